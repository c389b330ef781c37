"""Compressed answers: undone where they arrive, so that usage, repairs, errors and pools read them as plain text.

The gateway asks Azure for `identity`, so these are rare: a proxy or an API Management on the way may compress all the
same. A body is inflated in bounded pieces, as fast as its reader takes them: a small body can become a thousand times
as large, and must neither fill the memory nor keep the event loop.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable, Iterator

from gateway.errors import UpstreamError

__all__ = ("Inflater", "check_encoding", "inflated")

# The most that one piece of an inflated body has, in bytes.
_PIECE = 64 * 1024
_UNDONE = frozenset((b"gzip", b"x-gzip", b"deflate"))


def check_encoding(encoding: bytes, resource: str) -> None:
    """Raise UpstreamError (502) for a coding that is not undone here, such as brotli, or for several of them."""
    if encoding not in _UNDONE:
        name = encoding[:40].decode("latin-1")
        raise UpstreamError(
            f"the Azure resource {resource!r} answered with the content encoding {name!r}, though it was asked for "
            "none; the gateway reads gzip and deflate",
            code="unsupported_encoding",
            fault="encoding",
        )


class Inflater:
    """Inflates one body: gzip (of several members, too: RFC 1952, 2.2) or zlib, which HTTP calls deflate."""

    def __init__(self) -> None:
        self._inflate = _new()
        self._begun = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Return what `data` becomes, in pieces of 64 KiB at most. Raises UpstreamError where it is broken."""
        try:
            while data:
                if self._inflate.eof:
                    self._inflate = _new()
                self._begun = True
                if piece := self._inflate.decompress(data, _PIECE):
                    yield piece
                data = self._inflate.unused_data if self._inflate.eof else self._inflate.unconsumed_tail
                # A full piece may have left some behind that no byte of the input stands for.
                while not data and len(piece) == _PIECE and not self._inflate.eof:
                    if piece := self._inflate.decompress(b"", _PIECE):
                        yield piece
                    data = self._inflate.unused_data
        except zlib.error:
            raise _broken() from None

    def close(self) -> None:
        """Note the end of the body. Raises UpstreamError where it ends too early."""
        if self._begun and not self._inflate.eof:
            raise _broken()


async def inflated(
    pieces: AsyncIterator[bytes] | bytes, watch: Callable[[bytes], None] | None = None
) -> AsyncIterator[bytes]:
    """Return a body inflated; `watch` sees its pieces first. Raises UpstreamError, and what `pieces` raises."""
    inflater = Inflater()
    async for data in _each(pieces):
        for piece in inflater.feed(data):
            if watch is not None:
                watch(piece)
            yield piece
            await asyncio.sleep(0)  # a turn for the others
    inflater.close()


async def _each(pieces: AsyncIterator[bytes] | bytes) -> AsyncIterator[bytes]:
    if isinstance(pieces, bytes):
        yield pieces
    else:
        async for data in pieces:
            yield data


def _new() -> zlib._Decompress:
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)


def _broken() -> UpstreamError:
    return UpstreamError("Azure's answer is compressed, and its compression is broken", fault="encoding")
