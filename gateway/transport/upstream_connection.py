"""One connection to Azure: what is asked on it, the answer as it comes, and whether it may be used again.

It may if the answer ended exactly where its bytes ended, neither side wants it closed, and it is clean
(`UpstreamConnection.is_clean`): the next request then finds it as if it were new. On any byte that arrives while
nothing was asked it is closed: such bytes would be the next caller's answer.

An answer of known and moderate length is handed over whole: a break then becomes a clean 502, and the
connection is free again sooner. Of a longer one, or a stream, the pieces are either asked for one by one, or
handed to a sink (`UpstreamResponse.pump`) the moment they arrive, with no task between: that is the way of every stream
that the server writes.

A large read is not handled at once: reading pauses, the bytes wait in a backlog, and the fair scheduler has them
handled in bounded steps, between those of other connections. Backpressure comes first: while the reader of a
response wants no more, no step is taken.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, Self

from aiohttp.base_protocol import BaseProtocol

from gateway.body.request_body import Body
from gateway.errors import GatewayError, UpstreamError, UpstreamTimeout
from gateway.fair_scheduler import MOST_UNITS, SMALL, STEP, FairScheduler
from gateway.protocol.content_coding import BadCoding, Inflater, UnknownCoding
from gateway.protocol.http1 import (
    HEAD_END,
    MAX_HEAD,
    ChunkedDecoder,
    MalformedMessage,
    ResponseHead,
    is_never_head,
    parse_response,
)
from gateway.transport.deadline import Deadline

if TYPE_CHECKING:
    import aiohttp

    from gateway.protocol.headers import Field
    from gateway.transport.write_buffer import WriteBuffer

__all__ = ("IdlePool", "UpstreamConnection", "UpstreamResponse")

# An answer of known length up to this size is handed over whole.
_WHOLE = 1024 * 1024
# What may wait to be read before Azure is asked to wait.
_WAITING = 64 * 1024
# Above this size, a head and a body are not joined to be written.
_JOINED = 16 * 1024
_MAX_INTERIM = 16
# The most ends of lines that one step handles: an event has at least two, and a chunk's framing four.
_MOST_LINES = 4 * MOST_UNITS
# The most that a read of several KB may have to be handled at once: some 160 events in chunks of their own.
_LINES_AT_ONCE = 4 * _MOST_LINES
_READ = re.compile(rb"json|event-stream", re.IGNORECASE)
_EVENTS = re.compile(rb"event-stream", re.IGNORECASE)
# A compressed response that is handed over whole may have this many bytes.
_MOST_INFLATED = 16 * 1024 * 1024
# A step is cut down to no fewer bytes.
_LEAST_STEP = 256


class IdlePool(Protocol):
    """Where a connection goes when its answer has ended: the connector."""

    def put(self, wire: UpstreamConnection) -> None:
        """Keep a connection that may be used again."""


class WebSocketSink(Protocol):
    """Takes the bytes of a connection that has become a WebSocket: its relay."""

    @property
    def azure_held(self) -> bool:
        """Whether nothing more is to be read for now."""

    def from_azure(self, data: bytes) -> None:
        """Take bytes."""

    def azure_lost(self) -> None:
        """Note that the connection is closed."""

    def azure_flow(self, paused: bool) -> None:
        """Note whether writing is paused."""


class UpstreamResponse:
    """One answer of Azure. Its head is there after `await begun()`; its body is iterated over or pumped.

    `whole` is the body where it is short and of known length. The request's exchange owns an answer, and so
    its connection, until it has ended.
    """

    # An answer is made for each request, and most of these are never set: defaults of the class cost nothing.
    status = 0
    fields: list[Field] = []  # noqa: RUF012 -- replaced, never changed
    whole: bytes | None = None
    done = False
    close = False
    upload: asyncio.Task[None] | None = None
    upgrade = False  # a WebSocket was asked for
    watch: Callable[[bytes], None] | None = None  # sees the body's bytes as they come
    inflated = False  # its body was compressed, and is plain here
    _chunks: ChunkedDecoder | None = None
    _inflater: Inflater | None = None
    _ended = False  # all of a compressed body has come,
    _extra = b""  # and this follows it
    _left = 0  # bytes still to come, where that is known; -1 for all until the connection closes
    _size = 0  # of the parts
    _held = False
    _error: Exception | None = None
    _sink: Callable[[bytes], None] | None = None
    _waiter: asyncio.Future[None] | None = None

    def __init__(self, wire: UpstreamConnection) -> None:
        self._wire: UpstreamConnection | None = wire
        self._parts: list[bytes] = []

    async def begun(self) -> None:
        """Wait for the head, and for the body where it is handed over whole. Raises UpstreamError."""
        await self._wait()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        wire = self._wire
        assert wire is not None, "an answer that has ended is waited for"  # noqa: S101 -- a bug of ours
        self._waiter = wire.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    # -- the wire's side -------------------------------------------------------------------------------

    def begin(self, head: ResponseHead) -> None:
        """Take the head. Raises BadCoding if the body is compressed in an unknown way."""
        self.status, self.fields, length, chunked, self.close, coding = head
        if chunked:
            self._chunks = ChunkedDecoder()
        elif length is None:
            self._left = -1
        else:
            self._left = length
            # (Filters look at each event: a stream of many is handled in steps, also where its length is known.)
            if length <= SMALL or (length <= _WHOLE and not any(map(_EVENTS.search, self._kinds()))):
                self.whole = b""
        if coding and length != 0 and self._is_read():
            self._inflater, self.inflated = Inflater(coding), True
        if self.whole is None:
            self._wake()

    def _is_read(self) -> bool:
        """Whether the gateway reads what is in the body: errors, JSON and events; other content passes as it is."""
        return self.status >= 400 or any(map(_READ.search, self._kinds()))

    def _kinds(self) -> list[bytes]:
        return [value for name, value, _, _ in self.fields if name == b"content-type"]

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the body; returns what follows its end. Raises Malformed."""
        extra = b""
        done = False
        if self._chunks is not None:
            # (Steps bound the lines already; there are fewer of them than bytes, so none is left unread.)
            data = self._chunks.feed(data, len(data))
            done, extra = self._chunks.done, self._chunks.extra
        elif self._left >= 0:
            left = self._left
            if len(data) > left:
                data, extra = data[:left], data[left:]
            self._left = left - len(data)
            done = not self._left
        if self._inflater is not None:
            self._inflater.feed(data)
            self._ended, self._extra = done, extra
            return self.inflate()
        if self._sink is None:
            self._hand_on(data, done)
            return extra
        # Nearly every piece of a stream: as `_hand_on`, without the call.
        if data:
            if self.watch is not None:
                self.watch(data)
            self._sink(data)  # may raise: then it is not done, and whoever waits is told
        self.done = done
        return extra

    @property
    def pending(self) -> bool:
        """Whether bytes that have come wait to be inflated; nobody waits for those of one that was aborted."""
        return self._inflater is not None and self._inflater.pending and self._wire is not None

    def inflate(self) -> bytes:
        """Hand on a bounded piece of a compressed body; returns what follows its end. Raises BadCoding."""
        inflater = self._inflater
        assert inflater is not None, "the body is not compressed"  # noqa: S101 -- a bug of ours
        data = inflater.read(STEP)
        ended = self._ended and not inflater.pending
        if ended:
            inflater.check_end()
        elif self.whole is not None and self._size > _MOST_INFLATED:
            raise BadCoding(f"the response inflates to more than {_MOST_INFLATED} bytes")
        self._hand_on(data, ended)
        return self._extra

    def _hand_on(self, data: bytes, done: bool) -> None:
        if self.watch is not None and data:
            self.watch(data)
        if self._sink is not None:
            if data:
                self._sink(data)  # may raise: then it is not done, and whoever waits is told
        elif data:
            self._parts.append(data)
            self._size += len(data)
            if self.whole is None:
                self._wake()
                if self._size > _WAITING and not done:
                    self.hold()
        self.done = done

    def end_with_connection(self) -> None:
        """Note that a body without length has ended, unless what it is compressed with says that more should come."""
        if self._inflater is not None:
            try:
                self._inflater.check_end()
            except BadCoding as exc:
                self.fail(_explained(exc))
                return
        self.end()

    def end(self, whole: bytes | None = None) -> None:
        """Note that it has ended well, and let go of its connection; `whole` is a body that is handed over so."""
        self.done = True
        self.whole = whole
        self._wire = None
        self._sink = None
        self._wake()

    def fail(self, error: Exception) -> None:
        """Note that it does not go on, and let go of its connection."""
        self._wire = None
        self._sink = None
        if self._error is None and not self.done:
            self._error = error
            waiter = self._waiter
            if waiter is not None and not waiter.done():
                waiter.set_exception(error)

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    @property
    def switching(self) -> bool:
        """Whether its connection becomes a WebSocket."""
        return self.status == 101

    @property
    def uploading(self) -> bool:
        """Whether the request's body is still on its way."""
        return self.upload is not None and not self.upload.done()

    def switched(self) -> UpstreamConnection:
        """Hand over the connection, which has become a WebSocket."""
        wire, self._wire = self._wire, None
        assert wire is not None, "a connection is handed over twice"  # noqa: S101 -- a bug of ours
        return wire

    # -- the reader's side -----------------------------------------------------------------------------

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while not self._parts:
            if self.done:
                raise StopAsyncIteration
            await self._wait()
        return self._take()

    def _take(self) -> bytes:
        parts = self._parts
        self._parts, self._size = [], 0
        if self._held:
            self.release()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def peeked(self) -> bytes:
        """Return what has come of the body and was not taken yet; it stays."""
        if len(self._parts) > 1:
            self._parts = [b"".join(self._parts)]
        return self._parts[0] if self._parts else b""

    async def grow(self) -> bool:
        """Wait for more of the body; False at its end, or where no more is kept unread. Raises UpstreamError."""
        if self.done or self._held:
            return False
        await self._wait()
        return True

    async def pump(self, sink: Callable[[bytes], None]) -> None:
        """Hand every piece of the body to `sink` as it arrives; returns at the clean end.

        Raises UpstreamError where Azure breaks off, and what `sink` raises.
        """
        if self._parts:
            sink(self._take())
        if self.done:
            return
        self._sink = sink
        await self._wait()

    def hold(self) -> None:
        """Take nothing more from Azure for now."""
        if not self._held and self._wire is not None:
            self._held = True
            self._wire.hold()

    def release(self) -> None:
        """Go on taking."""
        if self._held:
            self._held = False
            if self._wire is not None:
                self._wire.release()

    def abort(self) -> None:
        """Close the connection at once, if it is still this answer's."""
        if self.upload is not None:
            self.upload.cancel()
        wire, self._wire = self._wire, None
        self._sink = None
        if wire is not None:
            wire.abort()
        if self._error is not None:
            # Its frames hold this answer: a cycle, which would keep the request until the collector finds it.
            self._error.with_traceback(None)

    async def aclose(self) -> None:
        """Close, as iterating asks of what it iterates over."""
        self.abort()


