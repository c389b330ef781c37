"""WebSockets through a running gateway, with a real client and a fake Azure: every frame, both ways, to the end."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import websockets
from aiohttp import WSMsgType, web
from websockets.asyncio.client import ClientConnection as WebSocketClient
from websockets.asyncio.client import connect

from gateway.errors import ApiError
from gateway.fair_scheduler import MOST_UNITS, STEP, FairScheduler
from gateway.limits.memory_budget import MemoryBudget
from gateway.protocol.websocket_frames import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    Control,
    FrameError,
    FrameParser,
    FrameWriter,
    Message,
    PassedFrames,
    encode_close_frame,
    encode_frame,
)
from gateway.testing import FakeAzure, Seen
from gateway.transport.client_connection import ClientConnection
from gateway.transport.websocket_limits import ControlFrameLimit
from gateway.transport.websocket_messages import error_event
from gateway.transport.websocket_relay import WebSocketRelay
from tests.conftest import CHAT, KEY, YAML, Gateway, RawUpstream, StartGateway, hard_close, until

pytestmark = pytest.mark.both_loops

REALTIME = YAML.replace("2024-10-21", "v1")
URL = "/v1/realtime?model=gpt-4o"
HANDSHAKE = (
    b"GET /v1/realtime?model=gpt-4o HTTP/1.1\r\nHost: gw.test\r\nAuthorization: Bearer azure-key\r\n"
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


async def echo(seen: Seen, opened: web.WebSocketResponse) -> None:
    """Send each message back, answer pings, and close with the client's own code."""
    async for message in opened:
        if message.type is WSMsgType.TEXT:
            await opened.send_str(message.data)
        elif message.type is WSMsgType.BINARY:
            await opened.send_bytes(message.data)
        elif message.type is WSMsgType.PING:
            await opened.pong(message.data)


@pytest.fixture
async def echoing() -> AsyncIterator[FakeAzure]:
    """A fake Azure that echoes messages."""
    async with FakeAzure(speak=echo) as running:
        yield running


def opened(gateway: Gateway, path: str = URL, *, key: str | None = KEY, **more: Any) -> Any:
    """Open a WebSocket through a gateway, as `websockets.connect` does."""
    headers = {**more.pop("headers", {}), **({"Authorization": f"Bearer {key}"} if key else {})}
    return connect(f"ws://{gateway.server.address}{path}", additional_headers=headers, max_size=None, **more)


async def refused(gateway: Gateway, path: str = URL, **more: Any) -> tuple[int, dict[str, Any]]:
    """Return the status and the error of a handshake without a 101 response."""
    with pytest.raises(websockets.InvalidStatus) as caught:
        await opened(gateway, path, **more)
    answer = caught.value.response
    assert answer.body is not None
    return answer.status_code, json.loads(answer.body)["error"]


async def events(opened: WebSocketClient, until_type: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while not found or found[-1]["type"] != until_type:
        found.append(json.loads(await opened.recv()))
    return found


# -- opening ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "path", "query"),
    [
        ("v1", "/openai/v1/realtime", [("model", "gpt-4o")]),
        (
            "2025-04-01-preview",
            "/openai/realtime",
            [("api-version", "2025-04-01-preview"), ("deployment", "gpt-4o")],
        ),
    ],
)
@pytest.mark.parametrize("asked", [URL, "/openai/realtime?api-version=2024-01-01&deployment=gpt-4o"])
async def test_realtime_urls(
    start_gateway: StartGateway, azure: FakeAzure, version: str, path: str, query: list[tuple[str, str]], asked: str
) -> None:
    """`model=` on v1, `deployment=` and `api-version=` on a dated preview, for both forms of the client's URL."""
    gateway = await start_gateway(azure.endpoint, YAML.replace("2024-10-21", version))
    async with opened(gateway, asked) as client:
        assert json.loads(await client.recv())["session"]["model"] == "gpt-4o"
        await client.send(json.dumps({"type": "response.create"}))
        types = [event["type"] for event in await events(client, "response.done")]
    assert types == ["response.created", *["response.output_text.delta"] * 3, "response.done"]
    seen = azure.requests[0]
    assert (seen.path, sorted(seen.query)) == (path, query)
    assert (seen.headers.get("api-key"), seen.headers.get("authorization")) == (KEY, None)


async def test_the_model_is_mapped(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Other query parameters stay, except those that would select the version or a key."""
    yaml = REALTIME.replace("{unmapped: own_name_without_dots}", "{models: {mine: gpt-4o}, unmapped: refuse}")
    gateway = await start_gateway(azure.endpoint, yaml)
    async with opened(gateway, "/v1/realtime?intent=x&model=mine&api-key=stolen"):
        pass
    assert azure.requests[0].query == [("intent", "x"), ("model", "gpt-4o")]
    assert (await refused(gateway, "/v1/realtime?model=other"))[0] == 404
    assert (await refused(gateway, "/v1/realtime?model=mine&deployment=gpt-4o"))[0] == 400
    assert len(azure.requests) == 1


async def test_a_version_without_realtime_is_refused_or_replaced(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Of the dated versions only previews have it."""
    gateway = await start_gateway(azure.endpoint)
    status, error = await refused(gateway)
    assert (status, error["code"]) == (404, "operation_not_supported")
    gateway = await start_gateway(azure.endpoint, YAML.replace("2024-10-21", "{otherwise: [v1]}"))
    async with opened(gateway) as client:
        await client.recv()
    assert azure.requests[0].path == "/openai/v1/realtime"


async def test_headers_go_both_ways(start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without those of the handshake itself, which are each side's own; the id is the one in the log."""
    monkeypatch.setattr("gateway.transport.websocket_relay._CLOSE_TIMEOUT", 0.1)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await upstream.request(reader)
        writer.write(
            switching(head, b"x-ms-region: East US 2\r\nset-cookie: a=b\r\n") + encode_frame(TEXT, b"hi", masked=False)
        )
        await reader.read()

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, REALTIME)
        async with opened(gateway, headers={"OpenAI-Beta": "realtime=v1", "X-Request-ID": "mine-1"}) as client:
            answer = client.response
            assert answer is not None
            assert await client.recv() == "hi"
            assert answer.headers["x-ms-region"] == "East US 2"
            assert answer.headers["x-request-id"] == "mine-1"
            assert "set-cookie" not in answer.headers
            assert "content-length" not in answer.headers
    head = upstream.heads[0].lower()
    assert b"openai-beta: realtime=v1\r\n" in head
    assert b"x-request-id: mine-1\r\n" in head
    assert head.count(b"sec-websocket-key: ") == head.count(b"upgrade: websocket") == 1
    assert b"permessage-deflate" not in head


def switching(head: bytes, more: bytes = b"") -> bytes:
    """Return Azure's 101 response to a handshake."""
    import hashlib

    key = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key")).split(b": ")[1]
    accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())  # noqa: S324
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-accept: " + accept + b"\r\n" + more + b"\r\n"
    )


