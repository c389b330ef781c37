"""The server: from a client's request to its response, through a real gateway to a fake Azure."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.errors import ApiError
from gateway.settings import Listen
from gateway.testing import FakeAzure
from gateway.transport import client_connection as connection
from gateway.transport.response_head import closing_response
from tests.conftest import CHAT, KEY, StartGateway, chat_request, raw_request, raw_upstream, until

pytestmark = pytest.mark.both_loops


async def test_chat_completion_reaches_the_deployment(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """A chat completion goes to its deployment's URL with the client's key, and the response comes back."""
    gateway = await start_gateway(azure.endpoint)

    async with gateway.post() as answer:
        body = await answer.json()

    assert answer.status == 200
    assert body["choices"][0]["message"]["content"] == "Hello there!"
    seen = azure.requests[0]
    assert seen.path == "/openai/deployments/gpt-4o/chat/completions"
    assert seen.query == [("api-version", "2024-10-21")]
    assert seen.headers.get("api-key") == KEY
    assert "authorization" not in seen.headers
    assert seen.json() == CHAT


async def test_stream_passes_byte_for_byte(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """A complete stream reaches the client as the bytes that Azure sent."""
    gateway = await start_gateway(azure.endpoint)

    async with gateway.post(json={**CHAT, "stream": True}) as answer:
        through = await answer.read()
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"{azure.endpoint}/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21",
            json={**CHAT, "stream": True},
            headers={"api-key": KEY},
        ) as direct,
    ):
        assert await direct.read() == through

    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-accel-buffering"] == "no"


async def test_chunks_arrive_as_they_are_sent(start_gateway: StartGateway) -> None:
    """Each event is forwarded when it arrives, not when the stream ends."""
    go = asyncio.Event()

    async def hold(seen: object, request: aiohttp.web.BaseRequest) -> aiohttp.web.StreamResponse:
        response = aiohttp.web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await go.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    async with FakeAzure(respond=hold) as azure:
        gateway = await start_gateway(azure.endpoint)
        async with gateway.post(json={**CHAT, "stream": True}) as answer:
            assert await answer.content.readany() == b"data: 1\n\n"
            go.set()
            assert await answer.content.read() == b"data: [DONE]\n\n"


async def test_completions_and_embeddings(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """The other two operations reach their paths."""
    gateway = await start_gateway(azure.endpoint)

    async with gateway.post("/v1/completions", {"model": "gpt-35-turbo", "prompt": "hi"}) as answer:
        assert (await answer.json())["choices"][0]["text"] == "Hello there!"
    async with gateway.post("/v1/embeddings", {"model": "text-embedding-3-small", "input": ["a", "b"]}) as answer:
        assert len((await answer.json())["data"]) == 2

    assert [seen.path for seen in azure.requests] == [
        "/openai/deployments/gpt-35-turbo/completions",
        "/openai/deployments/text-embedding-3-small/embeddings",
    ]


async def test_base_path_of_the_endpoint_is_kept(start_gateway: StartGateway) -> None:
    """An endpoint below a path, such as an API Management's, keeps that path."""
    async with FakeAzure(base_path="/corp/ai") as azure:
        gateway = await start_gateway(azure.endpoint + "/")
        async with gateway.post() as answer:
            assert answer.status == 200
    assert azure.requests[0].path == "/corp/ai/openai/deployments/gpt-4o/chat/completions"


