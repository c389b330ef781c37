"""Incoming bodies: complete or rejected, however reads split them, and without delay for other clients."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.body.incoming_body import INLINE_FRAMING_LINES, IncomingBody
from gateway.errors import ApiError
from gateway.fair_scheduler import FairScheduler
from gateway.protocol.http1_chunked import MOST_LINES
from gateway.settings import Limits, Timeouts
from gateway.testing import FakeAzure
from gateway.transport import client_connection as connection
from gateway.transport.client_connection import ClientConnection, IncomingRequest
from gateway.transport.write_buffer import WriteBuffer
from tests.azure.test_deployment_field import BOUNDARY, form
from tests.conftest import KEY, Gateway, StartGateway, chat_request, raw_request, until
from tests.test_costs import Pipe, settle

if TYPE_CHECKING:
    from aiohttp.web_server import Server

YAML = """
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline:
  - access_log
  - auth_passthrough
  - model_map: {unmapped: own_name}
  - api_version: 2025-04-01-preview
"""


class Client:
    """A client whose bytes the gateway gets in exactly the reads of a test."""

    def __init__(self, gateway: Gateway) -> None:
        http = gateway.server._http
        assert http is not None
        self.pipe = Pipe()
        self.connection = cast(ClientConnection, http())
        self.connection.connection_made(self.pipe)

    async def send(self, *reads: bytes) -> None:
        """Give each read when the gateway accepts it, and let the gateway work before the next."""
        for read in reads:
            await until(lambda: self.pipe.reading)
            if self.pipe.closing:
                return
            self.connection.data_received(read)
            await settle()

    async def status(self) -> int:
        """Return the status of the response, when its head has arrived."""
        await until(lambda: b"\r\n\r\n" in self.received)
        return int(self.received.split(b" ", 2)[1])

    @property
    def received(self) -> bytes:
        return b"".join(self.pipe.written)

    def leave(self) -> None:
        self.pipe.closing = True
        self.connection.connection_lost(None)


class Between:
    """A gateway and its fake Azure, for many examples of one test (with a short repr when one of them fails)."""

    def __init__(self, gateway: Gateway, azure: FakeAzure) -> None:
        self.gateway = gateway
        self.azure = azure


@pytest.fixture
async def between(start_gateway: StartGateway, azure: FakeAzure) -> Between:
    return Between(await start_gateway(azure.endpoint, YAML), azure)


def head(path: str, kind: str, *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: gw.test", f"Authorization: Bearer {KEY}", f"Content-Type: {kind}", *more]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def chat(payload: bytes) -> tuple[str, str, bytes]:
    body = json.dumps({"model": "gpt-4o", "messages": [{"role": "user", "content": payload.hex()}]}).encode()
    return "/v1/chat/completions", "application/json", body


def upload(path: str, *names: str, purpose: str = "assistants") -> Callable[[bytes], tuple[str, str, bytes]]:
    def made(payload: bytes) -> tuple[str, str, bytes]:
        values: dict[str, str | bytes] = {"model": "gpt-4o", "purpose": purpose, "file": payload, "data": payload}
        return path, f"multipart/form-data; boundary={BOUNDARY}", form(**{name: values[name] for name in names})

    return made


def batch(payload: bytes) -> tuple[str, str, bytes]:
    lines = [
        b'{"custom_id":"%d","body":{"model":"gpt-4o","x":"%b"}}' % (number, payload[number:][:100].hex().encode())
        for number in range(0, len(payload) + 1, 100)
    ]
    made = upload("/v1/files", "file", "purpose", purpose="batch")
    return made(b"\n".join(lines))


READERS = {
    "json": chat,
    "audio, the model first": upload("/v1/audio/transcriptions", "model", "file"),
    "audio, the model last": upload("/v1/audio/transcriptions", "file", "model"),
    "a file, its purpose first": upload("/v1/files", "purpose", "file"),
    "a file, its purpose last": upload("/v1/files", "file", "purpose"),
    "a batch": batch,
    "a part of an upload": upload("/v1/uploads/upload_1/parts", "data"),
}
SIZES = st.lists(st.integers(1, 4000), min_size=1, max_size=6)


def pieces(data: bytes, sizes: list[int], most: int) -> Iterator[bytes]:
    """Yield data in pieces of these sizes, repeated; larger ones if there would be more than `most`."""
    place = 0
    for size in itertools.cycle([max(size, len(data) // most) for size in sizes]):
        yield data[place : place + size]
        place += size
        if place >= len(data):
            return


def chunked(data: bytes, sizes: list[int], extension: bytes = b"") -> bytes:
    made = [b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces(data, sizes, 5000)]
    return b"".join(made) + b"0\r\n\r\n"


BODIES = st.builds(
    lambda data, times: data * times, st.binary(min_size=1, max_size=400), st.sampled_from([1, 1, 20, 500])
)


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BODIES, st.none() | SIZES, SIZES, st.sampled_from([b"", b";a=b"]))
async def test_a_body_arrives_whole(
    reader: str,
    between: Between,
    payload: bytes,
    chunks: list[int] | None,
    reads: list[int],
    extension: bytes,
) -> None:
    """Byte for byte, through every reader: with a length or in any chunks, and split into any reads.

    Or it is rejected, if the chunks are nearly all framing; a part of it is never taken for all of it.
    """
    gateway, azure = between.gateway, between.azure
    azure.requests.clear()
    path, kind, body = READERS[reader](payload)
    if chunks is None:
        wire = head(path, kind, f"Content-Length: {len(body)}") + body
    else:
        wire = head(path, kind, "Transfer-Encoding: chunked") + chunked(body, chunks, extension)
    client = Client(gateway)
    await client.send(*pieces(wire, reads, 150))
    status = await client.status()
    framing = 0 if chunks is None else len(wire) - wire.index(b"\r\n\r\n") - 4 - len(body)
    if status != 200:
        assert (status, framing > 4000 + 2 * len(body)) == (400, True), client.received
        assert not any(seen.body for seen in azure.requests)
    else:
        assert [seen.body for seen in azure.requests] == [body]
    client.leave()
    await gateway.idle()


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BODIES, st.none() | SIZES, SIZES, st.floats(0, 0.999))
async def test_a_body_that_breaks_off_is_never_taken_for_a_whole_one(
    reader: str,
    between: Between,
    payload: bytes,
    chunks: list[int] | None,
    reads: list[int],
    part: float,
) -> None:
    """Whichever byte is the last one: Azure never sees a complete body."""
    gateway, azure = between.gateway, between.azure
    azure.requests.clear()
    path, kind, body = READERS[reader](payload)
    if chunks is None:
        wire = head(path, kind, f"Content-Length: {len(body)}") + body
    else:
        wire = head(path, kind, "Transfer-Encoding: chunked") + chunked(body, chunks)
    client = Client(gateway)
    await client.send(*pieces(wire[: int(len(wire) * part)] or b"P", reads, 150))
    client.leave()
    await gateway.idle()
    await until(lambda: not azure.requests or azure.requests[-1].left)
    assert not any(seen.body for seen in azure.requests)


@pytest.mark.parametrize("lonely", ["the size", "the line break", "the first size", "the last chunk"])
async def test_a_read_with_nothing_but_framing_is_not_the_end(
    lonely: str, start_gateway: StartGateway, azure: FakeAzure
) -> None:
    """As Python's requests before 2.29 sends it: each chunk's size in a separate packet."""
    gateway = await start_gateway(azure.endpoint, YAML)
    path, kind, body = READERS["audio, the model first"](b"A" * 2000)
    first, second, third = (b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:200], body[200:1200], body[1200:]))
    reads = {
        "the size": [first, second[:5], second[5:], third + b"0\r\n\r\n"],
        "the line break": [first, second[:-2], second[-2:], third + b"0\r\n\r\n"],
        "the first size": [first[:4], first[4:], second, third + b"0\r\n\r\n"],
        "the last chunk": [first, second, third, b"0\r\n", b"\r\n"],
    }[lonely]
    client = Client(gateway)
    await client.send(head(path, kind, "Transfer-Encoding: chunked"), *reads)
    assert await client.status() == 200
    assert azure.requests[-1].body == body


# -- a bounded number of chunks in each turn ----------------------------------------------------------


class StubTransport:
    """A transport that only records whether reading is paused."""

    held = False
    released = 0

    def send_continue(self) -> None: ...

    def pause_input(self) -> None:
        self.held = True

    def resume_input(self) -> None:
        self.held = False
        self.released += 1

    def client_awaited(self, awaited: bool) -> None: ...


def arriving(transport: StubTransport, length: int | None = None) -> IncomingBody:
    loop = asyncio.get_running_loop()
    return IncomingBody(transport, loop, length=length, expects_continue=False, limit=1 << 30, timeout=5, min_rate=500)


SMALL_CHUNK = b"3\r\nxyz\r\n"


async def test_a_read_of_many_chunks_is_handled_some_at_a_time(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """16 chunks on arrival, then 128 in each step, with reading paused meanwhile; and no byte is lost."""
    gateway = await start_gateway(azure.endpoint, YAML)
    client = Client(gateway)
    path, kind, _ = chat(b"")
    counts = []
    feed = IncomingBody.feed

    def counted(self: IncomingBody, data: bytes, max_lines: int = MOST_LINES) -> bytes:
        before = self._total
        extra = feed(self, data, max_lines)
        counts.append((self._total - before) // 3)
        return extra

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IncomingBody, "feed", counted)
        client.connection.data_received(head(path, kind, "Transfer-Encoding: chunked") + SMALL_CHUNK * 1000)
        assert counts == [INLINE_FRAMING_LINES // 2]
        assert not client.pipe.reading
        await until(lambda: client.pipe.reading)
        assert counts == [16, *[128] * 7, 88]
        client.connection.data_received(b"0\r\n\r\n")
    assert await client.status() == 400  # the body is complete, but `xyz...` is not JSON
    client.leave()


async def test_a_body_with_a_slow_reader_is_not_parsed_further() -> None:
    """Unread bytes are kept unparsed until the reader takes the buffered ones."""
    transport = StubTransport()
    body = arriving(transport)
    piece = b"x" * 1000
    wire = b"3e8\r\n" + piece + b"\r\n"
    body.feed(wire * 300)
    taken = body._total
    assert taken == 128 * 1000
    assert (transport.held, body.full, body.has_work) == (True, True, False)
    read = await body.read()
    assert read == piece * 128
    assert (body.has_work, transport.released) == (True, 1)
    assert len(body.unread) == len(wire) * (300 - 128)


class SingleServer:
    """A server that has only this connection."""

    def connection_made(self, *_: object) -> None: ...

    def connection_lost(self, *_: object) -> None: ...

    def excess(self, _: int) -> int:
        return 0


async def test_a_body_in_chunks_goes_on_when_its_reader_does() -> None:
    """A slow reader takes the buffered bytes, which lets the unread chunks be parsed; then reading resumes."""
    pieces: list[bytes] = []
    go_on = asyncio.Event()

    async def handle(arrived: IncomingRequest) -> bool:
        await go_on.wait()
        async for piece in arrived.body.stream():
            pieces.append(piece)
            await settle()
        return True

    loop = asyncio.get_running_loop()
    limits, timeouts = Limits(), Timeouts()
    client = ClientConnection(cast("Server", SingleServer()), handle, loop, limits, timeouts, WriteBuffer(loop))
    pipe = Pipe()
    client.connection_made(pipe)
    client.data_received(b"POST /v1/files HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    client.data_received((b"3e8\r\n" + b"x" * 1000 + b"\r\n") * 400)
    await settle()
    assert not pipe.reading
    go_on.set()
    await until(lambda: pipe.reading)
    client.data_received(b"0\r\n\r\n")
    await until(lambda: client.idle)
    assert b"".join(pieces) == b"x" * 400_000
    client.connection_lost(None)


@given(BODIES, SIZES, SIZES, st.integers(1, 20))
async def test_a_chunked_body_is_read_as_sent_and_without_empty_pieces(
    payload: bytes, chunks: list[int], reads: list[int], most: int
) -> None:
    """However few lines one call parses: the same bytes, no empty piece, and then None."""
    body = arriving(StubTransport())
    wire = chunked(payload, [max(size, 3) for size in chunks])
    found = []
    for part in pieces(wire + b"next", reads, 150):
        if body.done:
            break
        extra = body.feed(body.unread + part, most)
        while body._parts:
            found.append(await body.read())
        while body.unread and not body.done:
            extra = body.feed(body.unread, most)
            while body._parts:
                found.append(await body.read())
        assert b"next".startswith(extra)
    assert await body.read() is None
    assert all(found)
    assert b"".join(part for part in found if part is not None) == payload


async def test_two_connections_take_turns(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Of two bodies in many chunks, neither is read to its end before the other has had a turn."""
    gateway = await start_gateway(azure.endpoint, YAML)
    first, second = Client(gateway), Client(gateway)
    path, kind, _ = chat(b"")
    for client in (first, second):
        client.connection.data_received(head(path, kind, "Transfer-Encoding: chunked") + SMALL_CHUNK * 2000)
    bodies = [client.connection._body for client in (first, second)]
    left = []
    while not (first.pipe.reading and second.pipe.reading):
        await asyncio.sleep(0)
        left.append([len(body.unread) for body in bodies if body is not None])
    assert max(abs(one - other) for one, other in left) <= 128 * len(SMALL_CHUNK)
    for client in (first, second):
        client.leave()


