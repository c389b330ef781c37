"""Shared by the tests: a running gateway, a fake Azure, and an upstream and a client that send raw bytes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self
from unittest.mock import Mock

import aiohttp
import hypothesis
import pytest
import structlog

from gateway import logs
from gateway.config import load
from gateway.process.event_loop import loop_factory
from gateway.server import Server
from gateway.settings import Listen
from gateway.testing import FakeAzure

KEY = "azure-key"
CHAT = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}

YAML = """
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline:
  - access_log
  - auth_passthrough
  - model_map: {unmapped: own_name_without_dots}
  - api_version: 2024-10-21
  - sse_newline
"""


# No test needs the system's certificate authorities, and reading them takes up to 60 ms at each gateway's start.
# Child processes inherit this.
os.environ["SSL_CERT_FILE"] = str(Path(__file__).with_name("authority.pem"))

# Timeout, in seconds, for something that must happen. Only a hang takes longer, even on a busy machine.
TIMEOUT = 30.0

# Examples have no deadline and may be slow to generate: neither is the code's fault.
# The usual examples are the same in every run, so that a failure comes from the change; `make nightly` draws new ones.
hypothesis.settings.register_profile(
    "usual", deadline=None, max_examples=100, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile(
    "nightly", hypothesis.settings.get_profile("usual"), max_examples=2_000, derandomize=False, print_blob=True
)
hypothesis.settings.load_profile("usual")


def pytest_asyncio_loop_factories(item: pytest.Function) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run a test marked `both_loops` on asyncio's loop and on the gateway's; the gateway must work on both.

    Other tests run on asyncio's loop, and so do slow ones whose gateway is another process with its own loop.
    `GATEWAY_TEST_LOOP=asyncio` or `=speed` runs all tests on that loop alone.
    """
    factories = {"asyncio": asyncio.new_event_loop, "speed": loop_factory()}
    if only := os.environ.get("GATEWAY_TEST_LOOP"):
        return {only: factories[only]}
    here = item.get_closest_marker("slow") is None or "start_gateway" in item.fixturenames
    if item.get_closest_marker("both_loops") is None or not here:
        del factories["speed"]
    return factories


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test process an equal share of the slow tests, spread among the quick ones.

    Slow tests mostly wait, and quick ones compute. `--dist worksteal` cuts the list into one block per process.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = [item for item in items if not item.get_closest_marker("slow")]
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    items.clear()
    for process in range(processes):
        waiting, computing = slow[process::processes], quick[process::processes]
        share = len(computing) * 2 // 3 // max(len(waiting), 1)  # the last third is quick, so that no process ends late
        for place, item in enumerate(waiting):
            items += [item, *computing[place * share : (place + 1) * share]]
        items += computing[len(waiting) * share :]


