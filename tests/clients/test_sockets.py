"""WebSockets of common clients: npm's `ws`, the realtime clients of the SDKs, and through nginx."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import trustme
from websockets.asyncio.client import connect

from gateway.testing import FakeAzure
from tests.clients.test_clients import SHIPPED, node, start_nginx
from tests.conftest import KEY, StartGateway, until
from tests.transport.test_websocket_relay import REALTIME, TWO, echo

pytestmark = [pytest.mark.clients, pytest.mark.timeout(120)]
__all__ = ("start_nginx",)  # a fixture


async def test_ws_sends_and_receives_ten_thousand_frames(start_gateway: StartGateway) -> None:
    """Text and binary, byte for byte; pings get a pong, and the close code reaches the log."""
    async with FakeAzure(speak=echo) as azure:
        gateway = await start_gateway(azure.endpoint, REALTIME)
        seen = await node("sockets.mjs", gateway, "frames")
        assert seen == {"received": 10_000, "wrong": [], "pong": "there?", "code": 1000, "reason": ""}
        await gateway.idle()
        assert gateway.exchanges()[0]["close_code"] == 4001
        assert gateway.exchanges()[0]["counts"] == {"messages_up": 10_000, "messages_down": 10_000}


async def test_ws_reads_slowly_hangs_up_and_is_refused(start_gateway: StartGateway) -> None:
    """A reader that pauses loses nothing; a lost connection and a wrong key end as expected."""
    async with FakeAzure(speak=echo) as azure:
        gateway = await start_gateway(azure.endpoint, REALTIME)
        seen = await node("sockets.mjs", gateway, "slow")
        assert seen == {"before": 0, "size": 30_000_000, "code": 1000, "reason": ""}
        assert (await node("sockets.mjs", gateway, "hangup"))["code"] == 1006
        assert await node("sockets.mjs", gateway, "refused") == {"status": 401}
        await gateway.idle()
        assert [event["ended_by"] for event in gateway.exchanges()] == ["complete", "client", "complete"]


async def test_ws_presents_its_key_as_a_browser_does(start_gateway: StartGateway) -> None:
    """Among the subprotocols; the gateway confirms the one that is not a key."""
    async with FakeAzure(speak=echo) as azure:
        gateway = await start_gateway(azure.endpoint, REALTIME)
        seen = await node("sockets.mjs", gateway, "browser")
        assert seen == {"protocol": "realtime", "code": 1000, "reason": ""}
        assert azure.requests[0].headers.get("api-key") == KEY


async def test_ws_two_hundred_at_once_leave_no_descriptor(start_gateway: StartGateway) -> None:
    """Half of them close cleanly, half drop the connection."""
    async with FakeAzure(speak=echo) as azure:
        gateway = await start_gateway(azure.endpoint, REALTIME)
        await node("sockets.mjs", gateway, "hangup")
        await gateway.idle()
        await until(lambda: azure.connections == 0)
        before = len(os.listdir("/proc/self/fd"))
        assert await node("sockets.mjs", gateway, "many") == {"right": 200}
        await gateway.idle()
        await until(lambda: azure.connections == 0)
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


@contextlib.asynccontextmanager
async def in_tls(port: int, folder: Path) -> AsyncIterator[tuple[str, dict[str, str]]]:
    """Put TLS in front of a port; yields its URL, and the environment in which Node trusts its authority."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(folder / "authority.pem")

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=context)
    async with server:
        url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
        yield url, {"NODE_EXTRA_CA_CERTS": str(folder / "authority.pem")}


async def test_the_realtime_client_of_npm_openai(start_gateway: StartGateway, tmp_path: Path) -> None:
    """It supports only wss://: a session is created, a response streams."""
    async with FakeAzure() as azure:
        gateway = await start_gateway(azure.endpoint, REALTIME)
        async with in_tls(gateway.port, tmp_path) as (url, env):
            assert await node("sockets.mjs", gateway, "sdk", url=url, env=env) == {"text": "Hello there!"}
        await gateway.idle()


async def test_the_realtime_client_of_openai_python(start_gateway: StartGateway) -> None:
    """A session is created, a response streams; also with the SDK's Azure client."""
    async with FakeAzure() as azure:
        gateway = await start_gateway(azure.endpoint, REALTIME)
        async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{gateway.url}/v1") as client:
            base = f"ws://{gateway.server.address}/v1"
            async with client.with_options(websocket_base_url=base).realtime.connect(model="gpt-4o") as connection:
                assert (await connection.recv()).type == "session.created"
                await connection.response.create()
                text, kind = "", ""
                while kind != "response.done":
                    event: Any = await connection.recv()
                    kind = event.type
                    text += event.delta if kind == "response.output_text.delta" else ""
                assert text == "Hello there!"
        azured = openai.AsyncAzureOpenAI(
            api_key=KEY, api_version="2025-04-01-preview", azure_endpoint=gateway.url,
            websocket_base_url=f"ws://{gateway.server.address}/openai",
        )  # fmt: skip
        async with azured as client, client.realtime.connect(model="gpt-4o") as connection:
            assert (await connection.recv()).type == "session.created"


async def test_openai_python_s_responses_websocket(start_gateway: StartGateway) -> None:
    """The model of each message is mapped."""
    async with FakeAzure() as azure:
        gateway = await start_gateway(azure.endpoint, TWO)
        async with (
            openai.AsyncOpenAI(
                api_key=KEY, base_url=f"{gateway.url}/v1", websocket_base_url=f"ws://{gateway.server.address}/v1"
            ) as client,
            client.responses.connect() as connection,
        ):
            await connection.response.create(model="mine", input="hi")
            kinds = []
            while "response.completed" not in kinds:
                kinds.append((await connection.recv()).type)
        assert kinds[0] == "response.created"


async def test_through_the_shipped_nginx_site(start_gateway: StartGateway, start_nginx: Any) -> None:
    """Frames and close codes pass nginx in both directions, and plain requests reuse connections."""
    async with FakeAzure(speak=echo) as azure:
        gateway = await start_gateway(azure.endpoint, REALTIME)
        port = await start_nginx(SHIPPED, f"127.0.0.1:{gateway.port}")
        url = f"ws://127.0.0.1:{port}/v1/realtime?model=gpt-4o"
        async with connect(url, additional_headers={"Authorization": f"Bearer {KEY}"}) as client:
            for number in range(100):
                await client.send(json.dumps({"n": number}))
                assert json.loads(await client.recv()) == {"n": number}
            await client.close(4002)
        await gateway.idle()
        assert [event["close_code"] for event in gateway.exchanges()] == [4002]
