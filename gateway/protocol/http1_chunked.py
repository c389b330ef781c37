"""The chunked transfer coding, decoded as bytes and without I/O (RFC 9112, 7.1)."""

from __future__ import annotations

import re

from gateway.protocol.http1_fields import FIELD, MalformedMessage

__all__ = ("FRAMING_OF_REQUESTS", "FRAMING_OF_RESPONSES", "MOST_LINES", "ChunkedDecoder")

_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t -~\x80-\xff]*)?")
_PARTIAL_SIZE = re.compile(rb"[0-9A-Fa-f]{1,16}[ \t]*(;[\t -~\x80-\xff]*)?\r?")
# Limits on framing, in bytes: one line; all lines, as an allowance and a share for each byte of the body.
_MAX_LINE = 4096
_FRAMING_ALLOWANCE = 4096
FRAMING_OF_RESPONSES = 16
FRAMING_OF_REQUESTS = 2
"""A request body in chunks of two bytes is refused after some 4,000 of them; one in chunks of three never is."""
# Maximum number of framing lines that one call reads: two for each chunk.
MOST_LINES = 256
# The next line, if it is not the rest of a chunk's bytes: a size, the end of a chunk, or a trailer.
_AT_SIZE, _AT_CHUNK_END, _AT_TRAILER = 0, -1, -2

_cached_sizes: dict[bytes, int] = {}


def _parse_size(line: bytes) -> int:
    found = _SIZE.fullmatch(line)
    if found is None:
        raise MalformedMessage("the size of a chunk is not a number")
    size = int(found.group(1), 16)
    if len(line) <= 3 and line.isalnum():
        _cached_sizes[line] = size
    return size


class ChunkedDecoder:
    """Decodes a chunked body.

    An empty result of `feed` says nothing about the end of the body: only `done` does, and `extra` then holds the
    bytes after it. One call reads at most `max_lines` lines of framing; `unread` holds the bytes after them, to be fed
    again in a later turn of the loop.
    """

    __slots__ = ("_framing_left", "_left", "_partial_line", "_share", "done", "extra", "unread")

    def __init__(self, share: int = FRAMING_OF_RESPONSES) -> None:
        """Allow `share` bytes of framing for each byte of the body; more is refused."""
        self._share = share
        self.done = False
        self.extra = b""
        self.unread = b""
        self._left = _AT_SIZE  # bytes of the current chunk still to come, or a state
        self._partial_line = b""
        self._framing_left = _FRAMING_ALLOWANCE

    def feed(self, data: bytes, max_lines: int = MOST_LINES) -> bytes:
        """Return the body's bytes among the next bytes of the connection. Raises MalformedMessage.

        Feed `unread` again before anything newer.
        """
        self.unread = b""
        if self._partial_line:
            data, self._partial_line = self._partial_line + data, b""
        out: list[bytes] = []
        left, offset, size = self._left, 0, len(data)
        while offset < size:
            if left > 0:
                piece = data[offset : offset + left]
                out.append(piece)
                offset += len(piece)
                left = left - len(piece) or _AT_CHUNK_END
                continue
            if not max_lines:
                self.unread = data[offset:]
                break
            end = data.find(b"\r\n", offset)
            if end < 0:
                self._keep_partial_line(data, offset, left)
                break
            max_lines -= 1
            line = data[offset:end]
            offset = end + 2
            self._framing_left -= len(line) + 2
            if left == _AT_SIZE:
                left = _cached_sizes.get(line, -1)
                if left < 0:
                    left = _parse_size(line)
                self._framing_left += self._share * left
                left = left or _AT_TRAILER
            elif left == _AT_CHUNK_END:
                if line:
                    raise MalformedMessage("a chunk is longer than its size")
                left = _AT_SIZE
            elif not line:
                self.done, self.extra = True, data[offset:]
                break
            elif not FIELD.fullmatch(line):
                raise MalformedMessage("a trailer is not a header field")
            if self._framing_left < 0:
                raise MalformedMessage("the chunks are nearly all framing; send larger chunks")
        self._left = left
        return out[0] if len(out) == 1 else b"".join(out)

    def _keep_partial_line(self, data: bytes, offset: int, left: int) -> None:
        """Keep the beginning of a line, unless no valid line begins so."""
        partial = data[offset:]
        if b"\n" in partial or b"\r" in partial[:-1] or (left == _AT_CHUNK_END and partial != b"\r"):
            raise MalformedMessage("a line of the chunks' framing ends wrongly")
        if left == _AT_SIZE and not _PARTIAL_SIZE.fullmatch(partial):
            raise MalformedMessage("the size of a chunk is not a number")
        if len(partial) > _MAX_LINE:
            raise MalformedMessage(f"a line of the chunks' framing is longer than {_MAX_LINE} bytes")
        self._partial_line = partial
