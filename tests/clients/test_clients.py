"""Real clients through a running gateway, with each of Azure's three known endings of streams."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web

from gateway.testing import FakeAzure, Seen
from tests.conftest import CHAT, KEY, YAML, Gateway, StartGateway, until

pytestmark = [pytest.mark.clients, pytest.mark.timeout(120)]

HERE = Path(__file__).parent
ENDINGS = (b"data: [DONE]\n\n", b"data: [DONE]\n", b"data: [DONE]")
UNREPAIRED = YAML.replace("  - sse_newline\n", "")
LISTED = YAML.replace(
    "{unmapped: own_name_without_dots}", "{models: {gpt-4o: gpt-4o, text-embedding-3-small: text-embedding-3-small}}"
)


@pytest.fixture(params=ENDINGS, ids=["blank line", "one newline", "no newline"])
async def azure(request: pytest.FixtureRequest) -> AsyncIterator[FakeAzure]:
    """A fake Azure with one of the three endings of streams."""
    async with FakeAzure(ending=request.param, delay=0.01) as running:
        yield running


async def node(
    script: str, gateway: Gateway, *arguments: str, url: str | None = None, env: dict[str, str] | None = None
) -> Any:
    """Run a script of this folder against a gateway; return the JSON that it prints."""
    process = await asyncio.create_subprocess_exec(
        *("node", str(HERE / script), url or gateway.url, KEY, *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **(env or {})},
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err.decode()
    return json.loads(out)


async def test_openai_python(azure: FakeAzure, start_gateway: StartGateway) -> None:
    """The official SDK: a plain response, a stream, embeddings, the list of models, and errors that it understands."""
    gateway = await start_gateway(azure.endpoint, LISTED)
    async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{gateway.url}/v1", max_retries=0) as client:
        messages: Any = CHAT["messages"]
        plain = await client.chat.completions.create(model="gpt-4o", messages=messages)
        assert plain.choices[0].message.content == "Hello there!"
        text = ""
        stream = await client.chat.completions.create(model="gpt-4o", messages=messages, stream=True)
        async for chunk in stream:
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
        assert text == "Hello there!"
        embeddings = await client.embeddings.create(model="text-embedding-3-small", input=["a", "b"])
        assert [each.embedding for each in embeddings.data] == [[0.25, -0.5, 0.125]] * 2
        completion = await client.completions.create(model="gpt-3.5-turbo", prompt="hi")
        assert completion.choices[0].text == "Hello there!"
        assert [model.id async for model in client.models.list()] == ["gpt-4o", "text-embedding-3-small"]
        assert (await client.models.retrieve("gpt-4o")).id == "gpt-4o"
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="unknown", messages=messages)
        with pytest.raises(openai.NotFoundError) as caught:
            await client.moderations.create(input="a cat")
        assert caught.value.code == "operation_not_supported"
    async with openai.AsyncOpenAI(api_key="wrong", base_url=f"{gateway.url}/v1", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(model="gpt-4o", messages=messages)


async def test_openai_python_sees_a_broken_stream(start_gateway: StartGateway) -> None:
    """A stream that Azure breaks off raises in the client; it does not look like a short response."""

    async def cut(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(
            b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m","choices":[]}\n\n'
        )
        assert request.transport is not None
        request.transport.abort()
        return response

    async with FakeAzure(respond=cut) as azure:
        gateway = await start_gateway(azure.endpoint)
        async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{gateway.url}/v1", max_retries=0) as client:
            messages: Any = CHAT["messages"]
            stream = await client.chat.completions.create(model="gpt-4o", messages=messages, stream=True)
            with pytest.raises(openai.APIError, match="before the end of its response"):
                [chunk async for chunk in stream]


async def test_openai_python_waits_as_it_is_told(azure: FakeAzure, start_gateway: StartGateway) -> None:
    """The SDK reads `retry-after-ms` of the gateway's 429 and succeeds at its next try."""
    yaml = YAML.replace("  - model_map", "  - rate_limit: {requests_per_minute: 60, burst: 1}\n  - model_map")
    gateway = await start_gateway(azure.endpoint, yaml)
    async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{gateway.url}/v1", max_retries=2) as client:
        messages: Any = CHAT["messages"]
        for _ in range(2):
            await client.chat.completions.create(model="gpt-4o", messages=messages)
    await gateway.idle()
    assert [event["status"] for event in gateway.exchanges()] == [200, 429, 200]


async def test_openai_node(azure: FakeAzure, start_gateway: StartGateway) -> None:
    """The same for the SDK of Node."""
    gateway = await start_gateway(azure.endpoint, LISTED)
    assert await node("openai.mjs", gateway) == {
        "plain": "Hello there!",
        "streamed": "Hello there!",
        "embeddings": [[0.25, -0.5, 0.125]] * 2,
        "models": ["gpt-4o", "text-embedding-3-small"],
        "error": {"status": 404, "name": "NotFoundError"},
    }


async def test_chatgpt(azure: FakeAzure, start_gateway: StartGateway) -> None:
    """`chatgpt` 5.2.5 hangs until its timeout if the ending is wrong; with the repair it works."""
    gateway = await start_gateway(azure.endpoint)
    assert await node("chatgpt.mjs", gateway) == {"text": "Hello there!", "progress": True}
    unrepaired = await start_gateway(azure.endpoint, UNREPAIRED)
    without = await node("chatgpt.mjs", unrepaired)
    assert ("error" in without) == (azure.ending != b"data: [DONE]\n\n")


