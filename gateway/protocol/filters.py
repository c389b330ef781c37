"""Filters on a response's bytes: the one loop that every streamed byte passes.

Rule 1: no I/O and no clock; bytes in, bytes out.
Rule 2: an event that no filter changes leaves with the bytes it came with, terminator included.
Rule 3: memory is bounded, by `MAX_EVENT`.

Theory of operation: `chain_filters` turns the filters of a response into one object with `feed` and `close`.
Neighbouring event filters share one splitter, so a stream is split into events once. If no filter wants anything of
some bytes, they are not split at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from gateway.errors import StreamBroken
from gateway.protocol.content_coding import BadCoding, Inflater, is_identity
from gateway.protocol.sse import MAX_EVENT, Event, EventSplitter

__all__ = ("EventFilter", "Filter", "FilterChain", "FilterFailed", "chain_filters", "run_filters")


class Filter:
    """A filter that a stage puts on a response's bytes: no I/O, no clock, one instance per response.

    It is fed all bytes, with one exception. While `between` is true, the gateway may skip the filter for complete
    events whose lines end with LF and that contain none of `contains`. The filter must neither change such events nor
    change its own state on them.
    """

    between: bool = False
    contains: Sequence[bytes] = ()

    def feed(self, data: bytes) -> bytes:
        """Take bytes from Azure (or from the filter before) and return the bytes to pass on."""
        return data

    def close(self) -> bytes:
        """Return the rest at the clean end of the stream; never called when the stream breaks."""
        return b""

    def cut(self) -> bytes:
        """Return the kept bytes to pass on when the stream breaks; nothing is fed after it."""
        return b""


class FilterFailed(Exception):
    """A filter raised `cause` in the middle of some bytes; `left` is the output of the filters for those before."""

    def __init__(self, left: bytes, cause: Exception) -> None:
        super().__init__(str(cause))
        self.left = left
        self.cause = cause


class EventFilter:
    """A filter on server-sent events. Give it one event, get back that event, others, or None to drop it.

    It sees the events that have one of `contains` in their bytes, or lack one of `lacks`; by default, all events. A
    stream in which no filter wants anything is not even split into events. `event` may change both for later events.
    """

    contains: Sequence[bytes] = (b"",)
    lacks: Sequence[bytes] = ()

    def __init_subclass__(cls) -> None:
        for name in ("contains", "lacks"):
            if isinstance(getattr(cls, name), bytes | str):
                raise TypeError(f"{cls.__name__}.{name} must be a tuple: {name} = (b'...',) with a comma")

    def event(self, event: Event) -> Event | list[Event] | None:
        """Return the event's replacement."""
        return event

    def close(self) -> list[Event]:
        """Return events to add at the clean end of the stream."""
        return []


def wanted(each: EventFilter, raw: bytes) -> bool:
    """Whether a filter wants to see an event."""
    return any(needle in raw for needle in each.contains) or any(needle not in raw for needle in each.lacks)


def run_filters(filters: Sequence[EventFilter], event: Event, first: int = 0) -> Iterator[Event]:
    """Run an event through `filters` from index `first` on; yield each result as soon as it has passed all of them."""
    kind = type(event)
    for index in range(first, len(filters)):
        if not wanted(filters[index], event.raw):
            continue
        result = filters[index].event(event)
        made = [result] if isinstance(result, Event) else result or []
        # A filter's replacement of a WebSocket message is a WebSocket message, too.
        events = [one if isinstance(one, kind) else kind(one.raw) for one in made]
        if len(events) != 1:
            for one in events:
                yield from run_filters(filters, one, index + 1)
            return
        event = events[0]
    yield event


