"""Deferred writes: response heads with small bodies leave together, at the end of a turn of the event loop.

Chunks of a stream do not pass here: `stream_writer.py` writes them, each turn's in one system call.

A turn handles the input of many connections. A write in between wakes its reader on another core for one message, and
evicts the data of the stages from the processor's caches. At the end of the turn, the same writes cost a third less
(docs/performance.md). No write waits for the next turn.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

__all__ = ("BufferedConnection", "WriteBuffer")


class BufferedConnection(Protocol):
    """A connection with a buffered write."""

    def flush(self) -> None:
        """Write it."""


class WriteBuffer:
    """The connections of one event loop that write at the end of this turn."""

    __slots__ = ("_connections", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._connections: list[BufferedConnection] = []

    def add(self, connection: BufferedConnection) -> None:
        """Flush a connection at the end of this turn."""
        if not self._connections:
            self._loop.call_soon(self._flush)
        self._connections.append(connection)

    def _flush(self) -> None:
        connections, self._connections = self._connections, []
        for connection in connections:
            connection.flush()
