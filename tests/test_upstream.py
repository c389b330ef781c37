"""The exchange with Azure: the request sent, the response accepted, and the client's view of failures."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import socket
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from gateway.azure.resources import Resource
from gateway.testing import FakeAzure
from gateway.transport.connection_pool import ConnectionPool, Destination
from gateway.transport.upstream_connection import UpstreamConnection
from tests.conftest import CHAT, RawUpstream, StartGateway, chat_request, hard_close, raw_request, raw_upstream, until

pytestmark = pytest.mark.both_loops

DATA = Path(__file__).parent / "data"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
STREAM = {**CHAT, "stream": True}


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def assert_healthy(start_gateway: StartGateway, azure: FakeAzure) -> None:
    gateway = await start_gateway(azure.endpoint)
    async with gateway.post() as answer:
        assert answer.status == 200


def answers() -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (DATA / "upstream_answers.jsonl").read_text().splitlines()]
    rows.append({"id": "hdr-line-17k", "expect": "reject", "raw": f"HTTP/1.1 200 OK\r\nX: {'a' * 17_000}\r\n\r\n"})
    rows.append(
        {
            "id": "hdr-flood",
            "expect": "reject",
            "raw": "HTTP/1.1 200 OK\r\n" + "".join(f"X-{n}: y\r\n" for n in range(9999)),
        }
    )
    coded = "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    rows.append({"id": "te-gzip", "expect": "reject", "raw": coded})
    rows.append({"id": "interim-flood", "expect": "reject", "raw": "HTTP/1.1 103 Early\r\n\r\n" * 100 + OK.decode()})
    rows.append({"id": "http09", "expect": "reject", "raw": "<html>hello</html>"})
    rows.append({"id": "ssh", "expect": "reject", "raw": "SSH-2.0-OpenSSH_9.2\r\n"})
    rows.append({"id": "h2", "expect": "reject", "raw": "\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03"})
    rows.append({"id": "status-000", "expect": "reject", "raw": "HTTP/1.1 000 X\r\nContent-Length: 0\r\n\r\n"})
    rows.append(
        {"id": "101", "expect": "reject", "raw": "HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n"}
    )
    return rows


@pytest.mark.parametrize("row", answers(), ids=lambda row: row["id"])
async def test_scripted_responses(row: dict[str, Any], start_gateway: StartGateway) -> None:
    """A broken response becomes a 502 or a 504, or is visibly truncated; no truncated response looks complete."""
    reset = row["id"].startswith("rst")
    async with raw_upstream(row["raw"].encode("latin-1"), reset=reset) as upstream:
        gateway = await start_gateway(upstream.endpoint, timeouts={"first_byte": 0.5, "idle": 0.5})
        whole = False
        status = 0
        try:
            async with gateway.post(allow_redirects=False) as answer:
                status = answer.status
                body = await answer.read()
                whole = True
        except aiohttp.ClientPayloadError:
            pass
        good = whole and status < 500
        assert row["expect"] == "either" or good == (row["expect"] == "accept")
        if whole and status >= 500:
            assert {"message", "type", "param", "code"} == set(json.loads(body)["error"])
            assert status in (502, 504)
        if good:
            assert "set-cookie" not in answer.headers
        await gateway.idle()
        await until(lambda: upstream.open == 0)


async def test_refused_and_unresolvable_resources_are_502(start_gateway: StartGateway) -> None:
    """A closed port and an unknown host are 502s with different messages."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    for endpoint, words in (
        (f"http://127.0.0.1:{port}", "could not connect"),
        ("http://no-such-host.invalid", "host name"),
    ):
        gateway = await start_gateway(endpoint)
        async with gateway.post() as answer:
            error = (await answer.json())["error"]
        assert answer.status == 502
        assert words in error["message"]
        assert error["type"] == "server_error"
        assert gateway.exchanges()[0]["ended_by"] == "upstream"


