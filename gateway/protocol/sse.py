"""Filters on a response's bytes, and server-sent events: the one loop that every streamed byte takes.

Rule 1: nothing here does I/O or looks at a clock; bytes in, bytes out.
Rule 2: an event that no filter changes leaves as the bytes it came as, terminator and all.
Rule 3: memory is bounded; what an event may weigh is `MAX_EVENT`.

Theory of operation: `chain_filters` turns the filters of a response into one object with `feed` and `close`.
Neighbouring event filters share one splitter, so that a stream is cut into events once. An event ends with a
blank line (WHATWG HTML, 9.2.6); lines end with LF, CRLF or CR. A CR at the end of a read may be half a CRLF:
the event is let go at once, and if a LF comes next it follows its event.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from gateway.errors import ApiError, StreamBroken
from gateway.protocol.content_coding import BadCoding, Inflater, is_identity
from gateway.protocol.json_fields import decode_json, encode_json

__all__ = (
    "Event",
    "EventFilter",
    "EventSplitter",
    "Filter",
    "FilterChain",
    "FilterFailed",
    "chain_filters",
    "run_filters",
    "unfinished_event",
)

MAX_EVENT = 64 * 1024 * 1024

_LINE = re.compile(rb"\r\n|\n|\r")
# A line's end and the blank line after it. An event that begins with a blank line is only that line.
# (The lookahead keeps a CRLF from being read as two line ends.)
_EVENT_END = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r(?!\n))")


class Filter:
    """A piece that a stage puts on a response's bytes: no I/O, no clock, one instance per response.

    It is fed all bytes; but while it says that it is `between` events, it may not be fed whole ones, in lines that end
    with LF, that have none of `contains` in them: those it must leave as they are, and unchanged itself.
    """

    between: bool = False
    contains: Sequence[bytes] = ()

    def feed(self, data: bytes) -> bytes:
        """Take bytes as they came from Azure (or the filter before) and return what goes on."""
        return data

    def close(self) -> bytes:
        """Return what is left at the clean end of the stream; never called when the stream breaks."""
        return b""

    def cut(self) -> bytes:
        """Return what is to go on of the bytes that were kept, when the stream breaks; nothing is fed after it."""
        return b""


class Event:
    """One server-sent event. `raw` is its bytes, blank line included."""

    __slots__ = ("_json", "_parsed", "raw")

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self._json: Any = None
        self._parsed = False

    @property
    def data(self) -> bytes:
        """The event's data: its `data:` lines, joined with LF; b"" where it has none."""
        values = []
        for line in _LINE.split(self.raw.removeprefix(b"\xef\xbb\xbf")):
            name, colon, value = line.partition(b":")
            if name == b"data":
                values.append(value.removeprefix(b" ") if colon else b"")
        return b"\n".join(values)

    def json(self) -> Any:
        """Return the data as JSON, decoded once; None where it is not JSON (such as `[DONE]`)."""
        if not self._parsed:
            try:
                self._json = decode_json(self.data, msgspec.json.decode)
            except ApiError:
                self._json = None
            self._parsed = True
        return self._json

    def set_json(self, content: object) -> None:
        """Replace the data; other fields of the event (`event`, `id`, `retry`) and its line ending stay."""
        found = _LINE.search(self.raw)
        newline = found.group() if found else b"\n"
        lines = [
            line
            for line in _LINE.split(self.raw.removeprefix(b"\xef\xbb\xbf"))
            if line and line.partition(b":")[0] != b"data"
        ]
        lines.append(b"data: " + encode_json(content))
        self.raw = newline.join(lines) + newline * 2
        self._json = content
        self._parsed = True

    def __repr__(self) -> str:
        return f"<Event of {len(self.raw)} bytes>"


class FilterFailed(Exception):
    """A filter raised `cause` in the middle of some bytes; `left` is what the filters made of those before."""

    def __init__(self, left: bytes, cause: Exception) -> None:
        super().__init__(str(cause))
        self.left = left
        self.cause = cause


class EventFilter:
    """A filter on server-sent events. Give it one event, get back that event, others, or None to drop it.

    It is asked about the events that have one of `contains` in their bytes, or lack one of `lacks`: about all of them,
    unless it says else. A stream in which no filter wants anything is not even cut into events. `event` may change
    both for the events that follow.
    """

    contains: Sequence[bytes] = (b"",)
    lacks: Sequence[bytes] = ()

    def __init_subclass__(cls) -> None:
        for name in ("contains", "lacks"):
            if isinstance(getattr(cls, name), bytes | str):
                raise TypeError(f"{cls.__name__}.{name} must be several: {name} = (b'...',) with a comma")

    def event(self, event: Event) -> Event | list[Event] | None:
        """Return what takes the event's place."""
        return event

    def close(self) -> list[Event]:
        """Return events to add at the clean end of the stream."""
        return []


