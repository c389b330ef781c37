"""Finds the reported usage (`usage_fields.py`) in a response or stream, and counts the text of one without usage."""

from __future__ import annotations

import re
from io import StringIO

from gateway.usage.response_text import text_of_events, texts_of_json
from gateway.usage.tokenizer import Source, count_tokens
from gateway.usage.usage_fields import SOURCES, Usage, decode_usage

__all__ = ("UsageScanner",)

_KEY = b'"usage"'
_OBJECT_START = b":{"
_NULL = b":null"  # in nearly every event of a stream whose usage was requested
_VALUE = re.compile(rb"\s*:\s*(?:([{n])|[^\s{n])")
# A usage holds details, one level deep, and no text.
_OBJECT = re.compile(rb"\{[^{}]*+(?:\{[^{}]*+\}[^{}]*+)*+\}")
_MAX_USAGE = 4096
# Buffer limits, in bytes: per scan, per non-streaming body, per SSE line.
_SCAN_SIZE = 4 * 1024
_MAX_BODY = 64 * 1024
_MAX_LINE = 1024 * 1024
# Characters of text to collect before their tokens are counted. A token across the border of two such pieces counts as
# two or a few: some in 8,000. (A megabyte can take half a second, and so a piece 16 ms.)
_TEXT_SIZE = 32 * 1024
# Bytes needed to tell a stream from another response, and the possible beginnings of a stream.
_PREFIX_SIZE = 6
_STREAM_PREFIXES = (b"data:", b"event:", b":", b"\xef\xbb\xbf", b"id:", b"retry:")


def _usage_at_end(data: bytes, start: int) -> Usage | None:
    """Return the usage at an offset if it ends the response, as nearly all do: at half the cost of a search."""
    end = data.rfind(b"}")
    return decode_usage(data[start:end]) if data.startswith(b"}", end - 1) and end - start < _MAX_USAGE else None


def _object_at(data: bytes, start: int) -> bytes | None:
    """Return the JSON object at an offset. Returns None if it is incomplete."""
    found = _OBJECT.match(data, start)
    return found.group() if found is not None else None


_NO_TEXT = StringIO()


class UsageScanner:
    """Reads along with one response and finds its usage. If a response has several, the last one counts.

    It also counts the tokens of a stream's text, piece by piece, in case the stream breaks off.
    """

    # Each request makes one, and most of these are never set: class defaults cost nothing.
    _reported: Usage | None = None
    status = 0
    """The status of the response; 0 until there is one."""
    sent = False
    """Whether the request was written to Azure."""
    _rest = b""  # may be the beginning of a usage
    _is_stream: bool | None = None  # None until enough bytes have arrived
    _size = 0  # of the body, or of the part of a stream whose text is not yet extracted
    _tokens = 0  # of the text counted so far
    _source: Source = "reported"  # of `_tokens`

    def __init__(self, model: str | None = None, *, each: bool = False) -> None:
        """With `each` the usage of all responses is added up: a WebSocket has many."""
        self._model = model
        self._each = each
        self._unscanned: list[bytes] = []  # scanning several reads together costs a fraction
        self._unscanned_size = 0
        self._kept: list[bytes] = []
        self._text = _NO_TEXT

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the response."""
        self._unscanned.append(data)
        self._unscanned_size += len(data)
        if self._unscanned_size > _SCAN_SIZE:
            self._scan()

    @property
    def reported(self) -> Usage | None:
        """The usage reported so far."""
        if self._unscanned:
            self._scan()
        return self._reported

    def _scan(self) -> None:
        """Search the unscanned bytes for usage."""
        data = self._unscanned[0] if len(self._unscanned) == 1 else b"".join(self._unscanned)
        self._unscanned, self._unscanned_size = [], 0
        if not self._each:
            self._keep(data)
        if self._rest:
            data, self._rest = self._rest + data, b""
        at = data.find(_KEY)
        while at >= 0:
            if data.startswith(_OBJECT_START, at + 7) and (usage := _usage_at_end(data, at + 8)) is not None:
                self._found(usage)
                return
            null = data.startswith(_NULL, at + 7)
            value = _VALUE.match(data, at + 7) if not null else None
            if null or (value is not None and value.group(1) == b"n"):
                # `usage: null` after an earlier match: that match was not the usage. A stream can repeat the
                # definition of a tool, which may contain an object of that name.
                whole, self._reported = b"", self._reported if self._each else None
            elif value is None:
                whole = None
            elif value.group(1) is None:
                whole = b""
            else:
                whole = _object_at(data, value.start(1))
            if whole is None and len(data) - at < _MAX_USAGE:
                self._rest = data[at:]
                return
            if whole and (usage := decode_usage(whole)) is not None:
                self._found(usage)
            at = data.find(_KEY, at + 7)
        # (A read from a stream nearly always ends at the end of an event.)
        if not data.endswith(b"\n") and (quote := data.rfind(b'"', max(0, len(data) - 6))) >= 0:
            tail = data[quote:]
            if _KEY.startswith(tail):
                self._rest = tail

    def _found(self, usage: Usage) -> None:
        self._reported = self._reported + usage if self._each and self._reported is not None else usage

    def _keep(self, data: bytes) -> None:
        """Keep the bytes that may have to be counted: the text of a stream, or the beginning of another body."""
        self._size += len(data)
        if self._is_stream is None:
            self._kept.append(data)
            if self._size >= _PREFIX_SIZE:
                self._is_stream = b"".join(self._kept).startswith(_STREAM_PREFIXES)
                if self._is_stream:
                    self._text = StringIO()
        elif not self._is_stream:
            if self._size <= _MAX_BODY:
                self._kept.append(data)
        elif self._size <= _MAX_LINE:
            self._kept.append(data)
            if b"\n" in data:
                self._extract_text(last=False)
        elif b"\n" in data:  # the end of a line without text, such as a picture
            rest = data[data.index(b"\n") :]
            self._kept, self._size = [rest], len(rest)

    def output(self) -> tuple[int, Source]:
        """Return the number of output tokens received so far, counted or estimated from the body."""
        if self._unscanned:
            self._scan()
        if self._is_stream is None:
            return 0, "estimated"
        if self._is_stream:
            self._extract_text(last=True)
        elif self._size > _MAX_BODY:
            return -(-self._size // 4), "estimated"
        else:
            return count_tokens("".join(texts_of_json(b"".join(self._kept))), self._model)
        self._count_text()
        return self._tokens, self._source

    def _extract_text(self, *, last: bool) -> None:
        """Extract the text of the complete events."""
        data = b"".join(self._kept)
        end = len(data) if last else data.rfind(b"\n") + 1
        self._kept, self._size = [data[end:]] if data[end:] else [], len(data) - end
        self._text.write(text_of_events(data[:end]))
        if self._text.tell() > _TEXT_SIZE:
            self._count_text()

    def _count_text(self) -> None:
        """Count the tokens of the collected text, and drop it."""
        tokens, source = count_tokens(self._text.getvalue(), self._model)
        self._tokens += tokens
        self._source = max(self._source, source, key=SOURCES.index)
        self._text = StringIO()
