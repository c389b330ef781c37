"""Requests to Azure through real proxies: an HTTP proxy (by CONNECT), and a SOCKS 5 proxy."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trustme

from gateway.testing import FakeAzure
from tests.conftest import CHAT, Gateway, RawUpstream, StartGateway, hard_close, until
from tests.proxies import ConnectProxy, SocksProxy

pytestmark = pytest.mark.both_loops

YAML = """
resources: {azure: {endpoint: "${ENDPOINT}", proxy: "${WAY}"}}
pipeline: [access_log, auth_passthrough, model_map, api_version, sse_newline]
"""
KINDS = pytest.mark.parametrize("kind", [ConnectProxy, SocksProxy], ids=["http", "socks5"])
Kind = type[ConnectProxy] | type[SocksProxy]


@pytest.fixture
def authority(monkeypatch: pytest.MonkeyPatch) -> trustme.CA:
    """An authority that the gateway trusts."""
    made = trustme.CA()
    context = ssl.create_default_context()
    made.configure_trust(context)
    monkeypatch.setattr("gateway.upstream.ssl.create_default_context", lambda: context)
    return made


@contextlib.asynccontextmanager
async def over_tls(azure: FakeAzure, issuer: trustme.CA, name: str = "azure.test") -> AsyncIterator[str]:
    """Provide an endpoint with TLS in front of the fake Azure."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    issuer.issue_cert(name).configure_cert(context)
    server = await asyncio.get_running_loop().create_server(azure._server, "127.0.0.1", 0, ssl=context)
    yield f"https://azure.test:{server.sockets[0].getsockname()[1]}"
    server.close()


async def refusal(gateway: Gateway) -> tuple[int, str]:
    """Send a request, and return the status and the error message; check that nothing shows the password."""
    async with gateway.post() as answer:
        text = await answer.text()
        message = (await answer.json())["error"]["message"]
    assert "sesame" not in text + str(gateway.events)
    return answer.status, message


@KINDS
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("login", [False, True], ids=["open", "login"])
async def test_requests_and_streams_go_through_the_proxy(
    kind: Kind, tls: bool, login: bool, start_gateway: StartGateway, azure: FakeAzure, authority: trustme.CA
) -> None:
    """All on one connection; the proxy looks up the host name, and cannot read inside TLS."""
    async with kind(*(("us er", "open:sesame/@") if login else ())) as proxy, over_tls(azure, authority) as secure:
        endpoint = secure if tls else f"http://azure.test:{azure.port}"
        way = proxy.url("us%20er:open%3Asesame%2F%40@" if login else "")
        gateway = await start_gateway(endpoint, YAML, env={"WAY": way})
        for stream in (False, True, False):
            async with gateway.post(json={**CHAT, "stream": stream}) as answer:
                body = await answer.read()
                assert answer.status == 200, body
                assert body.endswith(b"data: [DONE]\n\n") == stream
        assert [(seen.path, seen.headers.get("host")) for seen in azure.requests] == [
            ("/openai/deployments/gpt-4o/chat/completions", endpoint.partition("//")[2])
        ] * 3
        assert proxy.asked == [("azure.test", int(endpoint.rpartition(":")[2]))]
        assert (proxy.connections, azure.connections) == (1, 1)
        assert "sesame" not in str(gateway.events)


@KINDS
async def test_a_client_that_leaves_closes_the_tunnel(
    kind: Kind, start_gateway: StartGateway, azure: FakeAzure
) -> None:
    """As without a proxy, nothing is left open."""
    azure.words, azure.delay = ["x"] * 1000, 0.02
    async with kind() as proxy:
        gateway = await start_gateway(azure.endpoint, YAML, env={"WAY": proxy.url()})
        answer = await gateway.post(json={**CHAT, "stream": True})
        await answer.content.readany()
        answer.close()
        await until(lambda: proxy.open == 0 and azure.connections == 0)


