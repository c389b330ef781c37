"""Peeking at the beginning of a body consumes nothing, and loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway import Response
from gateway.body.peekable_body import PeekedBody
from gateway.testing import FakeAzure
from tests.conftest import CHAT, StartGateway, raw_upstream

PIECES = [b"one ", b"two ", b"three"]


async def source(*, pause: float = 0.0) -> AsyncIterator[bytes]:
    for piece in PIECES:
        await asyncio.sleep(pause)
        yield piece


@pytest.mark.parametrize(
    ("wanted", "seen"),
    [(b"", b""), (b"o", b"one "), (b"two", b"one two "), (b"three", b"one two three"), (b"four", b"one two three")],
)
async def test_a_stage_s_own_stream_stays_whole(wanted: bytes, seen: bytes) -> None:
    """Peeking reads up to the piece that suffices, or the end, and no further."""
    response = Response(200, source())
    assert seen == await response.peek(lambda data: wanted in data, 5)
    assert seen == await response.peek(lambda _: True, 5)
    assert await response.read() == b"one two three"


async def test_a_buffered_body_is_returned_whole() -> None:
    """Bytes are returned whole, whatever the predicate says."""
    assert await Response(200, b"all").peek(lambda _: False, 5) == b"all"


async def test_waiting_for_too_long_loses_no_byte() -> None:
    """Bytes that arrive later are part of the body; the timeout does not disturb the source."""
    response = Response(200, source(pause=0.02))
    assert await response.peek(lambda _: False, 0.001) == b""
    assert await response.read() == b"one two three"


async def test_what_is_kept_is_bounded() -> None:
    """Peeking stops above 64 KiB."""

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 10_000

    assert len(await Response(200, endless()).peek(lambda _: False, 5)) == 70_000


async def test_closing_closes_the_source() -> None:
    """Even while `grow` waits for it."""
    closed = asyncio.Event()

    async def waits() -> AsyncIterator[bytes]:
        try:
            yield b"a"
            await asyncio.sleep(60)
        finally:
            closed.set()

    response = Response(200, waits())
    assert await response.peek(lambda data: b"b" in data, 0.01) == b"a"
    assert isinstance(response.body, PeekedBody)
    await response.body.aclose()
    assert closed.is_set()


PEEKS = """
from gateway import Stage

class Peeks(Stage):
    async def __call__(self, request, call_next):
        response = await call_next(request)
        seen = await response.peek(lambda data: b"[DONE]" in data, 5)
        response.headers.set("x-seen", str(len(seen)))
        return response
"""
YAML = """
plugins_path: mine
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline: [peeks, access_log: {usage: false}, auth_passthrough, model_map, api_version]
"""


async def test_azure_s_stream_stays_whole(start_gateway: StartGateway) -> None:
    """After peeking to the end, the client gets every byte; a stream above 64 KiB is not kept."""
    for words in (["Hello"], ["x" * 1000] * 200):
        async with FakeAzure(words=words) as azure:
            gateway = await start_gateway(azure.endpoint, YAML, {"mine/peeks.py": PEEKS})
            async with gateway.post(json={**CHAT, "stream": True}) as answer:
                body = await answer.read()
            assert body.endswith(b"data: [DONE]\n\n")
            assert body.count(words[0].encode()) == len(words)
            assert int(answer.headers["x-seen"]) in (len(body), *range(64 * 1024, 400 * 1024))


async def test_a_break_is_raised(start_gateway: StartGateway) -> None:
    """If Azure's connection breaks while a stage peeks, nothing was sent yet: the client gets a 502."""
    broken = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n5\r\ndata:\r\n"
    async with raw_upstream(broken) as upstream:
        gateway = await start_gateway(upstream.endpoint, YAML, {"mine/peeks.py": PEEKS})
        async with gateway.post(json={**CHAT, "stream": True}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (502, "upstream_error")
