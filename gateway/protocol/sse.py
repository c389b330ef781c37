"""Server-sent events, cut out of a stream of bytes (WHATWG HTML, 9.2.6); no I/O, no clock.

An event ends with a blank line; lines end with LF, CRLF or CR. A CR at the end of a read may be the first half of a
CRLF: the event is complete at once, and if a LF comes next, it follows its event.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from gateway.errors import ApiError, StreamBroken
from gateway.protocol.json_fields import decode_json, encode_json

__all__ = ("MAX_EVENT", "Event", "EventSplitter", "unfinished_event")

MAX_EVENT = 64 * 1024 * 1024
"""Maximum size of an event, in bytes."""

_LINE_END = re.compile(rb"\r\n|\n|\r")
# The end of a line and the blank line after it. An event that begins with a blank line is only that line.
# (The lookahead keeps a CRLF from being read as two line ends.)
_EVENT_END = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r(?!\n))")


class Event:
    """One server-sent event. `raw` is its bytes, blank line included."""

    __slots__ = ("_json", "_parsed", "raw")

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self._json: Any = None
        self._parsed = False

    @property
    def data(self) -> bytes:
        """The event's data: its `data:` lines, joined with LF; b"" if it has none."""
        values = []
        for line in _LINE_END.split(self.raw.removeprefix(b"\xef\xbb\xbf")):
            name, colon, value = line.partition(b":")
            if name == b"data":
                values.append(value.removeprefix(b" ") if colon else b"")
        return b"\n".join(values)

    def json(self) -> Any:
        """Return the data as JSON, decoded once; None if it is not JSON (such as `[DONE]`)."""
        if not self._parsed:
            try:
                self._json = decode_json(self.data, msgspec.json.decode)
            except ApiError:
                self._json = None
            self._parsed = True
        return self._json

    def set_json(self, content: object) -> None:
        """Replace the data; other fields of the event (`event`, `id`, `retry`) and its line ending stay."""
        found = _LINE_END.search(self.raw)
        newline = found.group() if found else b"\n"
        lines = [
            line
            for line in _LINE_END.split(self.raw.removeprefix(b"\xef\xbb\xbf"))
            if line and line.partition(b":")[0] != b"data"
        ]
        lines.append(b"data: " + encode_json(content))
        self.raw = newline.join(lines) + newline * 2
        self._json = content
        self._parsed = True

    def __repr__(self) -> str:
        return f"<Event of {len(self.raw)} bytes>"


class EventSplitter:
    """Splits bytes into events, terminators included. A blank line between events is a piece by itself."""

    __slots__ = ("_after_cr", "_scan_from", "half", "rest")

    def __init__(self) -> None:
        self.rest = bytearray()
        """The event that has not ended yet."""
        self.half = False
        """Whether the first piece of the last `feed` is the LF that belongs to the CR before it."""
        self._scan_from = 0  # no event ends before this offset in `rest`
        self._after_cr = False  # the last event ended with a CR: a LF next is the rest of its line ending

    @property
    def between(self) -> bool:
        """Whether the next bytes begin an event, whatever they are."""
        return not (self.rest or self._after_cr)

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that end in `data`. Raises StreamBroken if an event is larger than `MAX_EVENT`."""
        out: list[bytes] = []
        self.half = False
        if self._after_cr and data:
            if data[:1] == b"\n":
                data = data[1:]
                out.append(b"\n")
                self.half = True
            self._after_cr = False
        rest = self.rest
        rest += data
        start = 0
        while True:
            if rest.startswith((b"\n", b"\r"), start):
                # A blank line by itself, between events: it passes unchanged.
                end = start + (2 if rest.startswith(b"\r\n", start) else 1)
            else:
                found = _EVENT_END.search(rest, max(self._scan_from, start))
                if found is None:
                    break
                end = found.end()
            out.append(bytes(rest[start:end]))
            start = end
        self._after_cr = start == len(rest) and start > 0 and rest[-1:] == b"\r"
        del rest[:start]
        self._scan_from = max(0, len(rest) - 3)
        if len(rest) > MAX_EVENT:
            raise StreamBroken(f"an event of the stream is larger than {MAX_EVENT} bytes")
        return out

    def close(self) -> bytes:
        """Return the event that no blank line ended."""
        rest = bytes(self.rest)
        self.rest.clear()
        return rest


def unfinished_event(tail: bytes) -> bytes:
    """Return the bytes that end the event a broken stream left open; `tail` is the last bytes sent."""
    if not tail or tail.endswith((b"\n\n", b"\r\r", b"\n\r\n", b"\n\r")):
        return b""
    # (A single LF after a CR would be half of a CRLF, and end no event.)
    return b"\n" if tail.endswith(b"\n") else b"\n\n"
