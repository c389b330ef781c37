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
from hypothesis import given
from hypothesis import strategies as st

from gateway import Next, Outcome, Request, Response, Stage, UpstreamError
from gateway.azure.operations import BY_NAME
from gateway.testing import FakeAzure, post, send
from gateway.usage import tokenizer as tokens
from gateway.usage.accounting import UsageMeter
from gateway.usage.metered_operations import METERED, PROMPTED, UNREPORTED
from gateway.usage.reported_usage import Usage
from gateway.usage.response_text import text_of_events
from gateway.usage.tokenizer import count_tokens, load_encodings, prompt_tokens
from gateway.usage.usage_reader import _TEXT_SIZE, UsageReader
from tests.chunks import event as sse
from tests.conftest import CHAT, RawUpstream, StartGateway, until

WORD = sse({"choices": [{"delta": {"content": " word"}}]})
CHAT_USAGE = (
    b'{"completion_tokens":13,"completion_tokens_details":{"accepted_prediction_tokens":0,"audio_tokens":2,'
    b'"reasoning_tokens":5,"rejected_prediction_tokens":0},"prompt_tokens":12,"prompt_tokens_details":'
    b'{"audio_tokens":1,"cached_tokens":4},"total_tokens":25}'
)
WHOLE = Usage(12, 13, 4, 5, 1, 2)
RESPONSES = b"""event: response.created
data: {"response":{"tools":[{"parameters":{"properties":{"usage":{"type":"string"}}}}],"usage":null}}

event: response.completed
data: {"response":{"usage":{"input_tokens":7,"input_tokens_details":{"cached_tokens":3},"output_tokens":9,\
"output_tokens_details":{"reasoning_tokens":8},"total_tokens":16}}}

"""
REALTIME = b"""{"type":"response.done","response":{"usage":{"total_tokens":30,"input_tokens":10,"output_tokens":20,
"input_token_details":{"text_tokens":4,"audio_tokens":6,"cached_tokens":2},
"output_token_details":{"text_tokens":5,"audio_tokens":15}}}}"""
STREAM = (
    b'data: {"choices":[{"delta":{"content":"hi"}}],"usage":null}\n\ndata: {"choices":[],"usage":'
    + CHAT_USAGE
    + b"}\n\ndata: [DONE]\n\n"
)
BODIES = {
    "chat": (b'{"choices":[{"message":{"content":"the \\"usage\\":{}"}}],"usage":' + CHAT_USAGE + b"}", WHOLE),
    "spaces": (b'{"choices": [], "usage" :\n ' + CHAT_USAGE.replace(b":", b" : ") + b"}", WHOLE),
    "stream": (STREAM, WHOLE),
    "responses": (RESPONSES, Usage(7, 9, 3, 8)),
    "embeddings": (b'{"data":[],"usage":{"prompt_tokens":5,"total_tokens":5}}', Usage(5)),
    "total alone": (b'{"data":[],"usage":{"total_tokens":5}}', Usage(5)),
    "realtime": (REALTIME, Usage(10, 20, 2, 0, 6, 15)),
    "duration": (b'{"text":"hi","usage":{"type":"duration","seconds":3}}', None),
    "no usage": (b'{"text":"hi","usage":null}', None),
    "junk": (b'{"usage":{"prompt_tokens":"many"},"usage":{', None),
}


@pytest.fixture(autouse=True, scope="module")
def _tokenizer() -> None:
    """Load the encodings, as the gateway does when they are first needed."""
    load_encodings()


@pytest.mark.parametrize("name", BODIES)
def test_the_usage_of_every_api_at_every_split(name: str) -> None:
    """However the response is split: with the names of each API, and never a text that only looks like usage."""
    body, expected = BODIES[name]
    for place in range(len(body) + 1):
        reader = UsageReader()
        reader.feed(body[:place])
        reader.feed(body[place:])
        assert reader.reported == expected, place
    reader = UsageReader()
    for place in range(len(body)):
        reader.feed(body[place : place + 1])
    assert reader.reported == expected


