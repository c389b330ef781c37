"""A client's body: streamed to Azure as it comes, or kept once somebody has asked for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from gateway.errors import ApiError, BodyConsumed

__all__ = (
    "Body",
    "Incoming",
)


class Incoming(Protocol):
    """Where a body comes from: the server's connection to the client."""

    length: int | None

    async def read(self) -> bytes:
        """Return the next bytes, or b"" at the end. Raises ApiError where the client is slow or too big."""

    async def rest(self, limit: int | None) -> bytes:
        """Return all that is still to come; raises as `read` does, and ApiError 413 above `limit` bytes."""


class Body:
    """A client's body: a stream until somebody asks for its bytes. Copies of a request share it."""

    __slots__ = ("_data", "_kept", "_source", "_streamed")

    def __init__(self, source: Incoming | bytes, *, kept: bool = True) -> None:
        """Take a body from where it comes, or its bytes: `kept`, or here by chance and to be had once."""
        self._data = source if isinstance(source, bytes) else None
        self._source = None if isinstance(source, bytes) else source
        self._kept = kept
        self._streamed = False

    @property
    def length(self) -> int | None:
        """The number of bytes, where it is known before they are read."""
        if self._data is not None:
            return len(self._data)
        return self._source.length if self._source is not None else None

    def at_hand(self) -> bytes | None:
        """Return the bytes, if they are here: again and again if they are kept, else once."""
        data = self._data
        if not self._kept and data is not None:
            self._data, self._streamed = None, True
        return data

    async def read(self, limit: int | None = None) -> bytes:
        """Read it whole and keep it.

        Raises ApiError 413 above `limit` bytes, BodyConsumed where it was streamed away already.
        """
        if self._data is None:
            if self._streamed or self._source is None:
                raise BodyConsumed(BodyConsumed.__doc__)
            self._streamed = True
            self._data = await self._source.rest(limit)
            self._source = None
        if limit is not None and len(self._data) > limit:
            raise too_much(limit)
        self._kept = True
        return self._data

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield it as it comes, once; BodyConsumed the second time, unless it was read before."""
        if (data := self.at_hand()) is not None:
            if data:
                yield data
            return
        if self._streamed or self._source is None:
            raise BodyConsumed(BodyConsumed.__doc__)
        self._streamed = True
        while chunk := await self._source.read():
            yield chunk


def too_much(limit: int) -> ApiError:
    """Return the error for a body above what a stage may keep."""
    return ApiError(413, f"the body is larger than the {limit} bytes that may be kept", code="body_too_large")