async def test_a_key_among_the_subprotocols_is_not_forwarded(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Browsers must send it so. Azure does not see it, it is not selected, and it is in no log."""
    gateway = await start_gateway(azure.endpoint, REALTIME)
    protocols: Any = ["realtime", f"openai-insecure-api-key.{KEY}", "openai-beta.realtime-v1"]
    async with opened(gateway, key=None, subprotocols=protocols) as client:
        assert client.subprotocol == "realtime"
        await client.recv()
    seen = azure.requests[0].headers
    assert seen.get("api-key") == KEY
    assert seen.get("sec-websocket-protocol") == "realtime, openai-beta.realtime-v1"
    await gateway.idle()
    assert gateway.exchanges()[0]["caller"].startswith("sha256:")
    assert KEY not in json.dumps(gateway.events)
    wrong: Any = ["realtime", "openai-insecure-api-key.wrong"]
    assert (await refused(gateway, key=None, subprotocols=wrong))[0] == 401
    assert (await refused(gateway, key=KEY, subprotocols=wrong))[0] == 401
    assert (await refused(gateway, key=None))[0] == 401


async def test_a_refused_handshake_is_a_plain_response(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Azure's response passes through the stages; the client's connection stays open."""
    gateway = await start_gateway(azure.endpoint, REALTIME + "  - openai_errors\n")
    status, error = await refused(gateway, key="wrong")
    assert (status, error["code"]) == (401, "invalid_api_key")
    status, error = await refused(gateway, "/v1/realtime?model=nothing")
    assert (status, error["code"]) == (404, "model_not_found")
    await gateway.idle()
    assert [event["status"] for event in gateway.exchanges()] == [401, 404]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ((b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Version: 8"), 426),
        ((b"Sec-WebSocket-Version: 13\r\n", b""), 426),
        ((b"dGhlIHNhbXBsZSBub25jZQ==", b"short"), 400),
        ((b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", b""), 400),
        ((b"\r\n\r\n", b"\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"), 400),
        ((b"\r\n\r\n", b"\r\nContent-Length: 2\r\n\r\nab"), 400),
        ((b"Connection: Upgrade\r\n", b""), 426),
        ((b"Upgrade: websocket\r\n", b""), 426),
        ((b"Upgrade: websocket", b"Upgrade: h2c"), 426),
        ((b"GET", b"POST"), 426),
        ((b"/v1/realtime?model=gpt-4o", b"/v1/embeddings"), 405),
        ((b"/v1/realtime?model=gpt-4o", b"/v1/nothing"), 404),
        ((b"/v1/realtime?model=gpt-4o", b"/v1/live/sessions"), 404),
    ],
)
async def test_invalid_handshakes(
    start_gateway: StartGateway, azure: FakeAzure, change: tuple[bytes, bytes], status: int
) -> None:
    """Invalid handshakes are refused with a status that names the fault, and are not sent to Azure."""
    gateway = await start_gateway(azure.endpoint, REALTIME)
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(HANDSHAKE.replace(*change))
    line = await reader.readline()
    writer.close()
    assert int(line.split()[1]) == status
    assert azure.requests == []


async def test_a_plain_get_must_upgrade(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """With the status and the header of RFC 9110 (15.5.22)."""
    gateway = await start_gateway(azure.endpoint, REALTIME)
    async with gateway.get("/v1/realtime?model=gpt-4o") as answer:
        assert (answer.status, answer.headers["upgrade"]) == (426, "websocket")
        assert (await answer.json())["error"]["code"] == "upgrade_required"


@pytest.mark.parametrize(
    "answer",
    [
        lambda head: switching(head.replace(b"sec-websocket-key: ", b"sec-websocket-key: x")),
        lambda head: switching(head, b"sec-websocket-extensions: permessage-deflate\r\n"),
        lambda _: b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        lambda _: b"HTTP/1.1 103 Early Hints\r\n\r\n",
        lambda _: b"",
    ],
)
async def test_an_invalid_response_of_azure(start_gateway: StartGateway, answer: Any) -> None:
    """Is a 502, and its connection is closed."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(await upstream.request(reader)))
        if answer(b"sec-websocket-key: a\r\n").startswith(b"HTTP/1.1 101"):
            await reader.read()

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, REALTIME)
        assert (await refused(gateway))[0] == 502
        await until(lambda: upstream.open == 0)


async def test_a_101_response_to_a_plain_request_is_invalid(start_gateway: StartGateway) -> None:
    """As it has asked for no upgrade."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upstream.request(reader)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n")
        await reader.read()

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint)
        async with gateway.post() as answer:
            assert answer.status == 502


# -- frames ----------------------------------------------------------------------------------------------------


async def test_ten_thousand_frames_both_ways(start_gateway: StartGateway, echoing: FakeAzure) -> None:
    """Of every size, text and binary, in order and byte for byte."""
    gateway = await start_gateway(echoing.endpoint, REALTIME)
    sizes = (0, 1, 10, 125, 126, 500, 2000)
    messages: list[str | bytes] = [
        f"{number}:" + "ä" * sizes[number % 7] if number % 3 else os.urandom(sizes[number % 7])
        for number in range(10_000)
    ]
    messages[5000:5000] = ["x" * 300_000, os.urandom(70_000)]
    received: list[str | bytes] = []

    async with opened(gateway) as client:

        async def read() -> None:
            while len(received) < len(messages):
                received.append(await client.recv())

        reading = asyncio.create_task(read())
        for message in messages:
            await client.send(message)
        await reading
    assert received == messages
    await gateway.idle()
    (event,) = gateway.exchanges()
    assert (event["status"], event["ended_by"], event["close_code"]) == (101, "complete", 1000)
    assert event["counts"] == {"messages_up": len(messages), "messages_down": len(messages)}
    assert (event["operation"], event["model"], event["deployment"]) == ("realtime.connect", "gpt-4o", "gpt-4o")


async def test_fragments_pings_and_pongs_are_forwarded(start_gateway: StartGateway, echoing: FakeAzure) -> None:
    """The other end answers a ping, whatever its payload is."""
    gateway = await start_gateway(echoing.endpoint, REALTIME)
    async with opened(gateway) as client:
        for payload in (b"", b"are you there", b"x" * 125):
            pong = await client.ping(payload)
            async with asyncio.timeout(30):
                await pong
        await client.send(["in ", "three ", "pieces"])
        assert await client.recv() == "in three pieces"


async def test_azure_s_fragments_and_pings_reach_the_client(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames that the network splits anywhere, fragments with a ping between them; the client's pong reaches Azure."""
    monkeypatch.setattr("gateway.transport.websocket_relay._CLOSE_TIMEOUT", 0.1)
    ponged = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await upstream.request(reader)
        data = b"\x01\x03one" + encode_frame(PING, b"p", masked=False) + b"\x00\x01 " + b"\x80\x03two"
        for byte in switching(head) + data:
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        frames = FrameParser(masked=True, most=1000)
        while chunk := await reader.read(100):
            if any(isinstance(each, Control) and each.payload == b"p" for each in frames.feed(chunk)):
                ponged.set()

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, REALTIME)
        async with opened(gateway) as client:
            assert await client.recv() == "one two"
            await asyncio.wait_for(ponged.wait(), 30)


async def test_frames_after_the_handshake_are_not_lost(start_gateway: StartGateway, echoing: FakeAzure) -> None:
    """A client may send them before the response."""
    gateway = await start_gateway(echoing.endpoint, REALTIME)
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(HANDSHAKE + encode_frame(TEXT, b"early", masked=True))
    await reader.readuntil(b"\r\n\r\n")
    assert await reader.readexactly(7) == b"\x81\x05early"
    writer.close()


# -- ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [1000, 1001, 3000, 4321])
async def test_the_client_s_close_code_reaches_azure(start_gateway: StartGateway, code: int) -> None:
    """With its reason; Azure's answer comes back, and both connections end."""
    received: list[tuple[int | None, str]] = []

    async def speak(seen: Seen, opened: web.WebSocketResponse) -> None:
        message = await opened.receive()
        received.append((message.data, message.extra or ""))

    async with FakeAzure(speak=speak) as azure:
        gateway = await start_gateway(azure.endpoint, REALTIME)
        async with opened(gateway) as client:
            await client.close(code, "that is all")
        assert received == [(code, "that is all")]
        assert client.close_code == 1000  # this Azure's answer
        await gateway.idle()
        await until(lambda: azure.connections == 0)
    (event,) = gateway.exchanges()
    assert (event["ended_by"], event["close_code"]) == ("complete", code)


@pytest.mark.parametrize("code", [1000, 1008, 1011, 4000])
async def test_azure_s_close_code_reaches_the_client(start_gateway: StartGateway, code: int) -> None:
    """With its reason, after everything that Azure sent before it."""

    async def speak(seen: Seen, opened: web.WebSocketResponse) -> None:
        await opened.send_str("last words")
        await opened.close(code=code, message=b"session over")

    async with FakeAzure(speak=speak) as azure:
        gateway = await start_gateway(azure.endpoint, REALTIME)
        async with opened(gateway) as client:
            assert await client.recv() == "last words"
            with pytest.raises(websockets.ConnectionClosed):
                await client.recv()
            assert (client.close_code, client.close_reason) == (code, "session over")
        await gateway.idle()
        await until(lambda: azure.connections == 0)
    (event,) = gateway.exchanges()
    assert (event["ended_by"], event["close_code"]) == ("complete", code)


@pytest.mark.parametrize("reset", [False, True])
async def test_a_client_that_disconnects(start_gateway: StartGateway, reset: bool) -> None:
    """Azure gets a close frame at once; deferred callbacks of the stages run once."""
    received: list[tuple[WSMsgType, Any]] = []

    async def speak(seen: Seen, opened: web.WebSocketResponse) -> None:
        await opened.send_str("hello")
        message = await opened.receive()
        received.append((message.type, message.data))

    async with FakeAzure(speak=speak) as azure:
        gateway = await start_gateway(azure.endpoint, REALTIME)
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(HANDSHAKE)
        await reader.readuntil(b"hello")
        if reset:
            hard_close(writer)
        else:
            writer.close()
        await until(lambda: received)
        await gateway.idle()
        await until(lambda: azure.connections == 0)
    assert received == [(WSMsgType.CLOSE, 1001)]
    (event,) = gateway.exchanges()
    assert (event["ended_by"], event["close_code"]) == ("client", 1001)


@pytest.mark.parametrize("reset", [False, True])
async def test_azure_disconnects(start_gateway: StartGateway, reset: bool) -> None:
    """The client gets a close frame with an error code."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(switching(await upstream.request(reader)) + encode_frame(TEXT, b"hello", masked=False))
        await writer.drain()
        await asyncio.sleep(0.02)
        if reset:
            hard_close(writer)

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, REALTIME)
        async with opened(gateway) as client:
            assert await client.recv() == "hello"
            with pytest.raises(websockets.ConnectionClosedError):
                await client.recv()
            assert (client.close_code, client.close_reason) == (
                1011,
                "Azure closed the WebSocket without a close frame. Reconnect.",
            )
        await gateway.idle()
    (event,) = gateway.exchanges()
    assert (event["ended_by"], event["error"], event["close_code"]) == ("upstream", "upstream_error", 1011)


async def test_azure_disconnects_in_the_middle_of_a_frame(start_gateway: StartGateway) -> None:
    """A close frame would be part of it: the connection ends, and the client sees that the message is incomplete."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(switching(await upstream.request(reader)) + encode_frame(TEXT, b"x" * 1000, masked=False)[:500])
        await writer.drain()
        await asyncio.sleep(0.02)

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, REALTIME)
        async with opened(gateway) as client:
            with pytest.raises(websockets.ConnectionClosedError):
                await client.recv()
            assert client.close_code == 1006


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x81\x05plain", 1002),
        (b"\xc1\x80\x00\x00\x00\x00", 1002),
        (b"\x88\x82\x00\x00\x00\x00\x03\xee", 1002),
        (encode_frame(BINARY, b"x" * 5000, masked=True), 1009),
        (b"GET / HTTP/1.1\r\n\r\n", 1002),
    ],
)
async def test_an_invalid_frame_of_the_client_ends_the_websocket(
    start_gateway: StartGateway, echoing: FakeAzure, data: bytes, code: int
) -> None:
    """Both sides get the code for it, and no byte of the frame reaches Azure."""
    gateway = await start_gateway(echoing.endpoint, REALTIME, limits={"body": 4000})
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(HANDSHAKE)
    await reader.readuntil(b"\r\n\r\n")
    writer.write(data)
    (control,) = FrameParser(masked=False, most=1000).feed(await reader.read())
    writer.close()
    assert isinstance(control, Control)
    assert (control.opcode, control.code) == (CLOSE, code)
    await gateway.idle()
    (event,) = gateway.exchanges()
    error = "message_too_large" if code == 1009 else "malformed_frame"
    assert (event["ended_by"], event["close_code"], event["error"]) == ("gateway", code, error)
    await until(lambda: echoing.connections == 0)