class _Events(Filter):
    """Splits bytes into events and runs neighbouring event filters on each.

    `before` is the byte filter in front of it, if any: called from here, it costs one call less for each event.
    """

    def __init__(self, filters: Sequence[EventFilter], before: Filter | None = None) -> None:
        self._filters = filters
        self._before = before
        self._splitter = EventSplitter()
        self._between = True  # the next bytes begin an event
        self._half_sent = False  # the last event ended with a CR that was passed on, so a LF next is, too
        self._collect_needles()

    @property
    def kept(self) -> int:
        """Bytes of an event that has not ended."""
        return len(self._splitter.rest)

    def _collect_needles(self) -> None:
        """Collect `contains` and `lacks` of all filters."""
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
        return self._split(data if before is None else before.feed(data))

    def _all_have(self, data: bytes) -> bool:
        """Whether each of several whole events has everything in `_lacks`."""
        start = 0
        # (The rest may be a blank line by itself.)
        while (found := data.find(b"\n\n", start)) >= 0:
            event = data[start:found]
            for needle in self._lacks:
                if needle not in event:
                    return False
            start = found + 2
        return True

    def _split(self, data: bytes) -> bytes:
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
                self._run(Event(piece), 0, out)
        except Exception as exc:
            raise FilterFailed(b"".join(out), exc) from exc
        if pieces:
            self._collect_needles()
        return b"".join(out)

    def _run(self, event: Event, first: int, out: list[bytes]) -> None:
        """Run `event` through the filters from index `first` on, and append the results to `out`."""
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
            out.append(self._split(left))
        try:
            if rest := self._splitter.close():
                # An event that no blank line ended; to complete it, list the stage `sse_newline` below.
                self._run(Event(rest), 0, out)
            for index, each in enumerate(self._filters):
                for event in each.close():
                    self._run(event, index + 1, out)
        except Exception as exc:
            raise FilterFailed(b"".join(out), exc) from exc
        return b"".join(out)


class _Decoded(Filter):
    """Decompresses a stage's own response, so that filters see plain text; Azure's responses are plain already."""

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
            raise StreamBroken(f"one read of the response inflates to more than {MAX_EVENT} bytes")
        return out

    def close(self) -> bytes:
        try:
            self._inflater.check_end()
        except BadCoding as exc:
            raise StreamBroken(str(exc)) from None
        return b""


class FilterChain:
    """The filters of one response as one: `feed` bytes, and `close` once at the clean end.

    If a filter fails in the middle of some bytes, both raise FilterFailed, with the bytes to send before the failure.
    """

    __slots__ = ("_filters", "feed")

    def __init__(self, filters: Sequence[Filter]) -> None:
        self._filters = filters
        # One filter is the common case: its method is called directly.
        self.feed: Callable[[bytes], bytes] = filters[0].feed if len(filters) == 1 else self._feed

    @property
    def kept(self) -> int:
        """Bytes of events that have not ended."""
        return sum(each.kept for each in self._filters if isinstance(each, _Events))

    def _feed(self, data: bytes, first: int = 0) -> bytes:
        index = first
        try:
            for index in range(first, len(self._filters)):
                data = self._filters[index].feed(data)
        except FilterFailed as exc:
            raise FilterFailed(self._feed(exc.left, index + 1), exc.cause) from exc.cause
        return data

    def close(self) -> bytes:
        """Close the filters in order; the rest of each one runs through those after it."""
        left = b""
        for index, each in enumerate(self._filters):
            try:
                if left:
                    left = each.feed(left)
                left += each.close()
            except FilterFailed as exc:
                raise FilterFailed(self._feed(exc.left, index + 1), exc.cause) from exc.cause
        return left

    def cut(self) -> bytes:
        """Return the kept bytes to pass on from a stream that broke. If a filter fails, its bytes are lost."""
        left = b""
        for index, each in enumerate(self._filters):
            with contextlib.suppress(Exception):
                if kept := each.cut():
                    left += self._feed(kept, index + 1)
        return left

    def whole(self, data: bytes) -> bytes:
        """Feed a whole body and close. Raises the exceptions of the filters."""
        try:
            return self.feed(data) + self.close()
        except FilterFailed as exc:
            raise exc.cause from None


def chain_filters(filters: Sequence[Filter | EventFilter], content_encoding: str | None = None) -> FilterChain:
    """Link filters in their order; decode the content encoding first, if there are any filters.

    Raises StreamBroken if there are filters, and the encoding is unknown.
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
