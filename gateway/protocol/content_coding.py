"""Content codings: gzip and deflate, decompressed in bounded pieces (RFC 9110, 8.4).

The gateway asks Azure for plain responses. A response that is compressed anyway, by an API management layer perhaps,
is decompressed before anything reads it: repairs, errors and usage see plain bytes only.
A few bytes can inflate to a thousand times their size, so no call returns more than the caller asked for.
"""

from __future__ import annotations

import zlib

from gateway.errors import GatewayError

__all__ = ("BadCoding", "Inflater", "UnknownCoding", "is_identity")

_SUPPORTED = (b"gzip", b"x-gzip", b"deflate")
# A member of a gzip file counts as this many bytes more than it has, so that one call does not read thousands of
# empty ones.
_MEMBER_COST = 256


class BadCoding(GatewayError):
    """The content coding of a body is unknown, or its data is broken."""


class UnknownCoding(BadCoding):
    """The content coding of a body is not supported."""


def is_identity(coding: bytes) -> bool:
    """Whether the value of a Content-Encoding means a plain body."""
    return coding.strip().lower() in (b"", b"identity")


class Inflater:
    """Decompresses gzip or deflate: `feed` compressed bytes, then `read` until nothing is `pending`."""

    __slots__ = ("_begun", "_decompressor", "_input", "pending")

    def __init__(self, coding: bytes) -> None:
        """Prepare for a coding. Raises UnknownCoding if it is neither gzip nor deflate."""
        name = coding.strip().lower()
        if name not in _SUPPORTED:
            shown = repr(name.decode("latin-1")) if name.isascii() and len(name) < 40 else "an unknown name"
            raise UnknownCoding(
                f"the response has the content coding {shown}; the gateway decodes only gzip and deflate"
            )
        self._decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
        self._input = b""
        self._begun = False
        self.pending = False
        """Whether `read` may return more without further input."""

    def feed(self, data: bytes) -> None:
        """Take compressed bytes."""
        if data:
            self._input += data
            self.pending = True

    def read(self, most: int) -> bytes:
        """Return at most `most` plain bytes. Raises BadCoding if the compressed data is broken."""
        out: list[bytes] = []
        try:
            while most > 0 and self.pending:
                if self._decompressor.eof:  # gzip may have several members (RFC 1952, 2.2)
                    self._decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
                self._begun = True
                piece = self._decompressor.decompress(self._input, most)
                ended = self._decompressor.eof
                self._input = self._decompressor.unused_data if ended else self._decompressor.unconsumed_tail
                # A decompressor that stopped at `most` may have more, even if it has taken all of its input.
                self.pending = bool(self._input) or (len(piece) == most and not ended)
                most -= len(piece) + (_MEMBER_COST if ended else 0)
                out.append(piece)
        except zlib.error:
            raise BadCoding("the compressed data of the response is broken") from None
        return out[0] if len(out) == 1 else b"".join(out)

    def check_end(self) -> None:
        """Note the end of the input. Raises BadCoding if the last member has not ended."""
        if self._begun and not self._decompressor.eof:
            raise BadCoding("the compressed data of the response ends too early")
