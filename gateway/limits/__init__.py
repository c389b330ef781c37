"""Limits: how much was used, and how much may be used.

Token buckets as plain arithmetic, the stores of counters (this process, the workers of one machine, Redis), the queue
of requests that wait for room, and the memory budget of the process. Nothing here knows HTTP or Azure.
"""