async def test_connect_timeout_is_504(start_gateway: StartGateway) -> None:
    """A resource that does not accept the connection is a 504 after `timeouts.connect`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        # Fill the backlog, so that the next connection is not accepted.
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        gateway = await start_gateway(f"http://127.0.0.1:{port}", timeouts={"connect": 0.3})
        async with gateway.post() as answer:
            error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (504, "upstream_timeout")
        for filler in fillers:
            filler.close()


async def test_no_response_in_time_is_504(start_gateway: StartGateway) -> None:
    """A resource that accepts the request and sends nothing, or half a head, is a 504 after `timeouts.first_byte`."""
    for answer_bytes in (b"", b"HTTP/1.1 200 OK\r\nContent-"):
        async with raw_upstream(answer_bytes, keep_open=True) as upstream:
            gateway = await start_gateway(upstream.endpoint, timeouts={"first_byte": 0.3})
            async with gateway.post() as answer:
                assert answer.status == 504
                assert "Azure" in (await answer.json())["error"]["message"]
            await until(lambda: upstream.open == 0)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"data: 1\n\n",
        b'data: {"choices":[{"delta":{"content":"h',
        b'data: {"choices":[{"delta":{"content":"\xc3',
        b"data: 1\r\n\r\ndata: 2\r\n",
        b"data: 1\n",
    ],
)
@pytest.mark.parametrize("how", ["reset", "eof", "stall"])
async def test_a_broken_stream_ends_with_an_error_event(sent: bytes, how: str, start_gateway: StartGateway) -> None:
    """A stream that breaks in the middle ends with an `error` event and without the last chunk."""
    answer_bytes = SSE + (chunk(sent) if sent else b"")
    async with raw_upstream(answer_bytes, reset=how == "reset", keep_open=how == "stall") as upstream:
        gateway = await start_gateway(upstream.endpoint, timeouts={"idle": 0.3})
        async with gateway.post(json=STREAM) as answer:
            assert answer.status == 200
            received = b""
            cut = False
            try:
                while data := await answer.content.readany():
                    received += data
            except aiohttp.ClientPayloadError:
                cut = True
        assert cut
        assert received.startswith(sent)
        events = [event for event in received.replace(b"\r\n", b"\n").split(b"\n\n") if event]
        error = json.loads(events[-1].removeprefix(b"data: "))["error"]
        assert error["code"] == ("upstream_timeout" if how == "stall" else "upstream_error")
        await gateway.idle()
        await until(lambda: upstream.open == 0)
        assert gateway.exchanges()[0]["ended_by"] == "upstream"


async def test_broken_stream_is_a_reset_for_http_1_0(start_gateway: StartGateway) -> None:
    """If the end of the connection ends the body, a broken stream ends with a reset, unlike a complete one."""
    async with raw_upstream(SSE + chunk(b"data: 1\n\n")) as upstream:
        gateway = await start_gateway(upstream.endpoint)
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        body = json.dumps(STREAM).encode()
        writer.write(
            b"POST /v1/chat/completions HTTP/1.0\r\nAuthorization: Bearer k\r\nContent-Length: %d\r\n\r\n%b"
            % (len(body), body)
        )
        received = b""
        reset = False
        try:
            while data := await reader.read(65536):
                received += data
        except ConnectionResetError:
            reset = True
        assert reset, "it ended like a whole answer"
        assert b"data: 1\n\n" in received
        writer.close()


@pytest.mark.parametrize("length", [1, 20, 200])
async def test_late_extra_bytes_never_reach_the_next_caller(length: int, start_gateway: StartGateway) -> None:
    """Bytes that arrive on an idle pooled connection close it: the next caller would get them."""
    late = b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"stolen": true}'[:length]
    sent = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upstream.request(reader)
        writer.write(OK)
        if upstream.connections == 1:
            await asyncio.sleep(0.05)
            writer.write(late)
            sent.set()
        await reader.read()

    upstream = RawUpstream(script)
    async with upstream:
        gateway = await start_gateway(upstream.endpoint)
        async with gateway.post() as answer:
            assert await answer.read() == b"{}"
        await sent.wait()
        await asyncio.sleep(0.05)
        async with gateway.post() as answer:
            assert await answer.read() == b"{}"
        assert upstream.connections == 2


@pytest.mark.parametrize("extra", [b"HTTP/1.1 200 OK\r\nX: ", OK, b"HTTP/1.1", b"\r\n"])
@pytest.mark.parametrize("chunked", [True, False])
async def test_extra_bytes_after_a_response_end_the_connection(
    extra: bytes, chunked: bool, start_gateway: StartGateway
) -> None:
    """A connection with any bytes after the response, even half a head, is not reused."""
    answer_bytes = OK
    if chunked:
        answer_bytes = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    if chunked and extra == b"\r\n":
        return  # an empty line after the last chunk looks like the end of a trailer; it does no harm
    async with raw_upstream(answer_bytes + extra, OK, keep_open=True) as upstream:
        gateway = await start_gateway(upstream.endpoint)
        for _ in range(2):
            async with gateway.post() as answer:
                assert await answer.read() == b"{}"
        assert upstream.connections == 2


async def test_clean_connections_are_reused(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """If a response ends with no bytes left over, the next request reuses the connection; streams too."""
    gateway = await start_gateway(azure.endpoint)
    for stream in (False, True, False, True):
        async with gateway.post(json={**CHAT, "stream": stream}) as answer:
            await answer.read()
    assert azure.connections == 1


async def test_stale_connection_is_replaced(start_gateway: StartGateway) -> None:
    """A pooled connection that Azure has just closed does not fail the client's request."""
    async with raw_upstream(OK) as upstream:  # closes after each response, without `Connection: close`
        gateway = await start_gateway(upstream.endpoint)
        for _ in range(20):
            async with gateway.post() as answer:
                assert answer.status == 200
        assert upstream.connections == 20


