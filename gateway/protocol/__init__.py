"""Protocols as pure functions: bytes in, events out.

HTTP/1.1, WebSocket frames, server-sent events, multipart forms, content codings, JSON objects edited in place, header
fields and the policy for them. Nothing here does I/O, reads a clock, imports aiohttp or knows Azure.
"""
