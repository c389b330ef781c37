"""The states of a client's connection: each row of the table in `ClientConnection`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import pytest

from gateway.settings import Limits, Timeouts
from gateway.transport import client_connection
from gateway.transport.client_connection import ClientConnection, ConnectionState, IncomingRequest
from gateway.transport.connection_limit import PROBE_CONNECTIONS
from gateway.transport.write_buffer import WriteBuffer
from tests.conftest import until
from tests.test_costs import Pipe, settle

if TYPE_CHECKING:
    from aiohttp.web_server import Server

State = ConnectionState
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


class SocketPipe(Pipe):
    """A transport that can close its sending side."""

    ended = False

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True


class Client:
    """A connection whose handler returns when a test says so."""

    def __init__(self, timeouts: Timeouts | None = None, excess: int = 0) -> None:
        self.excess_connections = excess
        self.done = asyncio.Event()
        self.keep_alive = True
        self.on_request: Callable[[ClientConnection], None] = lambda connection: None
        self.requests = 0
        loop = asyncio.get_running_loop()
        self.pipe = SocketPipe()
        self.connection = ClientConnection(
            cast("Server", self), self._handle, loop, Limits(), timeouts or Timeouts(), WriteBuffer(loop)
        )
        self.connection.connection_made(self.pipe)

    def connection_made(self, *_: object) -> None: ...

    def connection_lost(self, *_: object) -> None: ...

    def excess(self, _: int) -> int:
        return self.excess_connections

    async def _handle(self, incoming: IncomingRequest) -> bool:
        self.requests += 1
        self.on_request(incoming.connection)
        await self.done.wait()
        return self.keep_alive

    @property
    def state(self) -> ConnectionState:
        return self.connection._state

    async def send(self, data: bytes) -> ConnectionState:
        """Send bytes; returns the state after them."""
        self.connection.data_received(data)
        await settle()
        return self.state

    async def end(self, *, keep_alive: bool = True) -> ConnectionState:
        """End the current request; returns the state after it."""
        self.keep_alive = keep_alive
        self.done.set()
        await settle()
        return self.state


async def test_a_kept_connection_goes_round() -> None:
    """From the first head to the second; pipelined bytes wait for the end of the current request."""
    client = Client()
    assert client.state is State.READING_HEAD
    assert await client.send(HEAD[:10]) is State.READING_HEAD
    assert await client.send(HEAD[10:] + b"body") is State.RUNNING
    assert await client.send(HEAD[:10]) is State.RUNNING
    assert await client.end() is State.READING_HEAD
    client.done.clear()
    assert await client.send(HEAD[10:] + b"body") is State.RUNNING
    assert await client.end() is State.IDLE
    assert await client.send(b"P") is State.READING_HEAD
    assert client.requests == 2
    client.connection.connection_lost(None)
    assert client.connection._state is State.CLOSED


async def test_timeouts_close() -> None:
    """An idle connection closes at once; a client that has begun a head gets a 408 and a lingering close."""
    client = Client(Timeouts(head=0.01, keep_alive=0.01))
    await until(lambda: client.state is State.LINGERING_CLOSE)
    assert client.pipe.written[-1].startswith(b"HTTP/1.1 408 ")
    client = Client(Timeouts(keep_alive=0.01))
    client.done.set()
    client.connection.data_received(HEAD + b"body")
    await until(lambda: client.state is State.CLOSED)
    assert client.pipe.closing
    assert not any(b"408" in written for written in client.pipe.written)


async def test_a_rejected_head_lingers_until_too_many_bytes_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or until the time is over: the response must not be destroyed by a reset."""
    monkeypatch.setattr(client_connection, "_LINGERING_CLOSE_BYTES", 100)
    client = Client()
    assert await client.send(b"no request\r\n\r\n") is State.LINGERING_CLOSE
    assert (client.pipe.ended, client.pipe.closing) == (True, False)
    assert await client.send(b"x" * 100) is State.LINGERING_CLOSE
    assert await client.send(b"x") is State.CLOSED
    assert client.pipe.closing
    monkeypatch.setattr(client_connection, "_LINGERING_CLOSE_TIMEOUT", 0.01)
    client = Client()
    client.connection.data_received(b"no request\r\n\r\n")
    await until(lambda: client.state is State.CLOSED)


async def test_a_response_that_ends_the_connection_closes_it() -> None:
    """At once, if the whole request has arrived; a lingering close would only wait."""
    client = Client()
    await client.send(HEAD + b"body")
    assert await client.end(keep_alive=False) is State.CLOSED
    assert client.pipe.closing


async def test_the_rest_of_a_body_is_discarded_or_lingered_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short rest of known length is discarded and the next request follows; a chunked one ends the connection."""
    client = Client()
    await client.send(HEAD + b"bo")
    assert await client.end() is State.DISCARDING_BODY
    assert await client.send(b"d") is State.DISCARDING_BODY
    assert await client.send(b"y") is State.IDLE
    client.done.clear()
    assert await client.send(CHUNKED) is State.RUNNING
    assert await client.end() is State.LINGERING_CLOSE
    monkeypatch.setattr(client_connection, "_LINGERING_CLOSE_TIMEOUT", 0.01)
    client = Client()
    await client.send(HEAD + b"bo")
    await client.end()
    await until(lambda: client.state is State.CLOSED)


async def test_a_malformed_body_is_the_connection_s_last() -> None:
    """Bytes after it have no known meaning: they are discarded, and the connection lingers after the response."""
    client = Client()
    await client.send(CHUNKED)
    assert await client.send(b"no chunk\r\n" + HEAD) is State.MUST_CLOSE
    assert await client.send(HEAD + b"body") is State.MUST_CLOSE
    assert client.connection.closes_after_response()
    assert await client.end() is State.LINGERING_CLOSE
    assert client.requests == 1


async def test_a_websocket_takes_all_input_until_it_ends() -> None:
    """Also the bytes that were pipelined after its request."""
    taken: list[bytes] = []
    client = Client()
    client.on_request = lambda connection: connection.start_relay(taken.append, lambda paused: None)
    assert await client.send(HEAD + b"body" + b"frame 1") is State.UPGRADED
    assert await client.send(b"frame 2") is State.UPGRADED
    assert taken == [b"frame 1", b"frame 2"]
    client.connection.stop_relay()
    assert await client.send(b"frame 3") is State.MUST_CLOSE
    assert taken == [b"frame 1", b"frame 2"]
    assert await client.end(keep_alive=False) is State.LINGERING_CLOSE


async def test_the_connection_limit_leaves_room_for_probes() -> None:
    """A connection above the limit serves probes; one far above it is closed at once. Both get a 503 otherwise."""
    client = Client(excess=1)
    assert client.state is State.READING_HEAD
    assert await client.send(HEAD + b"body") is State.CLOSED
    far = Client(excess=PROBE_CONNECTIONS + 1)
    assert far.state is State.CLOSED
    for each in (client, far):
        response = b"".join(each.pipe.written)
        assert response.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 1\r\n" in response
    probe = Client(excess=1)
    assert await probe.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n") is State.RUNNING
    assert probe.connection.closes_after_response()


async def test_a_forced_close_is_final() -> None:
    """The request's task may still run; nothing that happens in it opens the connection again."""
    client = Client()
    await client.send(CHUNKED)
    client.connection.force_close()
    assert client.state is State.CLOSED
    client.connection.stop_relay()
    assert client.state is State.CLOSED
    assert await client.end() is State.CLOSED
    client.connection.connection_lost(None)
    assert client.state is State.CLOSED