async def test_stale_connection_found_while_sending(start_gateway: StartGateway) -> None:
    """Even if Azure reads the request on the old connection and then closes it without a byte."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upstream.request(reader)
        writer.write(OK)
        await reader.readuntil(b"\r\n\r\n")

    upstream = RawUpstream(script)
    async with upstream:
        gateway = await start_gateway(upstream.endpoint)
        for _ in range(4):
            async with gateway.post() as answer:
                assert answer.status == 200
        assert upstream.connections == 4


async def test_a_failed_idle_connection_is_replaced_once_and_only_for_idempotent_requests(
    start_gateway: StartGateway,
) -> None:
    """Azure may have processed the request before it closed the connection."""
    taken: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upstream.request(reader)
        if b"quiet" in upstream.heads[-1]:
            await asyncio.sleep(0.1)  # so that each uses its own connection
            writer.write(OK)
            await upstream.request(reader)
        taken.append(upstream.heads[-1])
        hard_close(writer)

    upstream = RawUpstream(script)
    async with upstream:
        gateway = await start_gateway(upstream.endpoint)
        for body, times in (({**CHAT, "store": True}, 1), (CHAT, 2)):
            quiet = [gateway.post(headers={"x-name": "quiet"}) for _ in range(8)]
            answers = await asyncio.gather(*quiet)
            assert {answer.status for answer in answers} == {200}
            for answer in answers:
                await answer.read()
            taken.clear()
            async with gateway.post(json=body) as answer:
                assert answer.status == 502
            assert len(taken) == times


async def test_requests_that_are_not_idempotent_use_no_long_idle_connection(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Azure may be closing it; idempotent requests use it, because they can be sent again."""
    async with raw_upstream(OK, OK, OK, OK, keep_open=True) as upstream:
        gateway = await start_gateway(upstream.endpoint)
        for fresh, body, connections in (
            (60.0, CHAT, 1), (60.0, {**CHAT, "store": True}, 1), (0.0, CHAT, 1), (0.0, {**CHAT, "store": True}, 2),
        ):  # fmt: skip
            monkeypatch.setattr("gateway.transport.connection_pool._FRESH", fresh)
            async with gateway.post(json=body) as answer:
                assert answer.status == 200
            assert upstream.connections == connections


async def test_a_failed_new_connection_is_not_retried(start_gateway: StartGateway) -> None:
    """Azure may have processed the request on a new connection that broke: it is sent once."""
    async with raw_upstream(b"") as upstream:
        gateway = await start_gateway(upstream.endpoint)
        async with gateway.post() as answer:
            assert answer.status == 502
        assert upstream.connections == 1


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308, 399])
async def test_redirects_are_neither_followed_nor_passed_on(
    status: int, start_gateway: StartGateway, azure: FakeAzure
) -> None:
    """A redirect would forward the key: neither the gateway follows it nor does the client get it."""
    location = f"{azure.endpoint}/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21"
    for more in ("Content-Length: 0\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"):
        raw = f"HTTP/1.1 {status} T\r\nLocation: {location}\r\n{more}"
        async with raw_upstream(raw.encode()) as upstream:
            gateway = await start_gateway(upstream.endpoint)
            async with gateway.post(allow_redirects=False) as answer:
                error = (await answer.json())["error"]
            assert (answer.status, error["code"]) == (502, "upstream_redirect")
            assert "'azure'" in error["message"]
            assert str(status) in error["message"]
            assert "location" not in answer.headers
            assert azure.endpoint not in error["message"]
            await until(lambda: upstream.open == 0)
    assert not azure.requests


