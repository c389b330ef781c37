"""`missing_fields`: every chunk has an id, object, creation time and model."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import Response
from gateway.testing import every_split, post, send
from plugins.missing_fields import MAX_HELD, Fill, MissingFields
from tests.chunks import (
    EMPTY,
    NAMED,
    PLAIN,
    PROMPT,
    USAGE,
    Count,
    chunk,
    contents,
    event,
    fed,
    findings,
    same_however_it_is_cut,
    stream,
    streams,
)

EVENTS = {"content-type": "text/event-stream"}
MADE_UP = {"id": "chatcmpl-made", "object": "chat.completion.chunk", "created": 7, "model": "made"}


def fill() -> Fill:
    return Fill(Count(), MADE_UP)


def test_empty_fields_are_what_the_stream_s_other_chunks_say_at_every_split() -> None:
    """Also in the first chunk, which waits for the second; chunks with all fields keep their bytes."""
    whole = stream(PROMPT, *PLAIN, findings(), USAGE)
    for pieces, out in every_split(whole, fill):
        first, *middle, mended, usage = contents(out)
        assert (first, mended) == ({**PROMPT, **NAMED}, {**findings(), **NAMED}), pieces
        assert stream(*PLAIN, done=b"") in out
        assert out.endswith(stream(USAGE))
        assert (middle, usage) == ([*PLAIN], USAGE)


def test_the_first_chunk_leaves_with_the_one_that_names_it() -> None:
    """It has no content, so no user waits for it; after it, each event leaves at once."""
    linked = fill()
    assert fed([event(PROMPT)], linked) != b""  # at the end it is not lost
    other = fill()
    out = fed([event(PROMPT), event(PLAIN[0])], other)
    assert contents(out) == [{**PROMPT, **NAMED}, PLAIN[0]]


@pytest.mark.parametrize("rest", [b"", b"data: [DONE]\n\n", b'data: {"error":{"message":"no"}}\n\n'])
def test_where_no_chunk_ever_has_them_they_are_made_up(rest: bytes) -> None:
    """The same for the whole stream; a chunk with content never waits."""
    out = fed([event(PROMPT) + rest], fill())
    assert contents(out)[0] == {**PROMPT, **MADE_UP}
    assert out.endswith(rest)
    nameless = {**chunk("a"), **EMPTY}
    linked = [event(PROMPT), event(nameless), event(nameless)]
    assert [{name: each[name] for name in EMPTY} for each in contents(fed(linked, fill()))] == [MADE_UP] * 3


def test_only_so_many_wait() -> None:
    """A long run of chunks with filter results alone is released."""
    filter_ = fill()
    kept = [filter_.event(each) for each in events(MAX_HELD)]
    assert kept == [None] * MAX_HELD
    last = filter_.event(*events(1))
    assert isinstance(last, list)
    assert len(last) == MAX_HELD + 1


def events(count: int) -> list[Any]:
    from gateway import Event

    return [Event(event(findings())) for _ in range(count)]


@pytest.mark.parametrize("content", [chunk(""), [], "", {"choices": None, "id": ""}, {"id": "a", "choices": []}])
def test_what_lacks_nothing_keeps_its_bytes(content: object) -> None:
    """An empty text is not an empty field, and a missing field is not added."""
    assert fed([stream(PLAIN[0], content)], fill()) == stream(PLAIN[0], content)


@given(streams(PROMPT, findings(), {**chunk("a"), **EMPTY}), st.lists(st.integers(0, 5000), max_size=6))
def test_where_reads_end_makes_no_difference(data: bytes, places: list[int]) -> None:
    """No field is empty afterwards, chunks stay in order, and complete ones keep their bytes."""
    out = same_however_it_is_cut(data, places, fill)
    for before, after in zip(data.split(b"\n\n"), out.split(b"\n\n"), strict=True):
        assert before == after or b'"id":""' in before
    assert all(each[name] for each in contents(out) for name in EMPTY)


async def test_it_is_a_matter_of_chat_and_completion_streams() -> None:
    """Repairs are counted; generated fields are the request's id, the operation's object and the deployment."""
    sent = await post(MissingFields(), response=Response(200, stream(PROMPT), EVENTS), json={})
    made = contents(sent.body)[0]
    assert (made["id"], made["object"]) == ("chatcmpl-req_test", "chat.completion.chunk")
    assert made["created"] > 1_700_000_000
    assert dict(sent.outcome.counts) == {"MissingFields": 1}
    text = {**EMPTY, "choices": [{"text": "a", "index": 0}]}
    answer = Response(200, stream(text), EVENTS)
    completions = contents((await send([MissingFields()], path="/completions", response=answer)).body)[0]
    assert (completions["id"], completions["object"]) == ("cmpl-req_test", "text_completion")
    assert (await send([MissingFields()], path="/responses", response=answer)).body == stream(text)


def test_a_comment_is_waited_through() -> None:
    """Held chunks still get the stream's own id, which also replaces generated fields."""
    out = fed([event(PROMPT) + b": keep-alive\n\n" + b"retry: 5\n\n" + stream(*PLAIN, findings())], fill())
    assert {each["id"] for each in contents(out)} == {NAMED["id"]}
    assert out.startswith(b": keep-alive\n\nretry: 5\n\n")
    late = [event({**chunk("a"), **EMPTY}), stream(PLAIN[1], findings())]
    assert [each["id"] for each in contents(fed(late, fill()))] == ["chatcmpl-made", NAMED["id"], NAMED["id"]]
