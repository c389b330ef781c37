"""`stream_options.include_usage`: requests the usage of a stream for the gateway, and hides it from the client."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from gateway.errors import ApiError
from gateway.protocol.filters import Filter
from gateway.protocol.json_fields import raw_fields, with_field
from gateway.protocol.sse import Event, EventSplitter

__all__ = ("STREAMED", "HideUsage", "request_stream_usage")

# Operations that stream their usage only on request. (The Responses API always does.)
STREAMED = frozenset({"chat.completions", "completions"})

# The first api-version with `stream_options` (Azure's api-version lifecycle).
_MIN_API_VERSION = "2024-09-01"
# Maximum number of bytes of an incomplete event to hold. A longer one is no chunk of text, and passes unchanged.
_MAX_HELD = 256 * 1024
_JSON_EVENT = b"data: {"


class _Chunk(msgspec.Struct):
    choices: Any = None
    usage: Any = None


_chunk = msgspec.json.Decoder(_Chunk)
# (`in` takes twice as long, and six times as long in a text with few different letters.)
_STREAM = re.compile(rb'"stream"')
_INCLUDE_USAGE = b'"stream_options":{"include_usage":true}'


def request_stream_usage(body: bytes, api_version: str) -> bytes | None:
    """Return the body with a request for the stream's usage. Returns None if it has one, or must have none.

    Older api-versions reject `stream_options`, and so does Azure for requests with `data_sources` ("on your data").
    """
    if (_STREAM.search(body) is None and b"\\u00" not in body) or (
        api_version != "v1" and api_version[:10] < _MIN_API_VERSION
    ):
        return None
    try:
        fields = raw_fields(body, ("stream", "stream_options", "data_sources"))
    except ApiError:
        return None  # Azure reports what is wrong with it
    if fields.get("stream") != b"true" or fields.get("data_sources", b"null") != b"null":
        return None
    given = fields.get("stream_options", b"null")
    if given == b"null":
        end = body.rstrip()
        if b'"stream_options"' not in body and end.endswith(b"}"):
            return b"%b,%b}" % (end[:-1], _INCLUDE_USAGE)  # every other byte stays
        return with_field(body, "stream_options", b'{"include_usage":true}')
    try:
        options = raw_fields(given)
    except ApiError:
        return None
    if options.get("include_usage") == b"true":
        return None
    return with_field(body, "stream_options", with_field(given, "include_usage", b"true"))


class HideUsage(Filter):
    """Removes the usage that the client did not request: the usage chunk, and `"usage":null` in all others.

    An event with JSON is held until it is complete; everything else passes at once.
    """

    contains = (b'"usage"',)

    def __init__(self) -> None:
        self._held = b""  # an incomplete event with JSON
        self._inside = b""  # the last byte of an incomplete event of another kind
        self.between = True
        self._splitter: EventSplitter | None = None  # for lines that do not end with LF (Azure's do)

    def feed(self, data: bytes) -> bytes:
        """Return the events without their usage."""
        if self.between and data.endswith(b"\n\n") and b"\r" not in data:
            return self._hide(data)  # nearly every read: complete events
        if self._splitter is not None or b"\r" in data:
            return self._split(data)
        if self._inside:
            return self._continue_event(data)
        if self._held:
            data, self._held = self._held + data, b""
        if not data.endswith(b"\n\n"):
            end = data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0
            rest = data[end:]
            if (rest.startswith(_JSON_EVENT) or _JSON_EVENT.startswith(rest)) and len(rest) <= _MAX_HELD:
                data, self._held = data[:end], rest
            else:
                self._inside = rest[-1:]
        self.between = not (self._held or self._inside)
        return self._hide(data)

    def _continue_event(self, data: bytes) -> bytes:
        """Pass the rest of an event without JSON, then filter the events after it."""
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
        """Filter event by event."""
        if self._splitter is None:
            self._splitter, self._inside = EventSplitter(), b""
            self.between = False
            data, self._held = self._held + data, b""
        return b"".join([self._hide(each) for each in self._splitter.feed(data) if not _is_usage_chunk(each)])

    def _hide(self, data: bytes) -> bytes:
        data = data.replace(b',"usage":null', b"")
        if b'"usage"' not in data:  # true for nearly every event
            return data
        if b'"usage":{' in data or b'"usage": {' in data:
            data = b"\n\n".join([event for event in data.split(b"\n\n") if not _is_usage_chunk(event)])
        return data.replace(b'"usage":null,', b"")

    def cut(self) -> bytes:
        """Return the held bytes of an event that will not be completed."""
        held, self._held = self._held, b""
        if self._splitter is not None:
            held += self._splitter.close()
        return self._hide(held)

    def close(self) -> bytes:
        """Return the held bytes."""
        return self.cut()


def _is_usage_chunk(event: bytes) -> bool:
    """Whether an event is the additional chunk that holds only the usage."""
    if b'"usage"' not in event:
        return False
    try:
        chunk = _chunk.decode(Event(event).data)
    except (msgspec.DecodeError, ValueError):
        return False
    return chunk.choices == [] and isinstance(chunk.usage, dict)
