"""Request bodies, from the socket's bytes to the bytes that stages read.

An incoming body, a body that is streamed or kept, its spool in memory or on disk, and a body whose beginning can be
peeked at. `protocol/` and `azure/` interpret the bytes (JSON, a form, a batch).
"""