async def test_an_invalid_frame_of_azure_ends_the_websocket(start_gateway: StartGateway) -> None:
    """The error for the client blames Azure."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(switching(await upstream.request(reader)) + b"\x81\x85masked-though")
        await reader.read()

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, REALTIME)
        async with opened(gateway) as client:
            with pytest.raises(websockets.ConnectionClosedError):
                await client.recv()
            assert client.close_code == 1011
        await gateway.idle()
        await until(lambda: upstream.open == 0)
    assert gateway.exchanges()[0]["ended_by"] == "upstream"


async def test_a_gateway_that_stops_sends_close_frames(start_gateway: StartGateway) -> None:
    """To both sides, when the grace period is over: 1001, going away."""
    received: list[Any] = []

    async def speak(seen: Seen, opened: web.WebSocketResponse) -> None:
        message = await opened.receive()
        received.append(message.data)

    async with FakeAzure(speak=speak) as azure:
        gateway = await start_gateway(azure.endpoint, REALTIME, timeouts={"grace": 0.1})
        async with opened(gateway) as client:
            stopping = asyncio.create_task(gateway.server.stop())
            with pytest.raises(websockets.ConnectionClosed):
                await client.recv()
            assert (client.close_code, client.close_reason) == (1001, "The gateway is shutting down. Reconnect.")
            await stopping
        await until(lambda: received)
    assert received == [1001]
    assert gateway.exchanges()[0]["ended_by"] == "gateway"


async def test_an_unanswered_close_frame_has_a_timeout(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the WebSocket ends without an error."""
    monkeypatch.setattr("gateway.transport.websocket_relay._CLOSE_TIMEOUT", 0.1)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(switching(await upstream.request(reader)))
        await reader.read()  # and the close frame, too, is only read
        await asyncio.sleep(60)

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, REALTIME)
        async with opened(gateway, close_timeout=0.2) as client:
            await client.close(1000)
        await gateway.idle()
    assert gateway.exchanges()[0]["close_code"] == 1000


# -- backpressure and silence ----------------------------------------------------------------------------------


async def test_backpressure_of_a_slow_client(start_gateway: StartGateway) -> None:
    """Reaches Azure: no byte is lost, and the buffered bytes are bounded."""
    sent = 0

    async def speak(seen: Seen, opened: web.WebSocketResponse) -> None:
        nonlocal sent
        for number in range(600):
            await opened.send_bytes(struct.pack("!I", number) * 25_000)
            sent += 1

    async with FakeAzure(speak=speak) as azure:
        gateway = await start_gateway(azure.endpoint, REALTIME)
        async with opened(gateway, max_queue=1) as client:
            await asyncio.sleep(0.5)
            assert sent < 300  # of 60 MB: the socket buffers
            for number in range(600):
                assert await client.recv() == struct.pack("!I", number) * 25_000
    await gateway.idle()


async def test_backpressure_of_a_slow_azure(start_gateway: StartGateway) -> None:
    """Reaches the client."""
    go_on = asyncio.Event()
    received = 0

    async def speak(seen: Seen, opened: web.WebSocketResponse) -> None:
        nonlocal received
        await go_on.wait()
        async for message in opened:
            received += len(message.data)

    async with FakeAzure(speak=speak) as azure:
        gateway = await start_gateway(azure.endpoint, REALTIME)
        sent = 0
        async with opened(gateway) as client:

            async def send() -> None:
                nonlocal sent
                for _ in range(600):
                    await client.send(bytes(100_000))
                    sent += 1

            sending = asyncio.create_task(send())
            await asyncio.sleep(0.5)
            assert sent < 300
            go_on.set()
            await sending
        assert received == 60_000_000


async def test_the_write_timeout_of_the_client(start_gateway: StartGateway) -> None:
    """Azure gets a close frame, and no connection stays open."""

    async def speak(seen: Seen, opened: web.WebSocketResponse) -> None:
        while True:
            await opened.send_bytes(bytes(100_000))

    async with FakeAzure(speak=speak) as azure:
        gateway = await start_gateway(azure.endpoint, REALTIME, timeouts={"client": 0.3})
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1024)
        writer.write(HANDSHAKE)
        await until(lambda: gateway.exchanges())
        await until(lambda: azure.connections == 0)
        writer.transport.abort()
    (event,) = gateway.exchanges()
    assert (event["ended_by"], event["error"]) == ("client", "client_not_reading")