async def test_unknown_operations_are_clear_404s(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """An unknown operation is a 404 in OpenAI's shape that names the path."""
    gateway = await start_gateway(azure.endpoint)

    for path, status in (("/v1/moderations", 404), ("/v1/", 404), ("/nothing", 404), ("/x/v1/models", 404)):
        async with gateway.post(path) as answer:
            error = (await answer.json())["error"]
        assert status == answer.status
        assert path.removeprefix("/v1/") in error["message"] or "/x/v1" in error["message"]
        assert {"message", "type", "param", "code"} == set(error)
    async with gateway.get("/v1/embeddings") as answer:
        assert answer.status == 405
        assert answer.headers["allow"] == "POST"
    assert not azure.requests


async def test_healthz_and_readyz(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Probes need no key; a draining gateway is not ready."""
    gateway = await start_gateway(azure.endpoint)

    async with gateway.get("/healthz", key=None) as answer:
        assert answer.status == 200
    async with gateway.get("/readyz", key=None) as answer:
        assert await answer.json() == {"status": "ready"}
    gateway.server.ready = False
    async with gateway.get("/readyz", key=None) as answer:
        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
    async with gateway.get("/healthz", key=None) as answer:
        assert answer.status == 200
    async with gateway.post("/healthz", key=None) as answer:
        assert answer.status == 405


async def test_client_that_leaves_closes_the_upstream(start_gateway: StartGateway) -> None:
    """If a client disconnects during a stream, Azure's stream ends, and the log says that the client ended it."""
    async with FakeAzure(words=["x"] * 1000, delay=0.02) as azure:
        gateway = await start_gateway(azure.endpoint)
        answer = await gateway.post(json={**CHAT, "stream": True})
        await answer.content.readany()
        assert azure.streaming == 1
        answer.close()
        await until(lambda: azure.streaming == 0)
        await gateway.idle()
        await until(lambda: azure.connections == 0)
    [event] = gateway.exchanges()
    assert event["ended_by"] == "client"
    assert event["status"] == 200


async def test_client_that_leaves_before_the_answer(start_gateway: StartGateway) -> None:
    """If a client disconnects before Azure has responded, the request to Azure ends; the log says 499."""
    waiting = asyncio.Event()
    gone = asyncio.Event()

    async def think(seen: object, request: object) -> None:
        waiting.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            gone.set()
            raise

    async with FakeAzure(respond=think) as azure:
        gateway = await start_gateway(azure.endpoint)
        task = asyncio.create_task(gateway.post().__aenter__())
        await waiting.wait()
        task.cancel()
        async with asyncio.timeout(30):
            await gone.wait()
        await gateway.idle()
    [event] = gateway.exchanges()
    assert (event["status"], event["ended_by"]) == (499, "client")


async def test_slow_reader_pauses_the_upstream(start_gateway: StartGateway) -> None:
    """While a client does not read, the gateway reads no more from Azure than its buffers hold."""
    block = b": " + b"x" * 65_533 + b"\n"
    sent = 0

    async def flood(seen: object, request: aiohttp.web.BaseRequest) -> aiohttp.web.StreamResponse:
        nonlocal sent
        response = aiohttp.web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(1000):
            await response.write(block)
            sent += 1
        await response.write(b"data: [DONE]\n\n")
        return response

    async with FakeAzure(respond=flood) as azure:
        gateway = await start_gateway(azure.endpoint)
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1024)
        writer.write(chat_request(stream=True))
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.3)
        assert sent < 400, "64 MB were offered; buffers of sockets hold a few"
        total = 0
        while chunk := await reader.read(1 << 20):
            total += len(chunk)
        writer.close()
    assert sent == 1000
    assert total > 1000 * len(block)


async def test_the_write_timeout_closes_a_client_that_never_reads(start_gateway: StartGateway) -> None:
    """If a client takes nothing for `timeouts.client` seconds, its connection and that to Azure close."""
    async with FakeAzure(words=["x" * 100_000] * 2000) as azure:
        gateway = await start_gateway(azure.endpoint, timeouts={"client": 0.3})
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1024)
        writer.write(chat_request(stream=True))
        await until(lambda: gateway.exchanges())
        await until(lambda: azure.connections == 0)
        writer.close()
    [event] = gateway.exchanges()
    assert (event["ended_by"], event["error"]) == ("client", "client_not_reading")


