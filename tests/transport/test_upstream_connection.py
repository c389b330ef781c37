"""A connection to Azure without sockets: what is clean, whose turn it is, and what the last bytes may do."""

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


class Home(ConnectionPool):
    """The pool of connections, to one place."""

    def __init__(self) -> None:
        super().__init__()
        self.there = cast(Destination, SimpleNamespace(idle=[], retired=False))

    def connection(self) -> tuple[UpstreamConnection, Pipe]:
        loop = asyncio.get_running_loop()
        wire, pipe = UpstreamConnection(loop), Pipe()
        wire.connection_made(pipe)
        wire.attach(None, self, self.there, WriteBuffer(loop))
        return wire, pipe

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()


async def turns_until(condition: Callable[[], object], most: int = 20_000) -> int:
    """Count the turns of the loop until something is true."""
    for count in range(most):
        if condition():
            return count
        await asyncio.sleep(0)
    raise AssertionError("it never is")


async def test_a_connection_is_pooled_only_if_it_is_as_new() -> None:
    """Each way not to be: being read no more, waited for, told of bytes, half parsed, timed, closed or behind."""
    home = Home()

    def put(spoil: Callable[[UpstreamConnection, Pipe], object]) -> bool:
        wire, pipe = home.connection()
        spoil(wire, pipe)
        home.put(wire)
        return home.there.idle[-1:] == [wire]

    async def nothing() -> None: ...

    assert put(lambda wire, pipe: None)
    ways: list[Callable[[UpstreamConnection, Pipe], object]] = [
        lambda wire, _: wire.hold(),
        lambda wire, _: wire._pause_reading(),
        lambda wire, _: wire.ask(10, 10),
        lambda wire, _: wire._deadline.set(10, wire.abort),
        lambda wire, _: wire._backlog.append(b"x"),
        lambda wire, _: setattr(wire._head_reader, "unparsed", b"HTTP/1.1 2"),
        lambda wire, _: setattr(wire, "_relay", object()),
        lambda wire, _: setattr(wire, "_early_data", b"x"),
        lambda wire, _: setattr(wire, "_unsent", b"x"),
        lambda wire, _: wire.eof_received(),
        lambda wire, pipe: setattr(pipe, "closing", True),
        lambda wire, pipe: setattr(pipe, "get_write_buffer_size", lambda: 1),
    ]
    for number, spoil in enumerate(ways):
        assert not put(spoil), number
    await home.close()


@pytest.mark.parametrize("split", [None, 20, len(OK) - 1])
async def test_a_watch_that_fails_on_the_last_bytes_leaves_nobody_waiting(split: int | None) -> None:
    """The request is told, and the connection is not in the pool: neither before nor after."""
    home = Home()
    wire, pipe = home.connection()
    answer = wire.ask(10, 10)

    def watch(data: bytes) -> None:
        assert not home.there.idle
        if data.endswith(b"}"):
            raise ValueError("a bug")

    answer.watch = watch
    waiting = asyncio.ensure_future(answer.begun())
    await asyncio.sleep(0)
    wire.data_received(OK[:split] if split else OK)
    if split:
        wire.data_received(OK[split:])
    with pytest.raises(ValueError, match="a bug"):
        await asyncio.wait_for(waiting, 5)
    assert not home.there.idle
    assert pipe.is_closing()
    await home.close()


async def test_a_response_that_ends_while_its_reader_is_behind_leaves_the_connection_reading() -> None:
    """The sink asks for a pause on the very last bytes; the next request on the connection finds it reading."""
    home = Home()
    wire, pipe = home.connection()
    answer = wire.ask(10, 10)
    wire.data_received(SSE)
    pumped = asyncio.ensure_future(answer.pump(lambda data: answer.hold()))
    await asyncio.sleep(0)
    wire.data_received(chunk(EVENT) + b"0\r\n\r\n")
    await asyncio.wait_for(pumped, 5)
    assert home.there.idle == [wire]
    assert wire.is_clean()
    assert pipe.reading
    await home.close()