async def test_the_write_timeout_of_azure(start_gateway: StartGateway) -> None:
    """It is the idle timeout; the client gets a close frame."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(switching(await upstream.request(reader)))
        await asyncio.sleep(60)

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, REALTIME, timeouts={"idle": 0.3})
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(HANDSHAKE)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(encode_frame(BINARY, bytes(100_000), masked=True) * 200)
        (control,) = FrameParser(masked=False, most=1000).feed(await reader.read(1000))
        writer.transport.abort()
        assert isinstance(control, Control)
        assert (control.code, control.payload[2:]) == (
            1011,
            b"Azure read no bytes of the WebSocket for 0.3 s. Reconnect.",
        )
        await gateway.idle()
        await until(lambda: upstream.open <= 1)
    assert gateway.exchanges()[0]["error"] == "upstream_timeout"


async def test_pings_of_the_gateway_s_own(start_gateway: StartGateway) -> None:
    """Both sides get them. A side that answers stays connected, and its pong is not forwarded."""
    seen: list[WSMsgType] = []

    async def speak(_: Seen, opened: web.WebSocketResponse) -> None:
        async for message in opened:
            seen.append(message.type)
            if message.type is WSMsgType.PING:
                await opened.pong(message.data)

    async with FakeAzure(speak=speak) as azure:
        gateway = await start_gateway(azure.endpoint, REALTIME, timeouts={"ping": 0.5})
        async with opened(gateway, ping_interval=None) as client:
            await until(lambda: len(seen) >= 3)
            assert client.close_code is None
    await gateway.idle()
    assert set(seen) == {WSMsgType.PING}
    assert gateway.exchanges()[0]["ended_by"] == "complete"


async def test_a_silent_client_is_disconnected(start_gateway: StartGateway, echoing: FakeAzure) -> None:
    """If it does not answer a ping: its machine is gone, or it hangs."""
    gateway = await start_gateway(echoing.endpoint, REALTIME, timeouts={"ping": 0.05})
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(HANDSHAKE)
    await until(lambda: gateway.exchanges())
    assert (await reader.read()).endswith(b"The client sent no bytes for 0.1 s, not even a pong.")
    writer.close()
    (event,) = gateway.exchanges()
    assert (event["ended_by"], event["error"]) == ("gateway", "request_timeout")
    await until(lambda: echoing.connections == 0)


async def test_a_silent_azure_is_disconnected(start_gateway: StartGateway) -> None:
    """The client gets a close frame."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(switching(await upstream.request(reader)))
        await reader.read()

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, REALTIME, timeouts={"ping": 0.05})
        async with opened(gateway, ping_interval=None) as client:
            with pytest.raises(websockets.ConnectionClosed):
                await client.recv()
            assert (client.close_code, client.close_reason) == (
                1011,
                "Azure sent no bytes for 0.1 s, not even a pong. Reconnect.",
            )
        await until(lambda: upstream.open == 0)


async def test_two_hundred_at_once_leave_nothing_open(start_gateway: StartGateway, echoing: FakeAzure) -> None:
    """A third closes, a third disconnects, a third sends an invalid frame; no file descriptor is left."""
    gateway = await start_gateway(echoing.endpoint, REALTIME)
    async with opened(gateway) as client:
        await client.send("warm")
        await client.recv()
    await gateway.idle()
    await until(lambda: echoing.connections == 0)
    before = len(os.listdir("/proc/self/fd"))

    async def one(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(HANDSHAKE)
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(5):
            message = os.urandom(200)
            writer.write(encode_frame(BINARY, message, masked=True))
            assert (await reader.readexactly(204))[4:] == message
        await asyncio.sleep(0.05)
        if number % 3 == 0:
            writer.write(encode_close_frame(1000, "", masked=True))
            await reader.read()
        elif number % 3 == 1:
            writer.write(b"\xff\xff")
            writer.write(b"\xff" * 20)
            await reader.read()
        writer.close()

    await asyncio.gather(*map(one, range(200)))
    await gateway.idle()
    await until(lambda: echoing.connections == 0)
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)
    assert len(gateway.exchanges()) == 201


# -- stages ----------------------------------------------------------------------------------------------------


async def test_limits_hold_while_it_is_open(start_gateway: StartGateway, echoing: FakeAzure) -> None:
    """One in flight is one WebSocket: above the limit the handshake is a 429; after its end another may open."""
    yaml = REALTIME.replace("  - model_map", "  - rate_limit: {in_flight: 1}\n  - model_map")
    gateway = await start_gateway(echoing.endpoint, yaml)
    async with opened(gateway):
        assert (await refused(gateway))[0] == 429
        async with gateway.post(json=CHAT) as answer:
            assert answer.status == 429
    await gateway.idle()
    async with opened(gateway) as client:
        await client.send("again")
        assert await client.recv() == "again"


FILTERING = """
from gateway import ApiError, Event, EventFilter, Stage

class Mark(EventFilter):
    def __init__(self, word):
        self.word = word
    def event(self, event):
        content = event.json()
        if content == "refuse":
            raise ApiError(400, "not this one", code="refused")
        if content == "fail":
            raise ValueError("a bug")
        if content == "drop":
            return None
        if content == "twice":
            return [event, event]
        event.set_json(f"{self.word}({content})")
        return event
    def close(self):
        return [Event(f'"{self.word} closed"'.encode())]

class Marks(Stage):
    async def __call__(self, request, call_next):
        response = await call_next(request)
        if response.status == 101:
            response.pipe(Mark("down-" + self.id))
            response.pipe(Mark("up-" + self.id), direction="up")
        return response
"""
FILTERED = "plugins_path: mine\n" + REALTIME + "  - marks as far\n  - marks as near\n"


@pytest.mark.parametrize("binary", [False, True])
async def test_filters_see_messages_in_both_directions(
    start_gateway: StartGateway, echoing: FakeAzure, binary: bool
) -> None:
    """As events; to the client, the filter nearest to Azure runs first, and vice versa; fragments are one message."""
    gateway = await start_gateway(echoing.endpoint, FILTERED, {"mine/marks.py": FILTERING})
    async with opened(gateway) as client:
        await client.send(['"a', 'b"'] if not binary else [b'"a', b'b"'])
        wanted = "down-far(down-near(up-near(up-far(ab))))"
        answer = await client.recv()
        assert json.loads(answer) == wanted
        assert isinstance(answer, bytes) is binary
        await client.send('"drop"')
        await client.send('"twice"')
        twice = [json.loads(await client.recv()) for _ in range(16)]
        assert twice == ["twice"] * 16
        await client.send('"end"')
        assert "end" in str(await client.recv())


async def test_an_api_error_of_a_filter_is_an_error_event(start_gateway: StartGateway, echoing: FakeAzure) -> None:
    """The WebSocket continues. Any other exception of a filter ends it, and both sides get a close frame."""
    gateway = await start_gateway(echoing.endpoint, FILTERED, {"mine/marks.py": FILTERING})
    async with opened(gateway) as client:
        await client.send('"refuse"')
        received = json.loads(await client.recv())
        error = {"type": "invalid_request_error", "code": "refused", "message": "not this one", "param": None}
        assert received == {"type": "error", "status": 400, "error": error}
        await client.send('"more"')
        assert "more" in str(await client.recv())
        await client.send('"fail"')
        with pytest.raises(websockets.ConnectionClosed):
            await client.recv()
        assert client.close_code == 1011
    await gateway.idle()
    assert gateway.exchanges()[0]["ended_by"] == "gateway"
    assert any(event["event"] == "filter_failed" for event in gateway.events)


WRONG = """
from gateway import Filter, Response, Stage

class Wrong(Stage):
    async def __call__(self, request, call_next):
        if self.id == "made":
            return Response(101)
        response = await call_next(request)
        if self.id == "bytes":
            response.pipe(Filter())
        elif self.id == "status":
            response.status = 200
        elif self.id == "read":
            await response.read()
        elif self.id == "peek":
            await response.peek(lambda data: True, 1)
        return response
"""


@pytest.mark.parametrize("mistake", ["made", "bytes", "status", "read", "peek"])
async def test_a_stage_that_misuses_a_websocket_is_a_500(
    start_gateway: StartGateway, echoing: FakeAzure, mistake: str
) -> None:
    """The log says how; the connection to Azure is closed."""
    yaml = "plugins_path: mine\n" + REALTIME.replace("  - access_log\n", f"  - access_log\n  - wrong as {mistake}\n")
    gateway = await start_gateway(echoing.endpoint, yaml, {"mine/wrong.py": WRONG})
    assert (await refused(gateway))[0] == 500
    await gateway.idle()
    await until(lambda: echoing.connections == 0)
    assert any(event["level"] == "error" for event in gateway.events)


# -- responses -------------------------------------------------------------------------------------------------

TWO = """
resources:
  azure: {endpoint: "${ENDPOINT}"}
  other: {endpoint: "http://127.0.0.1:1"}
resource: azure
pipeline:
  - access_log
  - auth_passthrough
  - model_map: {models: {mine: gpt-4o, far: other/gpt-4o}, unmapped: refuse}
  - api_version: {version: 2024-10-21, otherwise: [v1]}
"""