def wanted(each: EventFilter, raw: bytes) -> bool:
    """Whether a filter is to be asked about an event."""
    return any(needle in raw for needle in each.contains) or any(needle not in raw for needle in each.lacks)


def run_filters(filters: Sequence[EventFilter], event: Event, first: int = 0) -> Iterator[Event]:
    """Yield what filters, from `first` on, make of an event, each as soon as it is through all of them."""
    kind = type(event)
    for place in range(first, len(filters)):
        if not wanted(filters[place], event.raw):
            continue
        result = filters[place].event(event)
        made = [result] if isinstance(result, Event) else result or []
        # What a filter made of a message of a WebSocket is one, too.
        events = [one if isinstance(one, kind) else kind(one.raw) for one in made]
        if len(events) != 1:
            for one in events:
                yield from run_filters(filters, one, place + 1)
            return
        event = events[0]
    yield event


class EventSplitter:
    """Cuts bytes into events, terminators and all. Blank lines between events are pieces of their own."""

    __slots__ = ("_after_cr", "_scan", "half", "rest")

    def __init__(self) -> None:
        self.rest = bytearray()
        """The event that has not ended yet."""
        self.half = False
        """Whether the first piece of the last `feed` is the LF that belongs to the CR before it."""
        self._scan = 0  # no event ends before this place in `rest`
        self._after_cr = False  # the last event ended with a CR: a LF next is the rest of its line ending

    @property
    def between(self) -> bool:
        """Whether what comes next is the beginning of an event, whatever it is."""
        return not (self.rest or self._after_cr)

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that end in `data`. Raises StreamBroken where one does not end within `MAX_EVENT`."""
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
                # A blank line of its own, between events: it goes on as it is.
                end = start + (2 if rest.startswith(b"\r\n", start) else 1)
            else:
                found = _EVENT_END.search(rest, max(self._scan, start))
                if found is None:
                    break
                end = found.end()
            out.append(bytes(rest[start:end]))
            start = end
        self._after_cr = start == len(rest) and start > 0 and rest[-1:] == b"\r"
        del rest[:start]
        self._scan = max(0, len(rest) - 3)
        if len(rest) > MAX_EVENT:
            raise StreamBroken(f"an event is larger than {MAX_EVENT} bytes")
        return out

    def close(self) -> bytes:
        """Return the event that no blank line ended."""
        rest = bytes(self.rest)
        self.rest.clear()
        return rest


class _Events(Filter):
    """Cuts bytes into events and runs neighbouring event filters on each.

    `before` is the filter whose bytes it takes, if any: called from here, it costs one call less for each event.
    """

    def __init__(self, filters: Sequence[EventFilter], before: Filter | None = None) -> None:
        self._filters = filters
        self._before = before
        self._splitter = EventSplitter()
        self._between = True  # what comes next begins an event
        self._half_sent = False  # the last event ended with a CR that went on, so a LF next does too
        self._settle()

    @property
    def kept(self) -> int:
        """The bytes of an event that has not ended."""
        return len(self._splitter.rest)

    def _settle(self) -> None:
        """Put together what the filters want."""
        needles = [needle for each in self._filters for needle in each.contains]
        needles += self._before.contains if self._before is not None else ()
        self._finds = tuple(dict.fromkeys(needles))
        self._lacks = tuple(dict.fromkeys(needle for each in self._filters for needle in each.lacks))

    def feed(self, data: bytes) -> bytes:
        before = self._before
        if before is not None and not before.between:
            data = before.feed(data)
            before = None
        # Nearly every read of nearly every stream: whole events, in lines that end with LF, that no filter wants.
        if self._between and data.endswith(b"\n\n") and b"\r" not in data:
            for needle in self._finds:
                if needle in data:
                    break
            else:
                for needle in self._lacks:
                    if needle not in data:
                        break
                else:
                    if data.find(b"\n\n") + 2 == len(data) or self._all_have(data):
                        return data
        return self._cut(data if before is None else before.feed(data))

    def _all_have(self, data: bytes) -> bool:
        """Whether each of several whole events has all that no filter's event may lack."""
        start = 0
        # (What may be left is a blank line of its own.)
        while (found := data.find(b"\n\n", start)) >= 0:
            event = data[start:found]
            for needle in self._lacks:
                if needle not in event:
                    return False
            start = found + 2
        return True

    def _cut(self, data: bytes) -> bytes:
        out: list[bytes] = []
        splitter = self._splitter
        pieces = splitter.feed(data)
        self._between = splitter.between
        if splitter.half:
            piece = pieces.pop(0)
            if self._half_sent:
                out.append(piece)
        try:
            for piece in pieces:
                self._pass_on(Event(piece), 0, out)
        except Exception as exc:
            raise FilterFailed(b"".join(out), exc) from exc
        if pieces:
            self._settle()
        return b"".join(out)

    def _pass_on(self, event: Event, first: int, out: list[bytes]) -> None:
        """Run `event` through the filters from `first` on, and what they make of it after them."""
        if not event.raw.strip(b"\r\n"):
            self._half_sent = True
            out.append(event.raw)
            return
        self._half_sent = False
        for one in run_filters(self._filters, event, first):
            out.append(one.raw)
            self._half_sent = one.raw.endswith(b"\r")

    def close(self) -> bytes:
        out: list[bytes] = []
        if self._before is not None and (left := self._before.close()):
            out.append(self._cut(left))
        try:
            if rest := self._splitter.close():
                # An event that no blank line ended: whoever wants it completed lists `sse_newline` below.
                self._pass_on(Event(rest), 0, out)
            for place, each in enumerate(self._filters):
                for event in each.close():
                    self._pass_on(event, place + 1, out)
        except Exception as exc:
            raise FilterFailed(b"".join(out), exc) from exc
        return b"".join(out)