async def test_http_1_0_clients_get_an_answer_without_chunks(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Nginx uses HTTP/1.0 by default: the stream then ends with the connection."""
    gateway = await start_gateway(azure.endpoint)
    request = chat_request(stream=True).replace(b"HTTP/1.1", b"HTTP/1.0")

    received = await raw_request(gateway.port, request)

    head, _, body = received.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


async def test_expect_100_continue(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """A client that expects `100 Continue` gets it when a stage reads the body, and not before."""
    gateway = await start_gateway(azure.endpoint)
    whole = chat_request(extra="Expect: 100-continue\r\n")
    head, _, body = whole.partition(b"\r\n\r\n")
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(head + b"\r\n\r\n")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    assert b"HTTP/1.1 200 OK" in await reader.readuntil(b"\r\n\r\n")
    writer.close()

    refused = head.replace(b"Bearer azure-key", b"Basic azure-key") + b"\r\n\r\n"
    received = await raw_request(gateway.port, refused)
    assert received.startswith(b"HTTP/1.1 401")
    assert b"connection: close" in received
    received = await raw_request(gateway.port, head.replace(b"100-continue", b"200-maybe") + b"\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 417")


async def test_keep_alive_and_pipelining(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """100 pipelined requests get their responses in order."""
    gateway = await start_gateway(azure.endpoint)
    one = chat_request().replace(b"Connection: close\r\n", b"")
    received = await raw_request(gateway.port, one * 99 + chat_request())
    assert received.count(b"HTTP/1.1 200 OK") == 100
    assert len(azure.requests) == 100


async def test_body_above_the_limit_is_refused_unread(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """A Content-Length above the limit is an immediate 413; a chunked body is one when it exceeds the limit."""
    gateway = await start_gateway(azure.endpoint, limits={"body": 1000})
    head = chat_request().partition(b"Content-Length")[0]
    received = await raw_request(gateway.port, head + b"Content-Length: 1001\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 413")
    chunk = b"1f4\r\n" + b"x" * 500 + b"\r\n"
    received = await raw_request(gateway.port, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 3)
    assert received.startswith(b"HTTP/1.1 413")
    assert not azure.requests


async def test_slow_clients_are_disconnected(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Connections with incomplete heads, with incomplete bodies, and without a request are closed."""
    gateway = await start_gateway(azure.endpoint, timeouts={"head": 0.3, "client": 0.3, "keep_alive": 0.5})
    for sent, status in (
        (b"", b"HTTP/1.1 408"),
        (b"POST /v1/chat", b"HTTP/1.1 408"),
        (chat_request()[:-10], b"HTTP/1.1 408"),
    ):
        received = await raw_request(gateway.port, sent)
        assert received.startswith(status), received
        assert b'"error"' in received
    alive = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    received = await raw_request(gateway.port, alive)
    assert received.count(b"HTTP/1.1") == 1, "an idle connection is closed without a response"
    await until(lambda: not gateway.server._http.connections)  # type: ignore[union-attr]


async def test_a_slow_second_head_is_a_408(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """`timeouts.head` also applies to the second request of a connection."""
    gateway = await start_gateway(azure.endpoint, timeouts={"head": 0.3, "keep_alive": 30})
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readuntil(b"}")
    writer.write(b"GET /heal")
    async with asyncio.timeout(30):
        assert (await reader.read()).startswith(b"HTTP/1.1 408")
    writer.close()


async def test_connections_are_bounded(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """A connection above the limit gets a 503, and the others continue."""
    gateway = await start_gateway(azure.endpoint, limits={"connections": 2})
    held = [await asyncio.open_connection("127.0.0.1", gateway.port) for _ in range(2)]
    await until(lambda: len(gateway.server._http.connections) == 2)  # type: ignore[union-attr]
    for sent in (chat_request(), b"", b"POST /v1/chat"):
        received = await raw_request(gateway.port, sent)
        assert received.startswith(b"HTTP/1.1 503"), sent
        assert b"\r\nretry-after: 1\r\n" in received
        assert b"\r\nconnection: close\r\n" in received
    assert not azure.requests
    for path in (b"/healthz", b"/readyz"):
        received = await raw_request(gateway.port, b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
        assert received.startswith(b"HTTP/1.1 200"), "probes get a response at any load"
        assert b"\r\nconnection: close\r\n" in received
    for _, writer in held:
        writer.close()
    await until(lambda: not gateway.server._http.connections)  # type: ignore[union-attr]
    async with gateway.post() as answer:
        assert answer.status == 200


async def test_connections_above_the_limit_are_bounded_too(
    start_gateway: StartGateway, azure: FakeAzure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some are accepted for probes; one more gets a 503 and is closed immediately, before its request."""
    monkeypatch.setattr(connection, "PROBE_CONNECTIONS", 2)
    monkeypatch.setattr(connection, "PROBE_HEAD_TIMEOUT", 30.0)
    gateway = await start_gateway(azure.endpoint, limits={"connections": 1}, timeouts={"head": 30})
    held = [await asyncio.open_connection("127.0.0.1", gateway.port) for _ in range(3)]
    await until(lambda: len(gateway.server._http.connections) == 3)  # type: ignore[union-attr]
    received = await raw_request(gateway.port, b"", timeout=2)
    assert received.startswith(b"HTTP/1.1 503")
    assert b"\r\nretry-after: 1\r\n" in received
    await until(lambda: len(gateway.server._http.connections) == 3)  # type: ignore[union-attr]
    for _, writer in held:
        writer.close()


@pytest.mark.parametrize(
    "begun",
    [
        b"GET /v1/models HTTP/1.1\nHost: x\n\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA b: c\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        bytes.fromhex("1603010200010001fc0303") + bytes(400),
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 17_000,
    ],
)
async def test_an_invalid_head_is_rejected_before_it_is_complete(
    begun: bytes, start_gateway: StartGateway, azure: FakeAzure
) -> None:
    """An invalid head is rejected on arrival, not after `timeouts.head`; one that is too long names the limit."""
    gateway = await start_gateway(azure.endpoint, timeouts={"head": 60})
    for pieces in ([begun], [begun[: len(begun) // 2], begun[len(begun) // 2 :]]):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.02)
        async with asyncio.timeout(5):
            received = await reader.readuntil(b"}")
        assert received.startswith(b"HTTP/1.1 431" if len(begun) > 16_384 else b"HTTP/1.1 400"), received
        assert (b"16384" in received) is (len(begun) > 16_384)
        writer.close()


def test_an_error_that_ends_its_connection_has_its_headers() -> None:
    """Every 503 has a Retry-After; an error may set another one."""
    plain = closing_response(ApiError(503, "busy"))
    assert b"\r\nretry-after: 1\r\n" in plain
    explicit = closing_response(ApiError(503, "busy", headers={"retry-after": "30", "x-other": "a"}))
    assert b"\r\nretry-after: 30\r\n" in explicit
    assert b"\r\nx-other: a\r\n" in explicit
    assert b"retry-after" not in closing_response(ApiError(400, "no"))


async def test_request_id_is_echoed_or_made(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """A client's valid request id comes back; Azure's is in a header of another name."""
    gateway = await start_gateway(azure.endpoint)
    async with gateway.post(headers={"X-Request-ID": "abc-123"}) as answer:
        assert answer.headers["x-request-id"] == "abc-123"
        assert answer.headers["x-azure-request-id"].startswith("cb65b8a6")
    async with gateway.post(headers={"X-Request-ID": "a b\tc"}) as answer:
        assert answer.headers["x-request-id"].startswith("req_")
    assert azure.requests[0].headers.get("x-request-id") == "abc-123"


async def test_nothing_of_the_client_s_hop_reaches_azure(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Hop-by-hop, forwarding, cookie and credential headers are removed; others are forwarded."""
    gateway = await start_gateway(azure.endpoint)
    headers = {
        "Connection": "keep-alive, X-Named",
        "X-HTTP-Method": "DELETE",
        "X-Ms-Client-Principal": "admin",
        "Api-Version": "1999-01-01",
        "X-Named": "1",
        "X-Forwarded-For": "10.0.0.1",
        "X-Forwarded-Host": "evil",
        "Forwarded": "for=x",
        "Cookie": "a=b",
        "TE": "trailers",
        "Proxy-Authorization": "Basic x",
        "Via": "1.1 a",
        "Ocp-Apim-Subscription-Key": "other",
        "Accept-Encoding": "zstd",
        "OpenAI-Organization": "org-1",
        "X-Stainless-Lang": "python",
    }
    async with gateway.post(headers=headers) as answer:
        assert answer.status == 200
    seen = azure.requests[0].headers
    for name in headers:
        expected = name in ("OpenAI-Organization", "X-Stainless-Lang")
        if name in ("Connection", "Accept-Encoding"):
            continue
        assert expected == (name in seen), name
    assert seen.get("accept-encoding") == "identity"
    assert "connection" not in seen


async def test_client_address_comes_from_trusted_proxies_only(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """X-Forwarded-For counts only if a trusted proxy sent it, and then from the right."""
    stage = """
from dataclasses import dataclass
from gateway import Next, Request, Response, Stage

@dataclass
class Who(Stage):
    "Tell the client its address."
    async def __call__(self, request: Request, call_next: Next) -> Response:
        return Response.json({"client": request.client_address})
"""
    yaml = """
trusted_proxies: %s
plugins_path: mine
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline: [who, auth_passthrough, model_map, api_version]
"""
    for trusted, forwarded, expected in (
        ("[]", "1.2.3.4", "127.0.0.1"),
        ("127.0.0.0/8", "1.2.3.4", "1.2.3.4"),
        ("127.0.0.0/8", "9.9.9.9, 1.2.3.4, 127.0.0.7", "1.2.3.4"),
        ("127.0.0.1", "6.6.6.6, nonsense", "127.0.0.1"),
    ):
        gateway = await start_gateway(azure.endpoint, yaml % trusted, {"mine/who.py": stage})
        async with gateway.get("/v1/models", key=None) as answer:
            assert answer.status != 401
        async with gateway.session.get(gateway.url + "/v1/models", headers={"X-Forwarded-For": forwarded}) as answer:
            assert expected == (await answer.json())["client"]


async def test_draining_finishes_streams_and_refuses_newcomers(start_gateway: StartGateway) -> None:
    """When the gateway stops, running streams complete and new connections are refused."""
    async with FakeAzure(words=["x"] * 20, delay=0.02) as azure:
        gateway = await start_gateway(azure.endpoint, timeouts={"grace": 5})
        answer = await gateway.post(json={**CHAT, "stream": True})
        await answer.content.readany()
        stopping = asyncio.create_task(gateway.server.stop())
        await until(lambda: gateway.server.draining)
        body = await answer.read()
        await stopping
        assert body.endswith(b"data: [DONE]\n\n")
        assert body.count(b'"x"') >= 20
        try:
            await asyncio.open_connection("127.0.0.1", gateway.port)
        except OSError:
            refused = True
        else:
            refused = False
        assert refused


async def test_draining_accepts_one_more_request_of_an_idle_connection(
    start_gateway: StartGateway, azure: FakeAzure
) -> None:
    """The request may be in flight already; its response says `connection: close`, and the drain then ends."""
    gateway = await start_gateway(azure.endpoint, timeouts={"grace": 30})
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    request = chat_request().replace(b"Connection: close\r\n", b"")
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    assert b"close" not in head
    await reader.readexactly(int(re.search(rb"(?i)content-length: (\d+)", head)[1]))  # type: ignore[index]
    stopping = asyncio.create_task(gateway.server.stop())
    await until(lambda: gateway.server.draining)
    await asyncio.sleep(0.1)
    writer.write(request)
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"connection: close\r\n" in answer.lower()
    await stopping
    writer.close()


async def test_draining_closes_connections_that_stay_idle(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """After 1 second, not after the grace period: a client's connection pool must not delay the stop."""
    gateway = await start_gateway(azure.endpoint, timeouts={"grace": 3600})
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    await until(lambda: gateway.server._http is not None and gateway.server._http.connections)
    async with asyncio.timeout(30):
        await gateway.server.stop()
        assert await reader.read() == b""
    writer.close()


async def test_a_request_may_follow_a_stream_that_began_before_the_drain(start_gateway: StartGateway) -> None:
    """Its head was sent before the drain began, so its client does not know that the connection closes."""
    async with FakeAzure(words=["x"] * 15, delay=0.1) as azure:
        gateway = await start_gateway(azure.endpoint, timeouts={"grace": 30})
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(chat_request(stream=True).replace(b"Connection: close\r\n", b""))
        await reader.readuntil(b"\r\n\r\n")  # the head: its last line, a request id, may itself end with 0
        stopping = asyncio.create_task(gateway.server.stop())
        await reader.readuntil(b"\r\n0\r\n\r\n")
        assert gateway.server.draining
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b'"alive"' in await reader.read()
        await stopping
        writer.close()


async def test_grace_is_bounded(start_gateway: StartGateway) -> None:
    """A stream that outlives the grace period ends as broken, and the log says that the gateway ended it."""
    async with FakeAzure(words=["x"] * 10_000, delay=0.02) as azure:
        gateway = await start_gateway(azure.endpoint, timeouts={"grace": 0.2})
        answer = await gateway.post(json={**CHAT, "stream": True})
        await answer.content.readany()
        async with asyncio.timeout(30):
            await gateway.server.stop()
        cut = False
        try:
            await answer.read()
        except aiohttp.ClientPayloadError:
            cut = True
        assert cut
    assert gateway.exchanges()[0]["ended_by"] == "gateway"


async def test_log_event_of_an_exchange(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """One event for each exchange, with the facts for an operator, and never a key or a body."""
    gateway = await start_gateway(azure.endpoint)
    async with gateway.post(headers={"X-Request-ID": "r1"}):
        pass
    await gateway.idle()
    [event] = gateway.exchanges()
    assert {
        "team": "default",
        "operation": "chat.completions",
        "model": "gpt-4o",
        "deployment": "gpt-4o",
        "resource": "azure",
        "status": 200,
        "ended_by": "complete",
        "request_id": "r1",
    }.items() <= event.items()
    assert event["bytes"] > 0
    assert 0 < event["first_byte_ms"] <= event["total_ms"]
    text = json.dumps(gateway.events, default=str)
    assert KEY not in text
    assert "messages" not in text


async def test_grace_cuts_http_1_0_streams_visibly(start_gateway: StartGateway) -> None:
    """A stream that the gateway ends has an error event, and for HTTP/1.0 a reset."""
    for version in (b"1.0", b"1.1"):
        async with FakeAzure(words=["x"] * 10_000, delay=0.02) as azure:
            gateway = await start_gateway(azure.endpoint, timeouts={"grace": 0.1})
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(chat_request(stream=True).replace(b"HTTP/1.1", b"HTTP/" + version))
            received = await reader.readuntil(b'"x"')
            stopping = asyncio.create_task(gateway.server.stop())
            reset = False
            try:
                while data := await reader.read(65536):
                    received += data
            except ConnectionResetError:
                reset = True
            await stopping
            writer.close()
        assert b"shutting_down" in received
        assert reset == (version == b"1.0")
        assert not received.endswith(b"0\r\n\r\n")


async def test_broken_json_is_a_reset_for_http_1_0_even_with_output_unsent(start_gateway: StartGateway) -> None:
    """Even with pending output, a broken response does not end like a complete one."""
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%b\r\n" % (9_000_000, b"x" * 9_000_000)
    async with raw_upstream(raw) as upstream:
        gateway = await start_gateway(upstream.endpoint)
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1024)
        writer.write(chat_request().replace(b"HTTP/1.1", b"HTTP/1.0"))
        await asyncio.sleep(0.3)
        reset = False
        try:
            while await reader.read(65536):
                pass
        except ConnectionResetError:
            reset = True
        assert reset
        writer.close()


async def test_http_1_0_over_a_unix_socket_gets_whole_json_or_an_error(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    """A Unix socket has no RST, so a response without a length is buffered until it is complete."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"
    for raw, status in ((head + b"0\r\n\r\n", b"200"), (head, b"502")):
        async with raw_upstream(raw) as upstream:
            gateway = await start_gateway(upstream.endpoint, listen=Listen(unix=str(tmp_path / "s")))
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
            writer.write(chat_request().replace(b"HTTP/1.1", b"HTTP/1.0"))
            assert (await reader.read()).startswith(b"HTTP/1.1 " + status)
            writer.close()
            await gateway.server.stop()


async def test_every_connection_header_counts(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Headers that any of several `Connection` lines names are removed."""
    gateway = await start_gateway(azure.endpoint)
    raw = chat_request(extra="X-One: 1\r\nX-Two: 2\r\nConnection: X-One\r\nConnection: X-Two\r\n")
    assert (await raw_request(gateway.port, raw)).startswith(b"HTTP/1.1 200")
    assert not {"x-one", "x-two"} & {name.lower() for name, _ in azure.requests[0].headers}


@pytest.mark.parametrize("line", ["response.body = 'text'", "response.body = None", "response.status = '200'"])
async def test_a_stage_that_spoils_a_response_is_a_500(
    line: str, start_gateway: StartGateway, azure: FakeAzure
) -> None:
    """The client gets a complete 500, not half a response."""
    stage = f"""
from gateway import Stage

class Spoils(Stage):
    "Make a response that is none."
    async def __call__(self, request, call_next):
        response = await call_next(request)
        {line}
        return response
"""
    yaml = """
plugins_path: mine
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline: [access_log, spoils, auth_passthrough, model_map, api_version]
"""
    gateway = await start_gateway(azure.endpoint, yaml, {"mine/spoils.py": stage})
    async with gateway.post() as answer:
        assert answer.status == 500
        assert "error" in await answer.json()


async def test_aiohttp_still_has_what_the_server_uses(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """The gateway relies on these private names of aiohttp; an upgrade that moves one must fail here first."""
    import inspect

    from aiohttp.base_protocol import BaseProtocol

    for name in ("connections", "connection_made", "connection_lost", "shutdown"):
        assert hasattr(aiohttp.web.Server, name), f"web.Server.{name} moved: http_server.py uses it"
    asked = inspect.getsource(aiohttp.web.Server)
    assert "_task_handler" in asked, "web.Server no longer asks for _task_handler: client_connection.py uses that name"
    gateway = await start_gateway(azure.endpoint)
    _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    await until(lambda: gateway.server._http.connections)  # type: ignore[union-attr]
    [connection] = gateway.server._http.connections  # type: ignore[union-attr]
    assert isinstance(connection, BaseProtocol), "web.Server.__call__ no longer makes the connections"
    for name in ("_loop", "_paused", "_drain_helper", "writing_paused", "transport"):
        assert hasattr(connection, name), f"aiohttp's BaseProtocol.{name} moved: gateway/transport uses it"
    writer.close()


async def test_grace_ends_requests_without_an_answer_with_a_503(start_gateway: StartGateway) -> None:
    """A request without a response from Azure gets a 503 with the reason, so that its client can retry elsewhere."""

    async def think(seen: object, request: object) -> None:
        await asyncio.sleep(3600)

    async with FakeAzure(respond=think) as azure:
        gateway = await start_gateway(azure.endpoint, timeouts={"grace": 0.1})
        task = asyncio.create_task(gateway.post().__aenter__())
        await until(lambda: azure.requests)
        await gateway.server.stop()
        answer = await task
        assert answer.status == 503
        assert (await answer.json())["error"]["code"] == "shutting_down"
    [event] = gateway.exchanges()
    assert (event["status"], event["ended_by"], event["error"]) == (503, "gateway", "shutting_down")


async def test_client_that_leaves_while_reading_is_paused(start_gateway: StartGateway) -> None:
    """Many pipelined requests pause reading; the gateway still notices that their client has disconnected."""

    async def think(seen: object, request: object) -> None:
        await asyncio.sleep(3600)

    async with FakeAzure(respond=think) as azure:
        gateway = await start_gateway(azure.endpoint)
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        request = chat_request().replace(b"Connection: close\r\n", b"")
        writer.write(request + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 500)
        await until(lambda: azure.requests)
        writer.close()
        await gateway.idle()
        await until(lambda: azure.connections == 0)


SLOW = """
from gateway import Response, Stage

class Slow(Stage):
    async def __call__(self, request, call_next):
        if self.id == "whole":
            return Response(200, b"x" * 6_000_000)

        async def pieces():
            for _ in range(60):
                yield b"x" * 100_000

        return Response(200, pieces())
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "pieces"])
@pytest.mark.parametrize("close", [False, True])
async def test_a_client_that_reads_slowly_but_steadily_gets_all(
    start_gateway: StartGateway, how: str, close: bool
) -> None:
    """`timeouts.client` applies only to a client that takes nothing, not to the whole response, and also after it."""
    yaml = "plugins_path: mine\nresources: {azure: {endpoint: http://azure.invalid}}\nauth: none\n"
    yaml += f"pipeline: [access_log, slow as {how}, auth_passthrough, model_map, api_version]\n"
    gateway = await start_gateway("", yaml, {"mine/slow.py": SLOW}, timeouts={"client": 1})
    loop = asyncio.get_running_loop()
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        raw.setblocking(False)
        await loop.sock_connect(raw, ("127.0.0.1", gateway.port))
        request = chat_request() if close else chat_request().replace(b"Connection: close\r\n", b"")
        await loop.sock_sendall(raw, request)
        received = 0
        while received < 6_000_000 and (data := await loop.sock_recv(raw, 60_000)):
            received += data.count(b"x")
            await asyncio.sleep(0.02)
    assert received >= 6_000_000


HELD = """
import asyncio
from gateway import Response, Stage

class Held(Stage):
    async def start(self, services):
        self.go = asyncio.Event()

    async def __call__(self, request, call_next):
        async def pieces():
            yield b"x" * 6_000_000
            await self.go.wait()

        return Response(200, pieces())
"""


async def test_nothing_follows_the_last_chunk_when_the_gateway_stops(start_gateway: StartGateway) -> None:
    """The response is complete, although its client has not taken all of it yet."""
    yaml = "plugins_path: mine\nresources: {azure: {endpoint: http://azure.invalid}}\nauth: none\n"
    yaml += "pipeline: [access_log, held, auth_passthrough, model_map, api_version]\n"
    gateway = await start_gateway("", yaml, {"mine/held.py": HELD}, timeouts={"grace": 0.1})
    held: Any = next(stage for stage in gateway.server.teams.default.stages if stage.id == "held")
    loop = asyncio.get_running_loop()
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        raw.setblocking(False)
        await loop.sock_connect(raw, ("127.0.0.1", gateway.port))
        await until(lambda: gateway.server._http.connections)  # type: ignore[union-attr]
        connection: Any = next(iter(gateway.server._http.connections))  # type: ignore[union-attr]
        connection.transport.set_write_buffer_limits(high=100_000_000)  # so that the answer's end is reached
        await loop.sock_sendall(raw, chat_request())
        await until(lambda: connection.transport.get_write_buffer_size())
        connection.transport.set_write_buffer_limits(high=0)  # and the writer waits for the client
        held.go.set()
        await until(lambda: connection.writing_paused)
        stopping = asyncio.create_task(gateway.server.stop())
        await asyncio.sleep(0.3)
        received = b""
        while data := await loop.sock_recv(raw, 1_000_000):
            received += data
        await stopping
    assert received.endswith(b"x\r\n0\r\n\r\n")
    assert gateway.exchanges()[0]["ended_by"] == "complete"
