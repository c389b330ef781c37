"""`missing_delta`: chunks of the asynchronous filter get a `delta`."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import Response
from gateway.testing import every_split, post, send
from plugins.missing_delta import Deltas, MissingDelta
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


def complete() -> Deltas:
    return Deltas(Count(), drop=False)


def drop() -> Deltas:
    return Deltas(Count(), drop=True)


def test_choices_get_an_empty_delta_and_the_chunk_the_stream_s_id_at_every_split() -> None:
    """Between chunks and after the one that stops; all other bytes stay."""
    before, after = stream(PROMPT, *PLAIN[:2], done=b""), stream(PLAIN[3], done=b"")
    whole = before + event(findings()) + after + event(findings()) + stream(USAGE)
    for pieces, out in every_split(whole, complete):
        assert out.startswith(before), pieces
        assert out.endswith(stream(USAGE))
        assert after in out
        mended = [each for each in contents(out) if "content_filter_offsets" in str(each)]
        expected = {**findings(), "id": NAMED["id"]}
        expected["choices"] = [{**expected["choices"][0], "delta": {}}]
        assert mended == [expected] * 2


def test_they_can_be_dropped_at_every_split() -> None:
    """But never one with a finish_reason: it is completed."""
    for pieces, out in every_split(stream(PLAIN[0], findings(), USAGE), drop):
        assert out == stream(PLAIN[0], USAGE), pieces
    made = contents(fed([stream(PLAIN[0], findings("content_filter"))], drop()))
    assert [made[1]["choices"][0][name] for name in ("delta", "finish_reason")] == [{}, "content_filter"]


def test_one_of_several_choices() -> None:
    """The others stay; with `drop`, only it is removed; a chunk with usage stays."""
    both: dict[str, Any] = {**NAMED, "choices": [chunk("a")["choices"][0], findings(index=1)["choices"][0]]}
    completed = contents(fed([stream(both)], complete()))[0]["choices"]
    assert completed == [both["choices"][0], {**both["choices"][1], "delta": {}}]
    nameless = contents(fed([stream(PLAIN[0]), stream({**both, **EMPTY})], complete()))
    assert nameless[1]["choices"] == completed
    assert contents(fed([stream(both)], drop()))[0]["choices"] == both["choices"][:1]
    told = {**findings(), "usage": USAGE["usage"]}
    assert contents(fed([stream(told)], drop())) == [{**told, "choices": []}]


@pytest.mark.parametrize(
    "content",
    [
        PROMPT,
        USAGE,
        chunk(' "delta" '),
        {"choices": None},
        {"choices": [1, None]},
        {"choices": {"0": {}}},
        [],
        "delta",
        {"error": {"message": "no"}},
    ],
)
def test_what_lacks_nothing_keeps_its_bytes(content: object) -> None:
    """Chunks without choices, errors, and events that are not chunks."""
    assert fed([stream(content)], complete()) == stream(content)
    assert fed([stream(content)], drop()) == stream(content)


def test_a_delta_written_with_spaces_is_one() -> None:
    """JSON allows spaces; the event keeps its bytes."""
    spaced = b'data: {"id": "a", "choices": [{"index": 0, "delta" : {"content": "x"}}]}\n\n'
    assert fed([spaced, spaced], complete()) == spaced * 2


def test_a_delta_that_is_null_is_none() -> None:
    """Reading its content fails as without a delta."""
    out = contents(fed([stream({**NAMED, "choices": [{"index": 0, "delta": None}]})], complete()))
    assert out[0]["choices"] == [{"index": 0, "delta": {}}]


@given(streams(PROMPT, findings(), findings("content_filter")), st.lists(st.integers(0, 5000), max_size=6))
def test_where_reads_end_makes_no_difference(data: bytes, places: list[int]) -> None:
    """Every choice has a delta afterwards, and chunks that had one keep their bytes."""
    out = same_however_it_is_cut(data, places, complete)
    for before, after in zip(data.split(b"\n\n"), out.split(b"\n\n"), strict=True):
        assert before == after or b'"content_filter_offsets"' in before
    assert all("delta" in choice for each in contents(out) for choice in each["choices"])
    dropped = same_however_it_is_cut(data, places, drop)
    assert len(contents(dropped)) == len(contents(data)) - data.count(b'"finish_reason":null,"index":0}')


async def test_it_is_a_matter_of_chat_streams() -> None:
    """Repairs are counted; completions have texts and no deltas; `keep` turns the stage off."""
    whole = stream(PLAIN[0], findings(), findings())
    answer = Response(200, whole, EVENTS)
    sent = await post(MissingDelta(), response=answer, json={})
    assert dict(sent.outcome.counts) == {"MissingDelta": 2}
    assert len(contents((await post(MissingDelta("drop"), response=answer, json={})).body)) == 1
    text = stream({**EMPTY, "choices": [{"text": "a", "index": 0}]})
    completions = await send([MissingDelta()], path="/completions", response=Response(200, text, EVENTS))
    assert completions.body == text
    assert (await post(MissingDelta("keep"), response=answer, json={})).body == whole
