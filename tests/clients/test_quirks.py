"""Clients that fail on Azure's streams: they fail without the repairs and work with the shipped ones."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import openai
import pytest

from gateway.testing import FakeAzure
from tests.clients.test_clients import node
from tests.conftest import CHAT, KEY, YAML, Gateway, StartGateway

pytestmark = [pytest.mark.clients, pytest.mark.timeout(120)]

REPAIRS = ("missing_message", "missing_fields", "missing_delta", "prompt_filter_chunk: drop")
REPAIRED = YAML.replace("  - sse_newline\n", "".join(f"  - {stage}\n" for stage in REPAIRS) + "  - sse_newline\n")


def without(stage: str) -> str:
    """Return the shipped pipeline without one of its lines."""
    return REPAIRED.replace(f"  - {stage}\n", "")


@pytest.fixture
async def odd() -> AsyncIterator[FakeAzure]:
    """A fake Azure with the asynchronous filter."""
    async with FakeAzure(asynchronous_filter=True) as running:
        yield running


async def test_the_shipped_configuration_has_these_repairs(start_gateway: StartGateway, odd: FakeAzure) -> None:
    """These tests therefore hold for the shipped configuration."""
    from tests.test_deploy import ROOT

    shipped = (ROOT / "config" / "gateway.yaml").read_text()
    places = [shipped.index(f"\n  - {stage}") for stage in (*REPAIRS, "sse_newline")]
    assert places == sorted(places)


async def loop(gateway: Gateway) -> str:
    """Read a stream as the simplest program does."""
    async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{gateway.url}/v1", max_retries=0) as client:
        messages: Any = CHAT["messages"]
        text = ""
        async for chunk in await client.chat.completions.create(model="gpt-4o", messages=messages, stream=True):
            text += chunk.choices[0].delta.content or ""
        return text


async def test_a_plain_loop_in_openai_python(start_gateway: StartGateway, odd: FakeAzure) -> None:
    """`chunk.choices[0]` fails on the first chunk, `.delta.content` on the filter's findings."""
    assert await loop(await start_gateway(odd.endpoint, REPAIRED)) == "Hello there!"
    with pytest.raises(IndexError):
        await loop(await start_gateway(odd.endpoint, without("prompt_filter_chunk: drop")))
    with pytest.raises(AttributeError):
        await loop(await start_gateway(odd.endpoint, without("missing_delta")))


async def test_a_filtered_completion_in_openai_python(start_gateway: StartGateway) -> None:
    """`choices[0].message.content` fails if the filter withheld the message."""
    from aiohttp import web

    from gateway.testing import Seen

    async def withheld(seen: Seen, request: web.BaseRequest) -> web.Response:
        choice = {"content_filter_results": {}, "finish_reason": "content_filter", "index": 0, "logprobs": None}
        named = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "gpt-4o"}
        return web.Response(body=json.dumps({"choices": [choice], **named}).encode(), content_type="application/json")

    async def read(gateway: Gateway) -> str | None:
        async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{gateway.url}/v1", max_retries=0) as client:
            messages: Any = CHAT["messages"]
            completion = await client.chat.completions.create(model="gpt-4o", messages=messages)
            return completion.choices[0].message.content

    async with FakeAzure(respond=withheld) as azure:
        assert await read(await start_gateway(azure.endpoint, REPAIRED)) == ""
        with pytest.raises(AttributeError):
            await read(await start_gateway(azure.endpoint, without("missing_message")))


@pytest.mark.parametrize(
    ("client", "repair", "words"),
    [
        ("openai 7", "prompt_filter_chunk: drop", "reading 'delta'"),
        ("openai 7", "missing_delta", "reading 'content'"),
        ("openai 4", "prompt_filter_chunk: drop", "reading 'delta'"),
        ("openai 4", "missing_delta", "reading 'content'"),
        ("openai 4 helper", "missing_delta", "reading 'content'"),
        ("chatgpt", "missing_delta", "reading 'content'"),
    ],
)
async def test_clients_in_node_fail_without_the_repair(
    start_gateway: StartGateway, odd: FakeAzure, client: str, repair: str, words: str
) -> None:
    """With it they show the whole text: plain loops, the stream helper of the SDK 4.104, chatgpt 5.2.5."""
    run = read_with(client)
    assert (await run(await start_gateway(odd.endpoint, REPAIRED)))["text"] == "Hello there!"
    failed = await run(await start_gateway(odd.endpoint, without(repair)))
    assert words in failed["error"]


@pytest.mark.parametrize("client", ["@ai-sdk/azure", "@langchain/openai", "@langchain/openai azure"])
async def test_clients_that_bear_it_bear_the_repairs_too(
    start_gateway: StartGateway, odd: FakeAzure, client: str
) -> None:
    """The current AI SDK and LangChain read Azure's bytes and the repaired ones, on OpenAI's and Azure's paths."""
    for yaml in (REPAIRED, YAML):
        assert await read_with(client)(await start_gateway(odd.endpoint, yaml)) == {"text": "Hello there!"}


def read_with(client: str) -> Callable[[Gateway], Coroutine[Any, Any, Any]]:
    """Return a function that runs a client against a gateway."""
    script = ("chatgpt.mjs",) if client == "chatgpt" else ("quirks.mjs", client)
    return lambda gateway: node(script[0], gateway, *script[1:])