async def test_the_responses_api_has_a_model_in_each_message(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """It becomes the deployment; an unmapped one, or one elsewhere, is an error event, and the next message works."""
    gateway = await start_gateway(azure.endpoint, TWO)
    async with opened(gateway, "/v1/responses") as client:
        for message, code in (
            ({"model": "unknown"}, "model_not_found"),
            ({"model": "far"}, "resource_mismatch"),
            ({"model": 5}, None),
            ({"response": {"model": "unknown"}}, "model_not_found"),
        ):
            await client.send(json.dumps({"type": "response.create", "event_id": "e1", **message}))
            received = json.loads(await client.recv())
            assert (received["type"], received["error"]["code"], received["error"]["event_id"]) == ("error", code, "e1")
        for text in ('no json "model"', '"model"', '{"model"', '["model"]'):
            await client.send(text)
            assert json.loads(await client.recv())["error"]["type"] == "invalid_request_error"
        await client.send('{"type":"response.create","model":"mine","n":1e2}')
        types = [event["type"] for event in await events(client, "response.completed")]
        assert types == ["response.created", *["response.output_text.delta"] * 3, "response.completed"]
        await client.send(r'{"type":"response.create","mod\u0065l":"mine"}')
        assert (await events(client, "response.completed"))[0]["response"]["model"] == "gpt-4o"
    await gateway.idle()
    assert azure.requests[0].path == "/openai/v1/responses"
    assert gateway.exchanges()[0]["model"] == "mine"


async def test_a_duplicate_model_key_is_removed(start_gateway: StartGateway) -> None:
    """Azure might use the other one: only the mapped one is forwarded."""
    received: list[str] = []

    async def speak(seen: Seen, opened: web.WebSocketResponse) -> None:
        async for message in opened:
            received.append(message.data)
            await opened.send_str("ok")

    async with FakeAzure(speak=speak) as azure:
        gateway = await start_gateway(azure.endpoint, TWO)
        async with opened(gateway, "/v1/responses") as client:
            await client.send('{"type":"response.create","model":"forbidden","model":"mine","input":1.50}')
            await client.recv()
    assert received == ['{"type":"response.create","model":"gpt-4o","input":1.50}']


@pytest.mark.parametrize("fragments", [False, True])
async def test_an_error_event_waits_for_the_end_of_azure_s_message(
    start_gateway: StartGateway, fragments: bool
) -> None:
    """It is written neither into a frame that is partly forwarded, nor between the fragments of a message."""
    asked, received = asyncio.Event(), asyncio.Event()
    whole = b"\x01\x03one\x80\x03two" if fragments else encode_frame(TEXT, b"x" * 1000, masked=False)
    cut = 5 if fragments else 500

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(switching(await upstream.request(reader)) + whole[:cut])
        await asyncio.wait_for(asked.wait(), 30)
        await asyncio.sleep(0.05)
        writer.write(whole[cut:])
        await received.wait()

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, TWO)
        async with opened(gateway, "/v1/responses") as client:
            await client.send('{"type":"response.create","model":"unknown"}')
            asked.set()
            assert await client.recv() == ("onetwo" if fragments else "x" * 1000)
            assert json.loads(await client.recv())["error"]["code"] == "model_not_found"
            received.set()


async def test_no_error_event_follows_a_close_frame(start_gateway: StartGateway) -> None:
    """One that waits for the end of Azure's message is written before a close frame in the same read."""
    asked = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(switching(await upstream.request(reader)) + b"\x01\x02ab")
        await asyncio.wait_for(asked.wait(), 30)
        await asyncio.sleep(0.05)
        writer.write(b"\x80\x02cd" + encode_close_frame(1000, "bye", masked=False))
        await reader.read()

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, TWO)
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(HANDSHAKE.replace(b"/v1/realtime?model=gpt-4o", b"/v1/responses"))
        await reader.readuntil(b"\x01\x02ab")
        writer.write(encode_frame(TEXT, b'{"type":"response.create","model":5}', masked=True))
        asked.set()
        frames = FrameParser(masked=False, most=10_000, whole=True)
        frames.feed(b"\x01\x02ab")
        found: list[Any] = []
        while not frames.closed:
            found += frames.feed(await reader.read(1000))
        writer.write(encode_frame(TEXT, b'{"type":"response.create","model":5}', masked=True))
        writer.write(encode_close_frame(1000, "", masked=True))
        rest = await reader.read()
        writer.close()
    assert [getattr(each, "payload", b"")[:10] for each in found[:2]] == [b"abcd", b'{"type":"e']
    assert (len(found), rest) == (3, b"")


async def test_unread_error_events_pause_reading_from_the_client(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """However many errors it causes, the unwritten events are bounded."""
    gateway = await start_gateway(azure.endpoint, TWO, timeouts={"client": 1.0})
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(raw, ("127.0.0.1", gateway.port))
        await loop.sock_sendall(raw, HANDSHAKE.replace(b"/v1/realtime?model=gpt-4o", b"/v1/responses"))
        await until(lambda: any(connection._relay for connection in gateway.server._http.connections))  # type: ignore[union-attr]
        (connection,) = gateway.server._http.connections  # type: ignore[union-attr]
        block = encode_frame(TEXT, b'"model"', masked=True) * 5000
        most = 0
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(20):
                while not gateway.exchanges():
                    await loop.sock_sendall(raw, block)
                    assert connection.transport is not None
                    most = max(most, connection.transport.get_write_buffer_size())
        await until(lambda: gateway.exchanges())
        assert most < 200_000
    assert gateway.exchanges()[0]["error"] == "client_not_reading"


async def test_messages_before_an_invalid_frame_are_forwarded(start_gateway: StartGateway) -> None:
    """To Azure, and to the client."""
    received: list[tuple[WSMsgType, Any]] = []

    async def speak(seen: Seen, opened: web.WebSocketResponse) -> None:
        while not opened.closed:
            message = await opened.receive()
            received.append((message.type, message.data))

    async with FakeAzure(speak=speak) as azure:
        gateway = await start_gateway(azure.endpoint, REALTIME)
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(HANDSHAKE)
        await reader.readuntil(b"\r\n\r\n")
        sound = encode_frame(TEXT, b"0123456789" * 10, masked=True)
        writer.write(sound[:-10])
        await asyncio.sleep(0.05)
        writer.write(sound[-10:] + b"\xff\xff\xff\xff")
        await reader.read()
        writer.close()
        await until(lambda: len(received) >= 2)
    assert received[:2] == [(WSMsgType.TEXT, "0123456789" * 10), (WSMsgType.CLOSE, 1002)]

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await upstream.request(reader)
        writer.write(switching(head) + encode_frame(TEXT, b"last words", masked=False) + b"\xff\xff")
        await reader.read()

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, REALTIME)
        async with opened(gateway) as client:
            assert await client.recv() == "last words"
            with pytest.raises(websockets.ConnectionClosedError):
                await client.recv()
            assert client.close_code == 1011