@given(st.lists(st.integers(1, 40)), st.sampled_from(sorted(BODIES)))
def test_the_usage_in_pieces_of_any_size(sizes: list[int], name: str) -> None:
    """The result does not depend on how the bytes arrive."""
    body, expected = BODIES[name]
    reader = UsageReader()
    for size in sizes:
        reader.feed(body[:size])
        body = body[size:]
    reader.feed(body)
    assert reader.reported == expected


def test_the_answers_of_a_websocket_are_summed() -> None:
    """The usage of each of its responses counts; of a single response, the last one."""
    for each, expected in ((True, Usage(20, 40, 4, 0, 12, 30)), (False, Usage(10, 20, 2, 0, 6, 15))):
        reader = UsageReader(each=each)
        reader.feed(BODIES["realtime"][0] * 2)
        assert reader.reported == expected


def test_what_a_tool_is_described_by_is_no_usage() -> None:
    """Otherwise a client could make its responses cheap by disconnecting before the end."""
    tools = [{"parameters": {"properties": {"usage": {"input_tokens": 0, "output_tokens": 0}}}}]
    created = sse({"type": "response.created", "response": {"tools": tools, "usage": None}})
    for place in range(len(created)):
        reader = UsageReader()
        reader.feed(created[:place])
        reader.feed(created[place:])
        assert reader.reported is None


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("first", [1, 3, 5, 9])
def test_a_stream_is_one_however_it_begins(newline: bytes, first: int) -> None:
    """Whatever the first read contains, and whatever the lines end with."""
    data = (WORD * 3).replace(b"\n", newline)
    reader = UsageReader()
    reader.feed(data[:first])
    reader.feed(data[first:])
    assert reader.output()[0] == count_tokens(" word" * 3, "gpt-4o")[0]


def test_a_picture_in_a_stream_is_not_kept() -> None:
    """The text after the picture counts."""
    reader = UsageReader()
    reader.feed(b'data: {"type":"image_generation.partial_image","b64_json":"')
    for _ in range(500):
        reader.feed(b"A" * 16_384)
    assert sum(map(len, reader._kept)) < 1_100_000
    reader.feed(b'"}\n\n' + WORD)
    assert reader.output()[0] == count_tokens(" word", "gpt-4o")[0]


@pytest.mark.parametrize(
    ("deltas", "text"),
    [
        ([{"content": "Hel"}, {"content": "lo"}], "Hello"),
        ([{"content": 'a "quoted"\n\u20ac\\'}, {"content": "\U0001f600"}], 'a "quoted"\n\u20ac\\\U0001f600'),
        ([{"content": "a", "reasoning_content": "why"}, {"content": "b"}], "awhyb"),
        ([{"content": "a", "refusal": "no"}], "ano"),
        ([{"content": "a", "tool_calls": [{"function": {"arguments": '{"content":"x"}'}}]}], 'a{"content":"x"}'),
        ([{"content": "a"}, {"content": "", "reasoning_content": "why"}, {}], "awhy"),
        ([{"content": "data: {}"}, {"content": "b"}], "data: {}b"),
    ],
)  # fmt: skip
def test_the_text_of_a_stream_is_all_that_its_events_add(deltas: list[dict[str, Any]], text: str) -> None:
    """The fast path for plain text and the slow path have the same result."""
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    compact = [
        json.dumps(chunk, separators=(",", ":"), ensure_ascii=place % 2 == 0) for place, chunk in enumerate(chunks)
    ]
    events = [f"data: {chunk}\n\n" for chunk in compact]
    assert text_of_events("".join(events).encode()) == text


