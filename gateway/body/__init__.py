"""Bodies of requests, from the socket's bytes to what stages read.

A body that is still arriving, a body that is streamed or kept, its spool in memory or on disk, and a body whose
beginning can be read ahead. What a body means (JSON, a form, a batch) is decided in `protocol/` and `azure/`.
"""