async def test_a_client_that_never_reads_the_end_is_disconnected(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unwritten bytes do not keep its connection open for ever."""
    monkeypatch.setattr("gateway.transport.client_connection._LINGERING_CLOSE_TIMEOUT", 0.1)

    async def speak(seen: Seen, opened: web.WebSocketResponse) -> None:
        for _ in range(60):
            await opened.send_bytes(bytes(50_000))
        await opened.close()

    async with FakeAzure(speak=speak) as azure:
        gateway = await start_gateway(azure.endpoint, REALTIME, timeouts={"client": 0.3})
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(raw, ("127.0.0.1", gateway.port))
            await loop.sock_sendall(raw, HANDSHAKE)
            await until(lambda: gateway.exchanges())
            await until(lambda: not gateway.server._http.connections, 10)  # type: ignore[union-attr]


async def test_a_ping_that_looks_like_the_gateway_s_is_forwarded(start_gateway: StartGateway) -> None:
    """Such as that of another gateway on the path."""
    ponged = asyncio.Event()

    async def speak(seen: Seen, opened: web.WebSocketResponse) -> None:
        await opened.ping(b"gateway")
        async for message in opened:
            if message.type is WSMsgType.PONG and message.data == b"gateway":
                ponged.set()

    async with FakeAzure(speak=speak) as azure:
        gateway = await start_gateway(azure.endpoint, REALTIME)
        async with opened(gateway) as client:
            reading = asyncio.create_task(client.recv())
            await asyncio.wait_for(ponged.wait(), 30)
            reading.cancel()


@pytest.mark.parametrize(
    "query", ["Model=other", "model=mine&Deployment=other", "x=1;deployment=other", "x=1%3bmodel=other"]
)
async def test_the_model_map_cannot_be_bypassed(start_gateway: StartGateway, azure: FakeAzure, query: str) -> None:
    """By names in another case, which some servers treat as equal, or by another separator."""
    yaml = REALTIME.replace("{unmapped: own_name_without_dots}", "{models: {mine: gpt-4o}, unmapped: refuse}")
    gateway = await start_gateway(azure.endpoint, yaml)
    assert (await refused(gateway, f"/v1/realtime?{query}"))[0] in (400, 404)
    assert azure.requests == []
    async with opened(gateway, "/v1/realtime?MODEL=mine"):
        pass
    assert azure.requests[0].query == [("model", "gpt-4o")]


async def test_a_key_protocol_in_another_case_is_a_key_too(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """It is not forwarded, and never selected as a subprotocol."""
    gateway = await start_gateway(azure.endpoint, REALTIME)
    protocols: Any = [f"OpenAI-Insecure-API-Key.{KEY}", "realtime"]
    async with opened(gateway, key=None, subprotocols=protocols) as client:
        assert client.subprotocol == "realtime"
    assert azure.requests[0].headers.get("sec-websocket-protocol") == "realtime"


async def test_a_repeated_handshake_with_a_body_is_invalid(start_gateway: StartGateway) -> None:
    """On a keep-alive connection, too."""
    async with FakeAzure(deployments=()) as azure:
        gateway = await start_gateway(azure.endpoint, REALTIME)
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        statuses = []
        for length in (b"0", b"5"):
            writer.write(HANDSHAKE.replace(b"\r\n\r\n", b"\r\nContent-Length: " + length + b"\r\n\r\n"))
            head = await reader.readuntil(b"\r\n\r\n")
            statuses.append(int(head.split()[1]))
            sizes = [
                int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
            ]
            await reader.readexactly(sizes[0])
        writer.close()
    assert statuses == [404, 400]


@pytest.mark.parametrize("drops", [False, True])
async def test_a_close_frame_that_azure_does_not_answer(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch, drops: bool
) -> None:
    """If Azure disconnects or stays silent, the client, which closed, gets its own code back."""
    monkeypatch.setattr("gateway.transport.websocket_relay._CLOSE_TIMEOUT", 0.2)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(switching(await upstream.request(reader)))
        await reader.read(8)  # the close frame
        if not drops:
            await asyncio.sleep(5)

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, REALTIME)
        async with opened(gateway) as client:
            await client.close(4001)
            assert client.close_code == 4001
        await gateway.idle()
    (event,) = gateway.exchanges()
    assert (event["ended_by"], event["close_code"]) == ("complete", 4001)


def test_descriptors_are_counted() -> None:
    """The test above counts the descriptors of this system."""
    before = len(os.listdir("/proc/self/fd"))
    with socket.socket():
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert Path("/proc/self/fd").is_dir()


async def test_the_tokens_of_a_websocket_are_those_of_all_its_responses(
    start_gateway: StartGateway, azure: FakeAzure
) -> None:
    """In the log event at its end, and settled against the limits: each response adds its own."""
    limited = "auth_passthrough\n  - rate_limit: {tokens_per_day: 10000, per: team}"
    gateway = await start_gateway(azure.endpoint, REALTIME.replace("auth_passthrough", limited))
    async with opened(gateway) as client:
        for _ in range(3):
            await client.send(json.dumps({"type": "response.create"}))
            await events(client, "response.done")
    await until(lambda: gateway.exchanges())
    event = gateway.exchanges()[0]
    assert (event["input_tokens"], event["output_tokens"], event["usage_source"]) == (27, 9, "reported")
    async with gateway.post(json={**CHAT, "max_tokens": 1}) as answer:
        assert 10000 - 36 - 20 < int(answer.headers["x-ratelimit-remaining-tokens"]) < 10000 - 36


# -- fair turns, bounded memory --------------------------------------------------------------------------------

RESPONSES = HANDSHAKE.replace(b"/v1/realtime?model=gpt-4o", b"/v1/responses")
BOTH_WAYS = pytest.mark.parametrize("handshake", [HANDSHAKE, RESPONSES], ids=["passed on", "kept for a filter"])


class Steps:
    """The amounts that each call that reads frames, and each step, has handled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.frames: list[int] = []
        self.written: list[int] = []  # bytes of large messages, in each step
        self.turns = 0
        feed, run, piece = FrameParser.feed, FairScheduler._run, FrameWriter.piece

        def counted_feed(frames: FrameParser, data: bytes = b"", most: int = MOST_UNITS, size: int = STEP) -> list[Any]:
            found = feed(frames, data, most, size)
            if most == MOST_UNITS:  # else the test itself reads
                self.frames.append(sum(each.messages if isinstance(each, PassedFrames) else 1 for each in found))
            return found

        def counted_run(scheduler: FairScheduler) -> None:
            self.turns += 1
            run(scheduler)

        def counted_piece(writer: FrameWriter, size: int) -> bytes:
            made = piece(writer, size)
            self.written.append(len(made))
            return made

        monkeypatch.setattr(FrameParser, "feed", counted_feed)
        monkeypatch.setattr(FairScheduler, "_run", counted_run)
        monkeypatch.setattr(FrameWriter, "piece", counted_piece)


@BOTH_WAYS
@pytest.mark.parametrize("from_client", [True, False])
async def test_others_are_served_while_one_side_floods(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch, handshake: bytes, from_client: bool
) -> None:
    """No call handles more frames than its limit; other requests are served meanwhile; no frame is lost."""
    count, others = 30_000, asyncio.Event()
    flood = encode_frame(TEXT, b"1", masked=from_client) * count
    received = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        head = await upstream.request(reader)
        if b"/chat/completions" in head:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            await reader.read()
            return
        writer.write(switching(head))
        frames = FrameParser(masked=True, most=1000, whole=True)
        while data := await reader.read(65536):
            for each in read_all(frames, data):
                if each == Message(TEXT, b"1"):
                    received += 1
                elif isinstance(each, Message):
                    writer.write(flood if each.payload == b"flood" else encode_frame(TEXT, each.payload, masked=False))
                    others.set()
                elif each.opcode == CLOSE:
                    writer.write(encode_close_frame(1000, "", masked=False))

    def read_all(frames: FrameParser, data: bytes) -> list[Any]:
        found = frames.feed(data, 1_000_000, 1_000_000)
        assert not frames.unread
        return found

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, TWO.replace("models: {", "models: {gpt-4o: gpt-4o, "))
        async with opened(gateway, "/v1/responses") as other:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(handshake)
            await reader.readuntil(b"\r\n\r\n")
            steps = Steps(monkeypatch)
            writer.write(flood if from_client else encode_frame(TEXT, b"flood", masked=True))
            if not from_client:
                await others.wait()
            await other.send("hello")
            assert await other.recv() == "hello"
            async with gateway.post() as answer:
                assert answer.status == 200
            handled_meanwhile = sum(steps.frames)
            frames = FrameParser(masked=False, most=1000, whole=True)
            while not from_client and received < count:
                received += len(read_all(frames, await reader.read(65536)))
            await until(lambda: received == count, 20)
            writer.close()
        await gateway.idle()
    assert max(steps.frames) <= MOST_UNITS + 1  # the end of a frame that the last call began, too
    assert handled_meanwhile < count
    assert steps.turns * 2 * MOST_UNITS >= count - 4096
    up, down = ("messages_up", "messages_down") if from_client else ("messages_down", "messages_up")
    event = next(each for each in gateway.exchanges() if each.get("counts", {}).get(up, 0) >= count)
    assert event["counts"][up] == count
    assert event["counts"][down] <= 1


@BOTH_WAYS
@pytest.mark.parametrize("size", [1, 400, 400_000])
@pytest.mark.parametrize("goodbye", [True, False])
async def test_frames_of_a_client_that_disconnects_are_not_lost(
    start_gateway: StartGateway, handshake: bytes, size: int, goodbye: bool
) -> None:
    """It sends more than one turn handles, with a close frame or not: Azure gets all of it in order."""
    got: list[bytes] = []
    code: list[int | None] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(switching(await upstream.request(reader)))
        frames = FrameParser(masked=True, most=1_000_000, whole=True)
        while data := await reader.read(65536):
            for each in frames.feed(data, 1_000_000, 1_000_000):
                if isinstance(each, Message):
                    got.append(each.payload)
                elif isinstance(each, Control):
                    code.append(each.code)

    sent = [b'{"model":"gpt-4o","x":"%d%b"}' % (number, b"x" * size) for number in range(3 if size > 1000 else 1000)]
    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, TWO.replace("models: {", "models: {gpt-4o: gpt-4o, "))
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(handshake)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"".join(encode_frame(TEXT, each, masked=True) for each in sent))
        if goodbye:
            writer.write(encode_close_frame(4001, "", masked=True))
        writer.close()
        await until(lambda: code, 15)
        await gateway.idle()
    assert (len(got), got == sent) == (len(sent), True)
    assert code == [4001 if goodbye else 1001]


