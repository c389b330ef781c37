"""Recordings of Azure, if available: a correct response keeps its bytes, errors become OpenAI's."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from aiohttp import web

from gateway import EventFilter, Response
from gateway.protocol.filters import chain_filters
from gateway.testing import FakeAzure, Seen, every_split, post
from plugins.missing_delta import Deltas
from plugins.missing_fields import Fill
from plugins.missing_message import MissingMessage
from plugins.openai_errors import OpenAIErrors
from plugins.prompt_filter_chunk import Drop as PromptFilterDrop
from plugins.prompt_filter_chunk import Merge as PromptFilterMerge
from plugins.sse_newline import CompleteEvents
from plugins.stream_errors import StreamErrors
from plugins.strip_azure_fields import StripAzureFields
from tests.chunks import Count, fed
from tests.conftest import CHAT, StartGateway
from tests.protocol.test_filters import Keep

CAPTURES = Path(__file__).parents[2] / "shared" / "azure" / "captures"
BODIES = sorted(CAPTURES.glob("*.body")) if CAPTURES.is_dir() else []

pytestmark = pytest.mark.skipif(not BODIES, reason="the recordings are not part of a checkout")


@pytest.mark.parametrize("path", [path for path in BODIES if "stream" in path.name], ids=lambda path: path.stem)
def test_streams_pass_filters_unchanged(path: Path) -> None:
    """At every split of a stream's head and tail, and in reads of every size."""
    stream = path.read_bytes()
    for make in (CompleteEvents, Keep):
        for size in (1, 2, 3, 7, 64, 1000, len(stream)):
            linked = chain_filters([make()])
            pieces = [stream[place : place + size] for place in range(0, len(stream), size)]
            assert stream == b"".join([linked.feed(piece) for piece in pieces]) + linked.close()
        for _, out in every_split(stream[-1500:], make):
            assert stream[-1500:] == out


@pytest.mark.parametrize("path", [path for path in BODIES if "stream" in path.name], ids=lambda path: path.stem)
def test_repairs_change_what_is_odd_and_nothing_else(path: Path) -> None:
    """In reads of every size: the first chunk is dropped, merged or filled, every other event keeps its bytes."""
    stream = path.read_bytes()
    first, rest = stream.split(b"\n\n", 1)
    second = rest.split(b"\n\n", 1)[0]
    named = {name: json.loads(second[6:])[name] for name in ("id", "object", "created", "model")}
    found = json.loads(first[6:])["prompt_filter_results"]

    def filters() -> dict[str, list[EventFilter]]:
        drop, merge = PromptFilterDrop(Count()), PromptFilterMerge(Count())
        fill, deltas = Fill(Count(), {}), Deltas(Count(), drop=False)
        return {"all": [drop, deltas, fill], "merge": [merge], "fill": [fill], "deltas": [deltas]}

    for size in (1, 2, 3, 7, 64, 1000, len(stream)):
        pieces = [stream[place : place + size] for place in range(0, len(stream), size)]
        made = {name: fed(pieces, *each) for name, each in filters().items()}
        assert made["all"] == rest
        assert made["deltas"] == stream
        merged, others = made["merge"].split(b"\n\n", 1)
        assert json.loads(merged[6:]) == {**json.loads(second[6:]), "prompt_filter_results": found}
        assert rest == second + b"\n\n" + others
        filled, others = made["fill"].split(b"\n\n", 1)
        assert json.loads(filled[6:]) == {**json.loads(first[6:]), **named}
        assert others == rest


@pytest.mark.parametrize("path", [path for path in BODIES if "stream" in path.name], ids=lambda path: path.stem)
async def test_other_repairs_of_recorded_streams(path: Path) -> None:
    """No false errors, and Azure's own fields are removed."""
    stream = path.read_bytes()
    headers = {"content-type": "text/event-stream"}
    passed = await post(StreamErrors(), response=Response(200, stream, headers), json=CHAT)
    assert (passed.status, passed.body) == (200, stream)
    stripped = (await post(StripAzureFields(), response=Response(200, stream, headers), json=CHAT)).body
    assert b"content_filter_results" not in stripped
    assert b"obfuscation" not in stripped
    assert stripped.count(b"\n\n") == stream.count(b"\n\n")


async def test_a_recorded_completion_without_a_message_gets_one() -> None:
    """The completion that the filter withheld; the others keep their bytes."""
    for path in (path for path in BODIES if "chat-json" in path.name):
        body = path.read_bytes()
        answer = Response(200, body, {"content-type": "application/json"})
        sent = await post(MissingMessage(), response=answer, json=CHAT)
        if "content-filtered" in path.name:
            assert sent.json()["choices"][0]["message"]["content"] == ""
        else:
            assert sent.body == body


@pytest.mark.parametrize("path", BODIES, ids=lambda path: path.stem)
async def test_recordings_pass_the_gateway_unchanged(path: Path, start_gateway: StartGateway) -> None:
    """Each recorded response reaches the client with its status and its bytes."""
    body = path.read_bytes()
    meta = json.loads(path.with_suffix(".meta.json").read_text())
    status = meta["status"] if isinstance(meta["status"], int) else meta["status"]["code"]
    content_type = next((value for name, value in meta["headers"].items() if name.lower() == "content-type"), "")

    async def replay(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(status=status)
        response.headers["content-type"] = content_type if isinstance(content_type, str) else content_type[0]
        await response.prepare(request)
        for place in range(0, len(body), 1021):
            await response.write(body[place : place + 1021])
            await asyncio.sleep(0)
        return response

    async with FakeAzure(respond=replay) as azure:
        gateway = await start_gateway(azure.endpoint)
        # Where the usage was recorded, it had been asked for.
        options = {"stream_options": {"include_usage": True}} if b'"usage":{' in body else {}
        async with gateway.post(json={**CHAT, "stream": "stream" in path.name, **options}) as answer:
            assert (status, body) == (answer.status, await answer.read())


@pytest.mark.parametrize("path", [path for path in BODIES if "error" in path.name], ids=lambda path: path.stem)
async def test_recorded_errors_become_openai_s(path: Path) -> None:
    """Each in OpenAI's four fields, and nothing of Azure's error is lost."""
    meta = json.loads(path.with_suffix(".meta.json").read_text())
    status = int(path.name.split("-")[1][:3])
    headers = {name.lower(): str(value) for name, value in meta["headers"].items() if name.lower() == "content-type"}
    own = json.loads(path.read_bytes())["error"]
    sent = await post(OpenAIErrors(), response=Response(status, path.read_bytes(), headers), json=CHAT)
    error = json.loads(sent.body)["error"]
    codes = {401: "invalid_api_key", 404: "model_not_found", 400: "content_filter"}
    assert (error["code"], error["type"]) == (codes[status], "invalid_request_error")
    assert own["message"] in error["message"]
    assert "param" in error
    assert sent.headers.getall("content-type") == ["application/json"]
    assert error["innererror"] == own.get("innererror", {**own})
