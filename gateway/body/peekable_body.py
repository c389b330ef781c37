"""Peeking at the beginning of a body without consuming it, to decide about the response."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol, Self, runtime_checkable

__all__ = ("PeekableBody", "PeekedBody")

# Maximum number of bytes to peek at.
_MAX_PEEKED = 64 * 1024


@runtime_checkable
class PeekableBody(Protocol):
    """A body whose beginning can be peeked at."""

    def peeked(self) -> bytes:
        """Return the bytes that have arrived and are not consumed."""

    async def grow(self) -> bool:
        """Wait for more bytes; returns False if there are none to wait for."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def __anext__(self) -> bytes: ...


class PeekedBody:
    """Makes a stage's own stream peekable."""

    def __init__(self, source: AsyncIterator[bytes]) -> None:
        self._source = aiter(source)
        self._peeked = b""
        self._next: asyncio.Task[bytes | None] | None = None

    def peeked(self) -> bytes:
        """Return the bytes that have arrived and are not consumed."""
        return self._peeked

    async def grow(self) -> bool:
        """Wait for more bytes; returns False if there are none to wait for."""
        if len(self._peeked) > _MAX_PEEKED:
            return False
        piece = await self._piece()
        self._peeked += piece or b""
        return piece is not None

    async def _piece(self) -> bytes | None:
        """Return the source's next piece, or None at its end. A cancelled call loses no bytes."""
        if self._next is None:
            self._next = asyncio.ensure_future(anext(self._source, None))
        piece = await asyncio.shield(self._next)
        self._next = None
        return piece

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        peeked, self._peeked = self._peeked, b""
        if peeked:
            return peeked
        piece = await self._piece()
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """Close the source."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.wait((self._next,))
        if (aclose := getattr(self._source, "aclose", None)) is not None:
            await aclose()