@BOTH_WAYS
@pytest.mark.parametrize("size", [1, 400, 400_000])
@pytest.mark.parametrize("end", ["goodbye", "loss", "bad frame"])
async def test_frames_of_azure_that_disconnects_are_not_lost(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch, handshake: bytes, size: int, end: str
) -> None:
    """It sends more than one turn handles, then a close frame, an invalid frame or none: the client gets all."""
    sent = [b"%d%b" % (number, b"x" * size) for number in range(3 if size > 1000 else 1000)]

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await upstream.request(reader)
        last = {"goodbye": encode_close_frame(4001, "", masked=False), "loss": b"", "bad frame": b"\xff\xff"}[end]
        writer.write(switching(head) + b"".join(encode_frame(TEXT, each, masked=False) for each in sent) + last)
        await writer.drain()

    yaml = TWO if handshake is HANDSHAKE else FILTERED_DOWN
    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(
            upstream.endpoint, yaml.replace("models: {", "models: {gpt-4o: gpt-4o, "), {"mine/same.py": SAME}
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(handshake)
        await reader.readuntil(b"\r\n\r\n")
        frames = FrameParser(masked=False, most=1_000_000, whole=True)
        found: list[Any] = []
        while not frames.closed:
            found += frames.feed(await reader.read(65536), 1_000_000, 1_000_000)
        if end == "goodbye":
            writer.write(encode_close_frame(4001, "", masked=True))
        await reader.read()
        writer.close()
        await gateway.idle()
    assert [each.payload for each in found[:-1]] == sent
    assert found[-1].code == (4001 if end == "goodbye" else 1011)


SAME = """
from gateway import EventFilter, Stage

class Reading(EventFilter):
    def event(self, event):
        return event

class Decoding(EventFilter):
    def event(self, event):
        event.json()
        return event

class Same(Stage):
    async def __call__(self, request, call_next):
        response = await call_next(request)
        if response.status == 101:
            response.pipe(Reading())
            response.pipe(Decoding() if self.id == "decoding" else Reading(), direction="up")
        return response
"""
FILTERED_DOWN = "plugins_path: mine\n" + TWO + "  - same\n"


async def test_a_large_message_is_written_in_pieces(
    start_gateway: StartGateway, echoing: FakeAzure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 MB through filters, both ways: the same bytes, and no step handles more than its limit."""
    gateway = await start_gateway(echoing.endpoint, FILTERED_DOWN, {"mine/same.py": SAME})
    data = os.urandom(20_000_000)
    steps = Steps(monkeypatch)
    async with opened(gateway, "/v1/responses", ping_interval=None) as client:
        await client.send(data)
        await client.send("after it")
        assert await client.recv() == data
        assert await client.recv() == "after it"
    assert max(steps.written) <= STEP + 14
    assert sum(steps.written) == 2 * len(data) + 24


MEMORY = """
from gateway import Stage
from gateway.limits.memory_budget import Hold, MemoryBudget

BUDGET = MemoryBudget(400_000)

class Memory(Stage):
    async def __call__(self, request, call_next):
        request._exchange._memory_hold = Hold(BUDGET, "a caller")
        return await call_next(request)
"""


async def test_kept_messages_count_as_memory(
    start_gateway: StartGateway, echoing: FakeAzure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All incomplete messages of a caller: above its share the code is 1013, and all memory is released."""
    most = 0
    budgets: set[MemoryBudget] = set()
    take = MemoryBudget.take

    def counted(budget: MemoryBudget, caller: str, size: int) -> None:
        nonlocal most
        budgets.add(budget)
        take(budget, caller, size)
        most = max(most, budget.held)

    monkeypatch.setattr(MemoryBudget, "take", counted)
    gateway = await start_gateway(
        echoing.endpoint,
        "plugins_path: mine\n" + TWO.replace("  - model_map", "  - memory\n  - model_map"),
        {"mine/memory.py": MEMORY},
    )
    clients = []
    for size in (60_000, 60_000, 30_000):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(RESPONSES)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"\x02" + encode_frame(BINARY, b"x" * size, masked=True)[1:])
        clients.append((reader, writer))
        if len(clients) != 2:
            await until(lambda: sum(budget.held for budget in budgets) in (60_000, 90_000))
            continue
        (control,) = FrameParser(masked=False, most=1000).feed(await reader.read())
        assert isinstance(control, Control)
        assert control.code == 1013
        assert control.payload[2:].startswith(b"your requests already use your share of the gateway's memory")
        await until(lambda: gateway.exchanges())
        assert gateway.exchanges()[0]["error"] == "overloaded"
    for reader, writer in (clients[0], clients[2]):
        writer.write(b"\x80\x80aaaa")  # the last fragment, an empty one
        assert set((await reader.readexactly(30_004))[4:]) == {ord("x")}
    for _, writer in clients:
        writer.close()
    await gateway.idle()
    assert 90_000 <= most <= 100_000
    assert [budget.held for budget in budgets] == [0]


@pytest.mark.parametrize("end", ["the client leaves", "Azure leaves", "a bad frame", "the gateway stops"])
async def test_a_websocket_that_has_ended_keeps_no_messages(start_gateway: StartGateway, end: str) -> None:
    """They are released at its end, although the collector may find its cycle of objects much later."""
    go_on = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(switching(await upstream.request(reader)))
        writer.write(b"\x01\x7e\xff\xff" + b"x" * 65_535)
        if end == "Azure leaves":
            await go_on.wait()
            hard_close(writer)
        else:
            await reader.read()

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, TWO)
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(RESPONSES)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"\x02" + encode_frame(BINARY, b"x" * 100_000, masked=True)[1:])
        (connection,) = gateway.server._http.connections  # type: ignore[union-attr]
        relay = connection._relay.__self__  # type: ignore[union-attr]
        await until(lambda: relay._client.held == 100_000)
        if end == "the client leaves":
            hard_close(writer)
        elif end == "Azure leaves":
            go_on.set()
        elif end == "a bad frame":
            writer.write(b"\xff\xff")
        else:
            next(iter(gateway.server._running)).cancel()
        await gateway.idle()
        writer.close()
    assert relay.over
    for side in (relay._client, relay._azure):
        assert (side.held, side.frames.kept, side.frames.unread) == (0, 0, False)
        assert not side.unwritten


async def test_a_large_message_waits_for_azure_in_the_exchange(start_gateway: StartGateway) -> None:
    """The transport's buffer is bounded; the rest counts as held until the last piece is written."""
    go_on = asyncio.Event()
    data = os.urandom(20_000_000)
    got = b""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        writer.write(switching(await upstream.request(reader)))
        await go_on.wait()
        frames = FrameParser(masked=True, most=len(data), whole=True)
        while not got:
            for each in frames.feed(await reader.read(1_000_000), 1000, 1_000_000):
                assert isinstance(each, Message)
                got = each.payload
        writer.write(encode_close_frame(1000, "", masked=False))
        await reader.read()

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, TWO)
        async with opened(gateway, "/v1/responses", ping_interval=None) as client:
            (connection,) = gateway.server._http.connections  # type: ignore[union-attr]
            relay = connection._relay.__self__  # type: ignore[union-attr]
            await client.send(data)
            await until(lambda: not relay._azure.writable, 20)
            assert relay._client.held == len(data)
            assert relay._upstream.transport.get_write_buffer_size() <= 64 * 1024 + STEP + 14
            go_on.set()
            with pytest.raises(websockets.ConnectionClosedOK):
                await client.recv()
            assert relay._client.held == 0
        await gateway.idle()
    assert got == data


