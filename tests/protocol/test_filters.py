"""Filters on bytes and on events: every byte of a stream passes them, at every cut."""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import Event, EventFilter, Filter
from gateway.errors import StreamBroken
from gateway.protocol.filters import FilterFailed, chain_filters, run_filters
from gateway.protocol.sse import MAX_EVENT
from gateway.testing import every_split

EVENTS = (
    b"data: 1\n\n",
    b'event: ping\nid: 7\ndata: {"a": 1}\n\n',
    b": comment\n\n",
    b"data: a\ndata: b\n\n",
    b"data\n\n",
)
ENDINGS = (b"\n", b"\r\n", b"\r")


class Keep(EventFilter):
    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def event(self, event: Event) -> Event:
        self.seen.append(event.data)
        return event


class Upper(Filter):
    def feed(self, data: bytes) -> bytes:
        return data.upper()

    def close(self) -> bytes:
        return b"!"


def fed(filters: list[Filter | EventFilter], pieces: list[bytes], encoding: str | None = None) -> bytes:
    linked = chain_filters(filters, encoding)
    return b"".join([linked.feed(piece) for piece in pieces]) + linked.close()


@pytest.mark.parametrize("ending", ENDINGS)
def test_untouched_events_keep_their_bytes_at_every_split(ending: bytes) -> None:
    """An event filter that changes nothing passes every stream unchanged, and sees each event once."""
    stream = b"".join(EVENTS).replace(b"\n", ending)
    wanted = [b"1", b'{"a": 1}', b"", b"a\nb", b""]
    keeps: list[Keep] = []

    def make() -> Keep:
        keeps.append(Keep())
        return keeps[-1]

    for pieces, out in every_split(stream, make):
        assert stream == out, pieces
        assert wanted == keeps[-1].seen, pieces


@given(
    lines=st.lists(st.sampled_from([b"", b"data: x", b": c", b"data", b"id: 1", b"data:y", b"foo"]), max_size=12),
    endings=st.lists(st.sampled_from(ENDINGS), min_size=12, max_size=12),
    cuts=st.lists(st.integers(0, 80), max_size=6),
)
def test_any_mix_of_line_endings_passes_unchanged(lines: list[bytes], endings: list[bytes], cuts: list[int]) -> None:
    """For any line endings and cuts, bytes are neither lost, doubled nor moved."""
    stream = b"".join(line + ending for line, ending in zip(lines, endings, strict=False))
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    pieces = [stream[a:b] for a, b in itertools.pairwise(places)]
    assert stream == fed([Keep()], pieces)
    assert stream == fed([Keep(), Filter(), Keep(), Keep()], pieces)


def test_events_leave_as_soon_as_they_are_complete() -> None:
    """An event is not held until the next one begins."""
    for event in (b"data: 1\n\n", b"data: 1\r\n\r\n", b"data: 1\r\r", b"data: 1\r\n\r"):
        assert event == chain_filters([Keep()]).feed(event)


def test_filters_run_in_the_order_in_which_they_were_added() -> None:
    """The one nearest Azure runs first; the rest of each one runs through those after it."""

    class Add(Filter):
        def __init__(self, text: bytes) -> None:
            self.text = text

        def feed(self, data: bytes) -> bytes:
            return data + self.text

        def close(self) -> bytes:
            return b"<" + self.text

    assert fed([Add(b"a"), Add(b"b")], [b"x"]) == b"xab<ab<b"
    assert fed([Upper()], [b"x"]) == b"X!"


