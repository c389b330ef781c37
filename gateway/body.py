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


class Body:
    """A client's body: a stream until somebody asks for its bytes. Copies of a request share it."""

    __slots__ = ("_data", "_source", "_streamed")

    def __init__(self, source: Incoming | bytes) -> None:
        self._data = source if isinstance(source, bytes) else None
        self._source = None if isinstance(source, bytes) else source
        self._streamed = False

    @property
    def length(self) -> int | None:
        """The number of bytes, where it is known before they are read."""
        if self._data is not None:
            return len(self._data)
        return self._source.length if self._source is not None else None

    @property
    def buffered(self) -> bool:
        """Whether the bytes are at hand and can be sent more than once."""
        return self._data is not None

    async def read(self, limit: int | None = None) -> bytes:
        """Read it whole and keep it.

        Raises ApiError 413 above `limit` bytes, BodyConsumed where it was streamed away already.
        """
        if self._data is None:
            if self._streamed or self._source is None:
                raise BodyConsumed(BodyConsumed.__doc__)
            self._streamed = True
            chunks: list[bytes] = []
            size = 0
            while chunk := await self._source.read():
                size += len(chunk)
                if limit is not None and size > limit:
                    raise _too_much(limit)
                chunks.append(chunk)
            self._data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
            self._source = None
        elif limit is not None and len(self._data) > limit:
            raise _too_much(limit)
        return self._data

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield it as it comes, once; BodyConsumed the second time, unless it was read before."""
        if self._data is not None:
            if self._data:
                yield self._data
            return
        if self._streamed or self._source is None:
            raise BodyConsumed(BodyConsumed.__doc__)
        self._streamed = True
        while chunk := await self._source.read():
            yield chunk


def _too_much(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than the {limit} bytes that may be kept", code="body_too_large")
