"""Streams tell their usage only to those who ask: it is asked for in the client's place, and hidden from it again."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from gateway.errors import ApiError
from gateway.protocol.json_fields import raw_fields, with_field
from gateway.protocol.sse import Event, EventSplitter, Filter

__all__ = ("STREAMED", "HideUsage", "request_stream_usage")

# What streams its usage only to those who ask; the Responses API always does.
STREAMED = frozenset({"chat.completions", "completions"})

# The api-version that began to take `stream_options` (Azure's api-version lifecycle).
_SINCE = "2024-09-01"
# Of an event that has not ended; what is longer is no chunk of text, and goes on as it is.
_MOST_HELD = 256 * 1024
_JSON = b"data: {"


class _Chunk(msgspec.Struct):
    choices: Any = None
    usage: Any = None


_chunk = msgspec.json.Decoder(_Chunk)
# (`in` takes twice as long, and six times in a text that has few different letters.)
_STREAM = re.compile(rb'"stream"')
_ASKED = b'"stream_options":{"include_usage":true}'


def request_stream_usage(body: bytes, api_version: str) -> bytes | None:
    """Return the body of a streamed completion that asks for its usage; None where it does, or must not.

    Older api-versions refuse `stream_options`, and so do requests with `data_sources` ("on your data").
    """
    if (_STREAM.search(body) is None and b"\\u00" not in body) or (api_version != "v1" and api_version[:10] < _SINCE):
        return None
    try:
        fields = raw_fields(body, ("stream", "stream_options", "data_sources"))
    except ApiError:
        return None  # Azure will say what is wrong with it
    if fields.get("stream") != b"true" or fields.get("data_sources", b"null") != b"null":
        return None
    given = fields.get("stream_options", b"null")
    if given == b"null":
        end = body.rstrip()
        if b'"stream_options"' not in body and end.endswith(b"}"):
            return b"%b,%b}" % (end[:-1], _ASKED)  # as it came, but for its end
        return with_field(body, "stream_options", b'{"include_usage":true}')
    try:
        options = raw_fields(given)
    except ApiError:
        return None
    if options.get("include_usage") == b"true":
        return None
    return with_field(body, "stream_options", with_field(given, "include_usage", b"true"))


class HideUsage(Filter):
    """Takes out of a stream what its client did not ask for: the chunk of the usage, and `"usage":null` elsewhere.

    An event of JSON is kept until it is whole; all else goes on as it comes.
    """

    contains = (b'"usage"',)

    def __init__(self) -> None:
        self._rest = b""  # an event of JSON that has not ended
        self._inside = b""  # the last byte of another event that has not ended
        self.between = True
        self._splitter: EventSplitter | None = None  # of a stream whose lines do not end with LF, as Azure's do

    def feed(self, data: bytes) -> bytes:
        """Return the events without their usage."""
        if self.between and data.endswith(b"\n\n") and b"\r" not in data:
            return self._hidden(data)  # nearly every read: whole events
        if self._splitter is not None or b"\r" in data:
            return self._split(data)
        if self._inside:
            return self._go_on(data)
        if self._rest:
            data, self._rest = self._rest + data, b""
        if not data.endswith(b"\n\n"):
            end = data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0
            rest = data[end:]
            if (rest.startswith(_JSON) or _JSON.startswith(rest)) and len(rest) <= _MOST_HELD:
                data, self._rest = data[:end], rest
            else:
                self._inside = rest[-1:]
        self.between = not (self._rest or self._inside)
        return self._hidden(data)

    def _go_on(self, data: bytes) -> bytes:
        """Pass on the rest of an event that is none of JSON, and what follows it."""
        if self._inside == b"\n" and data.startswith(b"\n"):
            end = 1
        else:
            found = data.find(b"\n\n")
            end = found + 2 if found >= 0 else 0
        if not end:
            self._inside = data[-1:] or self._inside
            return data
        self._inside, self.between = b"", True
        return data[:end] + (self.feed(data[end:]) if data[end:] else b"")

    def _split(self, data: bytes) -> bytes:
        """Do it event by event."""
        if self._splitter is None:
            self._splitter, self._inside = EventSplitter(), b""
            self.between = False
            data, self._rest = self._rest + data, b""
        return b"".join([self._hidden(each) for each in self._splitter.feed(data) if not _tells_usage(each)])

    def _hidden(self, data: bytes) -> bytes:
        data = data.replace(b',"usage":null', b"")
        if b'"usage"' not in data:  # as it is with nearly every event, now
            return data
        if b'"usage":{' in data or b'"usage": {' in data:
            data = b"\n\n".join([event for event in data.split(b"\n\n") if not _tells_usage(event)])
        return data.replace(b'"usage":null,', b"")

    def cut(self) -> bytes:
        """Return what is left of an event that will not end."""
        rest, self._rest = self._rest, b""
        if self._splitter is not None:
            rest += self._splitter.close()
        return self._hidden(rest)

    def close(self) -> bytes:
        """Return what is left."""
        return self.cut()


def _tells_usage(event: bytes) -> bool:
    """Whether an event is the chunk that was added for the usage alone."""
    if b'"usage"' not in event:
        return False
    try:
        chunk = _chunk.decode(Event(event).data)
    except (msgspec.DecodeError, ValueError):
        return False
    return chunk.choices == [] and isinstance(chunk.usage, dict)