def test_events_can_be_dropped_changed_and_added() -> None:
    """None drops an event, a list replaces it by several, set_json changes only the data."""

    class Change(EventFilter):
        def event(self, event: Event) -> Event | list[Event] | None:
            content = event.json()
            if content == 1:
                return None
            if content == 2:
                return [event, Event(b"data: 2.5\n\n")]
            if content is not None:
                event.set_json({"was": content})
            return event

        def close(self) -> list[Event]:
            return [Event(b"data: bye\n\n")]

    stream = b"data: 1\n\ndata: 2\n\nevent: e\r\ndata: 3\r\n\r\ndata: [DONE]\n\n"
    wanted = b'data: 2\n\ndata: 2.5\n\nevent: e\r\ndata: {"was":3}\r\n\r\ndata: [DONE]\n\ndata: bye\n\n'
    for pieces, out in every_split(stream, Change):
        assert wanted == out, pieces


def test_a_dropped_event_takes_its_whole_line_ending_along() -> None:
    """Even if its last LF arrives in another read."""

    class Drop(EventFilter):
        def event(self, event: Event) -> None:
            return None

    for pieces, out in every_split(b"data: 1\r\n\r\ndata: 2\r\n\r\n", Drop):
        assert out == b"", pieces


def test_a_filter_sees_the_events_that_lack_something() -> None:
    """Each event of a read counts by itself, and the filter may change `lacks` from one event to the next."""

    class Lacking(EventFilter):
        contains: Sequence[bytes] = ()
        lacks: Sequence[bytes] = (b"z",)

        def event(self, event: Event) -> None:
            if b"!" in event.raw:
                self.lacks, self.contains = (), (b"z",)

    events = [b"data: %b\n\n" % text for text in (b"z1", b"y1", b"z2", b"!", b"z3", b"y2")]
    for pieces, out in every_split(b"".join(events), Lacking):
        assert out == b"data: z1\n\ndata: z2\n\ndata: y2\n\n", pieces
    assert fed([Filter(), Lacking()], events) == b"data: z1\n\ndata: z2\n\ndata: y2\n\n"


def test_replacement_events_before_a_failure_are_not_lost() -> None:
    """Each passes the filters after it before the next one does."""

    class Split(EventFilter):
        def event(self, event: Event) -> list[Event]:
            return [Event(b"data: held\n\n"), event]

    class Fail(EventFilter):
        contains = (b"bad",)

        def event(self, event: Event) -> Event:
            raise ValueError("bad")

    with pytest.raises(FilterFailed) as caught:
        chain_filters([Split(), Fail()]).feed(b"data: bad\n\n")
    assert caught.value.left == b"data: held\n\n"


def test_a_missing_comma_in_finds_is_an_error() -> None:
    """Bytes are a sequence too, of numbers, and each of those is in nearly every event."""
    with pytest.raises(TypeError, match="with a comma"):
        type("Odd", (EventFilter,), {"contains": b"x"})


def test_a_replacement_has_the_type_of_the_event() -> None:
    """A filter's replacement for a WebSocket message is a WebSocket message, too."""

    class Kind(Event):
        pass

    made = list(run_filters([Mark(search=False), Mark(search=False)], Kind(b"x")))
    assert [type(each) for each in made] == [Kind] * len(made)


def test_blank_lines_after_an_event_are_not_events() -> None:
    """One, two or three more of them: each passes, and no filter sees it."""
    for count in range(5):
        stream = b"data: y\n\ndata: z\n\n" + b"\n" * count
        assert stream == fed([Mark(search=True)], [stream])
        assert stream + b"data: y\n\n" == fed([Mark(search=True)], [stream, b"data: y\n\n"])


class Mark(EventFilter):
    """Marks events that hold an `x`, and records the events it sees."""

    def __init__(self, *, search: bool) -> None:
        self.asked: list[bytes] = []
        if search:
            self.contains = (b"x",)

    def event(self, event: Event) -> Event | list[Event]:
        self.asked.append(event.raw)
        return [event, Event(b"data: X\n\n")] if b"x" in event.raw else event