def fed(answer: UpstreamResponse) -> list[bytes]:
    """Pump an answer into a list."""
    out: list[bytes] = []
    answer._sink = out.append
    return out


@pytest.mark.parametrize("event", [EVENT, b":\n\n", b"\n", b"\r\r", b"data: " + b"x" * 3000 + b"\n\n"])
async def test_a_large_read_is_handled_in_bounded_steps(event: bytes) -> None:
    """So many bytes and ends of lines at most, in one step a turn, and reading pauses until it is done."""
    home = Home()
    wire, pipe = home.connection()
    answer = wire.ask(10, 10)
    wire.data_received(SSE)
    out = fed(answer)
    count = 250_000 // len(event)
    body = event * count
    wire.data_received(chunk(body))
    assert wire._reading_paused
    seen = 0
    while b"".join(out) != body:
        await asyncio.sleep(0)
        now = out[seen:]
        seen = len(out)
        assert len(now) <= 1
        assert all(len(each) <= STEP for each in now)
        assert all(each.count(b"\n") + each.count(b"\r") <= MOST_LINES for each in now)
    wire.data_received(b"0\r\n\r\n")
    await turns_until(lambda: answer.done)
    assert pipe.reading
    assert home.there.idle == [wire]
    await home.close()


@pytest.mark.parametrize("event", [b":\n\n", b"\n", b"\r\r"])
async def test_a_read_of_thousands_of_lines_is_handled_in_steps(event: bytes) -> None:
    """Also one that is small enough to be handled at once: filters look at each event."""
    home = Home()
    wire, pipe = home.connection()
    answer = wire.ask(10, 10)
    wire.data_received(SSE)
    out = fed(answer)
    wire.data_received(chunk(event * (STEP * 3 // 4 // len(event))))
    assert not out
    assert wire._reading_paused
    await turns_until(lambda: not wire._reading_paused)
    assert pipe.reading
    assert max(each.count(b"\n") + each.count(b"\r") for each in out) <= MOST_LINES
    wire.abort()


async def test_events_of_known_length_are_handled_in_steps() -> None:
    """A megabyte of events is not handed over whole: the filters would look at all of them in one turn."""
    home = Home()
    wire, _ = home.connection()
    answer = wire.ask(10, 10)
    body = EVENT * 5000
    wire.data_received(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(body))
    out = fed(answer)
    wire.data_received(body)
    await turns_until(lambda: answer.done)
    assert b"".join(out) == body
    assert max(map(len, out)) <= STEP
    assert home.there.idle == [wire]
    await home.close()


async def test_small_reads_are_handled_at_once() -> None:
    """An event of a stream waits for no turn."""
    home = Home()
    wire, _ = home.connection()
    answer = wire.ask(10, 10)
    wire.data_received(SSE)
    out = fed(answer)
    wire.data_received(chunk(EVENT))
    assert out == [EVENT]
    wire.abort()


async def test_no_step_is_taken_while_the_reader_wants_no_more() -> None:
    """Backpressure comes first; afterwards it goes on where it was, before anything newer."""
    home = Home()
    wire, _ = home.connection()
    answer = wire.ask(10, 10)
    wire.data_received(SSE)
    out: list[bytes] = []

    def sink(data: bytes) -> None:
        out.append(data)
        if len(out) == 1:
            answer.hold()

    answer._sink = sink
    body = b"".join(b"data: %d\n\n" % number for number in range(20_000))
    wire.data_received(chunk(body))
    wire.data_received(b"0\r\n\r\n")  # from a transport that had read it already
    await turns_until(lambda: out)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(out) == 1
    assert wire._reading_paused
    answer.release()
    await turns_until(lambda: answer.done)
    assert b"".join(out) == body
    assert home.there.idle == [wire]
    assert wire.is_clean()
    await home.close()


async def test_a_hold_between_two_steps_stops_the_next_one() -> None:
    """A client that falls behind while its response waits for its turn is given nothing more."""
    home = Home()
    wire, _ = home.connection()
    answer = wire.ask(10, 10)
    wire.data_received(SSE)
    out = fed(answer)
    body = EVENT * 2000
    wire.data_received(chunk(body) + b"0\r\n\r\n")
    await turns_until(lambda: out)
    answer.hold()
    seen = len(out)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(out) == seen
    assert wire._reading_paused
    answer.release()
    await turns_until(lambda: answer.done)
    assert b"".join(out) == body
    await home.close()


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("whole", [False, True])
async def test_what_came_before_the_connection_was_lost_is_handed_on(held: bool, whole: bool) -> None:
    """Also what no step had handled yet; the answer is whole only if its end had come."""
    home = Home()
    wire, _ = home.connection()
    answer = wire.ask(10, 10)
    wire.data_received(SSE)
    out = fed(answer)
    body = b"".join(b"data: %d\n\n" % number for number in range(20_000))
    waiting = asyncio.ensure_future(answer._wait())
    await asyncio.sleep(0)
    wire.data_received(chunk(body) + (b"0\r\n\r\n" if whole else b""))
    if held:
        answer.hold()
    wire.connection_lost(None)
    assert b"".join(out) == body
    assert answer.done is whole
    if whole:
        await waiting
    else:
        with pytest.raises(UpstreamError):
            await waiting
    assert not home.there.idle


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
    """However it is chunked and cut, compressed or not, and however often its reader asks for a pause."""

    async def scenario() -> None:
        home = Home()
        wire, _ = home.connection()
        answer = wire.ask(10, 10)
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
                answer.hold()
                held.append(None)

        answer._sink = sink
        for size in [*cuts, len(message)]:
            wire.data_received(message[:size])
            message = message[size:]
            if not message:
                break
            await asyncio.sleep(0)
        for _ in range(5000):
            if answer.done:
                break
            await asyncio.sleep(0)
            if held:
                held.clear()
                answer.release()
        assert b"".join(out) == body
        assert home.there.idle == [wire]
        assert wire.is_clean()
        await home.close()

    asyncio.run(scenario())


async def test_compressed_json_is_plain_before_anything_reads_it() -> None:
    """Also where it is short and handed over whole; its watch sees plain bytes, too."""
    home = Home()
    wire, _ = home.connection()
    body = json.dumps({"usage": {"total_tokens": 3}, "text": "x" * 50_000}).encode()
    packed = gzip.compress(body)
    answer = wire.ask(10, 10)
    watched: list[bytes] = []
    answer.watch = watched.append
    begun = asyncio.ensure_future(answer.begun())
    await asyncio.sleep(0)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
    wire.data_received(head + b"Content-Length: %d\r\n\r\n" % len(packed) + packed)
    await asyncio.wait_for(begun, 5)
    assert answer.whole == b"".join(watched) == body
    assert answer.inflated
    assert max(map(len, watched)) <= STEP
    assert home.there.idle == [wire]
    await home.close()


async def test_a_bomb_of_json_is_refused_before_it_fills_the_memory() -> None:
    """Above a bound the answer is an error, and the rest is never inflated."""
    home = Home()
    wire, _ = home.connection()
    packed = gzip.compress(bytes(200 * 1024 * 1024), 1)
    answer = wire.ask(10, 10)
    begun = asyncio.ensure_future(answer.begun())
    await asyncio.sleep(0)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
    wire.data_received(head + b"Content-Length: %d\r\n\r\n" % len(packed) + packed)
    with pytest.raises(UpstreamError, match="inflates"):
        await asyncio.wait_for(begun, 20)
    assert answer._size <= _MAX_INFLATED + STEP
    assert not home.there.idle


@pytest.mark.parametrize("ended", [False, True])
async def test_a_response_without_length_needs_a_clean_end(ended: bool) -> None:
    """Over TLS that is a closure alert (RFC 9112, 9.8): what only breaks off may have been cut by anybody."""
    home = Home()
    wire, _ = home.connection()
    answer = wire.ask(10, 10)
    wire.data_received(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{")
    if ended:
        wire.eof_received()
    wire.connection_lost(None)
    if ended:
        assert [piece async for piece in answer] == [b"{"]
    else:
        with pytest.raises(UpstreamError):
            [piece async for piece in answer]


@pytest.mark.parametrize("cut", [0, 3, 5000])
async def test_a_compressed_response_without_length_is_whole_only_if_its_coding_says_so(cut: int) -> None:
    """The end of the connection is the end of such a body: where it is compressed, a cut is seen all the same."""
    home = Home()
    wire, _ = home.connection()
    answer = wire.ask(10, 10)
    body = json.dumps([*range(5000)]).encode()
    packed = gzip.compress(body)
    wire.data_received(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n\r\n")
    wire.data_received(packed[: len(packed) - cut])
    wire.eof_received()
    wire.connection_lost(None)
    if cut:
        with pytest.raises(UpstreamError, match="ends too early"):
            [piece async for piece in answer]
    else:
        assert b"".join([piece async for piece in answer]) == body


async def test_nothing_more_is_inflated_once_a_response_is_aborted() -> None:
    """Its client has left: what had come, and stands for megabytes, is dropped with its connection."""
    home = Home()
    wire, _ = home.connection()
    answer = wire.ask(10, 10)
    watched: list[bytes] = []
    answer.watch = watched.append
    answer._sink = lambda data: None
    packed = gzip.compress(bytes(10_000_000))
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: gzip\r\n\r\n"
    wire.data_received(head + packed)
    await turns_until(lambda: watched)
    seen = len(watched)
    answer.abort()
    wire.connection_lost(None)
    assert len(watched) == seen


def test_other_content_passes_as_it_came() -> None:
    """The gateway reads errors, JSON and events; a download that is compressed stays so, whatever its coding."""

    async def scenario(head: bytes) -> Any:
        home = Home()
        wire, _ = home.connection()
        answer = wire.ask(10, 10)
        wire.data_received(b"HTTP/1.1 %b\r\nContent-Encoding: br\r\nContent-Length: 3\r\n\r\nabc" % head)
        await home.close()
        if answer._error is not None:
            raise answer._error
        return answer.whole

    assert asyncio.run(scenario(b"200 OK\r\nContent-Type: audio/mpeg")) == b"abc"
    for read in (b"200 OK\r\nContent-Type: application/json", b"500 No\r\nContent-Type: text/html"):
        with pytest.raises(UpstreamError, match="'br'"):
            asyncio.run(scenario(read))


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\nContent-Length: 0\n\n", b"HTTP/1.1 200 OK\r\nA: b\x00", b"HTTP/1.1 200\rX"]
)
async def test_a_head_that_can_never_be_one_is_refused_at_once(head: bytes) -> None:
    """Not after the time that Azure has to answer; a line break that is cut in two is none of that."""
    home = Home()
    wire, _ = home.connection()
    answer = wire.ask(600, 600)
    wire.data_received(b"HTTP/1.1 200 OK\r")
    assert answer._error is None
    wire.abort()
    wire, _ = home.connection()
    answer = wire.ask(600, 600)
    wire.data_received(head)
    assert isinstance(answer._error, UpstreamError)


async def test_reading_is_never_paused_while_bytes_are_handed_on() -> None:
    """Aiofastnet's TLS keeps what it has read and not handed on, if it is paused meanwhile, until more comes.

    So a pause begins with the next turn; what is still handed on waits in the backlog.
    """
    home = Home()
    wire, pipe = home.connection()
    answer = wire.ask(10, 10)
    wire.data_received(SSE)
    out = fed(answer)
    wire.data_received(chunk(EVENT * 1000))
    assert [pipe.reading] == [True]
    wire.data_received(chunk(EVENT))
    assert not out
    await asyncio.sleep(0)
    assert [pipe.reading] == [False]
    await turns_until(lambda: len(b"".join(out)) == 1001 * len(EVENT))
    assert not wire._reading_paused
    wire.abort()


async def test_a_pause_that_is_over_before_it_begins_is_none() -> None:
    """Hold and release within one turn leave the transport as it is."""
    home = Home()
    wire, pipe = home.connection()
    wire.ask(10, 10)
    wire.data_received(SSE)
    wire.hold()
    wire.release()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert pipe.reading
    wire.abort()
