"""Sockets: client connections and connections to Azure.

Both sides of HTTP/1.1 on asyncio, the pool of upstream connections, proxies on the way to Azure, WebSocket relays,
write buffering, pacing, timeouts and connection limits. `protocol/` parses the bytes; `balancing/` chooses the
deployment.
"""
