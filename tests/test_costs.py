"""Exact costs of an exchange: writes, tasks, and turns of the event loop. No figure here is a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from gateway.config import load
from gateway.server import Server
from gateway.settings import Listen
from gateway.transport.client_connection import ClientConnection
from gateway.transport.upstream_connection import UpstreamConnection
from tests.conftest import chat_request, until, write_files

YAML = """
resources: {azure: {endpoint: "http://azure.invalid"}}
pipeline:
  - access_log
  - auth_passthrough
  - rate_limit: {requests_per_minute: 100000}
  - model_map: {models: {gpt-4o: gpt4o-prod}}
  - api_version: 2024-10-21
  - sse_newline
"""
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(number: int) -> bytes:
    data = b'data: {"n": %d}\n\n' % number
    return b"%x\r\n%b\r\n" % (len(data), data)


class Pipe(asyncio.Transport):
    """A transport that records writes."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.reading = True
        self.closing = False
        self.on_write: Callable[[], None] = lambda: None

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))
        self.on_write()

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def close(self) -> None:
        self.closing = True

    abort = close

    def can_write_eof(self) -> bool:
        return False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


class Line:
    """A gateway between two pipes: the client's and Azure's."""

    def __init__(self, server: Server) -> None:
        self.server = server
        loop = asyncio.get_running_loop()
        connector = server.upstream._connections
        resource = next(iter(server.teams.default.services.values())).resource
        assert resource is not None
        destination = connector.destination(resource)
        self.azure, self.client = Pipe(), Pipe()
        self.wire = UpstreamConnection(loop)
        self.wire.connection_made(self.azure)
        assert connector._write_buffer is not None
        self.wire.attach(cast(Any, None), connector, destination, connector._write_buffer)
        destination.idle.append(self.wire)
        assert server._http is not None
        self.connection = cast(ClientConnection, server._http())
        self.connection.connection_made(self.client)

    async def ask(self, *, stream: bool = False) -> None:
        """Send a request and let it reach Azure."""
        request = chat_request(stream=stream).replace(b"Connection: close\r\n", b"")
        self.connection.data_received(request)
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[Line]:
    loaded = load(write_files(tmp_path, {"gateway.yaml": YAML}), {})
    server = Server(loaded.teams, replace(loaded.settings, listen=Listen("127.0.0.1", 0)))
    await server.start()
    line = Line(server)
    yield line
    line.connection.connection_lost(None)
    await settle()
    now = asyncio.Event()
    now.set()
    await server.stop(now=now)


async def test_a_plain_exchange_is_one_write_each_way(line: Line) -> None:
    """Head and body are one write to Azure and one to the client. The connection to Azure is free first."""
    for count in (1, 2, 3):
        await line.ask()
        assert len(line.azure.written) == count
        line.wire.data_received(PLAIN)
        assert len(cast(Any, line.wire.destination).idle) == 1
        await settle()
        assert len(line.client.written) == count
        assert line.client.written[-1].startswith(b"HTTP/1.1 200 OK\r\n")
        assert line.client.written[-1].endswith(b"\r\n\r\n{}")


async def test_answers_of_one_turn_leave_together_at_its_end(line: Line) -> None:
    """Not one by one between the work of other connections. Later writes of a connection stay in order."""
    health = b"GET /healthz HTTP/1.1\r\nHost: gw.test\r\n\r\n"
    other = cast(ClientConnection, line.server._http())  # type: ignore[misc] # the server has started
    pipe = Pipe()
    other.connection_made(pipe)
    order: list[str] = []
    line.client.on_write = lambda: order.append(f"first, with {len(asyncio.all_tasks())} tasks left")
    pipe.on_write = lambda: order.append(f"second, with {len(asyncio.all_tasks())} tasks left")
    line.connection.data_received(health)
    other.data_received(health)
    await settle()
    assert order == ["first, with 1 tasks left", "second, with 1 tasks left"], "both exchanges were over before"
    line.connection.data_received(health + b"no request\r\n\r\n")
    await settle()
    assert b"".join(line.client.written).count(b"HTTP/1.1 200") == 2
    assert line.client.written[-1].startswith(b"HTTP/1.1 400")
    other.connection_lost(None)


async def test_one_task_an_exchange(line: Line) -> None:
    """None is left at its end."""
    before = asyncio.all_tasks()
    await line.ask()
    assert len(asyncio.all_tasks() - before) == 1
    line.wire.data_received(PLAIN)
    await settle()
    assert asyncio.all_tasks() == before


