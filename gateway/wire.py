"""One connection to Azure: what is asked on it, the answer as it comes, and whether it may be used again.

It may where the answer ended exactly where its bytes ended, and neither side wants it closed. On any byte that
arrives while nothing was asked it is closed: such bytes would be the next caller's answer.

An answer of known and moderate length is handed over whole: a break then becomes a clean 502, and the
connection is free again sooner. Of a longer one, or a stream, the pieces are either asked for one by one, or
handed to a sink (`Answer.pump`) the moment they arrive, with no task between: that is the way of every stream
that the server writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, Self

from aiohttp.base_protocol import BaseProtocol

from gateway.body import Body
from gateway.deadline import Deadline
from gateway.errors import GatewayError, UpstreamError, UpstreamTimeout
from gateway.http1 import HEAD_END, MAX_HEAD, Chunks, Malformed, ResponseHead, parse_response

if TYPE_CHECKING:
    import aiohttp

    from gateway.headers import Field
    from gateway.outbox import Outbox
    from gateway.relay import Relay

__all__ = ("Answer", "Home", "Wire")

# An answer of known length up to this size is handed over whole.
_WHOLE = 1024 * 1024
# What may wait to be read before Azure is asked to wait.
_WAITING = 64 * 1024
# Above this size, a head and a body are not joined to be written.
_JOINED = 16 * 1024
_MAX_INTERIM = 16


class Home(Protocol):
    """Where a connection goes when its answer has ended: the connector."""

    def put(self, wire: Wire) -> None:
        """Keep a connection that may be used again."""


class Answer:
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
    watch: Callable[[bytes], None] | None = None  # sees the body's bytes as they come, but not those of an encoding
    encoding: bytes | None = None
    _chunks: Chunks | None = None
    _left = 0  # bytes still to come, where that is known; -1 for all until the connection closes
    _size = 0  # of the parts
    _held = False
    _error: Exception | None = None
    _sink: Callable[[bytes], None] | None = None
    _waiter: asyncio.Future[None] | None = None

    def __init__(self, wire: Wire) -> None:
        self._wire: Wire | None = wire
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
        """Take the head."""
        self.status, self.fields, length, chunked, self.close, encoding = head
        if encoding is not None:
            self.encoding, self.watch = encoding, None
        if chunked:
            self._chunks = Chunks()
        elif length is None:
            self._left = -1
        else:
            self._left = length
            if length <= _WHOLE:
                self.whole = b""
        if self.whole is None:
            self._wake()

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the body; returns what follows its end. Raises Malformed."""
        extra = b""
        done = False
        if self._chunks is not None:
            data = self._chunks.feed(data)
            while self._chunks.unread:
                data += self._chunks.feed(self._chunks.unread)
            done, extra = self._chunks.done, self._chunks.extra
        elif self._left >= 0:
            left = self._left
            if len(data) > left:
                data, extra = data[:left], data[left:]
            self._left = left - len(data)
            done = not self._left
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
        return extra

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

    def switched(self) -> Wire:
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

    async def aclose(self) -> None:
        """Close, as iterating asks of what it iterates over."""
        self.abort()


