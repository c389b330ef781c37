"""Compressed responses: gzip and deflate undone in bounded pieces (RFC 9110, 8.4).

The gateway asks Azure for plain responses. One that comes compressed all the same, from an API management layer
perhaps, is undone before anything looks at it: repairs, errors and usage are read from plain bytes alone.
A few bytes can stand for a thousand times as many, so no call returns more than it was asked for.
"""

from __future__ import annotations

import zlib

from gateway.errors import GatewayError

__all__ = ("BadCoding", "Inflater", "UnknownCoding", "is_identity")

_INFLATED = (b"gzip", b"x-gzip", b"deflate")
# What a member counts for, besides its bytes: thousands of empty ones would else be read in one call.
_MEMBER = 256


class BadCoding(GatewayError):
    """A body is compressed in an unknown way, or is broken."""


class UnknownCoding(BadCoding):
    """A body is compressed in a way that is not undone here."""


def is_identity(coding: bytes) -> bool:
    """Whether the value of a Content-Encoding says that the body is plain."""
    return coding.strip().lower() in (b"", b"identity")


class Inflater:
    """Undoes gzip or deflate: `feed` compressed bytes, then `read` until nothing is `pending`."""

    __slots__ = ("_begun", "_inflate", "_input", "pending")

    def __init__(self, coding: bytes) -> None:
        """Begin. Raises UnknownCoding for another than gzip or deflate."""
        name = coding.strip().lower()
        if name not in _INFLATED:
            told = name.decode("latin-1") if name.isascii() and len(name) < 40 else "another"
            raise UnknownCoding(
                f"the response has the content coding {told!r}; the gateway decodes gzip and deflate alone"
            )
        self._inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
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
        """Return at most `most` plain bytes. Raises BadCoding if what was fed is broken."""
        out: list[bytes] = []
        try:
            while most > 0 and self.pending:
                if self._inflate.eof:  # gzip may have several members (RFC 1952, 2.2)
                    self._inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
                self._begun = True
                piece = self._inflate.decompress(self._input, most)
                ended = self._inflate.eof
                self._input = self._inflate.unused_data if ended else self._inflate.unconsumed_tail
                # A decoder that was stopped by `most` may have more, even if it has taken all of its input.
                self.pending = bool(self._input) or (len(piece) == most and not ended)
                most -= len(piece) + (_MEMBER if ended else 0)
                out.append(piece)
        except zlib.error:
            raise BadCoding("the response's content coding is broken") from None
        return out[0] if len(out) == 1 else b"".join(out)

    def check_end(self) -> None:
        """Note that nothing more is fed. Raises BadCoding if the last member has not ended."""
        if self._begun and not self._inflate.eof:
            raise BadCoding("the response's content coding ends too early")