async def test_eventsource_parser(azure: FakeAzure, start_gateway: StartGateway) -> None:
    """1.0.0 and the newest version receive `[DONE]`; without the repair they miss it if the ending is wrong."""
    gateway = await start_gateway(azure.endpoint)
    seen = await node("parsers.mjs", gateway)
    assert (seen["first"], seen["newest"]) == ("[DONE]", "[DONE]")
    unrepaired = await start_gateway(azure.endpoint, UNREPAIRED)
    without = await node("parsers.mjs", unrepaired)
    whole = azure.ending == b"data: [DONE]\n\n"
    assert ((without["first"] == "[DONE]"), (without["newest"] == "[DONE]")) == (whole, whole)
    assert without["count"] == seen["count"] - (0 if whole else 1)


# -- nginx -------------------------------------------------------------------------------------------------------

SHIPPED = (HERE.parents[1] / "deploy" / "nginx" / "gateway.conf").read_text()
PLAIN = """
server { listen 80; location / { proxy_pass http://127.0.0.1:8080; proxy_read_timeout 5s; } }
"""


@pytest.fixture
async def start_nginx(tmp_path: Path, unused_tcp_port_factory: Any) -> AsyncIterator[Any]:
    """Return a function that runs nginx with a site in front of an address and returns its port."""
    binary = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert binary, "nginx is not installed; apt-get install nginx-light"
    processes: list[asyncio.subprocess.Process] = []

    async def start(site: str, address: str) -> int:
        port: int = unused_tcp_port_factory()
        folder = tmp_path / f"nginx{port}"
        folder.mkdir()
        site = site.replace("listen 80;", f"listen 127.0.0.1:{port};").replace("127.0.0.1:8080", address)
        paths = "".join(
            f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (folder / "nginx.conf").write_text(
            f"daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;\n"
            f"events {{}}\nhttp {{ access_log off; {paths}\n{site}\n}}\n"
        )
        process = await asyncio.create_subprocess_exec(
            binary, "-p", str(folder), "-c", str(folder / "nginx.conf"), stderr=asyncio.subprocess.PIPE
        )
        processes.append(process)
        async with aiohttp.ClientSession() as session:
            async with asyncio.timeout(30):
                while True:
                    try:
                        async with session.get(f"http://127.0.0.1:{port}/healthz") as answer:
                            assert answer.status == 200
                            return port
                    except aiohttp.ClientConnectionError:
                        assert process.returncode is None, (folder / "error.log").read_text()
                        await asyncio.sleep(0.05)

    yield start
    for process in processes:
        process.terminate()
        await process.wait()


@pytest.mark.parametrize("site", [SHIPPED, PLAIN], ids=["shipped", "nginx's defaults"])
async def test_nginx_streams_unbuffered(site: str, start_gateway: StartGateway, start_nginx: Any) -> None:
    """Each event arrives before the fake Azure sends the next one, even if nginx buffers and uses HTTP/1.0."""
    arrived = asyncio.Event()

    async def one_by_one(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for number in range(20):
            await response.write(b"data: %d\n\n" % number)
            await arrived.wait()
            arrived.clear()
        await response.write(b"data: [DONE]")
        return response

    async with FakeAzure(respond=one_by_one) as azure:
        gateway = await start_gateway(azure.endpoint)
        port = await start_nginx(site, f"127.0.0.1:{gateway.port}")
        received = b""
        async with gateway.session.post(
            f"http://127.0.0.1:{port}/v1/chat/completions", json={**CHAT, "stream": True}, headers={"api-key": KEY}
        ) as answer:
            assert answer.status == 200
            number = 0
            async with asyncio.timeout(30):
                while chunk := await answer.content.readany():
                    received += chunk
                    if received.endswith(b"data: %d\n\n" % number):
                        number += 1
                        arrived.set()
        assert number == 20
        assert received.endswith(b"data: 19\n\ndata: [DONE]\n\n")


async def test_nginx_keeps_connections_and_tells_the_client_s_address(
    start_gateway: StartGateway, start_nginx: Any
) -> None:
    """With the shipped site: one connection to the gateway for many requests, and limits by real address."""
    yaml = YAML.replace("  - model_map", "  - rate_limit: {requests_per_minute: 1, per: client}\n  - model_map")
    async with FakeAzure() as azure:
        gateway = await start_gateway(azure.endpoint, "trusted_proxies: [127.0.0.1]\n" + yaml)
        port = await start_nginx(SHIPPED, f"127.0.0.1:{gateway.port}")
        statuses = []
        for address in ("127.0.0.2", "127.0.0.2", "127.0.0.3"):
            connector = aiohttp.TCPConnector(local_addr=(address, 0))
            async with (
                aiohttp.ClientSession(connector=connector) as session,
                session.post(
                    f"http://127.0.0.1:{port}/v1/chat/completions", json=CHAT, headers={"api-key": KEY}
                ) as answer,
            ):
                statuses.append(answer.status)
                assert len(answer.headers["x-request-id"]) == 32, "nginx's own id"
        assert statuses == [200, 429, 200]
        assert len(gateway.server._http.connections) == 1  # type: ignore[union-attr]


async def test_client_that_leaves_nginx_ends_azure_s_stream(start_gateway: StartGateway, start_nginx: Any) -> None:
    """Through nginx, too, Azure's stream ends when its client leaves."""
    async with FakeAzure(words=["x"] * 5000, delay=0.01) as azure:
        gateway = await start_gateway(azure.endpoint)
        port = await start_nginx(SHIPPED, f"127.0.0.1:{gateway.port}")
        answer = await gateway.session.post(
            f"http://127.0.0.1:{port}/v1/chat/completions", json={**CHAT, "stream": True}, headers={"api-key": KEY}
        )
        await answer.content.readany()
        assert azure.streaming == 1
        answer.close()
        await until(lambda: azure.streaming == 0)
        await gateway.idle()
