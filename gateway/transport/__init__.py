"""Sockets: connections of clients and connections to Azure.

Both sides of HTTP/1.1 on asyncio, the pool of upstream connections, proxies on the way to Azure, WebSocket relays,
write buffering, pacing, timeouts and connection limits. How bytes are parsed is `protocol/`; which deployment is asked
is `balancing/`.
"""