class UpstreamConnection(BaseProtocol):
    """The protocol of one connection to Azure."""

    __slots__ = (
        "_answer",
        "_backlog",
        "_buffer",
        "_deadline",
        "_early",
        "_ended",
        "_first_byte",
        "_held",
        "_home",
        "_idle",
        "_interim",
        "_outbox",
        "_reading_paused",
        "_relay",
        "_scheduler",
        "_transport_paused",
        "_unsent",
        "closed",
        "connection",
        "destination",
        "idle_since",
        "loop",
        "lost",
        "received",
        "used",
    )

    should_close = False  # aiohttp's connector asks

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.loop = loop
        self.connection: aiohttp.connector.Connection | None = None
        self.destination: object = None
        self.used = False  # an answer has ended on it
        self.received = False  # something came since it was last asked
        self.lost = False  # it was closed on
        self.idle_since = 0.0
        self.closed: asyncio.Future[None] | None = None  # aiohttp's connector asks
        self._home: IdlePool | None = None
        self._outbox: WriteBuffer | None = None
        self._unsent = b""
        self._relay: WebSocketSink | None = None
        self._early: bytes | None = None  # what came behind a 101, until the relay takes it
        self._answer: UpstreamResponse | None = None
        self._buffer = b""  # a head that has not ended
        self._backlog: list[bytes] = []  # received bytes of a body that no step has handled yet
        self._held = False  # the response's reader wants no more for now
        self._reading_paused = False  # what comes waits, and soon nothing more comes
        self._transport_paused = False
        self._ended = False  # the other end has said that it sends no more
        self._scheduler = FairScheduler.of(loop)
        self._interim = 0
        self._first_byte = self._idle = 0.0
        self._deadline = Deadline(loop)

    def settle(
        self, connection: aiohttp.connector.Connection | None, home: IdlePool, destination: object, outbox: WriteBuffer
    ) -> None:
        """Tell a new connection where it belongs; `connection` is aiohttp's own idea of it, if it made it."""
        self.connection, self._home, self.destination, self._outbox = connection, home, destination, outbox

    # -- asking ----------------------------------------------------------------------------------------

    def ask(self, first_byte: float, idle: float) -> UpstreamResponse:
        """Get ready for one answer: `first_byte` seconds to its head, `idle` seconds from piece to piece."""
        self.received = False
        self._interim = 0
        self._first_byte, self._idle = first_byte, idle
        self._expire_in(first_byte)
        self._answer = answer = UpstreamResponse(self)
        return answer

    def expect(self, first_byte: float) -> None:
        """Have so many seconds to the head from now on; the request has been sent."""
        if self._answer is not None and not self._answer.status:
            self._first_byte = first_byte
            self._expire_in(first_byte)

    def send(self, head: bytes, body: bytes) -> None:
        """Write a request whose body is at hand."""
        if len(body) <= _JOINED and self._outbox is not None:
            self._unsent = head + body
            self._outbox.add(self)
        elif self.transport is not None:  # else connection_lost() has told the answer
            self.transport.writelines((head, body))

    def flush(self) -> None:
        """Write what `send` left for the end of the loop's turn."""
        unsent, self._unsent = self._unsent, b""
        if self.is_connected() and self._answer is not None:
            self.transport.write(unsent)  # type: ignore[union-attr] # it is connected

    async def send_stream(self, head: bytes, body: Body, patience: float) -> None:
        """Write a request's body as it comes from the client, in chunks where its length is not known.

        Raises ApiError where the client fails, UpstreamTimeout where Azure takes nothing for `patience` seconds.
        """
        told = body.length
        chunked = told is None
        sent = 0
        self._write(head)
        async for chunk in body.stream():
            if not chunk:
                continue  # as a chunk it would be the last one (RFC 9112, 7.1)
            sent += len(chunk)
            self._write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunked else chunk)
            if self._paused:
                try:
                    async with asyncio.timeout(patience):
                        await self._drain_helper()
                except TimeoutError:
                    raise UpstreamTimeout(
                        f"Azure took no more of the request for {patience:g} s", fault="stalled"
                    ) from None
        if chunked:
            self._write(b"0\r\n\r\n")
        elif sent != told:
            raise GatewayError(f"a body of {told} bytes was sent as {sent}")

    def _write(self, data: bytes) -> None:
        # Where the connection is lost, the answer has been told, and its exchange ends the upload.
        if self.transport is not None:
            self.transport.write(data)

    # -- what arrives ----------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        answer = self._answer
        if answer is None:
            if self._relay is not None:
                self._relay.from_azure(data)
                return
            if self._early is not None:
                self._early += data
                return
            # Nobody asked for these bytes, and the next caller must not get them.
            self.abort()
            return
        self.received = True
        if self._reading_paused:
            self._backlog.append(data)  # some transports still deliver what they had read before the pause
            return
        try:
            if not answer.status:
                rest = self._take_head(answer, data)
                if rest is None:
                    return
                data = rest
                if answer.switching:
                    self._switch(answer, data)
                    return
                if answer.whole is not None and len(data) == answer._left and not answer.inflated:
                    # Nearly every plain answer: it came in one piece, head and all.
                    if answer.watch is not None:
                        answer.watch(data)
                    self._end(answer, b"")
                    answer.end(data)
                    return
            if len(data) > SMALL and answer.whole is None:
                few = data.count(b"\n") + data.count(b"\r") <= _LINES_AT_ONCE
                if not (self._scheduler.may_handle(len(data)) and few):
                    self._put_off(data)
                    return
            extra = answer.feed(data)
        except Exception as exc:
            self._give_up(_explained(exc))
            return
        if answer.done or answer.inflated:
            self._fed(answer, extra)
        elif not self._held:
            self._expire_in(self._idle)

    def _fed(self, answer: UpstreamResponse, extra: bytes) -> None:
        """Go on after some of the body: `extra` follows its end."""
        if answer.done:
            self._end(answer, extra)
            answer.end(b"".join(answer._parts) if answer.whole is not None else None)
        elif not self._held:
            self._expire_in(self._idle)
            if answer.pending:
                self._pause_reading()
                self._scheduler.add(self)

    # -- large reads -----------------------------------------------------------------------------------

    def _put_off(self, data: bytes) -> None:
        """Keep a large read, read no more, and handle it in steps."""
        self._backlog.append(data)
        self._pause_reading()
        if not self._held:
            self._expire_in(self._idle)
            self._scheduler.add(self)

    def step(self) -> bool:
        """Handle a bounded piece of the backlog; return whether there is more, and the reader wants it."""
        self._handle_piece()
        if self._more:
            return not self._held
        if not self._held:
            self._resume_reading()
        return False

    @property
    def _more(self) -> bool:
        """Whether bytes that have come wait for a step."""
        return bool(self._backlog) or (self._answer is not None and self._answer.pending)

    def _handle_piece(self) -> None:
        answer = self._answer
        if answer is None:
            self._backlog.clear()
            return
        try:
            extra = answer.inflate() if answer.pending else answer.feed(self._next_piece())
        except Exception as exc:
            self._give_up(_explained(exc))
        else:
            self._fed(answer, extra)

    def _next_piece(self) -> bytes:
        """Take a piece from the backlog: bounded in bytes and in lines, and whole events if it can be."""
        data = self._backlog[0] if len(self._backlog) == 1 else b"".join(self._backlog)
        self._backlog.clear()
        size = STEP
        while size > _LEAST_STEP and data.count(b"\n", 0, size) + data.count(b"\r", 0, size) > _MOST_LINES:
            size //= 2
        if len(data) <= size:
            return data
        size = data.rfind(b"\n\n", 0, size) + 2 if data.find(b"\n\n", 0, size) >= 0 else size
        self._backlog.append(data[size:])
        return data[:size]

    def _pause_reading(self) -> None:
        """Let what comes wait, and have nothing more read from the next turn on.

        Not at once: this may be called while a TLS transport hands on what it has read. Paused in the middle of it,
        aiofastnet would keep the rest until the socket has more to read, which may be never.
        """
        if not self._reading_paused and self.is_connected():
            self._reading_paused = True
            self.loop.call_soon(self._pause_transport)

    def _pause_transport(self) -> None:
        if self._reading_paused and not self._transport_paused and self.is_connected():
            self._transport_paused = True
            self.transport.pause_reading()  # type: ignore[union-attr] # it is connected

    def _resume_reading(self) -> None:
        self._reading_paused = False
        if self._transport_paused:
            self._transport_paused = False
            if self.is_connected():
                self.transport.resume_reading()  # type: ignore[union-attr] # it is connected

    def _take_head(self, answer: UpstreamResponse, data: bytes) -> bytes | None:
        """Read the head; returns what follows it, or None where it is not whole yet. Raises Malformed."""
        if self._buffer:
            data, self._buffer = self._buffer + data, b""
        while True:
            end = data.find(HEAD_END)
            if end < 0 or end > MAX_HEAD:
                if not data.startswith(b"HTTP/1."[: len(data)]):
                    raise MalformedMessage("there is no status line")
                if len(data) > MAX_HEAD:
                    raise MalformedMessage("the head is too large")
                if is_never_head(data):
                    raise MalformedMessage("the head has a control character, or half a line break")
                self._buffer = data
                return None
            head = parse_response(data[:end])
            data = data[end + 4 :]
            if 200 <= head.status <= 599 or (head.status == 101 and answer.upgrade):
                break
            self._interim += 1
            if head.status == 101 or not 100 <= head.status < 200 or self._interim > _MAX_INTERIM:
                raise MalformedMessage(f"the status {head.status} is none that was asked for")
        answer.begin(head)
        return data

    def _switch(self, answer: UpstreamResponse, early: bytes) -> None:
        """Become a WebSocket; what has come of it waits for the relay."""
        self._answer = None
        self._deadline.clear()
        self._early = early
        self.hold_relay()
        answer.done = True
        answer._wake()

    def start_relay(self, relay: WebSocketSink) -> None:
        """Give what comes from now on to a relay."""
        self._relay = relay
        early, self._early = self._early, None
        if early:
            relay.from_azure(early)
        if self.lost:
            relay.azure_lost()
        elif not relay.azure_held:
            self.release_relay()

    def end_relay(self, seconds: float) -> None:
        """Close, once all is written, or after so many seconds."""
        self._relay = None
        self.close()
        if self.transport is not None:
            self._deadline.set(seconds, self.abort)

    def hold_relay(self) -> None:
        """Take nothing more of the WebSocket for now; what still comes in this turn is the relay's to keep."""
        self._pause_reading()

    def release_relay(self) -> None:
        """Go on taking."""
        self._resume_reading()

    def pause_writing(self) -> None:
        """Note that Azure does not read fast enough."""
        super().pause_writing()
        if self._relay is not None:
            self._relay.azure_flow(True)

    def resume_writing(self) -> None:
        """Note that it does again."""
        super().resume_writing()
        if self._relay is not None:
            self._relay.azure_flow(False)

    def _end(self, answer: UpstreamResponse, extra: bytes) -> None:
        """Send the connection home after an answer, or close it.

        The last bytes have been handed on by now: what raises on them must not find the connection in the pool.
        """
        self._answer = None
        self._deadline.clear()
        home = self._home
        if extra or self._backlog or answer.close or answer.uploading or home is None or self.transport is None:
            self.abort()
            return
        self._held = False  # nothing is left that its reader could be spared
        if self._reading_paused:
            self._resume_reading()
        self.used = True
        home.put(self)

    def is_clean(self) -> bool:
        """Whether the next request finds the connection as if it were new.

        It is open and reading; nobody is waiting for a response or is told of bytes; none is unread, unsent or half
        parsed, and no timer runs.
        """
        transport = self.transport
        return (
            transport is not None
            and not transport.is_closing()
            and self._answer is None
            and self._relay is None
            and not (self._reading_paused or self._held or self._ended or self.lost)
            and not (self._backlog or self._buffer or self._early or self._unsent)
            and not self._deadline.is_set()
            and not transport.get_write_buffer_size()
        )

    def _give_up(self, error: Exception) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.fail(error)
        self.abort()

    def eof_received(self) -> None:
        """Note that the other end sends no more; the connection is closed next.

        Over TLS this is its closure alert: a connection that is cut is closed without it.
        """
        self._ended = not _cut_off(self.transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """End or fail the answer at hand."""
        self.lost = True
        while self._more:
            self._handle_piece()  # these bytes came before the end
        super().connection_lost(exc)
        self._forget()
        answer, self._answer = self._answer, None
        if answer is None:
            if self._relay is not None:
                self._relay.azure_lost()
            return
        if answer.status and answer._left < 0 and answer._chunks is None and exc is None and self._ended:
            # RFC 9112, 9.8: without a length, a response over TLS is complete only after a closure alert.
            answer.end_with_connection()
        elif answer.status or self._buffer:
            answer.fail(UpstreamError("Azure's answer broke off before its end"))
        else:
            answer.fail(UpstreamError("Azure closed the connection before it had answered"))

    # -- closing ---------------------------------------------------------------------------------------

    def is_connected(self) -> bool:
        """Whether it is open; aiohttp's connector asks, too."""
        return self.transport is not None and not self.transport.is_closing()

    def close(self) -> None:
        """Close, as aiohttp's connector asks."""
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """Close at once, without waiting for what is still to be written."""
        self._backlog.clear()
        self._scheduler.remove(self)
        if self.transport is not None:
            self.transport.abort()
        self._forget()

    def _forget(self) -> None:
        self._deadline.stop()
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()

    # -- how long it may take --------------------------------------------------------------------------

    def _expire_in(self, seconds: float) -> None:
        self._deadline.set(seconds, self._expired)

    def _expired(self) -> None:
        begun = self._answer is not None and self._answer.status
        self._give_up(
            UpstreamTimeout(f"Azure sent nothing for {self._idle:g} s", fault="stalled")
            if begun
            else UpstreamTimeout(f"Azure did not begin to answer within {self._first_byte:g} s")
        )

    # -- flow ------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Take nothing more for now; it is not Azure that is slow then."""
        self._held = True
        self._scheduler.remove(self)
        self._pause_reading()
        self._deadline.clear()

    def release(self) -> None:
        """Go on taking: first what has come already."""
        self._held = False
        if self._more:
            self._scheduler.add(self)
        else:
            self._resume_reading()
        self._expire_in(self._idle)


def _explained(exc: Exception) -> Exception:
    """Return the error of a response that cannot be read; a filter's own stays as it is."""
    if isinstance(exc, MalformedMessage):
        return UpstreamError(f"what Azure answered is not valid HTTP: {exc}")
    if isinstance(exc, UnknownCoding):
        return UpstreamError(str(exc), code="unsupported_encoding", fault="encoding")
    return UpstreamError(str(exc), fault="encoding") if isinstance(exc, BadCoding) else exc


def _cut_off(transport: asyncio.BaseTransport | None) -> bool:
    """Whether a TLS connection ended without a closure alert.

    uvloop and aiofastnet do not call `eof_received` then. asyncio does; but its TLS object reads as ended only after
    an alert, and else waits for more.
    """
    tls = transport.get_extra_info("ssl_object") if transport is not None else None
    if not isinstance(tls, ssl.SSLObject):
        return False
    try:
        return bool(tls.read(1))
    except ssl.SSLError:
        return True
