"""`strip_azure_fields`: responses without the fields that only Azure has."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import Response
from gateway.testing import every_split, post, send
from plugins.strip_azure_fields import Strip, StripAzureFields
from tests.chunks import (
    FOUND,
    NAMED,
    PLAIN,
    PROMPT,
    USAGE,
    Count,
    contents,
    findings,
    same_however_it_is_cut,
    stream,
    streams,
)

JSON = {"content-type": "application/json", "content-length": "1"}
EVENTS = {"content-type": "text/event-stream"}


async def stripper() -> StripAzureFields:
    """Return the started stage."""
    stage = StripAzureFields()
    await post(stage, json={})
    return stage


def without(content: Any) -> Any:
    """Return a chunk without Azure's fields, computed in another way."""
    if isinstance(content, list):
        return [without(each) for each in content]
    if not isinstance(content, dict):
        return content
    gone = ("content_filter", "prompt_filter", "prompt_annotations", "obfuscation")
    return {name: without(value) for name, value in content.items() if not name.startswith(gone)}


async def test_chunks_lose_them_at_every_split() -> None:
    """In the chunk and its choices; chunks without them keep their bytes."""
    stage = await stripper()
    chunks = [PROMPT, {**PLAIN[1], "obfuscation": "kK"}, findings(), USAGE]
    for pieces, out in every_split(stream(*chunks), lambda: Strip(stage.contains, stage.stripped, Count())):
        assert contents(out) == without(chunks), pieces
        assert out.endswith(stream(USAGE))


@given(data=streams(PROMPT, findings()), places=st.lists(st.integers(0, 5000), max_size=6))
def test_where_reads_end_makes_no_difference(data: bytes, places: list[int]) -> None:
    """For any chunks."""
    stage = StripAzureFields()
    stage._names, stage.contains = frozenset(stage.fields), tuple(f'"{name}"'.encode() for name in stage.fields)
    out = same_however_it_is_cut(data, places, lambda: Strip(stage.contains, stage.stripped, Count()))
    assert contents(out) == without(contents(data))


async def test_completions_and_responses_lose_them() -> None:
    """In JSON, and in the response inside an event of the Responses API."""
    completion = {**NAMED, "choices": [{"message": {"content": "a"}, "content_filter_results": {}}]}
    answer = Response(200, json.dumps({**completion, "prompt_filter_results": FOUND}).encode(), JSON)
    sent = await post(StripAzureFields(), response=answer, json={})
    assert sent.json() == {**NAMED, "choices": [{"message": {"content": "a"}}]}
    assert dict(sent.outcome.counts) == {"StripAzureFields": 1}
    event = {"type": "response.completed", "response": {"id": "r", "content_filters": [], "output": []}}
    streamed = await send([StripAzureFields()], path="/responses", response=Response(200, stream(event), EVENTS))
    assert contents(streamed.body) == [{"type": "response.completed", "response": {"id": "r", "output": []}}]


@pytest.mark.parametrize(
    ("path", "status", "headers", "body"),
    [
        ("/chat/completions", 200, JSON, b'{ "choices" : [{"message":{"content":"\\"obfuscation\\""}}] }'),
        ("/chat/completions", 200, JSON, b'{"metadata":{"obfuscation":"mine"},"choices":[1]}'),
        ("/chat/completions", 400, JSON, b'{"error":{"innererror":{"content_filter_result":{}}}}'),
        ("/chat/completions", 200, JSON, b'["obfuscation"]'),
        ("/chat/completions", 200, JSON, b'{"obfuscation" no'),
        ("/files/file-1/content", 200, JSON, b'{"obfuscation":"a user\'s"}'),
        ("/audio/speech", 200, {"content-type": "audio/mpeg"}, b'"obfuscation"'),
    ],
)
async def test_everything_else_keeps_its_bytes(path: str, status: int, headers: dict[str, str], body: bytes) -> None:
    """Texts and users' data, errors, files, and bodies that are not JSON."""
    method = "GET" if "content" in path else "POST"
    sent = await send([StripAzureFields()], method, path, response=Response(status, body, headers))
    assert (sent.body, sent.outcome.counts) == (body, {})


async def test_the_fields_can_be_others() -> None:
    """As listed; an empty list turns the stage off."""
    answer = Response(200, b'{"a":1,"b":2,"obfuscation":"x"}', JSON)
    assert (await post(StripAzureFields(["a"]), response=answer, json={})).json() == {"b": 2, "obfuscation": "x"}
    assert (await post(StripAzureFields([]), response=answer, json={})).body == answer.body
