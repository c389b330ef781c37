"""`stream_errors`: an error inside a stream with status 200 reaches clients as an error."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from gateway import Response, UpstreamError
from gateway.errors import ConfigError
from gateway.protocol.filters import FilterFailed, chain_filters
from gateway.testing import FakeAzure, Seen, post
from plugins.openai_errors import OpenAIErrors
from plugins.stream_errors import StreamErrors
from tests.chunks import DONE, PLAIN, PROMPT, USAGE, cuts, event, stream
from tests.conftest import CHAT, YAML, StartGateway

EVENTS = {"content-type": "text/event-stream", "x-ratelimit-remaining-tokens": "0"}
LIMIT = {"error": {"code": "429", "message": "Rate limit is exceeded. Try again in 9 seconds."}}
FILTERED = {"error": {"code": "content_filter", "message": "filtered", "type": None, "param": "prompt"}}
STAGES = YAML.replace("  - sse_newline", "  - openai_errors\n  - stream_errors\n  - sse_newline")


def pieces(*data: bytes) -> Any:
    """Return an end of the pipeline that responds with a stream in these pieces."""

    async def body() -> AsyncIterator[bytes]:
        for piece in data:
            await asyncio.sleep(0)
            yield piece

    return lambda _: Response(200, body(), EVENTS)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (LIMIT, 429),
        (FILTERED, 400),
        ({"error": {"status": 503, "message": "busy"}}, 503),
        ({"error": {"code": None, "type": "server_error", "message": "oh"}}, 500),
        ({"error": {"code": "TooManyRequests", "message": "slow"}}, 429),
        ({"error": {"code": 1234, "message": "what"}}, 500),
        ({"error": "out of words"}, 500),
    ],
)
async def test_an_error_at_the_beginning_has_its_own_status(error: dict[str, Any], status: int) -> None:
    """Also after comments and the chunk with the prompt's filter results; the response's headers stay."""
    for before in (b"", b": ping\n\n", event(PROMPT)):
        sent = await post(StreamErrors(), response=pieces(before, event(error)), json={})
        own = error["error"] if isinstance(error["error"], dict) else {"message": error["error"]}
        assert (sent.status, sent.json()) == (status, {"error": own})
        assert sent.headers.get("content-type") == "application/json"
        assert sent.headers.get("x-ratelimit-remaining-tokens") == "0"
        assert dict(sent.outcome.counts) == {"StreamErrors": 1}


async def test_openai_errors_above_it_gives_it_openai_s_words() -> None:
    """And has the time to retry."""
    sent = await post(OpenAIErrors(), StreamErrors(), response=pieces(event(LIMIT)), json={})
    assert (sent.status, sent.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert sent.headers.get("retry-after") == "9"


async def test_an_error_after_output_ends_the_stream_as_broken() -> None:
    """The events before it are sent; the client raises the error."""
    sent_on = stream(PROMPT, *PLAIN[:2], done=b"")
    both = await post(StreamErrors(), response=pieces(sent_on + event(FILTERED)), json={})  # in one read
    assert (both.status, both.body, both.outcome.ended_by) == (200, sent_on, "upstream")
    answer = await post(StreamErrors(), response=pieces(sent_on), json={})
    linked = chain_filters(answer.response.filters)
    assert linked.feed(sent_on) == sent_on
    with pytest.raises(FilterFailed, match="filtered") as caught:
        linked.feed(event(FILTERED))
    assert isinstance(caught.value.cause, UpstreamError)
    assert (caught.value.cause.code, caught.value.cause.param) == ("content_filter", "prompt")


@given(st.lists(st.integers(0, 3000), max_size=6), st.sampled_from([stream(*PLAIN), stream(PROMPT, *PLAIN, USAGE)]))
async def test_a_stream_without_errors_keeps_its_bytes(places: list[int], data: bytes) -> None:
    """For any split, with and without the word in a text."""
    data = data.replace(b"Hello", b'say \\"error\\"')
    sent = await post(StreamErrors(), response=pieces(*cuts(data, places)), json={})
    assert (sent.status, sent.body, sent.outcome.counts) == (200, data, {})


@pytest.mark.parametrize("data", [b"", DONE, b": ping\n\n", b"data: {\n\n", b"no event at all", event(PROMPT), b"\n\n"])
async def test_streams_that_say_nothing_pass(data: bytes) -> None:
    """Byte for byte."""
    sent = await post(StreamErrors(), response=pieces(data), json={})
    assert (sent.status, sent.body) == (200, data)


@pytest.mark.parametrize(
    "content",
    [{"type": "error", "error": {"message": "its own"}}, {"error": None, "choices": []}, {**PLAIN[0], "error": {}}],
)
async def test_what_is_no_error_of_a_chat_stream_passes(content: object) -> None:
    """The Responses API has its own error events, which its clients read."""
    data = stream(content, *PLAIN)
    sent = await post(StreamErrors(), response=pieces(data), json={})
    assert (sent.status, sent.body) == (200, data)


async def test_the_head_waits_no_longer_than_it_may() -> None:
    """A slow model does not delay the head; not a byte of the stream is lost."""
    first = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield event(PROMPT)
        await first.wait()
        yield stream(*PLAIN)

    def answer(_: object) -> Response:
        asyncio.get_running_loop().call_later(0.1, first.set)
        return Response(200, slow(), EVENTS)

    sent = await post(StreamErrors(wait=0.01), response=answer, json={})
    assert (sent.status, sent.body) == (200, stream(PROMPT, *PLAIN))


async def test_over_sockets(start_gateway: StartGateway) -> None:
    """A 429 in a stream is a 429 for the client; a later error ends a chunked body without its last chunk."""
    later = asyncio.Event()

    async def respond(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        if later.is_set():
            await response.write(stream(PROMPT, *PLAIN[:2], done=b""))
        await response.write(event(LIMIT))
        return response

    async with FakeAzure(respond=respond) as azure:
        gateway = await start_gateway(azure.endpoint, STAGES)
        async with gateway.post(json={**CHAT, "stream": True}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (429, "rate_limit_exceeded")
            assert answer.headers["retry-after-ms"] == "9000"
        later.set()
        async with gateway.post(json={**CHAT, "stream": True}) as answer:
            assert answer.status == 200
            received = b""
            with pytest.raises(aiohttp.ClientPayloadError):  # noqa: PT012 -- what came before is looked at
                async for piece in answer.content.iter_any():
                    received += piece
            assert received.startswith(stream(PROMPT, *PLAIN[:2], done=b"") + b'data: {"error"')
        await gateway.idle()
    refused, broken = gateway.exchanges()
    assert (refused["status"], refused["counts"]) == (429, {"stream_errors": 1})
    assert (broken["ended_by"], broken["error"], broken["counts"]) == ("upstream", "429", {"stream_errors": 1})


async def test_a_stream_that_breaks_before_its_first_event_is_a_502(start_gateway: StartGateway) -> None:
    """Nothing was sent yet, so the client gets a status."""

    async def cut(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(event(PROMPT))
        assert request.transport is not None
        request.transport.abort()
        return response

    async with FakeAzure(respond=cut) as azure:
        gateway = await start_gateway(azure.endpoint, STAGES)
        async with gateway.post(json={**CHAT, "stream": True}) as answer:
            assert (answer.status, json.loads(await answer.read())["error"]["code"]) == (502, "upstream_error")


@pytest.mark.parametrize(
    "data",
    [
        event(LIMIT)[:-1],
        event(LIMIT)[:-2],
        event(LIMIT).replace(b"\n", b"\r"),
        event(LIMIT)[6:-2],
        b"event: error\n" + event(LIMIT)[:-2],
        b": c\nid: 1\n" + event(LIMIT)[:-1],
        b"\xef\xbb\xbf" + event(LIMIT)[:-2],
        json.dumps(LIMIT, indent=1).encode(),
        event({"statusCode": 429, "message": "Rate limit is exceeded."}),
        event({"error": {"type": "too_many_requests", "message": "slow"}}),
    ],
)
async def test_an_error_that_is_not_quite_an_event_is_one(data: bytes) -> None:
    """Without its blank line, which Azure has left out, as plain JSON, and as API Management writes it."""
    for before in (b"", event(PROMPT)):
        sent = await post(StreamErrors(), response=pieces(before, data), json={})
        assert sent.status == 429, data


async def test_an_error_after_output_says_what_it_was() -> None:
    """Its code, even a number, and the type of its status."""
    for code, kind in ((429, "requests"), ("content_filter", "invalid_request_error"), (None, "server_error")):
        error = {"error": {"code": code, "message": "m", "param": "prompt"}}
        linked = chain_filters((await post(StreamErrors(), response=pieces(stream(*PLAIN)), json={})).response.filters)
        with pytest.raises(FilterFailed) as caught:
            linked.feed(event(error))
        cause = caught.value.cause
        assert isinstance(cause, UpstreamError)
        assert (cause.code, cause.type, cause.param) == (str(code or "upstream_error"), kind, "prompt")


async def test_a_compressed_stream_is_not_waited_for() -> None:
    """Its first bytes cannot be read: the body passes unchanged."""

    async def body() -> AsyncIterator[bytes]:
        yield gzip.compress(stream(*PLAIN))

    made = body()
    answer = Response(200, made, {**EVENTS, "content-encoding": "gzip"})
    sent = await post(StreamErrors(), response=lambda _: answer, json={})
    assert (sent.body, sent.response.body) == (stream(*PLAIN), made)


async def test_the_end_is_completed_at_once_where_it_stands_above_sse_newline(start_gateway: StartGateway) -> None:
    """A client gets `[DONE]` at once, not when Azure closes; the other order is a mistake."""
    seen = asyncio.Event()

    async def respond(_: Seen, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(stream(*PLAIN, done=b"data: [DONE]\n"))
        await seen.wait()
        return response

    repairs = "  - missing_fields\n  - missing_delta\n  - prompt_filter_chunk\n  - openai_errors\n  - stream_errors\n"
    async with FakeAzure(respond=respond) as azure:
        gateway = await start_gateway(azure.endpoint, YAML.replace("  - sse_newline", repairs + "  - sse_newline"))
        async with gateway.post(json={**CHAT, "stream": True}) as answer:
            received = b""
            while not received.endswith(b"data: [DONE]\n\n"):
                received += await asyncio.wait_for(answer.content.readany(), 30)
            seen.set()
    for wrong in ("stream_errors", "missing_fields", "missing_delta", "prompt_filter_chunk"):
        with pytest.raises(ConfigError, match=f"'{wrong}' must be above 'sse_newline', which provides 'events'"):
            await start_gateway("http://x", YAML + f"  - {wrong}\n")
    with pytest.raises(ConfigError, match="'openai_errors' must be above 'stream_errors'"):
        await start_gateway("http://x", YAML.replace("  - sse_newline", "  - stream_errors\n  - openai_errors"))
