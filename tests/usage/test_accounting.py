"""The usage of exchanges: as Azure reports it, or else counted or estimated."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from gateway import Next, Outcome, Request, Response, Stage, UpstreamError
from gateway.azure.operations import BY_NAME
from gateway.testing import FakeAzure, post, send
from gateway.usage.accounting import UsageMeter
from gateway.usage.metered_operations import METERED, PROMPTED, UNREPORTED
from gateway.usage.tokenizer import count_tokens, load_encodings, prompt_tokens
from gateway.usage.usage_fields import Usage
from tests.chunks import event as sse
from tests.conftest import CHAT, RawUpstream, StartGateway, until

WORD = sse({"choices": [{"delta": {"content": " word"}}]})
CHAT_USAGE = (
    b'{"completion_tokens":13,"completion_tokens_details":{"accepted_prediction_tokens":0,"audio_tokens":2,'
    b'"reasoning_tokens":5,"rejected_prediction_tokens":0},"prompt_tokens":12,"prompt_tokens_details":'
    b'{"audio_tokens":1,"cached_tokens":4},"total_tokens":25}'
)
CHAT_TOTAL = Usage(12, 13, 4, 5, 1, 2)
CHAT_RESPONSE = b'{"choices":[{"message":{"content":"the \\"usage\\":{}"}}],"usage":' + CHAT_USAGE + b"}"


@pytest.fixture(autouse=True, scope="module")
def _tokenizer() -> None:
    """Load the encodings, as the gateway does when they are first needed."""
    load_encodings()


@dataclass
class Counting(Stage):
    """Keeps the outcomes that `defer` callbacks get."""

    needs_usage = True

    def __post_init__(self) -> None:
        self.outcomes: list[Outcome] = []

    async def __call__(self, request: Request, call_next: Next) -> Response:
        request.defer(self.outcomes.append)
        return await call_next(request)


async def test_a_stage_that_needs_usage_gets_it() -> None:
    """In the outcome; nothing is measured if no stage needs it."""
    counting = Counting()
    answer = Response(200, CHAT_RESPONSE, {"content-type": "application/json"})
    await post(counting, response=answer, json=CHAT)
    assert counting.outcomes[0].usage == CHAT_TOTAL
    assert counting.outcomes[0].usage.total_tokens == 25
    sent = await post(response=answer, json=CHAT)
    assert sent.outcome.usage is None


async def test_only_metered_operations_have_usage() -> None:
    """A stored response, or the file of a batch, has the usage of others."""
    for method, path in (("GET", "/responses/resp_1"), ("GET", "/files/f/content"), ("GET", "/chat/completions/c")):
        counting = Counting()
        await send([counting], method, path, response=Response(200, CHAT_RESPONSE))
        assert counting.outcomes[0].usage is None


async def test_a_refused_request_used_nothing() -> None:
    """An error of Azure, of the network or of a stage."""
    for answer in (Response.json({"error": {"usage": {"x": 1}}}, 429), UpstreamError("down")):
        counting = Counting()
        await post(counting, response=answer, json=CHAT)
        assert counting.outcomes[0].usage is None


async def stream(words: int = 5) -> AsyncIterator[bytes]:
    for _ in range(words):
        yield WORD


async def test_an_abandoned_stream_is_counted() -> None:
    """The tokens until the client left are counted."""
    counting = Counting()
    answer = Response(200, stream(), {"content-type": "text/event-stream"})
    body = {**CHAT, "stream": True}
    await post(
        counting, response=answer, json=body, leave_after=2 * len(sse({"choices": [{"delta": {"content": " word"}}]}))
    )
    used = counting.outcomes[0].usage
    assert used is not None
    prompt, source = prompt_tokens(json.dumps(body, separators=(",", ":")).encode(), "gpt-4o")
    assert (used.input_tokens, used.source) == (prompt, source)
    assert used.output_tokens == count_tokens(" word" * 2, "gpt-4o")[0]


async def test_several_responses_are_summed() -> None:
    """Of all requests to Azure: a request can be sent in parts, or again."""

    class Twice(Stage):
        async def __call__(self, request: Request, call_next: Next) -> Response:
            await request.buffer(1000)
            await call_next(request.copy())
            return await call_next(request)

    counting = Counting()
    await post(counting, Twice(), response=Response(200, CHAT_RESPONSE), json=CHAT)
    assert counting.outcomes[0].usage == CHAT_TOTAL + CHAT_TOTAL


def test_a_sum_has_the_least_reliable_source() -> None:
    """A sum has the least reliable source of its parts."""
    assert (Usage(1) + Usage(1, source="estimated") + Usage(1, source="counted")).source == "estimated"


# -- through a gateway ---------------------------------------------------------------------------------


async def test_the_usage_of_json_is_in_the_log(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """As Azure reports it."""
    gateway = await start_gateway(azure.endpoint)
    async with gateway.post() as answer:
        assert answer.status == 200
    await gateway.idle()
    event = gateway.exchanges()[0]
    assert (event["input_tokens"], event["output_tokens"], event["usage_source"]) == (9, 3, "reported")


@pytest.mark.parametrize("options", [None, {"include_usage": False}, {"include_usage": True}])
async def test_the_usage_of_a_stream_is_requested_and_hidden(
    options: dict[str, bool] | None, start_gateway: StartGateway, azure: FakeAzure
) -> None:
    """For the gateway; the client sees the usage only if it requested it."""
    gateway = await start_gateway(azure.endpoint)
    body = {**CHAT, "stream": True, **({"stream_options": options} if options is not None else {})}
    async with gateway.post(json=body) as answer:
        received = await answer.read()
    await gateway.idle()
    asked = bool(options and options["include_usage"])
    assert (b'"usage"' in received) == asked
    assert received.endswith(b"data: [DONE]\n\n")
    assert json.loads(azure.requests[0].body)["stream_options"]["include_usage"] is True
    event = gateway.exchanges()[0]
    assert (event["input_tokens"], event["output_tokens"], event["usage_source"]) == (9, 3, "reported")


async def test_an_old_api_version_gets_no_request_for_usage(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """It rejects `stream_options`: the tokens are counted or estimated."""
    yaml = (
        'resources: {azure: {endpoint: "${ENDPOINT}"}}\n'
        "pipeline: [access_log, auth_passthrough, model_map, api_version: 2024-06-01, sse_newline]\n"
    )
    gateway = await start_gateway(azure.endpoint, yaml)
    async with gateway.post(json={**CHAT, "stream": True}) as answer:
        await answer.read()
    await gateway.idle()
    assert "stream_options" not in json.loads(azure.requests[0].body)
    event = gateway.exchanges()[0]
    assert event["usage_source"] in ("counted", "estimated")
    assert event["output_tokens"] == count_tokens("Hello there!", "gpt-4o")[0]


async def test_usage_is_not_requested_unless_a_stage_needs_it(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Without a stage that needs usage the body stays unchanged."""
    yaml = (
        'resources: {azure: {endpoint: "${ENDPOINT}"}}\n'
        "pipeline: [access_log: {usage: false}, auth_passthrough, model_map, api_version, sse_newline]\n"
    )
    gateway = await start_gateway(azure.endpoint, yaml)
    async with gateway.post(json={**CHAT, "stream": True}) as answer:
        await answer.read()
    await gateway.idle()
    assert json.loads(azure.requests[0].body) == {**CHAT, "stream": True}
    assert "input_tokens" not in gateway.exchanges()[0]


