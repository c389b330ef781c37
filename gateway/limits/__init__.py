"""Limits: how much of something was used, and how much may be.

Token buckets as plain arithmetic, the stores that keep them (this process, the workers of one machine, Redis), the
queue of requests that wait for room, and the memory budget of the process. Nothing here knows HTTP or Azure.
"""