async def test_interim_responses_are_skipped(start_gateway: StartGateway) -> None:
    """1xx responses before the final one are ignored."""
    async with raw_upstream(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 E\r\nLink: </a>\r\n\r\n" + OK) as upstream:
        gateway = await start_gateway(upstream.endpoint)
        async with gateway.post() as answer:
            assert (answer.status, await answer.read()) == (200, b"{}")


UPLOAD_STAGE = """
from dataclasses import dataclass
from gateway import Next, Request, Response, Stage

@dataclass
class FixedDeployment(Stage):
    "Choose a deployment without reading the body, so that it streams through."
    name: str
    provides = ("deployment",)
    async def __call__(self, request: Request, call_next: Next) -> Response:
        request.target = request.target.replace(deployment=self.name)
        return await call_next(request)
"""
UPLOAD_YAML = """
plugins_path: mine
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline: [access_log, auth_passthrough, fixed_deployment: gpt-4o, api_version]
"""


async def test_an_unread_body_streams_through(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """A body that no stage reads is forwarded as it arrives, with its length or in chunks."""
    gateway = await start_gateway(azure.endpoint, UPLOAD_YAML, {"mine/fixed_deployment.py": UPLOAD_STAGE})
    body = json.dumps({**CHAT, "user": "x" * 300_000}).encode()

    async def pieces() -> Any:
        for place in range(0, len(body), 50_000):
            yield body[place : place + 50_000]

    async with gateway.post(json=None, data=body) as answer:
        assert answer.status == 200
    async with gateway.post(json=None, data=pieces()) as answer:
        assert answer.status == 200
    assert [body, body] == [seen.body for seen in azure.requests]
    assert str(len(body)) == azure.requests[0].headers.get("content-length")
    assert azure.requests[1].headers.get("transfer-encoding") == "chunked"


async def test_a_response_before_the_upload_ends(start_gateway: StartGateway) -> None:
    """A response during the upload is passed on; the rest of the body is not sent."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"error":{"message":"too big"}}'
        writer.write(
            b"HTTP/1.1 413 X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        await reader.read()

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, UPLOAD_YAML, {"mine/fixed_deployment.py": UPLOAD_STAGE})
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\n"
        writer.write(head + b"Content-Length: 9000000\r\n\r\n" + b"x" * 100_000)
        async with asyncio.timeout(30):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 413")
            assert b"too big" in await reader.readuntil(b"}}")
        writer.close()
        await until(lambda: upstream.open == 0)


@pytest.mark.parametrize("framing", ["length", "chunked", "until close"])
@pytest.mark.parametrize("size", [0, 10, 3_000_000])
async def test_plain_responses_of_every_framing_and_size(framing: str, size: int, start_gateway: StartGateway) -> None:
    """JSON with a length, in chunks, or until the connection closes arrives complete; empty bodies too."""
    body = b"x" * size
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    if framing == "length":
        raw = head + b"Content-Length: %d\r\n\r\n" % size + body
    elif framing == "chunked":
        raw = head + b"Transfer-Encoding: chunked\r\n\r\n" + (chunk(body) if body else b"") + b"0\r\n\r\n"
    else:
        raw = head + b"\r\n" + body
    async with raw_upstream(raw) as upstream:
        gateway = await start_gateway(upstream.endpoint)
        async with gateway.post() as answer:
            assert (answer.status, await answer.read()) == (200, body)


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("size", [10, 3_000_000])
async def test_truncated_plain_responses_are_visible(framing: str, size: int, start_gateway: StartGateway) -> None:
    """A small one becomes a 502; a large one ends before its length or without its last chunk."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    body = b"x" * (size // 2)
    raw = head + (b"Content-Length: %d\r\n\r\n" % size + body)
    if framing == "chunked":
        raw = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(body)
    async with raw_upstream(raw) as upstream:
        gateway = await start_gateway(upstream.endpoint)
        whole = False
        status = 0
        try:
            async with gateway.post() as answer:
                status = answer.status
                await answer.read()
                whole = True
        except aiohttp.ClientPayloadError:
            pass
        assert not whole or status == 502
        await gateway.idle()
        assert gateway.exchanges()[0]["ended_by"] == "upstream"


async def test_responses_without_a_body(start_gateway: StartGateway) -> None:
    """204 and 304 end with their head, whatever their Content-Length."""
    for raw in (b"HTTP/1.1 204 No\r\n\r\n", b"HTTP/1.1 304 Not\r\nContent-Length: 5\r\n\r\n"):
        async with raw_upstream(raw) as upstream:
            gateway = await start_gateway(upstream.endpoint)
            async with gateway.post() as answer:
                assert (answer.status, await answer.read()) == (int(raw[9:12]), b"")


@pytest.mark.parametrize(
    ("raw", "length"),
    [
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", []),
        (b"HTTP/1.1 205 Reset Content\r\nContent-Length: 2\r\n\r\nhi", [b"0"]),
        (b"HTTP/1.1 205 Reset Content\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", [b"0"]),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", [b"5"]),
        (b"HTTP/1.1 103 Early\r\nContent-Length: 9\r\n\r\nHTTP/1.1 204 No\r\nContent-Length: 5\r\n\r\n", []),
    ],
)
async def test_responses_without_a_body_have_no_length(
    raw: bytes, length: list[bytes], start_gateway: StartGateway
) -> None:
    """204 has no Content-Length, 205 has 0 (RFC 9110, 8.6, 15.3.6); the next response is parsed correctly."""
    async with raw_upstream(raw) as upstream:
        gateway = await start_gateway(upstream.endpoint)
        answer = await raw_request(gateway.port, chat_request())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert body == b""
    assert [line[15:].strip() for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")] == length
    assert b"transfer-encoding" not in head.lower()


async def test_v1_names_the_deployment_in_the_body(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """On `/openai/v1` the body's model becomes the deployment; every other value keeps its bytes."""
    yaml = """
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline: [auth_passthrough, model_map: {models: {gpt-4: gpt-4o}}, api_version: v1]
"""
    gateway = await start_gateway(azure.endpoint, yaml)
    body = b'{"temperature": 1.50, "model": "gpt-4", "seed": 12345678901234567890, "messages": []}'
    async with gateway.post(json=None, data=body) as answer:
        assert answer.status == 200
    seen = azure.requests[0]
    assert (seen.path, seen.query) == ("/openai/v1/chat/completions", [])
    assert seen.json()["model"] == "gpt-4o"
    assert b"1.50" in seen.body
    assert b"12345678901234567890" in seen.body
    async with gateway.post("/v1/completions", {"model": "gpt-4", "prompt": "x"}) as answer:
        assert answer.status == 404
        assert "v1" in (await answer.json())["error"]["message"]


async def test_tls_is_verified(start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown authority, another name or an expired certificate is a 502 that says which."""
    authority = trustme.CA()
    context = ssl.create_default_context()
    authority.configure_trust(context)
    monkeypatch.setattr("gateway.upstream.ssl.create_default_context", lambda: context)
    stranger = trustme.CA()
    yesterday, tomorrow = (datetime.now(UTC) + timedelta(days=days) for days in (-1, 1))
    for issuer, name, begins, ends, why in (
        (authority, "localhost", None, None, None),
        (authority, "other.test", None, None, "it is for another host"),
        (stranger, "localhost", None, None, "its issuer is not known"),
        (authority, "localhost", None, yesterday, "it has expired"),
        (authority, "localhost", tomorrow, None, "it is not valid yet"),
    ):
        server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        issuer.issue_cert(name, not_before=begins, not_after=ends).configure_cert(server_context)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server_context)
        port = server.sockets[0].getsockname()[1]
        gateway = await start_gateway(f"https://localhost:{port}")
        async with gateway.post() as answer:
            assert answer.status == (200 if why is None else 502), await answer.text()
            if why is not None:
                said = "the certificate of the Azure resource 'azure', from 'localhost', is not valid: "
                assert (await answer.json())["error"]["message"].startswith(said + why)
        server.close()


async def test_aiohttp_still_has_the_private_names_that_the_gateway_uses() -> None:
    """connection_pool.py relies on private parts of aiohttp; an upgrade that moves them must fail here first."""
    import ast
    import inspect

    from aiohttp import connector as module
    from aiohttp.client_reqrep import ConnectionKey

    own = ConnectionPool()
    await own.start()
    connector = own._connector
    assert connector is not None
    assert hasattr(connector, "_factory"), (
        "TCPConnector._factory moved: connection_pool.py makes its protocol through it"
    )
    assert isinstance(connector._factory(), UpstreamConnection), "TCPConnector._factory is made by something else now"
    assert list(inspect.signature(connector.connect).parameters) == ["req", "traces", "timeout"], (
        "TCPConnector.connect() takes other arguments: connection_pool.py calls it"
    )
    made = inspect.signature(ConnectionKey).parameters
    assert list(made)[:4] == ["host", "port", "is_ssl", "ssl"], "ConnectionKey's fields moved: connector.py makes one"
    assert len(made) == 8, "ConnectionKey has other fields: connector.py makes one"
    # The attributes of a request and of a protocol that the connector reads: the substitutes must have them.
    tree = ast.parse(inspect.getsource(module))
    asked: dict[str, set[str]] = {"req": set(), "proto": set(), "protocol": set()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in asked:
            asked[node.value.id].add(node.attr)
    destination = Destination(Resource("east", "https://east.invalid"), ssl.create_default_context())
    # Those of them that only the connection of a proxy or a Unix socket needs.
    elsewhere = {
        "headers",
        "proxy_auth",
        "proxy_headers",
        "update_auth",
        "method",
        "_ssl",
        "loop",
        "update_proxy",
        "request_info",
    }
    missing = {name for name in asked["req"] if not hasattr(destination, name)} - elsewhere
    assert not missing, f"the connector asks a request for {missing}: give it to connection_pool.Destination"
    wire = UpstreamConnection(asyncio.get_running_loop())
    unused = {"set_response_params", "read"}
    missing = {name for name in asked["proto"] | asked["protocol"] if not hasattr(wire, name)} - unused
    assert not missing, f"the connector asks a protocol for {missing}: give it to UpstreamConnection"
    await own.close()


@pytest.mark.parametrize(
    "junk", [b"zz\r\n", b"3\r\nabcXX\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"0\r\nbad trailer\r\n\r\n"]
)
async def test_junk_inside_a_stream_ends_it_at_once(junk: bytes, start_gateway: StartGateway) -> None:
    """An invalid chunk in a response causes an error event immediately, without waiting for a timeout."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upstream.request(reader)
        writer.write(SSE + chunk(b"data: a\n\n"))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(junk)
        await reader.read()

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint)
        received = b""
        cut = False
        async with asyncio.timeout(30):
            async with gateway.post(json=STREAM) as answer:
                try:
                    while data := await answer.content.readany():
                        received += data
                except aiohttp.ClientPayloadError:
                    cut = True
        assert cut
        assert b"upstream_error" in received
        await gateway.idle()


async def test_an_upload_that_azure_does_not_read_times_out(start_gateway: StartGateway) -> None:
    """It does not wait forever, nor after its client has disconnected."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(
            upstream.endpoint, UPLOAD_YAML, {"mine/fixed_deployment.py": UPLOAD_STAGE}, timeouts={"idle": 0.5}
        )
        async with gateway.post(json=None, data=io.BytesIO(b"x" * 50_000_000)) as answer:
            assert answer.status == 504
        await gateway.idle()


async def test_a_client_that_leaves_an_upload_that_azure_does_not_read(start_gateway: StartGateway) -> None:
    """Its connection to Azure is closed soon, even though the gateway was not reading from it."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    async with RawUpstream(script) as upstream:
        gateway = await start_gateway(upstream.endpoint, UPLOAD_YAML, {"mine/fixed_deployment.py": UPLOAD_STAGE})
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\n"
        writer.write(head + b"Content-Length: 90000000\r\n\r\n")
        for _ in range(20):
            writer.write(b"x" * 1_000_000)
        await until(lambda: upstream.connections)
        await asyncio.sleep(0.5)
        hard_close(writer)
        await gateway.idle()
        assert gateway.exchanges()[0]["ended_by"] == "client"


@pytest.mark.parametrize("raw_body", [b"1\r\n:\r\n" * 100_000, chunk(b"data: " + b"x" * 10_000_000 + b"\n\n")])
async def test_streams_of_unusual_shapes_arrive_complete(raw_body: bytes, start_gateway: StartGateway) -> None:
    """A hundred thousand chunks of one byte; one event of ten megabytes."""
    async with raw_upstream(SSE + raw_body + b"0\r\n\r\n") as upstream:
        gateway = await start_gateway(upstream.endpoint)
        async with gateway.post(json=STREAM) as answer:
            received = await answer.read()
    assert len(received) in (100_000, 10_000_008)


async def test_compressed_streams(start_gateway: StartGateway) -> None:
    """If Azure compresses events against the request, filters and clients get plain text."""
    text = b"data: 1\n\ndata: [DONE]\n"
    packed = gzip.compress(text)
    coded = SSE.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
    async with raw_upstream(coded + chunk(packed[:9]) + chunk(packed[9:]) + b"0\r\n\r\n") as upstream:
        gateway = await start_gateway(upstream.endpoint)
        async with gateway.post(json=STREAM) as answer:
            assert await answer.read() == text + b"\n"
            assert "content-encoding" not in answer.headers