async def test_a_client_that_leaves_a_stream_has_used_its_tokens_so_far(start_gateway: StartGateway) -> None:
    """The usage is in the log, once, however the exchange ended."""
    go = asyncio.Event()

    async def slow(_: Any, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(3):
            await response.write(WORD)
        await go.wait()
        return response

    async with FakeAzure(respond=slow) as azure:
        gateway = await start_gateway(azure.endpoint)
        async with gateway.post(json={**CHAT, "stream": True}) as answer:
            received = b""
            while received.count(b" word") < 3:
                received += await answer.content.readany()
        await until(lambda: gateway.exchanges())
        go.set()
    (event,) = gateway.exchanges()
    assert (event["ended_by"], event["output_tokens"]) == ("client", count_tokens(" word" * 3, "gpt-4o")[0])
    assert event["usage_source"] in ("counted", "estimated")


async def test_a_client_that_leaves_before_the_response_has_used_its_prompt(start_gateway: StartGateway) -> None:
    """Azure was working on it; the output is unknown."""
    arrived = asyncio.Event()

    async def never(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}]}")
        arrived.set()
        await reader.read()

    async with RawUpstream(never) as upstream:
        gateway = await start_gateway(f"http://127.0.0.1:{upstream.port}")
        asking = asyncio.create_task(gateway.post().__aenter__())
        await arrived.wait()
        asking.cancel()
        await until(lambda: gateway.exchanges())
    (event,) = gateway.exchanges()
    assert event["output_tokens"] == 0
    assert event["input_tokens"] > 0


async def test_the_usage_of_a_broken_stream(start_gateway: StartGateway) -> None:
    """The tokens before the break are counted."""
    events = WORD * 4

    async def breaks(_: Any, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(events)
        assert request.transport is not None
        request.transport.abort()
        return response

    async with FakeAzure(respond=breaks) as azure:
        gateway = await start_gateway(azure.endpoint)
        async with gateway.post(json={**CHAT, "stream": True}) as answer:
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.read()
        await gateway.idle()
    (event,) = gateway.exchanges()
    assert (event["ended_by"], event["output_tokens"]) == ("upstream", count_tokens(" word" * 4, "gpt-4o")[0])


def test_a_meter_without_a_response_has_no_usage() -> None:
    """No request was sent to Azure."""
    meter = UsageMeter()
    assert meter.usage(abandoned=True) is None
    meter.watch("chat.completions", b"{}", None)
    assert meter.usage(abandoned=True) is None


@pytest.mark.parametrize(("size", "source"), [(100_000, "reported"), (2_000_000, "estimated")])
async def test_a_body_is_metered_even_if_no_stage_reads_its_model(
    size: int, source: str, start_gateway: StartGateway, azure: FakeAzure
) -> None:
    """The deployment is in the path; a large body streams through, without a request for the stream's usage."""
    gateway = await start_gateway(azure.endpoint)
    body = {"messages": [{"role": "user", "content": "x" * size}], "stream": True}
    path = "/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21"
    sent = io.BytesIO(json.dumps(body).encode())
    headers = {"content-type": "application/json"}
    async with gateway.post(path, None, data=sent, headers=headers) as answer:
        assert b'"usage"' not in await answer.read()
    await gateway.idle()
    (event,) = gateway.exchanges()
    assert event["usage_source"] in (source, "counted" if source == "estimated" else source)
    assert event["output_tokens"] == (3 if source == "reported" else count_tokens("Hello there!", "gpt-4o")[0])


def test_the_metered_operations_exist() -> None:
    """All names are in the table of operations; none with a prompt is unreported."""
    assert set(BY_NAME) >= METERED | UNREPORTED
    assert not UNREPORTED & PROMPTED