@pytest.mark.parametrize("counted", [True, False])
def test_a_long_stream_is_not_kept(counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its events nor its text: the tokens are counted or estimated piece by piece."""
    if not counted:
        monkeypatch.setattr(tokens, "toktok", None)
    reader, most, text = UsageReader("gpt-4o"), 0, ""
    for number in range(20_000):
        word = f" word {number % 700}"
        text += word
        reader.feed(sse({"choices": [{"delta": {"content": word}}], "padding": "x" * 300}))
        most = max(most, reader._text.tell() + sum(map(len, reader._kept)))
    assert most < _TEXT_SIZE + 10_000
    assert len(text) > 5 * _TEXT_SIZE
    whole, source = count_tokens(text, "gpt-4o")
    found, how = reader.output()
    assert how == source
    assert whole <= found <= whole + 3 * len(text) // _TEXT_SIZE


def test_a_long_answer_is_estimated_by_its_length() -> None:
    """The response broke off before the usage at its end."""
    reader = UsageReader()
    for _ in range(100):
        reader.feed(b'{"data": "' + b"x" * 4000)
    assert sum(map(len, reader._kept)) < 70_000
    assert reader.output() == (100_250, "estimated")


@dataclass
class Counting(Stage):
    """Keeps the outcomes that `defer` callbacks get."""

    needs_usage = True

    def __post_init__(self) -> None:
        self.outcomes: list[Outcome] = []

    async def __call__(self, request: Request, call_next: Next) -> Response:
        request.defer(self.outcomes.append)
        return await call_next(request)


async def test_a_stage_that_wants_usage_gets_it() -> None:
    """In the outcome; nothing is measured if no stage needs it."""
    counting = Counting()
    answer = Response(200, BODIES["chat"][0], {"content-type": "application/json"})
    await post(counting, answer=answer, json=CHAT)
    assert counting.outcomes[0].usage == WHOLE
    assert counting.outcomes[0].usage.total_tokens == 25
    sent = await post(answer=answer, json=CHAT)
    assert sent.outcome.usage is None


async def test_only_what_uses_tokens_is_asked() -> None:
    """A stored response, or the file of a batch, has the usage of others."""
    for method, path in (("GET", "/responses/resp_1"), ("GET", "/files/f/content"), ("GET", "/chat/completions/c")):
        counting = Counting()
        await send([counting], method, path, answer=Response(200, BODIES["chat"][0]))
        assert counting.outcomes[0].usage is None


async def test_a_refused_request_used_nothing() -> None:
    """An error of Azure, of the network or of a stage."""
    for answer in (Response.json({"error": {"usage": {"x": 1}}}, 429), UpstreamError("down")):
        counting = Counting()
        await post(counting, answer=answer, json=CHAT)
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
        counting, answer=answer, json=body, leave_after=2 * len(sse({"choices": [{"delta": {"content": " word"}}]}))
    )
    used = counting.outcomes[0].usage
    assert used is not None
    prompt, source = prompt_tokens(json.dumps(body, separators=(",", ":")).encode(), "gpt-4o")
    assert (used.input_tokens, used.source) == (prompt, source)
    assert used.output_tokens == count_tokens(" word" * 2, "gpt-4o")[0]


async def test_several_answers_are_summed() -> None:
    """Of all requests to Azure: a request can be sent in parts, or again."""

    class Twice(Stage):
        async def __call__(self, request: Request, call_next: Next) -> Response:
            await request.buffer(1000)
            await call_next(request.copy())
            return await call_next(request)

    counting = Counting()
    await post(counting, Twice(), answer=Response(200, BODIES["chat"][0]), json=CHAT)
    assert counting.outcomes[0].usage == WHOLE + WHOLE


def test_the_least_sure_source_is_told() -> None:
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
async def test_a_stream_is_asked_for_its_usage(
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


async def test_an_old_api_version_is_not_asked(start_gateway: StartGateway, azure: FakeAzure) -> None:
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


async def test_nothing_is_asked_for_nobody(start_gateway: StartGateway, azure: FakeAzure) -> None:
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


async def test_a_client_that_leaves_a_stream_has_used_what_came(start_gateway: StartGateway) -> None:
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


async def test_a_client_that_leaves_before_the_answer_has_used_its_prompt(start_gateway: StartGateway) -> None:
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


def test_a_meter_that_saw_nothing_knows_nothing() -> None:
    """No request was sent to Azure."""
    meter = UsageMeter()
    assert meter.usage(abandoned=True) is None
    meter.watch("chat.completions", b"{}", None)
    assert meter.usage(abandoned=True) is None


@pytest.mark.parametrize(("size", "source"), [(100_000, "reported"), (2_000_000, "estimated")])
async def test_a_body_of_which_nobody_asks_the_model_is_metered(
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


def test_what_is_metered_are_operations() -> None:
    """All names are in the table of operations; none with a prompt is unreported."""
    assert set(BY_NAME) >= METERED | UNREPORTED
    assert not UNREPORTED & PROMPTED
