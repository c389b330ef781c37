"""Protocols as pure functions: bytes in, events out.

HTTP/1.1 (`http1_*.py`), header fields and the policy for them, WebSocket frames, server-sent events and filters on
them, multipart forms, content codings, JSON objects edited in place. Nothing here does I/O, reads a clock, imports
aiohttp or knows Azure.
"""