class _Decoded(Filter):
    """Undoes the compression of a stage's own response, so that filters see the text; Azure's comes plain."""

    def __init__(self, coding: str) -> None:
        try:
            self._inflater = Inflater(coding.encode("latin-1"))
        except BadCoding as exc:
            raise StreamBroken(str(exc)) from None

    def feed(self, data: bytes) -> bytes:
        self._inflater.feed(data)
        try:
            out = self._inflater.read(MAX_EVENT)
        except BadCoding as exc:
            raise StreamBroken(str(exc)) from None
        if self._inflater.pending:
            raise StreamBroken(f"some bytes of the answer inflate to more than {MAX_EVENT}")
        return out

    def close(self) -> bytes:
        try:
            self._inflater.check_end()
        except BadCoding as exc:
            raise StreamBroken(str(exc)) from None
        return b""


class FilterChain:
    """The filters of one response, as one: `feed` bytes, and `close` once at the clean end.

    Where a filter fails in the middle of some bytes both raise CutShort, with what is to be sent before the failure.
    """

    __slots__ = ("_filters", "feed")

    def __init__(self, filters: Sequence[Filter]) -> None:
        self._filters = filters
        # One filter is the common case: its own method is called, with nothing in between.
        self.feed: Callable[[bytes], bytes] = filters[0].feed if len(filters) == 1 else self._feed

    @property
    def kept(self) -> int:
        """The bytes of events that have not ended."""
        return sum(each.kept for each in self._filters if isinstance(each, _Events))

    def _feed(self, data: bytes, first: int = 0) -> bytes:
        place = first
        try:
            for place in range(first, len(self._filters)):
                data = self._filters[place].feed(data)
        except FilterFailed as exc:
            raise FilterFailed(self._feed(exc.left, place + 1), exc.cause) from exc.cause
        return data

    def close(self) -> bytes:
        """Close the filters in order; what one leaves runs through those after it."""
        left = b""
        for place, each in enumerate(self._filters):
            try:
                if left:
                    left = each.feed(left)
                left += each.close()
            except FilterFailed as exc:
                raise FilterFailed(self._feed(exc.left, place + 1), exc.cause) from exc.cause
        return left

    def cut(self) -> bytes:
        """Return what goes on of a stream that broke, and was kept so far. A filter that fails at it loses it."""
        left = b""
        for place, each in enumerate(self._filters):
            with contextlib.suppress(Exception):
                if kept := each.cut():
                    left += self._feed(kept, place + 1)
        return left

    def whole(self, data: bytes) -> bytes:
        """Feed a whole body and close. Raises what a filter raises."""
        try:
            return self.feed(data) + self.close()
        except FilterFailed as exc:
            raise exc.cause from None


def chain_filters(filters: Sequence[Filter | EventFilter], content_encoding: str | None = None) -> FilterChain:
    """Link filters in their order, undoing the content encoding first where there is anything to run.

    Raises StreamBroken where filters are to read an encoding that nobody here can undo.
    """
    linked: list[Filter] = []
    if filters and content_encoding and not is_identity(content_encoding.encode("latin-1")):
        linked.append(_Decoded(content_encoding))
    together: list[EventFilter] = []
    for each in filters:
        if isinstance(each, EventFilter):
            together.append(each)
            continue
        if together:
            linked.append(_Events(together, linked.pop() if linked else None))
            together = []
        linked.append(each)
    if together:
        linked.append(_Events(together, linked.pop() if linked else None))
    return FilterChain(linked)


def unfinished_event(tail: bytes) -> bytes:
    """Return what ends the event that a broken stream left open, given the last bytes sent."""
    if not tail or tail.endswith((b"\n\n", b"\r\r", b"\n\r\n", b"\n\r")):
        return b""
    # (A LF alone behind a CR would be half of a CRLF, and end no event.)
    return b"\n" if tail.endswith(b"\n") else b"\n\n"