async def test_unread_bytes_of_a_client_that_leaves_are_released(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """No further step runs for it, and its request ends."""
    gateway = await start_gateway(azure.endpoint, YAML)
    client = Client(gateway)
    path, kind, _ = chat(b"")
    client.connection.data_received(head(path, kind, "Transfer-Encoding: chunked") + SMALL_CHUNK * 2000)
    client.leave()
    await gateway.idle()
    await settle()
    assert not FairScheduler.of(asyncio.get_running_loop())._waiting
    assert not azure.requests


async def test_a_whole_body_in_unread_chunks_is_followed_by_the_next_request(
    start_gateway: StartGateway, azure: FakeAzure
) -> None:
    """The bytes after the last chunk are parsed after the last step."""
    gateway = await start_gateway(azure.endpoint, YAML)
    client = Client(gateway)
    path, kind, body = chat(b"x" * 3000)
    wire = head(path, kind, "Transfer-Encoding: chunked") + chunked(body, [3]) + head("/v1/models", kind)
    client.connection.data_received(wire)
    await until(lambda: client.received.count(b"HTTP/1.1 ") == 2)
    assert azure.requests[0].body == body
    client.leave()


# -- unread bodies -------------------------------------------------------------------------------------


def refused(*more: str) -> bytes:
    """Return a head that is rejected before its body is read."""
    return head("/v1/chat/completions", "application/json", *more).replace(b"Bearer", b"Basic")


async def test_a_short_rest_is_skipped_and_the_connection_kept(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """It is counted, not parsed: the next request follows on the same connection."""
    gateway = await start_gateway(azure.endpoint, YAML)
    client = Client(gateway)
    await client.send(refused("Content-Length: 200000") + b"x" * 1000)
    assert await client.status() == 401
    assert b"connection: close" not in client.received
    await client.send(*[b"y" * 50_000] * 3)
    await client.send(b"z" * 49_000 + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    await until(lambda: b'{"status":"alive"}' in client.received)


@pytest.mark.parametrize("length", ["Content-Length: 300000", "Transfer-Encoding: chunked"])
async def test_a_long_or_chunked_rest_ends_the_connection_and_is_never_parsed(
    length: str, start_gateway: StartGateway, azure: FakeAzure
) -> None:
    """After a long rest, or a chunked one, the response says `connection: close`, and no input is a second request."""
    gateway = await start_gateway(azure.endpoint, YAML)
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(refused(length) + b"5\r\nhello")
    answer = await reader.readuntil(b"\r\n\r\n")
    assert b" 401 " in answer
    assert b"connection: close" in answer
    [held] = gateway.server._http.connections  # type: ignore[union-attr]
    assert cast(ClientConnection, held)._body is None
    writer.write(b"\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    async with asyncio.timeout(10):
        rest = await reader.read()
    assert b"HTTP/1.1" not in rest
    writer.close()


async def test_a_lingering_close_is_bounded_in_bytes(
    start_gateway: StartGateway, azure: FakeAzure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lingering close is limited to 32 MiB, here 100 KB."""
    monkeypatch.setattr(connection, "_LINGERING_CLOSE_BYTES", 100_000)
    gateway = await start_gateway(azure.endpoint, YAML)
    client = Client(gateway)
    client.pipe.can_write_eof = lambda: True  # type: ignore[method-assign]
    client.pipe.write_eof = lambda: None  # type: ignore[method-assign]
    await client.send(refused("Transfer-Encoding: chunked"))
    assert await client.status() == 401
    sent = 0
    while not client.pipe.closing:
        client.connection.data_received(b"x" * 10_000)
        sent += 10_000
    assert sent == 110_000
    client.leave()


async def test_a_lingering_close_is_bounded_in_time(
    start_gateway: StartGateway, azure: FakeAzure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timeout of a lingering close is for all of it: a byte does not restart it."""
    monkeypatch.setattr(connection, "_LINGERING_CLOSE_TIMEOUT", 0.3)
    gateway = await start_gateway(azure.endpoint, YAML)
    _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(refused("Transfer-Encoding: chunked"))

    async def send() -> None:
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    with pytest.raises(ConnectionError):
        await asyncio.wait_for(send(), 5)
    writer.close()


# -- slow clients --------------------------------------------------------------------------------------


async def drip(port: int, first: bytes, rest: bytes, pause: float = 0.05) -> bytes:
    """Send `first`, then `rest` byte by byte until there is a response; return all received bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = asyncio.create_task(reader.read())
    try:
        writer.write(first)
        for number in range(10_000):
            if answer.done():
                break
            writer.write(rest[number % len(rest) :][:1])
            await asyncio.wait((answer,), timeout=pause)
        async with asyncio.timeout(10):
            return await answer
    except ConnectionError:
        return b""
    finally:
        answer.cancel()
        writer.close()


FORM = READERS["audio, the model first"](b"x" * 50_000)
SLOW = {
    "json": (head(*chat(b"")[:2], "Content-Length: 5000"), b" "),
    "chunked json": (head(*chat(b"")[:2], "Transfer-Encoding: chunked"), b"1\r\n \r\n"),
    "framing alone": (head(*chat(b"")[:2], "Transfer-Encoding: chunked") + b"5;", b"x"),
    "a form before its model": (head(*FORM[:2], f"Content-Length: {len(FORM[2])}") + FORM[2][:20], FORM[2][20:]),
    "a form on its way to Azure": (head(*FORM[:2], f"Content-Length: {len(FORM[2])}") + FORM[2][:500], b"x"),
}


@pytest.mark.parametrize("kind", SLOW)
async def test_a_body_that_drips_is_a_408(kind: str, start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Each byte arrives in time, but the body is too slow overall. No other timeout runs meanwhile."""
    gateway = await start_gateway(azure.endpoint, YAML, timeouts={"client": 1.5, "first_byte": 1.0})
    received = await drip(gateway.port, *SLOW[kind])
    assert received.startswith(b"HTTP/1.1 408 "), received
    assert b"connection: close" in received
    assert b"500 bytes per second" in received or b"no byte arrived" in received
    assert b"Azure" not in received
    await gateway.idle()
    [event] = gateway.exchanges()
    assert (event["status"], event["error"]) == (408, "request_timeout")
    assert not any(seen.body for seen in azure.requests)


async def test_a_body_above_the_least_rate_may_take_its_time(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Longer than `first_byte`, which excludes the time in which the client sends."""
    gateway = await start_gateway(azure.endpoint, YAML, timeouts={"first_byte": 1.0}, limits={"body_rate": 1})
    path, kind, body = chat(b"12345678")
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(head(path, kind, f"Content-Length: {len(body)}", "Connection: close"))
    for place in range(0, len(body), 8):
        writer.write(body[place : place + 8])
        await asyncio.sleep(0.15)
    assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_the_timeout_of_a_body_begins_at_its_last_byte(start_gateway: StartGateway) -> None:
    """The timeout begins with the last byte, not with the timer before it."""
    loop = asyncio.get_running_loop()
    transport = StubTransport()
    body = IncomingBody(transport, loop, length=100, expects_continue=False, limit=1000, timeout=50, min_rate=1)
    waiting = asyncio.create_task(body.rest(None))
    await settle()
    body._wait_started -= 40.0  # it has waited for 40 s when the next byte arrives
    body.feed(b"x")
    assert body._timer is not None
    assert body._due() == pytest.approx(body._wait_started + 51), "50 s overall, plus 1 s for the byte"
    body._waited, body._total = -1000.0, 1
    assert body._due() == body._last_byte_at + 50, "50 s after the byte"
    body._last_byte_at -= 51.0
    body._check_timeout()
    with pytest.raises(ApiError, match="no byte arrived for 50 s"):
        await waiting


async def test_a_reader_that_is_slow_costs_its_client_no_time() -> None:
    """Only the time in which the reader waits counts."""
    transport = StubTransport()
    body = arriving(transport, 100)
    body.feed(b"x" * 50)
    assert await body.read() == b"x" * 50
    assert body._waited == 0
    waiting = asyncio.create_task(body.read())
    await settle()
    assert body._timer is not None
    body.feed(b"x" * 50)
    assert await waiting == b"x" * 50
    assert await body.read() is None
    assert await body.read() is None


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_2000_slow_clients_are_disconnected_while_others_are_served(
    start_gateway: StartGateway, azure: FakeAzure
) -> None:
    """Heads, bodies and chunks at 1 byte per second get a 408; other clients get responses meanwhile."""
    gateway = await start_gateway(azure.endpoint, YAML, timeouts={"head": 4, "client": 4})
    kinds = [
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX: ", b"a"),
        *[SLOW[kind] for kind in ("json", "chunked json", "a form on its way to Azure")],
    ]
    slow = [asyncio.create_task(drip(gateway.port, *kinds[number % 4], pause=1.0)) for number in range(2000)]
    served = 0
    while not all(task.done() for task in slow):
        received = await raw_request(gateway.port, chat_request(), timeout=60)
        assert received.startswith(b"HTTP/1.1 200 "), received
        served += 1
        await asyncio.sleep(0.05)
    # (A client that writes once more before it reads may see only the end of the connection.)
    assert all(task.result().startswith(b"HTTP/1.1 408 ") or not task.result() for task in slow)
    assert served
    await gateway.idle()
    assert sum(event.get("status") == 408 for event in gateway.events) == 2000
    await until(lambda: not gateway.server._http.connections, 20)  # type: ignore[union-attr]
