"""Reading that pauses: a protocol that stops its transport from reading, and a backlog of received bytes.

A large read is not handled at once: reading pauses, the bytes wait in the backlog, and the fair scheduler has them
handled in bounded pieces, in turns with other connections.
"""

from __future__ import annotations

import asyncio

from aiohttp.base_protocol import BaseProtocol

from gateway.fair_scheduler import MOST_UNITS, STEP

__all__ = ("MOST_LINES", "Backlog", "PausableProtocol")

MOST_LINES = 4 * MOST_UNITS
"""Maximum number of line ends in one piece: an event has at least two, and a chunk's framing has four."""
# A piece with more line ends is halved, but not below this size, in bytes.
_MIN_PIECE = 256


class Backlog(list[bytes]):
    """Received bytes that wait to be handled."""

    __slots__ = ()

    def take_piece(self) -> bytes:
        """Remove and return a piece, limited in bytes and line ends; it ends with a whole event, if it can."""
        data = self[0] if len(self) == 1 else b"".join(self)
        self.clear()
        size = STEP
        while size > _MIN_PIECE and data.count(b"\n", 0, size) + data.count(b"\r", 0, size) > MOST_LINES:
            size //= 2
        if len(data) <= size:
            return data
        size = data.rfind(b"\n\n", 0, size) + 2 if data.find(b"\n\n", 0, size) >= 0 else size
        self.append(data[size:])
        return data[:size]


class PausableProtocol(BaseProtocol):
    """A connection that pauses and resumes reading."""

    __slots__ = ("_reading_paused", "_transport_paused", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.loop = loop
        self._reading_paused = False  # received bytes wait, and the transport soon reads no more
        self._transport_paused = False

    def is_connected(self) -> bool:
        """Whether the connection is open; aiohttp's connector asks, too."""
        return self.transport is not None and not self.transport.is_closing()

    def _pause_reading(self) -> None:
        """Let received bytes wait, and pause the transport from the next turn of the loop on.

        Not at once: the caller may be a TLS transport that is delivering what it has read. If aiofastnet is paused in
        the middle of that, it keeps the rest until the socket has more to read, which may be never.
        """
        if not self._reading_paused and self.is_connected():
            self._reading_paused = True
            self.loop.call_soon(self._pause_transport)

    def _pause_transport(self) -> None:
        if self._reading_paused and not self._transport_paused and self.is_connected():
            self._transport_paused = True
            self.transport.pause_reading()  # type: ignore[union-attr] # it is connected

    def _resume_reading(self) -> None:
        self._reading_paused = False
        if self._transport_paused:
            self._transport_paused = False
            if self.is_connected():
                self.transport.resume_reading()  # type: ignore[union-attr] # it is connected