async def test_events_that_arrive_together_leave_together_and_at_once(line: Line) -> None:
    """All events of one read are one write, before `data_received` returns; no task switch is needed."""
    await line.ask(stream=True)
    line.wire.data_received(STREAM)
    await settle()
    assert len(line.client.written) == 1, "the head"
    for count in (1, 5, 50):
        line.client.written.clear()
        line.wire.data_received(b"".join(event(number) for number in range(count)))
        assert len(line.client.written) == 1
        assert line.client.written[0].count(b"data: ") == count
    line.client.written.clear()
    line.wire.data_received(b"d\r\ndata: [DONE]\n\r\n0\r\n\r\n")
    await settle()
    assert line.client.written == [b"e\r\ndata: [DONE]\n\n\r\n", b"0\r\n\r\n"]
    assert not line.client.closing


async def test_an_event_that_no_filter_changes_is_not_touched(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are decoded only if a filter asks for it."""

    def never(*_: object) -> None:
        raise AssertionError("an event was decoded")

    await line.ask(stream=True)
    monkeypatch.setattr("gateway.protocol.sse.Event.__init__", never)
    line.wire.data_received(STREAM + event(1))
    await settle()
    line.wire.data_received(event(2))
    assert line.client.written[-1] == event(2)


async def test_a_client_that_does_not_read_holds_azure(line: Line) -> None:
    """Backpressure pauses Azure's socket in the next turn of the loop, and resumes it at once."""
    await line.ask(stream=True)
    line.wire.data_received(STREAM + event(1))
    await settle()
    seen = []
    for change in (line.connection.pause_writing, line.connection.resume_writing):
        change()
        await settle()
        seen.append(line.azure.reading)
    assert seen == [False, True]
    line.wire.data_received(event(2))
    assert line.client.written[-1] == event(2)


async def test_an_exchange_leaves_nothing_for_the_garbage_collector(line: Line) -> None:
    """No cycles: all objects of an exchange are freed at its end, without the collector."""
    import gc

    async def exchange() -> None:
        await line.ask()
        line.wire.data_received(PLAIN)
        await settle()

    await exchange()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(10):
            await exchange()
        gc.collect()
        ours = [each for each in gc.garbage if type(each).__module__.startswith(("gateway", "plugins"))]
        gc.garbage.clear()
    finally:
        gc.set_debug(0)
        gc.enable()
    assert ours == []


async def test_an_upload_nobody_asks_for_is_never_whole_in_memory(line: Line) -> None:
    """The gateway holds at most two buffers that Azure has not accepted yet, whatever the size of the upload."""
    loop = asyncio.get_running_loop()
    from gateway.body.incoming_body import IncomingBody
    from gateway.body.request_body import Body

    held: list[bool] = []

    class Sender:
        def send_continue(self) -> None: ...

        def pause_input(self) -> None:
            held.append(True)

        def resume_input(self) -> None:
            held.append(False)

        def client_awaited(self, awaited: bool) -> None: ...

    arriving = IncomingBody(Sender(), loop, length=None, expects_continue=False, limit=1 << 40, timeout=5, min_rate=500)
    piece = b"x" * 65_536
    line.wire.ask(60, 60)
    upload = asyncio.create_task(line.wire.send_stream(b"HEAD", Body(arriving), 60))
    line.wire.pause_writing()
    taken = 0
    for _ in range(100):
        arriving.feed(b"10000\r\n" + piece + b"\r\n")
        taken += 1
        await settle()
        if held[-1:] == [True]:
            break
    assert taken <= 4, "the client is asked to wait soon after Azure does"
    line.wire.resume_writing()
    await settle()
    assert held[-1] is False
    upload.cancel()
    await asyncio.gather(upload, return_exceptions=True)


async def test_an_empty_piece_of_a_body_is_not_its_last_chunk(line: Line) -> None:
    """A stage's own source may yield an empty piece; as a chunk it would end the body (RFC 9112, 7.1)."""
    from gateway.body.request_body import Body

    class Source:
        length: int | None = None
        left = (b"one", b"", b"two", None)

        async def read(self) -> bytes | None:
            first, *self.left = self.left  # type: ignore[assignment]
            return first

        async def rest(self, limit: int | None) -> bytes:
            raise AssertionError

    line.wire.ask(60, 60)
    await line.wire.send_stream(b"HEAD", Body(Source()), 60)
    assert b"".join(line.azure.written) == b"HEAD3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"


async def test_a_stream_for_a_client_that_is_paused_already_waits(line: Line) -> None:
    """If the client does not read when a stream begins, reading from Azure pauses as soon as a buffer is full."""
    await line.ask(stream=True)
    line.connection.pause_writing()
    line.wire.data_received(STREAM + event(1))
    await settle()
    assert not any(b"data: " in written for written in line.client.written)
    for number in range(5000):
        line.wire.data_received(event(number))
    await settle()
    reading = [line.azure.reading]
    line.connection.resume_writing()
    await until(lambda: line.azure.reading)
    assert reading == [False]
    assert b"".join(line.client.written).count(b"data: ") == 5001
