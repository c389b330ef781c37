"""A connection to Azure without sockets: reuse, steps, backpressure, and the last bytes."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import UpstreamError
from gateway.fair_scheduler import STEP
from gateway.transport.connection_pool import ConnectionPool, Destination
from gateway.transport.paused_reading import MOST_LINES
from gateway.transport.upstream_connection import UpstreamConnection
from gateway.transport.upstream_response import _MAX_INFLATED, UpstreamResponse
from gateway.transport.write_buffer import WriteBuffer
from tests.test_costs import Pipe

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b"data: " + b"x" * 100 + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Pool(ConnectionPool):
    """A pool with one destination."""

    def __init__(self) -> None:
        super().__init__()
        self.only = cast(Destination, SimpleNamespace(idle=[], retired=False))

    def open(self) -> tuple[UpstreamConnection, Pipe]:
        loop = asyncio.get_running_loop()
        connection, pipe = UpstreamConnection(loop), Pipe()
        connection.connection_made(pipe)
        connection.attach(None, self, self.only, WriteBuffer(loop))
        return connection, pipe

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()


async def turns_until(condition: Callable[[], object], most: int = 20_000) -> int:
    """Count the turns of the loop until a condition is true."""
    for count in range(most):
        if condition():
            return count
        await asyncio.sleep(0)
    raise AssertionError("the condition never becomes true")


async def test_a_connection_is_pooled_only_if_it_is_clean() -> None:
    """It is not if reading is paused, if it closes, or if a response, a relay, bytes or a timer are left."""
    pool = Pool()

    def put(spoil: Callable[[UpstreamConnection, Pipe], object]) -> bool:
        connection, pipe = pool.open()
        spoil(connection, pipe)
        pool.put(connection)
        return pool.only.idle[-1:] == [connection]

    async def nothing() -> None: ...

    assert put(lambda connection, pipe: None)
    ways: list[Callable[[UpstreamConnection, Pipe], object]] = [
        lambda connection, _: connection.hold(),
        lambda connection, _: connection._pause_reading(),
        lambda connection, _: connection.ask(10, 10),
        lambda connection, _: connection._deadline.set(10, connection.abort),
        lambda connection, _: connection._backlog.append(b"x"),
        lambda connection, _: setattr(connection._head_reader, "unparsed", b"HTTP/1.1 2"),
        lambda connection, _: setattr(connection, "_relay", object()),
        lambda connection, _: setattr(connection, "_early_data", b"x"),
        lambda connection, _: setattr(connection, "_unsent", b"x"),
        lambda connection, _: connection.eof_received(),
        lambda connection, pipe: setattr(pipe, "closing", True),
        lambda connection, pipe: setattr(pipe, "get_write_buffer_size", lambda: 1),
    ]
    for number, spoil in enumerate(ways):
        assert not put(spoil), number
    await pool.close()


@pytest.mark.parametrize("split", [None, 20, len(OK) - 1])
async def test_a_watch_that_fails_on_the_last_bytes_leaves_no_reader_waiting(split: int | None) -> None:
    """The request gets the exception, and the connection is in the pool neither before nor after."""
    pool = Pool()
    connection, pipe = pool.open()
    response = connection.ask(10, 10)

    def watch(data: bytes) -> None:
        assert not pool.only.idle
        if data.endswith(b"}"):
            raise ValueError("a bug")

    response.watch = watch
    waiting = asyncio.ensure_future(response.begun())
    await asyncio.sleep(0)
    connection.data_received(OK[:split] if split else OK)
    if split:
        connection.data_received(OK[split:])
    with pytest.raises(ValueError, match="a bug"):
        await asyncio.wait_for(waiting, 5)
    assert not pool.only.idle
    assert pipe.is_closing()
    await pool.close()


async def test_a_response_that_ends_while_its_reader_is_slow_leaves_the_connection_reading() -> None:
    """The sink pauses reading on the very last bytes; the next request on the connection finds it reading."""
    pool = Pool()
    connection, pipe = pool.open()
    response = connection.ask(10, 10)
    connection.data_received(SSE)
    pumped = asyncio.ensure_future(response.pump(lambda data: response.hold()))
    await asyncio.sleep(0)
    connection.data_received(chunk(EVENT) + b"0\r\n\r\n")
    await asyncio.wait_for(pumped, 5)
    assert pool.only.idle == [connection]
    assert connection.is_clean()
    assert pipe.reading
    await pool.close()


def fed(response: UpstreamResponse) -> list[bytes]:
    """Pump a response into a list."""
    out: list[bytes] = []
    response._sink = out.append
    return out


@pytest.mark.parametrize("event", [EVENT, b":\n\n", b"\n", b"\r\r", b"data: " + b"x" * 3000 + b"\n\n"])
async def test_a_large_read_is_handled_in_bounded_steps(event: bytes) -> None:
    """One step per turn of the loop, limited in bytes and line ends; reading pauses until all steps are done."""
    pool = Pool()
    connection, pipe = pool.open()
    response = connection.ask(10, 10)
    connection.data_received(SSE)
    out = fed(response)
    count = 250_000 // len(event)
    body = event * count
    connection.data_received(chunk(body))
    assert connection._reading_paused
    seen = 0
    while b"".join(out) != body:
        await asyncio.sleep(0)
        now = out[seen:]
        seen = len(out)
        assert len(now) <= 2
        assert all(len(each) <= STEP for each in now)
        assert all(each.count(b"\n") + each.count(b"\r") <= MOST_LINES for each in now)
    connection.data_received(b"0\r\n\r\n")
    await turns_until(lambda: response.done)
    assert pipe.reading
    assert pool.only.idle == [connection]
    await pool.close()


@pytest.mark.parametrize("event", [b":\n\n", b"\n", b"\r\r"])
async def test_a_read_of_thousands_of_lines_is_handled_in_steps(event: bytes) -> None:
    """Even one that is small enough to be handled at once: filters look at each event."""
    pool = Pool()
    connection, pipe = pool.open()
    response = connection.ask(10, 10)
    connection.data_received(SSE)
    out = fed(response)
    connection.data_received(chunk(event * (STEP * 3 // 4 // len(event))))
    assert not out
    assert connection._reading_paused
    await turns_until(lambda: not connection._reading_paused)
    assert pipe.reading
    assert max(each.count(b"\n") + each.count(b"\r") for each in out) <= MOST_LINES
    connection.abort()


async def test_events_of_known_length_are_handled_in_steps() -> None:
    """A megabyte of events is not delivered whole: the filters would look at all of them in one turn."""
    pool = Pool()
    connection, _ = pool.open()
    response = connection.ask(10, 10)
    body = EVENT * 5000
    connection.data_received(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    out = fed(response)
    connection.data_received(body)
    await turns_until(lambda: response.done)
    assert b"".join(out) == body
    assert max(map(len, out)) <= STEP
    assert pool.only.idle == [connection]
    await pool.close()


async def test_small_reads_are_handled_at_once() -> None:
    """An event of a stream does not wait for a turn."""
    pool = Pool()
    connection, _ = pool.open()
    response = connection.ask(10, 10)
    connection.data_received(SSE)
    out = fed(response)
    connection.data_received(chunk(EVENT))
    assert out == [EVENT]
    connection.abort()


async def test_no_step_is_taken_while_the_reader_wants_no_more() -> None:
    """Backpressure comes first; afterwards older bytes come before newer ones."""
    pool = Pool()
    connection, _ = pool.open()
    response = connection.ask(10, 10)
    connection.data_received(SSE)
    out: list[bytes] = []

    def sink(data: bytes) -> None:
        out.append(data)
        if len(out) == 1:
            response.hold()

    response._sink = sink
    body = b"".join(b"data: %d\n\n" % number for number in range(20_000))
    connection.data_received(chunk(body))
    connection.data_received(b"0\r\n\r\n")  # from a transport that had read it already
    await turns_until(lambda: out)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(out) == 1
    assert connection._reading_paused
    response.release()
    await turns_until(lambda: response.done)
    assert b"".join(out) == body
    assert pool.only.idle == [connection]
    assert connection.is_clean()
    await pool.close()


async def test_a_hold_between_two_steps_stops_the_next_one() -> None:
    """A client that becomes slow while its response waits for a turn gets nothing more."""
    pool = Pool()
    connection, _ = pool.open()
    response = connection.ask(10, 10)
    connection.data_received(SSE)
    out = fed(response)
    body = EVENT * 2000
    connection.data_received(chunk(body) + b"0\r\n\r\n")
    await turns_until(lambda: out)
    response.hold()
    seen = len(out)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(out) == seen
    assert connection._reading_paused
    response.release()
    await turns_until(lambda: response.done)
    assert b"".join(out) == body
    await pool.close()


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("whole", [False, True])
async def test_bytes_received_before_the_connection_is_lost_are_delivered(held: bool, whole: bool) -> None:
    """Even those that no step has handled yet; the response is complete only if its end has arrived."""
    pool = Pool()
    connection, _ = pool.open()
    response = connection.ask(10, 10)
    connection.data_received(SSE)
    out = fed(response)
    body = b"".join(b"data: %d\n\n" % number for number in range(20_000))
    waiting = asyncio.ensure_future(response._wait())
    await asyncio.sleep(0)
    connection.data_received(chunk(body) + (b"0\r\n\r\n" if whole else b""))
    if held:
        response.hold()
    connection.connection_lost(None)
    assert b"".join(out) == body
    assert response.done is whole
    if whole:
        await waiting
    else:
        with pytest.raises(UpstreamError):
            await waiting
    assert not pool.only.idle


@settings(max_examples=60)
@given(
    st.lists(st.binary(min_size=1, max_size=9000), max_size=12),
    st.lists(st.integers(1, 40_000), max_size=30),
    st.lists(st.booleans(), max_size=40),
    st.booleans(),
)
def test_any_response_arrives_byte_for_byte(
    chunks: list[bytes], cuts: list[int], holds: list[bool], packed: bool
) -> None:
    """For any chunks and cuts, compressed or not, and however often its reader pauses."""

    async def scenario() -> None:
        pool = Pool()
        connection, _ = pool.open()
        response = connection.ask(10, 10)
        body = b"".join(chunks)
        coded = gzip.compress(body) if packed else body
        head = SSE.replace(b"Transfer", b"Content-Encoding: gzip\r\nTransfer") if packed else SSE
        step = max(1, len(coded) // 5)
        message = head + b"".join(chunk(coded[at : at + step]) for at in range(0, len(coded), step)) + b"0\r\n\r\n"
        out: list[bytes] = []
        waits = list(holds)
        held: list[None] = []

        def sink(data: bytes) -> None:
            out.append(data)
            if waits and waits.pop():
                response.hold()
                held.append(None)

        response._sink = sink
        for size in [*cuts, len(message)]:
            connection.data_received(message[:size])
            message = message[size:]
            if not message:
                break
            await asyncio.sleep(0)
        for _ in range(5000):
            if response.done:
                break
            await asyncio.sleep(0)
            if held:
                held.clear()
                response.release()
        assert b"".join(out) == body
        assert pool.only.idle == [connection]
        assert connection.is_clean()
        await pool.close()

    asyncio.run(scenario())


async def test_compressed_json_is_decompressed_before_anything_reads_it() -> None:
    """Even if it is short and delivered whole; its watch sees plain bytes, too."""
    pool = Pool()
    connection, _ = pool.open()
    body = json.dumps({"usage": {"total_tokens": 3}, "text": "x" * 50_000}).encode()
    packed = gzip.compress(body)
    response = connection.ask(10, 10)
    watched: list[bytes] = []
    response.watch = watched.append
    begun = asyncio.ensure_future(response.begun())
    await asyncio.sleep(0)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
    connection.data_received(head + b"Content-Length: %d\r\n\r\n" % len(packed) + packed)
    await asyncio.wait_for(begun, 5)
    assert response.whole == b"".join(watched) == body
    assert response.inflated
    assert max(map(len, watched)) <= STEP
    assert pool.only.idle == [connection]
    await pool.close()


async def test_a_bomb_of_json_is_refused_before_it_fills_the_memory() -> None:
    """Above a limit the response is an error, and the rest is never inflated."""
    pool = Pool()
    connection, _ = pool.open()
    packed = gzip.compress(bytes(200 * 1024 * 1024), 1)
    response = connection.ask(10, 10)
    begun = asyncio.ensure_future(response.begun())
    await asyncio.sleep(0)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
    connection.data_received(head + b"Content-Length: %d\r\n\r\n" % len(packed) + packed)
    with pytest.raises(UpstreamError, match="inflates"):
        await asyncio.wait_for(begun, 20)
    assert response._size <= _MAX_INFLATED + STEP
    assert not pool.only.idle


@pytest.mark.parametrize("ended", [False, True])
async def test_a_response_without_length_needs_a_clean_end(ended: bool) -> None:
    """Over TLS that is a closure alert (RFC 9112, 9.8): without one, an attacker may have cut the connection."""
    pool = Pool()
    connection, _ = pool.open()
    response = connection.ask(10, 10)
    connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{")
    if ended:
        connection.eof_received()
    connection.connection_lost(None)
    if ended:
        assert [piece async for piece in response] == [b"{"]
    else:
        with pytest.raises(UpstreamError):
            [piece async for piece in response]


@pytest.mark.parametrize("cut", [0, 3, 5000])
async def test_a_compressed_response_without_length_is_whole_only_if_its_coding_says_so(cut: int) -> None:
    """Such a body ends with the connection: if it is compressed, a cut is detected anyway."""
    pool = Pool()
    connection, _ = pool.open()
    response = connection.ask(10, 10)
    body = json.dumps([*range(5000)]).encode()
    packed = gzip.compress(body)
    connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n\r\n")
    connection.data_received(packed[: len(packed) - cut])
    connection.eof_received()
    connection.connection_lost(None)
    if cut:
        with pytest.raises(UpstreamError, match="ends too early"):
            [piece async for piece in response]
    else:
        assert b"".join([piece async for piece in response]) == body


async def test_nothing_more_is_inflated_once_a_response_is_aborted() -> None:
    """Its client has left: the received bytes, which would inflate to megabytes, are dropped with the connection."""
    pool = Pool()
    connection, _ = pool.open()
    response = connection.ask(10, 10)
    watched: list[bytes] = []
    response.watch = watched.append
    response._sink = lambda data: None
    packed = gzip.compress(bytes(10_000_000))
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: gzip\r\n\r\n"
    connection.data_received(head + packed)
    await turns_until(lambda: watched)
    seen = len(watched)
    response.abort()
    connection.connection_lost(None)
    assert len(watched) == seen


def test_other_content_passes_unchanged() -> None:
    """The gateway reads errors, JSON and events; a compressed download stays compressed, whatever its coding."""

    async def scenario(head: bytes) -> Any:
        pool = Pool()
        connection, _ = pool.open()
        response = connection.ask(10, 10)
        connection.data_received(b"HTTP/1.1 %b\r\nContent-Encoding: br\r\nContent-Length: 3\r\n\r\nabc" % head)
        await pool.close()
        if response._error is not None:
            raise response._error
        return response.whole

    assert asyncio.run(scenario(b"200 OK\r\nContent-Type: audio/mpeg")) == b"abc"
    for read in (b"200 OK\r\nContent-Type: application/json", b"500 No\r\nContent-Type: text/html"):
        with pytest.raises(UpstreamError, match="'br'"):
            asyncio.run(scenario(read))


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\nContent-Length: 0\n\n", b"HTTP/1.1 200 OK\r\nA: b\x00", b"HTTP/1.1 200\rX"]
)
async def test_a_head_that_can_never_be_one_is_refused_at_once(head: bytes) -> None:
    """Before the timeout; but half a line break at the end of a read is not refused."""
    pool = Pool()
    connection, _ = pool.open()
    response = connection.ask(600, 600)
    connection.data_received(b"HTTP/1.1 200 OK\r")
    assert response._error is None
    connection.abort()
    connection, _ = pool.open()
    response = connection.ask(600, 600)
    connection.data_received(head)
    assert isinstance(response._error, UpstreamError)


async def test_reading_is_never_paused_while_bytes_are_delivered() -> None:
    """If aiofastnet's TLS is paused while it delivers bytes, it keeps the rest until the socket has more to read.

    So a pause begins with the next turn; bytes that are still delivered wait in the backlog.
    """
    pool = Pool()
    connection, pipe = pool.open()
    response = connection.ask(10, 10)
    connection.data_received(SSE)
    out = fed(response)
    connection.data_received(chunk(EVENT * 1000))
    assert [pipe.reading] == [True]
    connection.data_received(chunk(EVENT))
    assert not out
    await asyncio.sleep(0)
    assert [pipe.reading] == [False]
    await turns_until(lambda: len(b"".join(out)) == 1001 * len(EVENT))
    assert not connection._reading_paused
    connection.abort()


async def test_a_pause_that_ends_before_it_begins_has_no_effect() -> None:
    """Hold and release within one turn leave the transport reading."""
    pool = Pool()
    connection, pipe = pool.open()
    connection.ask(10, 10)
    connection.data_received(SSE)
    connection.hold()
    connection.release()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert pipe.reading
    connection.abort()
