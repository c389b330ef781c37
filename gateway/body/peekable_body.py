"""Looking at the beginning of a body before it is decided what to answer; what was looked at stays in it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol, Self, runtime_checkable

__all__ = ("PeekableBody", "PeekedBody")

# What is kept unread, in bytes.
_MOST = 64 * 1024


@runtime_checkable
class PeekableBody(Protocol):
    """A body whose beginning can be looked at."""

    def peeked(self) -> bytes:
        """Return what has come and was not taken yet."""

    async def grow(self) -> bool:
        """Wait for more; False where there is no more to wait for."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def __anext__(self) -> bytes: ...


class PeekedBody:
    """A stage's own stream, made one whose beginning can be looked at."""

    def __init__(self, source: AsyncIterator[bytes]) -> None:
        self._source = aiter(source)
        self._begun = b""
        self._next: asyncio.Task[bytes | None] | None = None

    def peeked(self) -> bytes:
        """Return what has come and was not taken yet."""
        return self._begun

    async def grow(self) -> bool:
        """Wait for more; False where there is no more to wait for."""
        if len(self._begun) > _MOST:
            return False
        piece = await self._piece()
        self._begun += piece or b""
        return piece is not None

    async def _piece(self) -> bytes | None:
        """Return the source's next piece, None at its end; to be cancelled while it waits costs no byte."""
        if self._next is None:
            self._next = asyncio.ensure_future(anext(self._source, None))
        piece = await asyncio.shield(self._next)
        self._next = None
        return piece

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        begun, self._begun = self._begun, b""
        if begun:
            return begun
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
