"""`prompt_filter_chunk`: handles Azure's first chunk, which has no choices."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import Response
from gateway.testing import every_split, post, send
from plugins.prompt_filter_chunk import Drop, Merge, PromptFilterChunk
from tests.chunks import (
    FOUND,
    OLD_PROMPT,
    PLAIN,
    PROMPT,
    USAGE,
    Count,
    contents,
    event,
    fed,
    same_however_it_is_cut,
    stream,
    streams,
)

EVENTS = {"content-type": "text/event-stream; charset=utf-8"}


@pytest.mark.parametrize("first", [PROMPT, OLD_PROMPT, {**PROMPT, "usage": None}])
def test_it_is_dropped_and_every_other_byte_stays_at_every_split(first: object) -> None:
    """Under its old name, too; the chunk with the usage, which has no choices either, stays."""
    whole = stream(first, *PLAIN, USAGE)
    for pieces, out in every_split(whole, lambda: Drop(Count())):
        assert out == stream(*PLAIN, USAGE), pieces


def test_what_it_tells_is_merged_into_the_first_chunk_that_has_choices() -> None:
    """From several chunks, too."""
    for pieces, out in every_split(stream(PROMPT, PROMPT, *PLAIN, USAGE), lambda: Merge(Count())):
        first, *others = contents(out)
        assert first == {**PLAIN[0], "prompt_filter_results": FOUND * 2}, pieces
        assert out.endswith(stream(*PLAIN[1:], USAGE))
        assert others == [*PLAIN[1:], USAGE]


def test_what_cannot_be_merged_is_not_lost() -> None:
    """Before an error, the usage alone, or the end, it stays unchanged."""
    for rest in ([{"error": {"message": "no"}}], [USAGE], []):
        assert fed([stream(PROMPT, *rest)], Merge(Count())) == stream(PROMPT, *rest)
    assert fed([event(PROMPT)], Merge(Count())) == event(PROMPT)


@pytest.mark.parametrize(
    "kept",
    [
        {**PROMPT, "usage": USAGE["usage"]},
        {**PROMPT, "error": {"message": "no"}},
        {**PLAIN[1], "prompt_filter_results": FOUND},
        {"choices": []},
        {**PROMPT, "prompt_filter_results": None},
        USAGE,
    ],
)
def test_what_tells_anything_else_is_kept(kept: object) -> None:
    """A chunk with usage, an error or choices, and one without results for a prompt."""
    assert fed([stream(kept)], Drop(Count())) == stream(kept)
    assert fed([stream(kept)], Merge(Count())) == stream(kept)


@given(streams(PROMPT, OLD_PROMPT), st.lists(st.integers(0, 5000), max_size=6))
def test_where_reads_end_makes_no_difference(data: bytes, places: list[int]) -> None:
    """At any position, dropping leaves the other chunks byte for byte, and merging loses nothing."""
    expected = b"".join(each for each in data.replace(b"\n\n", b"\n\n\0").split(b"\0") if b'"prompt_f' not in each
                        and b'"prompt_a' not in each)  # fmt: skip
    assert same_however_it_is_cut(data, places, lambda: Drop(Count())) == expected
    merged = same_however_it_is_cut(data, places, lambda: Merge(Count()))
    assert merged.count(b'"prompt_index"') == data.count(b'"prompt_index"')


async def test_it_is_a_matter_of_chat_and_completion_streams() -> None:
    """Repairs are counted; other operations and responses without events stay; `keep` turns the stage off."""
    whole = stream(PROMPT, *PLAIN)
    answer = Response(200, whole, EVENTS)
    sent = await post(PromptFilterChunk(), response=answer, json={})
    assert (sent.body, dict(sent.outcome.counts)) == (stream(*PLAIN), {"PromptFilterChunk": 1})
    assert (await post(PromptFilterChunk("merge"), response=answer, json={})).outcome.counts == {"PromptFilterChunk": 1}
    assert (await send([PromptFilterChunk()], path="/completions", response=answer)).body == stream(*PLAIN)
    for sent in (
        await send([PromptFilterChunk()], path="/responses", response=answer),
        await post(PromptFilterChunk(), response=Response(200, whole, {"content-type": "text/plain"}), json={}),
        await post(PromptFilterChunk("keep"), response=answer, json={}),
    ):
        assert (sent.body, sent.outcome.counts) == (whole, {})


def test_merging_waits_through_comments() -> None:
    """A comment is neither a chunk nor the end."""
    out = fed([event(PROMPT) + b": ping\n\n" + stream(*PLAIN)], Merge(Count()))
    assert out.startswith(b": ping\n\n")
    assert contents(out)[0] == {**PLAIN[0], "prompt_filter_results": FOUND}
