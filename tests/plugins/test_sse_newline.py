"""`sse_newline`: repairs the end of a stream, and leaves a correct one alone."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import Event, EventFilter, Response
from gateway.protocol.filters import chain_filters
from gateway.testing import every_split, post
from plugins.sse_newline import CompleteEvents, SseNewline
from tests.chunks import Count, cuts

ENDINGS = (b"\n", b"\r\n", b"\r")
BODY = b'data: {"a":1}\n\n: ping\n\nevent: e\ndata: x\ndata: y\n\n'


def reference(stream: bytes) -> list[bytes]:
    """Return the data of each event that a reader dispatches by the letter of WHATWG HTML 9.2.6."""
    events: list[bytes] = []
    data: list[bytes] = []
    lines = re.split(rb"\r\n|\n|\r", stream)
    for line in lines[:-1]:
        if not line:
            if data:
                events.append(b"\n".join(data))
            data = []
        elif line.startswith(b"data"):
            name, _, value = line.partition(b":")
            if name == b"data":
                data.append(value.removeprefix(b" "))
    return events


def repaired(pieces: list[bytes]) -> bytes:
    linked = chain_filters([CompleteEvents()])
    return b"".join([linked.feed(piece) for piece in pieces]) + linked.close()


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("body", [BODY, b"", b"data: [DONE] is not it\n\n", b": only a comment\n\n"])
def test_correct_streams_pass_unchanged_at_every_split(ending: bytes, body: bytes) -> None:
    """Byte for byte, also if the last newline arrives in its own read."""
    stream = (body + b"data: [DONE]\n\n").replace(b"\n", ending)
    for pieces, out in every_split(stream, CompleteEvents):
        assert stream == out, pieces


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("body", [BODY, b""])
@pytest.mark.parametrize("newlines", [0, 1])
def test_last_event_is_completed_in_the_stream_s_own_ending(ending: bytes, body: bytes, newlines: int) -> None:
    """`[DONE]` without its blank line, or without any newline, is completed."""
    whole = (body + b"data: [DONE]\n\n").replace(b"\n", ending)
    broken = (body + b"data: [DONE]" + b"\n" * newlines).replace(b"\n", ending)
    if not body and not newlines:
        whole = whole.replace(ending, b"\n")  # there was no ending to go by
    for pieces, out in every_split(broken, CompleteEvents):
        assert whole == out, pieces


@pytest.mark.parametrize("ending", ENDINGS)
def test_done_is_completed_the_moment_it_is_there(ending: bytes) -> None:
    """The blank line follows the line at once, before the stream ends."""
    linked = chain_filters([CompleteEvents()])
    first = b"data: 1\n\n".replace(b"\n", ending)
    assert first == linked.feed(first)
    assert b"data: [DONE]" + ending * 2 == linked.feed(b"data: [DONE]" + ending)
    assert linked.feed(ending) == b""
    assert linked.close() == b""


def test_what_follows_done_is_dropped() -> None:
    """Bytes after the completed event are not part of the response."""
    for more in (b"\n", b"\n\n", b"data: more\n\n", b"x"):
        for pieces, out in every_split(b"data: 1\n\ndata: [DONE]\n\n" + more, CompleteEvents):
            assert out == b"data: 1\n\ndata: [DONE]\n\n", pieces


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("last", [b"data: 2\n", b"data: 2", b"event: e\ndata: 2\n", b"data: a\ndata: 2", b"id: 3\n"])
def test_other_open_events_are_completed(ending: bytes, last: bytes) -> None:
    """An event that is open at the end is completed, in its own line ending."""
    stream = (b"data: 1\n\n" + last).replace(b"\n", ending)
    wanted = (b"data: 1\n\n" + last.rstrip(b"\n") + b"\n\n").replace(b"\n", ending)
    for pieces, out in every_split(stream, CompleteEvents):
        assert wanted == out, pieces


@pytest.mark.parametrize(
    "stream", [b"", b"\n", b"data: 1\n\n", b"data: 1\n\n: ping\n", b"data: 1\n\n: ping", b"data: 1\r\n\r"]
)
def test_streams_without_an_open_event_pass_unchanged(stream: bytes) -> None:
    """No `[DONE]` is added, and comments are not events."""
    for pieces, out in every_split(stream, CompleteEvents):
        assert stream == out, pieces


def test_done_inside_other_data_is_not_the_end() -> None:
    """Only a line that is exactly `data: [DONE]`, the first data of its event, ends a stream."""
    for event in (b"data: x\ndata: [DONE]\n\n", b"data: [DONE]x\n\n", b": data: [DONE]\n\n", b"data:  [DONE]\n\n"):
        stream = event + b"data: after\n\n"
        for pieces, out in every_split(stream, CompleteEvents):
            assert stream == out, pieces
    for pieces, out in every_split(b"id: 1\ndata:[DONE]\n", CompleteEvents):
        assert out == b"id: 1\ndata:[DONE]\n\n", pieces


@given(
    lines=st.lists(
        st.sampled_from([b"", b"", b"data: x", b": c", b"data", b"id: 1", b"data: [DONE", b"dat", b"data: long" * 9]),
        max_size=10,
    ),
    ending=st.sampled_from(ENDINGS),
    end=st.sampled_from(
        [b"", b"data: [DONE]", b"data: [DONE]$", b"data: [DONE]$$", b"data: x", b"data: x$", b"$data: [DONE]"]
    ),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_a_strict_reader_sees_every_event(lines: list[bytes], ending: bytes, end: bytes, cuts: list[int]) -> None:
    """For any stream and any split, a reader by the standard gets each event up to `[DONE]`."""
    stream = b"".join(line + ending for line in lines) + end.replace(b"$", ending)
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    pieces = [stream[a:b] for a, b in itertools.pairwise(places)]

    out = repaired(pieces)

    wanted = reference(stream + ending * 2)
    if b"[DONE]" in wanted:
        wanted = wanted[: wanted.index(b"[DONE]") + 1]
    assert wanted == reference(out)
    assert repaired([stream]) == out, "where it was cut makes no difference"
    assert repaired([out]) == out, "a repaired stream needs no repair"


def test_memory_is_bounded() -> None:
    """An endless line is not kept."""
    filter_ = CompleteEvents()
    for _ in range(1000):
        filter_.feed(b"x" * 10_000)
    assert len(filter_._line) < 20


@pytest.mark.parametrize(
    ("content_type", "repairs"),
    [
        ("text/event-stream", True),
        ("text/event-stream; charset=utf-8", True),
        ("Text/Event-Stream;charset=UTF-8", True),
        ("application/json", False),
        ("text/event-streams", False),
    ],
)
async def test_only_event_streams_are_repaired(content_type: str, repairs: bool) -> None:
    """By the media type, with any parameters."""
    answer = Response(200, b"data: [DONE]", {"content-type": content_type})
    sent = await post(SseNewline(), response=answer)
    assert (b"data: [DONE]\n\n" if repairs else b"data: [DONE]") == sent.body


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("end", "mended"),
    [
        ("data: [DONE]\n\n", 0),
        ("data: [DONE]\n", 1),
        ("data: [DONE]", 1),
        ("data: 1\n\n", 0),
        ("data: 1\n", 1),
        ("", 0),
    ],
)
def test_an_end_that_was_mended_is_counted(ending: bytes, end: str, mended: int) -> None:
    """Once, for any split; a correct end is not counted."""
    stream = BODY.replace(b"\n", ending) + end.encode().replace(b"\n", ending)
    for size in (1, 2, 3, len(stream)):
        count = Count()
        linked = chain_filters([CompleteEvents(count)])
        for place in range(0, len(stream), size):
            linked.feed(stream[place : place + size])
        linked.close()
        assert count.calls == mended, size


@given(
    st.lists(
        st.sampled_from(
            [b"data: x\n\n", b"data: y\n\n", b"data: [DONE]\n", b"\n", b"data: z", b"\r", b": c\n\n", b"a\r\n\r\n"]
        ),
        max_size=8,
    ),
    st.lists(st.integers(0, 90), max_size=5),
)
def test_leaving_it_out_where_it_has_nothing_to_do_changes_nothing(parts: list[bytes], places: list[int]) -> None:
    """Before event filters, it does not get data that it would leave alone: the stream and the count are the same."""

    class Mark(EventFilter):
        contains = (b"y",)

        def event(self, event: Event) -> list[Event]:
            return [event, Event(b"data: after\n\n")]

    pieces = cuts(b"".join(parts), places)
    apart, together = Count(), Count()
    first, second = CompleteEvents(apart), chain_filters([Mark()])
    expected = b"".join([second.feed(first.feed(piece)) for piece in pieces])
    if left := first.close():
        expected += second.feed(left)
    expected += second.close()
    linked = chain_filters([CompleteEvents(together), Mark()])
    assert expected == b"".join([linked.feed(piece) for piece in pieces]) + linked.close()
    assert together.calls == apart.calls