@KINDS
async def test_each_proxy_has_its_own_connections(kind: Kind, start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Resources of one endpoint share connections only if proxy, user name and password are the same."""
    yaml = """
resources:
  a: {endpoint: "${ENDPOINT}", proxy: "${WAY}"}
  b: {endpoint: "${ENDPOINT}", proxy: "${WAY}"}
  c: {endpoint: "${ENDPOINT}", proxy: "${OTHER}"}
  d: {endpoint: "${ENDPOINT}"}
pipeline:
  - auth_passthrough
  - model_map: {models: {a: a/gpt-4o, b: b/gpt-4o, c: c/gpt-4o, d: d/gpt-4o}, unmapped: refuse}
  - api_version
"""
    async with kind() as proxy:
        gateway = await start_gateway(azure.endpoint, yaml, env={"WAY": proxy.url("u:p@"), "OTHER": proxy.url("u:q@")})
        for model, connections in (("a", 1), ("b", 1), ("c", 2), ("d", 2), ("a", 2), ("c", 2)):
            async with gateway.post(json={**CHAT, "model": model}) as answer:
                assert answer.status == 200
            assert proxy.connections == connections
        assert azure.connections == 3


@KINDS
@pytest.mark.parametrize(
    ("issued_for", "why"),
    [("other.test", "it is for another host"), (None, "its issuer is not known")],
    ids=["other-name", "other-authority"],
)
async def test_azure_s_certificate_is_verified_through_a_proxy(
    kind: Kind, issued_for: str | None, why: str, start_gateway: StartGateway, azure: FakeAzure, authority: trustme.CA
) -> None:
    """Neither the proxy nor a host after it can pose as Azure: a 502 names the certificate, and why it is not valid."""
    issuer = authority if issued_for else trustme.CA()
    async with kind() as proxy, over_tls(azure, issuer, issued_for or "azure.test") as endpoint:
        gateway = await start_gateway(endpoint, YAML, env={"WAY": proxy.url()})
        status, message = await refusal(gateway)
        assert status == 502
        assert message.startswith(
            f"the certificate of the Azure resource 'azure', from 'azure.test', is not valid: {why}"
        )
        await until(lambda: proxy.open == 0)
    assert not azure.requests


@KINDS
async def test_an_endpoint_without_tls_through_a_proxy(
    kind: Kind, start_gateway: StartGateway, azure: FakeAzure
) -> None:
    """A 502 says that TLS failed."""
    async with kind() as proxy:
        gateway = await start_gateway(azure.endpoint.replace("http://", "https://"), YAML, env={"WAY": proxy.url()})
        assert await refusal(gateway) == (502, "TLS with the Azure resource 'azure' failed")
        await until(lambda: proxy.open == 0)


@KINDS
@pytest.mark.parametrize("login", ["", "user:sesame@"], ids=["no-login", "wrong-login"])
async def test_a_proxy_that_requires_another_login(
    kind: Kind, login: str, start_gateway: StartGateway, azure: FakeAzure
) -> None:
    """A 502 says that the proxy refused, and why; it does not show the password."""
    async with kind("user", "another") as proxy:
        gateway = await start_gateway(azure.endpoint, YAML, env={"WAY": proxy.url(login)})
        status, message = await refusal(gateway)
        assert status == 502
        assert message.startswith("the proxy of the Azure resource 'azure' refused the tunnel")
        assert ("status 407" if kind is ConnectProxy else "authentication") in message
        await until(lambda: proxy.open == 0)
        assert gateway.exchanges()[0]["ended_by"] == "upstream"
    assert not azure.requests


@pytest.mark.parametrize("scheme", ["http", "socks5"])
async def test_a_proxy_that_is_not_there(scheme: str, start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Refused or not found, it is a 502 that names the proxy; the gateway does not bypass the proxy."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    for host, words in (
        (f"127.0.0.1:{port}", "could not connect to the proxy of"),
        ("no-such-host.invalid:1", "the host name 'no-such-host.invalid' of the proxy of"),
    ):
        gateway = await start_gateway(azure.endpoint, YAML, env={"WAY": f"{scheme}://user:sesame@{host}"})
        status, message = await refusal(gateway)
        assert status == 502
        assert words in message
    assert not azure.requests


@pytest.mark.parametrize("scheme", ["http", "socks5"])
@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"\x05"])
async def test_a_proxy_that_does_not_respond_in_time(scheme: str, said: bytes, start_gateway: StartGateway) -> None:
    """A 504 after `timeouts.connect` that names the proxy; its connection is closed."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if said.startswith(b"H" if scheme == "http" else b"\x05"):
            writer.write(said)
        while await reader.read(100):
            pass

    async with RawUpstream(script) as proxy:
        gateway = await start_gateway(
            "https://azure.test", YAML, env={"WAY": f"{scheme}://u:sesame@127.0.0.1:{proxy.port}"},
            timeouts={"connect": 0.3},
        )  # fmt: skip
        status, message = await refusal(gateway)
        assert status == 504
        assert message == "the proxy of the Azure resource 'azure' did not connect to it within 0.3 s"
        await until(lambda: proxy.open == 0)


async def test_a_tls_handshake_that_times_out_is_not_the_proxy_s_fault(start_gateway: StartGateway) -> None:
    """The proxy has connected, and Azure is silent: a 504 that names Azure."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ConnectProxy.granted)
        while await reader.read(1000):
            pass

    async with RawUpstream(script) as proxy:
        gateway = await start_gateway(
            "https://azure.test", YAML, env={"WAY": proxy.endpoint}, timeouts={"connect": 0.3}
        )
        assert await refusal(gateway) == (504, "could not connect to the Azure resource 'azure' within 0.3 s")
        await until(lambda: proxy.open == 0)


OK = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 2\r\n\r\nno", "with status 502"),
        (b"HTTP/1.1 301 Moved\r\nLocation: http://x\r\n\r\n", "with status 301"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "with status 100"),
        (b"", "is not a complete HTTP response"),
        (b"HTTP/1.1 200 OK\r\nX: y\r\n", "is not a complete HTTP response"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "is not a complete HTTP response"),
        (b"\x05\x00", "is not a complete HTTP response"),
        (OK.replace(b"\r\n\r\n", b"\r\nX: " + b"x" * 33_000), "is not a complete HTTP response"),
        (b"HTTP/1.1 abc\r\n\r\n", "is not valid HTTP"),
        (b"HTTP/1.1 200 OK\r\nno field\r\n\r\n", "is not valid HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: a\nb\r\n\r\n", "is not valid HTTP"),
        (OK + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "sent bytes after its response"),
    ],
)
async def test_responses_that_an_http_proxy_must_not_send(said: bytes, words: str, start_gateway: StartGateway) -> None:
    """A status other than 2xx, bytes that are not a head, a head without end, bytes after the head: each is a 502."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)

    async with RawUpstream(script) as proxy:
        gateway = await start_gateway("http://azure.test", YAML, env={"WAY": proxy.endpoint})
        status, message = await refusal(gateway)
        assert (status, words in message) == (502, True), message
        assert "the proxy of the Azure resource 'azure'" in message
        await until(lambda: proxy.open == 0)


async def test_a_proxy_s_response_without_end_is_refused(start_gateway: StartGateway) -> None:
    """At 32 KiB of head, before the timeout."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"X: " + b"x" * 1000 + b"\r\n")
            await writer.drain()
            await asyncio.sleep(0.001)

    async with RawUpstream(script) as proxy:
        gateway = await start_gateway("http://azure.test", YAML, env={"WAY": proxy.endpoint}, timeouts={"connect": 3})
        status, message = await refusal(gateway)
        assert (status, "is not a complete HTTP response" in message) == (502, True), message
        await until(lambda: proxy.open == 0)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([b"\x05\x00", b"\x05\x05\x00\x01" + bytes(6)], "Connection refused by destination host"),
        ([b"\x05\x00", b"\x05\x02\x00\x01" + bytes(6)], "Connection not allowed by ruleset"),
        ([b"\x05\x00", b"\x05\x00\x00\x09" + bytes(6)], "the proxy of"),
        ([b"\x05\x00", b"\x05\x00"], "the proxy of"),
        ([b"\x05\x09"], "the proxy of"),
        ([b"\x05\x02"], "the proxy of"),
        ([b"\x04\x00"], "the proxy of"),
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], "the proxy of"),
        ([b""], "the proxy of"),
    ],
)
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_responses_that_a_socks_proxy_must_not_send(
    said: list[bytes], words: str, reset: bool, start_gateway: StartGateway
) -> None:
    """A refusal is a 502 with its reason; so is a response that is not SOCKS 5, is cut, or ends in a reset."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in said:
            await reader.read(1000)
            writer.write(part)
            await writer.drain()
        if reset:
            await asyncio.sleep(0.02)
            hard_close(writer)

    async with RawUpstream(script) as proxy:
        gateway = await start_gateway("http://azure.test", YAML, env={"WAY": f"socks5://127.0.0.1:{proxy.port}"})
        status, message = await refusal(gateway)
        assert status == 502
        assert words in message
        await until(lambda: proxy.open == 0)


LEAKS = """
from gateway import Stage

class Leaks(Stage):
    async def __call__(self, request, call_next):
        proxy = request.target.resource.proxy
        raise RuntimeError(f"{request.target} {proxy!r} {proxy.password}")
"""


async def test_a_stage_s_error_does_not_log_the_password(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Even if the stage puts it into the error."""
    yaml = "plugins_path: mine\n" + YAML.replace("sse_newline", "leaks")
    files = {"mine/leaks.py": LEAKS}
    gateway = await start_gateway(azure.endpoint, yaml, files, env={"WAY": "http://user:sesame@127.0.0.1:1"})
    async with gateway.post() as answer:
        assert answer.status == 500
        assert "sesame" not in await answer.text()
    assert [event["error"] for event in gateway.events if event["event"] == "stage_failed"] == ["RuntimeError"]
    assert "sesame" not in str(gateway.events)


@KINDS
async def test_literal_addresses_go_through_as_they_are(
    kind: Kind, start_gateway: StartGateway, azure: FakeAzure
) -> None:
    """IPv6 in brackets in a CONNECT."""
    async with kind() as proxy:
        for host in ("127.0.0.1", "[::1]"):
            gateway = await start_gateway(f"http://{host}:{azure.port}", YAML, env={"WAY": proxy.url()})
            async with gateway.post() as answer:
                assert answer.status == 200
            assert proxy.asked[-1] == (host.strip("[]"), azure.port)


async def test_a_proxy_with_two_addresses_of_which_one_is_dead(
    start_gateway: StartGateway, azure: FakeAzure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one is used: the addresses of a name are tried one after the other."""
    async with ConnectProxy() as proxy:
        ask = socket.getaddrinfo

        def both(host: Any, port: Any, **more: Any) -> Any:
            if host != "proxy.test":
                return ask(host, port, **more)
            # (No server listens at the first: all of 127.0.0.0/8 is this machine.)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 0)) for each in ("127.9.9.9", "127.0.0.1")]

        gateway = await start_gateway(azure.endpoint, YAML, env={"WAY": f"http://proxy.test:{proxy.port}"})
        # No name of this machine is sure to have two addresses.
        monkeypatch.setattr(socket, "getaddrinfo", both)
        async with gateway.post() as answer:
            assert answer.status == 200, await answer.text()
