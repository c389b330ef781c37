"""Protocols as pure functions: bytes in, events out.

HTTP/1.1 (`http1_*.py`), header fields and the policy for them, WebSocket frames, server-sent events and filters on
them, multipart forms, content codings, JSON objects edited in place. Nothing here does I/O, imports aiohttp, knows
Azure, or reads a clock (but for the dates of `Retry-After`).
"""