class Wire(BaseProtocol):
    """The protocol of one connection to Azure."""

    __slots__ = (
        "_answer",
        "_buffer",
        "_deadline",
        "_early",
        "_first_byte",
        "_home",
        "_idle",
        "_interim",
        "_outbox",
        "_relay",
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
        self._home: Home | None = None
        self._outbox: Outbox | None = None
        self._unsent = b""
        self._relay: Relay | None = None
        self._early = b""  # what came behind a 101
        self._answer: Answer | None = None
        self._buffer = b""
        self._interim = 0
        self._first_byte = self._idle = 0.0
        self._deadline = Deadline(loop)

    def settle(
        self, connection: aiohttp.connector.Connection | None, home: Home, destination: object, outbox: Outbox
    ) -> None:
        """Tell a new connection where it belongs; `connection` is aiohttp's own idea of it, if it made it."""
        self.connection, self._home, self.destination, self._outbox = connection, home, destination, outbox

    # -- asking ----------------------------------------------------------------------------------------

    def ask(self, first_byte: float, idle: float) -> Answer:
        """Get ready for one answer: `first_byte` seconds to its head, `idle` seconds from piece to piece."""
        self.received = False
        self._interim = 0
        self._first_byte, self._idle = first_byte, idle
        self._expire_in(first_byte)
        self._answer = answer = Answer(self)
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
            # Nobody asked for these bytes, and the next caller must not get them.
            self.abort()
            return
        self.received = True
        try:
            if not answer.status:
                rest = self._take_head(answer, data)
                if rest is None:
                    return
                data = rest
                if answer.switching:
                    self._switch(answer, data)
                    return
                if answer.whole is not None and len(data) == answer._left:
                    # Nearly every plain answer: it came in one piece, head and all.
                    self._end(answer, b"")
                    if answer.watch is not None:
                        answer.watch(data)
                    answer.end(data)
                    return
            extra = answer.feed(data)
        except Malformed as exc:
            self._give_up(UpstreamError(f"what Azure answered is not valid HTTP: {exc}"))
            return
        except Exception as exc:
            self._give_up(exc)
            return
        if answer.done:
            self._end(answer, extra)
            answer.end(b"".join(answer._parts) if answer.whole is not None else None)
        elif not answer._held:
            self._expire_in(self._idle)

    def _take_head(self, answer: Answer, data: bytes) -> bytes | None:
        """Read the head; returns what follows it, or None where it is not whole yet. Raises Malformed."""
        if self._buffer:
            data, self._buffer = self._buffer + data, b""
        while True:
            end = data.find(HEAD_END)
            if end < 0 or end > MAX_HEAD:
                if not data.startswith(b"HTTP/1."[: len(data)]):
                    raise Malformed("there is no status line")
                if len(data) > MAX_HEAD:
                    raise Malformed("the head is too large")
                self._buffer = data
                return None
            head = parse_response(data[:end])
            data = data[end + 4 :]
            if 200 <= head.status <= 599 or (head.status == 101 and answer.upgrade):
                break
            self._interim += 1
            if head.status == 101 or not 100 <= head.status < 200 or self._interim > _MAX_INTERIM:
                raise Malformed(f"the status {head.status} is none that was asked for")
        answer.begin(head)
        return data

    def _switch(self, answer: Answer, early: bytes) -> None:
        """Become a WebSocket; what has come of it waits for the relay."""
        self._answer = None
        self._deadline.clear()
        self._early = early
        self.hold_relay()
        answer.done = True
        answer._wake()

    def start_relay(self, relay: Relay) -> None:
        """Give what comes from now on to a relay."""
        self._relay = relay
        early, self._early = self._early, b""
        if early:
            relay.from_azure(early)
        if self.lost:
            relay.azure_lost()
        else:
            self.release_relay()

    def end_relay(self, seconds: float) -> None:
        """Close, once all is written, or after so many seconds."""
        self._relay = None
        self.close()
        if self.transport is not None:
            self._deadline.set(seconds, self.abort)

    def hold_relay(self) -> None:
        """Take nothing more of the WebSocket for now."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()

    def release_relay(self) -> None:
        """Go on taking."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

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

    def _end(self, answer: Answer, extra: bytes) -> None:
        """Send the connection home after an answer, or close it."""
        self._answer = None
        self._deadline.clear()
        home = self._home
        if extra or answer.close or answer.uploading or home is None or self.transport is None:
            self.abort()
        else:
            self.used = True
            home.put(self)

    def _give_up(self, error: Exception) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.fail(error)
        self.abort()

    def eof_received(self) -> None:
        """Take the other end's leave; the connection is closed next."""

    def connection_lost(self, exc: BaseException | None) -> None:
        """End or fail the answer at hand."""
        self.lost = True
        super().connection_lost(exc)
        self._forget()
        answer, self._answer = self._answer, None
        if answer is None:
            if self._relay is not None:
                self._relay.azure_lost()
            return
        if answer.status and answer._left < 0 and answer._chunks is None and exc is None:
            answer.end()
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
        if self.transport is not None:
            self.transport.pause_reading()
            self._deadline.clear()

    def release(self) -> None:
        """Go on taking."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()
            self._expire_in(self._idle)