def pytest_collection_finish() -> None:
    """Freeze the objects made so far, some million, so that the garbage collector skips them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _quiet_logs() -> Any:
    """Reset log settings before and after each test."""
    structlog.reset_defaults()
    logs.configure("debug", "json")
    yield
    structlog.reset_defaults()


@pytest.fixture
def aioresponses_314(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make aioresponses 0.7.9 work with aiohttp 3.14, whose ClientResponse needs one more argument."""
    original = aiohttp.ClientResponse.__init__

    def init(self: aiohttp.ClientResponse, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("stream_writer", Mock())
        original(self, *args, **kwargs)

    monkeypatch.setattr(aiohttp.ClientResponse, "__init__", init)


@dataclass
class Gateway:
    """A gateway in this process."""

    server: Server
    session: aiohttp.ClientSession
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{self.server.address}"

    @property
    def port(self) -> int:
        return self.server.address.port

    def post(self, path: str = "/v1/chat/completions", json: Any = CHAT, *, key: str | None = KEY, **more: Any) -> Any:
        """Start a request, as `session.post` does; `key` is sent as a bearer token."""
        headers = {**more.pop("headers", {})}
        if key is not None:
            headers.setdefault("Authorization", f"Bearer {key}")
        return self.session.post(self.url + path, json=json, headers=headers, **more)

    def get(self, path: str, *, key: str | None = KEY, **more: Any) -> Any:
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        return self.session.get(self.url + path, headers=headers, **more)

    def exchanges(self) -> list[dict[str, Any]]:
        """Return the `exchange` events so far."""
        return [event for event in self.events if event["event"] == "exchange"]

    async def idle(self) -> None:
        """Wait until no exchange runs."""
        await until(lambda: not self.server._running)


async def until(condition: Callable[[], object], seconds: float = TIMEOUT) -> None:
    """Wait until a condition is true; TimeoutError fails the test after `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def write_files(folder: Path, files: dict[str, str]) -> Path:
    """Write the files of a configuration and return the path of its gateway.yaml."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "gateway.yaml"


StartGateway = Callable[..., Awaitable[Gateway]]


@pytest.fixture
async def start_gateway(tmp_path: Path) -> AsyncIterator[StartGateway]:
    """Return a function that starts a gateway: `await start_gateway(endpoint, yaml, files, timeouts=...)`."""
    stack = contextlib.AsyncExitStack()

    async def start(
        endpoint: str,
        yaml: str = YAML,
        files: dict[str, str] | None = None,
        *,
        timeouts: dict[str, float] | None = None,
        limits: dict[str, int] | None = None,
        listen: Listen | None = None,
        env: dict[str, str] | None = None,
    ) -> Gateway:
        path = write_files(tmp_path, {"gateway.yaml": yaml, **(files or {})})
        loaded = load(path, {"ENDPOINT": endpoint, **(env or {})})
        settings = replace(
            loaded.settings,
            listen=listen or Listen("127.0.0.1", 0),
            timeouts=replace(loaded.settings.timeouts, **(timeouts or {})),
            limits=replace(loaded.settings.limits, **(limits or {})),
        )
        events: list[dict[str, Any]] = []
        structlog.configure(
            processors=[structlog.processors.add_log_level, _Recorder(events)],
            logger_factory=structlog.ReturnLoggerFactory(),
            wrapper_class=structlog.make_filtering_bound_logger(0),
        )
        server = Server(loaded.teams, settings)
        await server.start()
        session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        gateway = Gateway(server, session, events)
        now = asyncio.Event()
        now.set()
        stack.push_async_callback(server.stop, now=now)
        stack.push_async_callback(session.close)
        return gateway

    yield start
    await stack.aclose()


class _Recorder:
    def __init__(self, events: list[dict[str, Any]]) -> None:
        self.events = events

    def __call__(self, _: Any, __: str, event: Any) -> str:
        self.events.append(dict(event))
        return json.dumps(event, default=str)


@pytest.fixture
async def azure() -> AsyncIterator[FakeAzure]:
    """A fake Azure with default settings."""
    async with FakeAzure() as running:
        yield running


class RawUpstream:
    """An upstream that sends exact bytes: `script` gets the reader and writer of each connection."""

    def __init__(
        self,
        script: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._script = script
        self._context = context
        self.connections = 0
        self.open = 0
        self.heads: list[bytes] = []

    async def __aenter__(self) -> Self:
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=1024, ssl=self._context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open += 1
        try:
            await self._script(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.close()

    async def request(self, reader: asyncio.StreamReader) -> bytes:
        """Read one request, body included, and return its head."""
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                await reader.readexactly(int(line.partition(b":")[2]))
        return head


@contextlib.asynccontextmanager
async def raw_upstream(
    *answers: bytes, reset: bool = False, keep_open: bool = False, pause: float = 0
) -> AsyncIterator[RawUpstream]:
    """Run an upstream that sends the next of `answers` for each request of a connection, then closes or resets it."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await upstream.request(reader)
            if pause:
                await asyncio.sleep(pause)
            writer.write(answer)
            await writer.drain()
        if keep_open:
            await reader.read()
        if reset:
            await asyncio.sleep(0.02)
            hard_close(writer)

    upstream = RawUpstream(script)
    async with upstream:
        yield upstream


def hard_close(writer: asyncio.StreamWriter) -> None:
    """Close a connection with a reset."""
    import socket
    import struct

    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def raw_request(port: int, data: bytes, *, timeout: float = TIMEOUT, eof: bool = False) -> bytes:
    """Send exact bytes to a gateway and return everything until it closes, or until `timeout` seconds have passed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = b""
    try:
        writer.write(data)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        if eof:
            writer.write_eof()
        async with asyncio.timeout(timeout):
            while chunk := await reader.read(65536):
                received += chunk
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.close()
    return received


def chat_request(key: str = KEY, *, stream: bool = False, extra: str = "", body: bytes | None = None) -> bytes:
    """Return the bytes of a chat completion request with `Connection: close`."""
    if body is None:
        body = json.dumps({**CHAT, "stream": stream}).encode()
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: gw.test\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nConnection: close\r\n{extra}Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
