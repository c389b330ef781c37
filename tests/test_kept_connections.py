"""Every way in which an exchange can end, followed by another request on the same connection to Azure.

Clients read slowly, through small kernel buffers, so that most responses end before their client has read them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
import trustme
import uvloop

from gateway.config import load
from gateway.process.event_loop import loop_factory
from gateway.server import Server
from tests.conftest import RawUpstream, write_files

# A stage whose filter can fail on the last piece.
STAGES = """
from dataclasses import dataclass
from gateway import Filter, Next, Request, Response, Stage

class Failing(Filter):
    between = False
    def feed(self, data: bytes) -> bytes:
        if b"LAST" in data:
            raise ValueError("a bug of the filter")
        return data

@dataclass
class FailAtTheEnd(Stage):
    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        if "filter" in request.headers.get("x-how", ""):
            response.pipe(Failing())
        return response
"""
YAML = """
listen: 127.0.0.1:0
plugins_path: [mine]
resources: {azure: {endpoint: "${ENDPOINT}"%s}}
timeouts: {first_byte: 20, idle: 20, client: 20}
pipeline:
  - access_log
  - auth_passthrough
  - model_map: {unmapped: own_name}
  - api_version: 2024-10-21
  - fail_at_the_end:FailAtTheEnd
"""
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
    "speed": loop_factory(),
}
EVENT = b"data: " + b"x" * 5_000 + b"\n\n"


def sse(size: int, *, chunked: bool = True, last: bytes = b"data: LAST\n\n") -> bytes:
    """Return a stream of about `size` bytes, head and all."""
    events = [*[EVENT] * (size // len(EVENT)), last]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    if chunked:
        body = b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in events) + b"0\r\n\r\n"
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + body
    return head + b"Content-Length: %d\r\n\r\n" % sum(map(len, events)) + b"".join(events)


def plain(status: bytes, body: bytes, more: bytes = b"") -> bytes:
    head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n" % (status, more, len(body))
    return head + body


# What Azure sends; after None it closes the connection, otherwise it waits for the next request.
RESPONSES: dict[str, Callable[[int], list[bytes | None]]] = {
    "stream in chunks": lambda size: [sse(size)],
    "stream of known length": lambda size: [sse(size, chunked=False)],
    "long JSON in chunks": lambda size: [
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"%x\r\n%b\r\n0\r\n\r\n" % (size, b" " * size)
    ],
    "short JSON": lambda _: [plain(b"200 OK", b"{}")],
    "long JSON": lambda size: [plain(b"200 OK", b"[" + b" " * (size + 1024 * 1024) + b"]")],
    "an error": lambda size: [plain(b"400 Bad Request", b'{"error": {"message": "no"}}')],
    "nothing": lambda _: [b"HTTP/1.1 204 No Content\r\n\r\n"],
    "interim, then JSON": lambda _: [b"HTTP/1.1 103 Early Hints\r\n\r\n" + plain(b"200 OK", b"{}")],
    "asks to close": lambda size: [plain(b"200 OK", b"{}", b"Connection: close\r\n")],
    "stream until it closes": lambda size: [
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + EVENT * (size // 5_000),
        None,
    ],
    "breaks off": lambda size: [sse(size)[: size // 2], None],
    "too much": lambda size: [sse(size) + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"],
    "malformed": lambda size: [sse(size)[:-5] + b"zz\r\n"],
}
HOW = ("reads slowly", "leaves in the middle", "reads slowly, the filter fails at the end")


@contextlib.asynccontextmanager
async def running(folder: Path, endpoint: str, ca: str | None) -> AsyncIterator[Server]:
    """A gateway with small send buffers for clients."""
    tls = f", tls: {{ca: {ca}}}" if ca else ""
    files = {"gateway.yaml": YAML % tls, "mine/fail_at_the_end.py": STAGES}
    loaded = load(write_files(folder, files), {"ENDPOINT": endpoint})
    server = Server(loaded.teams, loaded.settings)
    await server.start()
    assert server._listener is not None
    for each in server._listener.sockets:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
    now = asyncio.Event()
    now.set()
    try:
        yield server
    finally:
        await server.stop(now=now)


async def connect_slowly(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect with a small receive buffer."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=sock, limit=4096)


def request(what: str, how: str = "") -> bytes:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": what}]}).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\nX-How: %b\r\n"
        b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (how.encode(), len(body), body)
    )


async def first_client(port: int, what: str, how: str) -> None:
    reader, writer = await connect_slowly(port)
    writer.write(request(what, how))
    with contextlib.suppress(ConnectionError):
        if how == "leaves in the middle":
            await reader.read(3000)
            writer.transport.abort()
            return
        while await reader.read(4096):
            await asyncio.sleep(0)
    writer.close()


async def second_client(port: int, nonce: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(f"echo {nonce}"))
    answer = await reader.read()
    writer.close()
    return answer


async def scenario(folder: Path, authority: trustme.CA | None) -> list[str]:
    """Let each exchange end in each way, followed by another request; return those that went wrong."""
    wrong: list[str] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            said = json.loads(await reader.readexactly(length))["messages"][0]["content"]
            if said.startswith("echo "):
                writer.write(plain(b"200 OK", json.dumps({"nonce": said[5:]}).encode()))
                continue
            name, _, size = said.partition("/")
            for each in RESPONSES[name](int(size)):
                if each is None:
                    await writer.drain()
                    return
                writer.write(each)
                await writer.drain()

    upstream = RawUpstream(script)
    context = None
    ca = None
    if authority is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(context)
        ca = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(ca)
    server = await asyncio.start_server(upstream._connected, "127.0.0.1", 0, ssl=context)
    upstream._tasks = set()
    port = server.sockets[0].getsockname()[1]
    endpoint = f"https://localhost:{port}" if context else f"http://127.0.0.1:{port}"
    async with server, running(folder, endpoint, ca) as gateway:
        # (From one multiple of the transport's limits to the next, so that some responses end just where it pauses.)
        sizes = range(200_000, 290_000, 13_000)
        for number, (name, how, size) in enumerate(itertools.product(RESPONSES, HOW, sizes)):
            if number % len(sizes) > 1 and name in ("short JSON", "an error", "nothing", "asks to close"):
                continue
            async with asyncio.timeout(30):
                await first_client(gateway.address.port, f"{name}/{size}", how)
                answer = await second_client(gateway.address.port, str(number))
            if not answer.startswith(b"HTTP/1.1 200 ") or not answer.endswith(b'{"nonce": "%d"}' % number):
                wrong.append(f"{name}/{size}, {how}: {answer[:60]!r}")
            for destination in gateway.upstream._connections._destinations.values():
                wrong += [f"{name}/{size}, {how}: not clean" for wire in destination.idle if not wire.is_clean()]
        for task in upstream._tasks:
            task.cancel()
    return wrong


def run(loop: str, main: Callable[[], Awaitable[Any]]) -> Any:
    async def coroutine() -> Any:
        return await main()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        return runner.run(coroutine())


@pytest.mark.slow
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_kept_connection_is_as_good_as_a_new_one(loop: str, secure: bool, tmp_path: Path) -> None:
    """However the exchange before it ended, the next request gets its own response, and immediately."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    authority = trustme.CA() if secure else None
    assert run(loop, lambda: scenario(tmp_path, authority)) == []
