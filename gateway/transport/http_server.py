"""The server of client connections: accepts them, counts them, and enforces the connection limit."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from aiohttp.web_protocol import RequestHandler
from aiohttp.web_server import Server as AiohttpServer

from gateway.settings import Limits, Timeouts
from gateway.transport.client_connection import ClientConnection, Handler
from gateway.transport.connection_limit import ConnectionCount
from gateway.transport.file_descriptors import client_capacity, descriptor_limit
from gateway.transport.write_buffer import WriteBuffer

__all__ = ("HttpServer",)


class HttpServer(AiohttpServer):
    """aiohttp's low-level server, with the gateway's own connections."""

    def __init__(self, handler: Handler, limits: Limits, timeouts: Timeouts, count: ConnectionCount) -> None:
        super().__init__(cast(Any, handler))
        self._arguments = handler, self._loop, limits, timeouts, WriteBuffer(self._loop)
        self._count = count
        self._open = 0
        self._capacity = client_capacity(descriptor_limit())

    def __call__(self) -> RequestHandler:
        """Return the protocol of a new connection."""
        return cast("RequestHandler", ClientConnection(self, *self._arguments))

    def excess(self, limit: int) -> int:
        """Return how many connections exceed the limit, the newest included; 0 or less if none.

        All workers together may have `limit`, and this one as many as its descriptors suffice for.
        """
        return max(self._count.set(self._open) - limit, self._open - self._capacity)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Add a connection; abort it if even a rejection might take the last descriptor."""
        super().connection_made(handler, transport)
        self._open += 1
        if self._open > 2 * self._capacity:
            transport.abort()

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Remove a connection."""
        super().connection_lost(handler, exc)
        self._open -= 1
        self._count.set(self._open)

    def use(self, limits: Limits, timeouts: Timeouts) -> None:
        """Apply other limits and timeouts, to open connections, too: some live for days."""
        handler, loop, _, _, write_buffer = self._arguments
        self._arguments = handler, loop, limits, timeouts, write_buffer
        for connection in self.connections:
            cast(ClientConnection, connection).use(limits, timeouts)