@given(
    lines=st.lists(st.sampled_from([b"", b"data: x", b": c", b"data: y", b"x"]), max_size=12),
    endings=st.lists(st.sampled_from(ENDINGS), min_size=12, max_size=12),
    plain=st.booleans(),
    cuts=st.lists(st.integers(0, 80), max_size=6),
)
def test_finds_does_not_change_the_result(
    lines: list[bytes], endings: list[bytes], plain: bool, cuts: list[int]
) -> None:
    """The filter sees no other events, and the stream is the same as if it saw all of them."""
    endings = [b"\n"] * 12 if plain else endings
    stream = b"".join(line + ending for line, ending in zip(lines, endings, strict=False))
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    pieces = [stream[a:b] for a, b in itertools.pairwise(places)]
    searching = Mark(search=True)
    assert fed([Mark(search=False), Mark(search=False)], pieces) == fed([Mark(search=True), searching], pieces)
    assert all(b"x" in raw for raw in searching.asked)


@given(cuts=st.lists(st.integers(0, 80), max_size=6), more=st.booleans())
def test_bytes_before_a_failure_are_not_lost(cuts: list[int], more: bool) -> None:
    """They run through the filters after it, at any cuts; then the failure is raised."""

    class Fail(EventFilter):
        contains = (b"bad",)

        def event(self, event: Event) -> Event:
            raise ValueError("bad")

    stream = b"data: a\n\ndata: b\n\ndata: bad\n\ndata: c\n\n"
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    behind: list[Filter | EventFilter] = [Upper(), Keep()] if more else []
    linked = chain_filters([Filter(), Fail(), *behind])
    out = b""
    with pytest.raises(FilterFailed) as caught:  # noqa: PT012 -- it may be raised by any of them
        for start, end in itertools.pairwise(places):
            out += linked.feed(stream[start:end])
    assert isinstance(caught.value.cause, ValueError)
    expected = b"data: a\n\ndata: b\n\n"
    assert out + caught.value.left == (expected.upper() if more else expected)
    with pytest.raises(ValueError, match="bad"):
        chain_filters([Fail()]).whole(stream)


def test_an_event_without_end_is_bounded() -> None:
    """A stream that never ends an event is stopped before it fills the memory."""
    linked = chain_filters([Keep()])
    block = b"x" * (8 * 1024 * 1024)
    for _ in range(MAX_EVENT // len(block)):
        linked.feed(block)
    with pytest.raises(StreamBroken):
        linked.feed(block)


def test_ten_megabytes_byte_by_byte_is_linear() -> None:
    """A large event in very many reads costs a scan of each byte, not of all before it."""
    linked = chain_filters([Keep()])
    piece = b"x" * 100
    for _ in range(100_000):
        assert linked.feed(piece) == b""
    assert len(linked.feed(b"\n\n")) == 10_000_002


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "GZIP"])
def test_filters_see_text_where_azure_compresses(encoding: str) -> None:
    """Gzip and deflate are decoded before the first filter; an unknown coding is an error."""
    text = b"data: hello\n\n" * 50
    packed = gzip.compress(text) if encoding.lower() == "gzip" else zlib.compress(text)
    pieces = [packed[place : place + 7] for place in range(0, len(packed), 7)]
    assert text.upper() + b"!" == fed([Upper()], pieces, encoding)
    assert packed == fed([], [packed], encoding)
    with pytest.raises(StreamBroken):
        fed([Upper()], [packed[:-9]], encoding)
    with pytest.raises(StreamBroken):
        fed([Upper()], [b"nonsense"], encoding)
    with pytest.raises(StreamBroken):
        chain_filters([Upper()], "br")


def test_gzip_of_several_members_is_read_whole() -> None:
    """As RFC 1952 allows; bytes after the last member are an error, and no bytes are an empty text."""
    packed = gzip.compress(b"one ") + gzip.compress(b"two")
    for size in (1, 5, len(packed)):
        pieces = [packed[place : place + size] for place in range(0, len(packed), size)]
        assert fed([Upper()], pieces, "gzip") == b"ONE TWO!"
    with pytest.raises(StreamBroken):
        fed([Upper()], [packed + b"garbage"], "gzip")
    assert fed([Filter()], [], "gzip") == b""