async def test_a_message_that_is_kept_has_a_limit_of_its_own(
    start_gateway: StartGateway, echoing: FakeAzure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without filters it is the limit of bodies. With filters it is lower, and a length above it ends the WebSocket."""
    monkeypatch.setattr("gateway.transport.websocket_side.MAX_KEPT_MESSAGE", 5000)
    gateway = await start_gateway(echoing.endpoint, TWO.replace("models: {", "models: {gpt-4o: gpt-4o, "))
    async with opened(gateway) as client:
        await client.send(b"x" * 5001)
        assert await client.recv() == b"x" * 5001
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(RESPONSES)
    await reader.readuntil(b"\r\n\r\n")
    writer.write(encode_frame(BINARY, b"x" * 5000, masked=True))
    assert len(await reader.readexactly(5004)) == 5004
    writer.write(encode_frame(BINARY, b"x" * 5001, masked=True)[:8])
    (control,) = FrameParser(masked=False, most=1000).feed(await reader.read())
    writer.close()
    assert isinstance(control, Control)
    assert (control.code, control.payload[2:]) == (1009, b"a message is larger than 5000 bytes")


async def test_a_stage_that_decodes_gets_no_large_message(start_gateway: StartGateway, echoing: FakeAzure) -> None:
    """The client gets an error event, and the WebSocket continues."""
    gateway = await start_gateway(
        echoing.endpoint, FILTERED_DOWN.replace("- same", "- same as decoding"), {"mine/same.py": SAME}
    )
    async with opened(gateway, "/v1/responses") as client:
        await client.send(json.dumps({"event_id": "e1", "x": "a" * 5_000_000}))
        received = json.loads(await client.recv())
        assert (received["status"], received["error"]["code"], received["error"]["event_id"]) == (
            413,
            "message_too_large",
            "e1",
        )
        await client.send('"more"')
        assert await client.recv() == '"more"'


@pytest.mark.parametrize("opcode", [PING, PONG])
@pytest.mark.parametrize("from_client", [True, False])
async def test_too_many_pings_end_the_websocket(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch, opcode: int, from_client: bool
) -> None:
    """A hundred at once are forwarded; one more ends it, and the client and the log have the reason."""
    monkeypatch.setattr("gateway.transport.websocket_limits._CONTROL_FRAMES_PER_SECOND", 0)
    flood = encode_frame(opcode, b"p", masked=from_client) * 101
    received: list[Any] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(switching(await upstream.request(reader)) + (b"" if from_client else flood))
        frames = FrameParser(masked=True, most=1000)
        while data := await reader.read(65536):
            received.extend(frames.feed(data, 1000))

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, REALTIME)
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(HANDSHAKE)
        await reader.readuntil(b"\r\n\r\n")
        if from_client:
            writer.write(flood)
        found: list[Any] = []
        found += FrameParser(masked=False, most=1000).feed(await reader.read(), 1000)
        writer.close()
        await until(lambda: upstream.open == 0)
    passed, ended = (received, found) if from_client else (found, received)
    assert [each.opcode for each in passed] == [opcode] * 100 + [CLOSE]
    assert [each.opcode for each in ended] == [CLOSE]
    assert found[-1].code == (1008 if from_client else 1011)
    assert b"too many pings and pongs; the limit is 100 at once" in found[-1].payload
    (event,) = gateway.exchanges()
    assert event["error"] == ("policy_violation" if from_client else "upstream_error")
    assert "too many pings and pongs; the limit is 100 at once" in event["reason"]


def test_pings_are_counted_by_a_token_bucket() -> None:
    """Its capacity is 100, its refill is 20 per second."""
    bucket = ControlFrameLimit()
    for now, allowed in ((1000.0, 100), (1001.0, 20), (1001.5, 10), (2000.0, 100)):
        for _ in range(allowed):
            bucket.take(now)
        with pytest.raises(FrameError) as caught:
            bucket.take(now)
        assert caught.value.code == 1008
        bucket._left += 1  # the one that was refused


def relay_of(gateway: Gateway) -> tuple[ClientConnection, WebSocketRelay]:
    """Return the relay of the only open WebSocket, and its client's connection."""
    connections: list[Any] = gateway.server._http.connections  # type: ignore[union-attr]
    (connection,) = (each for each in connections if each._relay is not None)
    return connection, connection._relay.__self__


@BOTH_WAYS
@pytest.mark.parametrize("from_client", [True, False])
async def test_a_disconnect_is_handled_after_the_frames_before_it(
    start_gateway: StartGateway, handshake: bytes, from_client: bool
) -> None:
    """Most frames wait for their turns then: the other side gets them, and then a close frame."""
    count = 5000
    received: list[Any] = []

    async def read(reader: asyncio.StreamReader, masked: bool) -> None:
        frames = FrameParser(masked=masked, most=1000, whole=True)
        while not frames.closed:
            received.extend(frames.feed(await reader.read(65536), 1_000_000, 1_000_000))

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(switching(await upstream.request(reader)))
        if from_client:
            await read(reader, True)
        await reader.read()

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, TWO.replace("models: {", "models: {gpt-4o: gpt-4o, "))
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(handshake)
        await reader.readuntil(b"\r\n\r\n")
        connection, relay = relay_of(gateway)
        flood = encode_frame(TEXT, b"1", masked=from_client) * count
        (relay.from_client if from_client else relay.from_azure)(flood)
        lost = connection.transport if from_client else relay._upstream.transport
        assert lost is not None
        lost.abort()
        if not from_client:
            await read(reader, False)
        await until(lambda: received and isinstance(received[-1], Control), 20)
        writer.close()
        await gateway.idle()
    assert received[:-1] == [Message(TEXT, b"1")] * count
    assert received[-1].code == (1001 if from_client else 1011)
    (event,) = gateway.exchanges()
    assert event["ended_by"] == ("client" if from_client else "upstream")


async def test_a_paused_side_is_not_parsed(start_gateway: StartGateway, echoing: FakeAzure) -> None:
    """Bytes that still arrive are kept until the other side is writable."""
    gateway = await start_gateway(echoing.endpoint, REALTIME)
    async with opened(gateway) as client:
        connection, relay = relay_of(gateway)
        looked_at = []
        relay.azure_flow(True)
        looked_at.append(connection._disconnect_timer is not None)  # it checks whether the client is connected
        relay.from_client(encode_frame(TEXT, b"held", masked=True))
        assert relay._client.frames.unread
        assert relay._client.messages == 0
        relay.azure_flow(False)
        looked_at.append(connection._disconnect_timer is not None)  # a client that leaves now loses no frame
        assert looked_at == [True, False]
        assert await client.recv() == "held"
        assert not connection._input_paused
        relay.from_client(encode_frame(TEXT, b"turn", masked=True) * 1000)
        assert (connection._input_paused, connection._disconnect_timer) == (True, None)
        assert [await client.recv() for _ in range(1000)] == ["turn"] * 1000


async def test_the_end_waits_for_a_large_message(start_gateway: StartGateway) -> None:
    """Azure has closed first: the client's last message and its own close frame still reach Azure completely."""
    received: list[Any] = []
    large = b'{"model":"gpt-4o","x":"%b"}' % (b"a" * 3_000_000)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(switching(await upstream.request(reader)) + encode_close_frame(4002, "", masked=False))
        frames = FrameParser(masked=True, most=10_000_000, whole=True)
        while data := await reader.read(65536):
            received.extend(frames.feed(data, 1_000_000, 1_000_000))

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, TWO.replace("models: {", "models: {gpt-4o: gpt-4o, "))
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(RESPONSES)
        await reader.readuntil(b"\r\n\r\n\x88\x02\x0f\xa2")
        writer.write(encode_frame(TEXT, large, masked=True) + encode_close_frame(4002, "", masked=True))
        await until(lambda: gateway.exchanges(), 20)
        await until(lambda: upstream.open == 0)
        writer.close()
    assert received[:-1] == [Message(TEXT, large)]
    assert received[-1].code == 4002
    assert gateway.exchanges()[0]["ended_by"] == "complete"


@pytest.mark.parametrize(
    ("message", "event_id"),
    [
        (b'{"event_id":"e1","type":"x"}', "e1"),
        (b'{"event_id":"e1","x":[' + b"[]," * 1_000_000 + b"[]]}", "e1"),
        (b'{"event_id":[1]}', None),
        (b'{"event_id":"' + b"a" * 5000 + b'"}', None),
        (b"[1]", None),
        (b"no JSON", None),
    ],
)
def test_an_error_event_repeats_the_message_s_id_and_decodes_nothing_else(message: bytes, event_id: str | None) -> None:
    """A message may be large, and its size may be the error."""
    received = json.loads(error_event(ApiError(413, "too much"), message))
    assert received["error"].get("event_id") == event_id
