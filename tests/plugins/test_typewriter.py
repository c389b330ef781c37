"""`typewriter`: spreads events that arrive in bursts."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from aiohttp import web

from gateway import Response
from gateway.testing import FakeAzure, Seen, post
from plugins.typewriter import Typewriter
from tests.chunks import PLAIN, chunk, event, stream
from tests.conftest import CHAT, YAML, RawUpstream, StartGateway, chat_request, hard_close

LUMP = stream(PLAIN[0], *(chunk(f"word {number}") for number in range(30)), PLAIN[3])
PACED = YAML + "  - typewriter: 0.3\n"


async def test_streams_alone_get_a_pace() -> None:
    """The configured one; other responses have none."""
    events = await post(Typewriter(0.25), response=Response(200, LUMP, {"content-type": "text/event-stream"}), json={})
    assert events.response.pace == 0.25
    assert (await post(Typewriter(), json={})).response.pace is None


async def test_a_lump_reaches_the_client_in_pieces_and_whole(start_gateway: StartGateway) -> None:
    """Each event in nearly its own piece, in order, and the stream ends correctly."""

    async def respond(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(LUMP)
        return response

    async with FakeAzure(respond=respond) as azure:
        gateway = await start_gateway(azure.endpoint, PACED)
        plain = await start_gateway(azure.endpoint)
        async with gateway.post(json={**CHAT, "stream": True}) as answer:
            pieces = [piece async for piece, _ in answer.content.iter_chunks()]
        async with plain.post(json={**CHAT, "stream": True}) as answer:
            unpaced = [piece async for piece, _ in answer.content.iter_chunks()]
    assert b"".join(pieces) == b"".join(unpaced) == LUMP
    assert len(unpaced) < 5 < len(pieces)


@pytest.mark.parametrize("reset", [False, True])
async def test_what_came_before_a_break_is_not_lost(start_gateway: StartGateway, reset: bool) -> None:
    """A stream that Azure breaks off ends with all events that arrived, then the error."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upstream.request(reader)
        data = LUMP.removesuffix(b"data: [DONE]\n\n") + b"data: half"
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await writer.drain()
        await asyncio.sleep(0.05)
        if reset:
            hard_close(writer)

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, PACED)
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(chat_request(stream=True))
        received = await reader.read()
        writer.close()
    assert received.count(b"word") == 30
    assert b"data: half" in received
    assert b'"code":"upstream_error"' in received


async def test_a_client_that_leaves_ends_it(start_gateway: StartGateway) -> None:
    """Nothing is kept for it, and the connection to Azure is closed."""
    async with FakeAzure(words=["x"] * 1000, delay=0.001) as azure:
        gateway = await start_gateway(azure.endpoint, PACED)
        async with gateway.post(json={**CHAT, "stream": True}) as answer:
            await answer.content.read(10)
        await gateway.idle()
        assert gateway.exchanges()[0]["ended_by"] == "client"


async def test_a_client_that_reads_slowly_gets_every_byte(start_gateway: StartGateway) -> None:
    """Azure waits meanwhile, and so do the paced events."""
    words = ["y" * 2000] * 2000

    async with FakeAzure(words=words) as azure:
        gateway = await start_gateway(azure.endpoint, PACED)
        connector = aiohttp.TCPConnector()
        async with (
            aiohttp.ClientSession(connector=connector, read_bufsize=4096) as session,
            session.post(
                f"{gateway.url}/v1/chat/completions",
                json={**CHAT, "stream": True},
                headers={"Authorization": "Bearer azure-key"},
            ) as answer,
        ):
            await asyncio.sleep(0.5)
            body = await answer.read()
    assert body.count(b"y" * 2000) == 2000
    assert body.endswith(event("x").replace(b'"x"', b"[DONE]"))


async def test_a_gateway_that_stops_lets_what_waits_leave(start_gateway: StartGateway) -> None:
    """Azure has sent the whole response: it ends correctly, only sooner."""
    sent = asyncio.Event()

    async def respond(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(LUMP)
        await response.write_eof()
        sent.set()
        return response

    async with FakeAzure(respond=respond) as azure:
        gateway = await start_gateway(azure.endpoint, YAML + "  - typewriter: 10\n", timeouts={"grace": 0.1})
        async with gateway.post(json={**CHAT, "stream": True}) as answer:
            await answer.content.readany()
            await sent.wait()
            stopping = asyncio.create_task(gateway.server.stop())
            rest = await answer.read()
            await stopping
    assert rest.endswith(b"data: [DONE]\n\n")
    assert gateway.exchanges()[0]["ended_by"] == "complete"
