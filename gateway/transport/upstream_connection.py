"""One connection to Azure: writes a request, reads its response, and is reused if it is clean.

A connection is reusable only if the response ended with no bytes left over, neither side asked to close it, and it is
clean (`UpstreamConnection.is_clean`): the next request finds it as if it were new. Bytes that arrive on an idle
connection close it: they would be the beginning of the next caller's response.

A large read is handled in steps (see `paused_reading.py`). Backpressure comes first: no step is taken while the reader
of the response wants no more.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Protocol

from gateway.body.request_body import Body
from gateway.errors import GatewayError, UpstreamError, UpstreamTimeout
from gateway.fair_scheduler import SMALL, FairScheduler
from gateway.protocol.http1_response import ResponseHeadReader
from gateway.transport.paused_reading import MOST_LINES, Backlog
from gateway.transport.upgradable_connection import UpgradableConnection
from gateway.transport.upstream_response import UpstreamResponse, unreadable_response

if TYPE_CHECKING:
    import aiohttp

    from gateway.transport.write_buffer import WriteBuffer

__all__ = ("IdlePool", "UpstreamConnection")

# A larger body, in bytes, is not joined to its head.
_MAX_JOINED = 16 * 1024
# Maximum number of line ends in a read that is handled at once: some 160 events in chunks of their own.
_LINES_AT_ONCE = 4 * MOST_LINES


class IdlePool(Protocol):
    """Takes connections whose response has ended."""

    def put(self, connection: UpstreamConnection) -> None:
        """Keep a connection for the next request."""


class UpstreamConnection(UpgradableConnection):
    """The protocol of one connection to Azure."""

    __slots__ = (
        "_backlog",
        "_eof",
        "_first_byte_timeout",
        "_head_reader",
        "_held",
        "_idle_timeout",
        "_pool",
        "_response",
        "_scheduler",
        "_unsent",
        "_write_buffer",
        "closed",
        "connection",
        "destination",
        "idle_since",
        "received",
        "used",
    )

    should_close = False  # aiohttp's connector asks

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.connection: aiohttp.connector.Connection | None = None
        self.destination: object = None
        self.used = False  # a response has ended on it
        self.received = False  # bytes have arrived since the last request
        self.idle_since = 0.0
        self.closed: asyncio.Future[None] | None = None  # aiohttp's connector asks
        self._pool: IdlePool | None = None
        self._write_buffer: WriteBuffer | None = None
        self._unsent = b""
        self._response: UpstreamResponse | None = None
        self._head_reader = ResponseHeadReader()
        self._backlog = Backlog()
        self._held = False  # the response's reader has paused it
        self._eof = False  # Azure has announced that it sends no more
        self._scheduler = FairScheduler.of(loop)
        self._first_byte_timeout = self._idle_timeout = 0.0

    def attach(
        self,
        connection: aiohttp.connector.Connection | None,
        pool: IdlePool,
        destination: object,
        write_buffer: WriteBuffer,
    ) -> None:
        """Give a new connection its pool; `connection` is aiohttp's own object, if aiohttp's connector made it."""
        self.connection, self._pool, self.destination = connection, pool, destination
        self._write_buffer = write_buffer

    # -- the request -----------------------------------------------------------------------------------

    def ask(self, first_byte: float, idle: float) -> UpstreamResponse:
        """Begin an exchange: `first_byte` is the timeout for the head, `idle` the one between pieces, in seconds."""
        self.received = False
        self._head_reader.interim = 0
        self._first_byte_timeout, self._idle_timeout = first_byte, idle
        self._set_deadline(first_byte)
        self._response = response = UpstreamResponse(self)
        return response

    def expect(self, first_byte: float) -> None:
        """Restart the timeout for the head, in seconds, because the request has been sent."""
        if self._response is not None and not self._response.status:
            self._first_byte_timeout = first_byte
            self._set_deadline(first_byte)

    def send(self, head: bytes, body: bytes) -> None:
        """Write a request with a whole body."""
        if len(body) <= _MAX_JOINED and self._write_buffer is not None:
            self._unsent = head + body
            self._write_buffer.add(self)
        elif self.transport is not None:  # else connection_lost() has failed the response
            self.transport.writelines((head, body))

    def flush(self) -> None:
        """Write the bytes that `send` left for the end of the loop's turn."""
        unsent, self._unsent = self._unsent, b""
        if self.is_connected() and self._response is not None:
            self.transport.write(unsent)  # type: ignore[union-attr] # it is connected

    async def send_stream(self, head: bytes, body: Body, timeout: float) -> None:  # noqa: ASYNC109 -- of one write
        """Write a request's body as it arrives from the client, in chunks if its length is not known.

        Raises ApiError if the client fails, UpstreamTimeout if Azure reads nothing for `timeout` seconds.
        """
        length = body.length
        chunked = length is None
        sent = 0
        self._write(head)
        async for chunk in body.stream():
            if not chunk:
                continue  # an empty chunk would end the body (RFC 9112, 7.1)
            sent += len(chunk)
            self._write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunked else chunk)
            if self._paused:
                try:
                    async with asyncio.timeout(timeout):
                        await self._drain_helper()
                except TimeoutError:
                    raise UpstreamTimeout(
                        f"Azure read none of the request's body for {timeout:g} s", fault="stalled"
                    ) from None
        if chunked:
            self._write(b"0\r\n\r\n")
        elif sent != length:
            raise GatewayError(f"a body of {length} bytes was sent as {sent}")

    def _write(self, data: bytes) -> None:
        # If the connection is lost, the response has failed already, and its exchange cancels the upload.
        if self.transport is not None:
            self.transport.write(data)

    # -- received bytes --------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Take received bytes."""
        response = self._response
        if response is None:
            if self._relay is not None:
                self._relay.from_azure(data)
                return
            if self._early_data is not None:
                self._early_data += data
                return
            # No request is waiting for these bytes, and the next one must not get them.
            self.abort()
            return
        self.received = True
        if self._reading_paused:
            self._backlog.append(data)  # some transports still deliver what they had read before the pause
            return
        try:
            if not response.status:
                found = self._head_reader.read(data, response.upgrade)
                if found is None:
                    return
                head, data = found
                response.begin(head)
                if response.switching:
                    self._switch_protocols(response, data)
                    return
                if response.whole is not None and len(data) == response.remaining and not response.inflated:
                    # Nearly every plain response: head and body arrive in one piece.
                    if response.watch is not None:
                        response.watch(data)
                    self._finish(response, b"")
                    response.end(data)
                    return
            if len(data) > SMALL and response.whole is None:
                few = data.count(b"\n") + data.count(b"\r") <= _LINES_AT_ONCE
                if not (self._scheduler.may_handle(len(data)) and few):
                    self._defer(data)
                    return
            extra = response.feed(data)
        except Exception as exc:
            self._fail(unreadable_response(exc))
            return
        if response.done or response.inflated:
            self._after_piece(response, extra)
        elif not self._held:
            self._set_deadline(self._idle_timeout)

    def _switch_protocols(self, response: UpstreamResponse, early_data: bytes) -> None:
        """Become a WebSocket; the bytes after the head wait for the relay."""
        self._response = None
        self._deadline.clear()
        self._early_data = early_data
        self.hold_relay()
        response.switch_protocols()

    def _after_piece(self, response: UpstreamResponse, extra: bytes) -> None:
        """Continue after some of the body; `extra` is the bytes after its end."""
        if response.done:
            self._finish(response, extra)
            response.end()
        elif not self._held:
            self._set_deadline(self._idle_timeout)
            if response.pending:
                self._pause_reading()
                self._scheduler.add(self)

    def _finish(self, response: UpstreamResponse, extra: bytes) -> None:
        """Return the connection to its pool after a response, or close it.

        The last bytes have been delivered before: an exception from that must not find the connection in the pool.
        """
        self._response = None
        self._deadline.clear()
        pool = self._pool
        if extra or self._backlog or response.close or response.uploading or pool is None or self.transport is None:
            self.abort()
            return
        self._held = False  # no bytes are left for its reader
        if self._reading_paused:
            self._resume_reading()
        self.used = True
        pool.put(self)

    def is_clean(self) -> bool:
        """Whether the next request finds the connection as if it were new.

        It is open and reading; it has no response and no relay; no bytes are unread, unsent or half parsed, and no
        timer runs.
        """
        transport = self.transport
        return (
            transport is not None
            and not transport.is_closing()
            and self._response is None
            and self._relay is None
            and not (self._reading_paused or self._held or self._eof or self.lost)
            and not (self._backlog or self._head_reader.unparsed or self._early_data or self._unsent)
            and not self._deadline.is_set()
            and not transport.get_write_buffer_size()
        )

    # -- large reads, and backpressure -----------------------------------------------------------------

    def _defer(self, data: bytes) -> None:
        """Keep a large read, pause reading, and handle it in steps."""
        self._backlog.append(data)
        self._pause_reading()
        if not self._held:
            self._set_deadline(self._idle_timeout)
            self._scheduler.add(self)

    def step(self) -> bool:
        """Handle a bounded piece of the backlog; return whether there is more and the reader wants it."""
        self._handle_piece()
        if self._has_more:
            return not self._held
        if not self._held:
            self._resume_reading()
        return False

    @property
    def _has_more(self) -> bool:
        """Whether received bytes wait for a step."""
        return bool(self._backlog) or (self._response is not None and self._response.pending)

    def _handle_piece(self) -> None:
        response = self._response
        if response is None:
            self._backlog.clear()
            return
        try:
            extra = response.inflate() if response.pending else response.feed(self._backlog.take_piece())
        except Exception as exc:
            self._fail(unreadable_response(exc))
        else:
            self._after_piece(response, extra)

    def hold(self) -> None:
        """Pause reading; meanwhile no timeout of Azure's runs."""
        self._held = True
        self._scheduler.remove(self)
        self._pause_reading()
        self._deadline.clear()

    def release(self) -> None:
        """Resume reading, after the bytes that have already arrived."""
        self._held = False
        if self._has_more:
            self._scheduler.add(self)
        else:
            self._resume_reading()
        self._set_deadline(self._idle_timeout)

    # -- timeouts and the end --------------------------------------------------------------------------

    def _set_deadline(self, seconds: float) -> None:
        self._deadline.set(seconds, self._timed_out)

    def _timed_out(self) -> None:
        begun = self._response is not None and self._response.status
        self._fail(
            UpstreamTimeout(f"Azure sent nothing for {self._idle_timeout:g} s", fault="stalled")
            if begun
            else UpstreamTimeout(f"Azure did not begin to respond within {self._first_byte_timeout:g} s")
        )

    def _fail(self, error: Exception) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.fail(error)
        self.abort()

    def eof_received(self) -> None:
        """Note that Azure sends no more; the connection is closed next.

        Over TLS this is the closure alert: a connection that is cut is closed without one.
        """
        self._eof = not _is_truncated(self.transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """End or fail the current response."""
        self.lost = True
        while self._has_more:
            self._handle_piece()  # these bytes arrived before the end
        super().connection_lost(exc)
        self._detach()
        response, self._response = self._response, None
        if response is None:
            if self._relay is not None:
                self._relay.azure_lost()
            return
        if response.status and response.ends_with_connection and exc is None and self._eof:
            # RFC 9112, 9.8: without a length, a response over TLS is complete only after a closure alert.
            response.end_with_connection()
        elif response.status or self._head_reader.unparsed:
            response.fail(UpstreamError("Azure closed the connection before the end of its response"))
        else:
            response.fail(UpstreamError("Azure closed the connection before it responded"))

    def abort(self) -> None:
        """Close at once; discard unsent bytes."""
        self._backlog.clear()
        self._scheduler.remove(self)
        if self.transport is not None:
            self.transport.abort()
        self._detach()

    def _detach(self) -> None:
        """Stop the timer, and release aiohttp's own object for this connection."""
        self._deadline.stop()
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()


def _is_truncated(transport: asyncio.BaseTransport | None) -> bool:
    """Whether a TLS connection ended without a closure alert.

    uvloop and aiofastnet do not call `eof_received` then. asyncio does, but its TLS object reads as ended only after
    an alert; otherwise it waits for more.
    """
    tls = transport.get_extra_info("ssl_object") if transport is not None else None
    if not isinstance(tls, ssl.SSLObject):
        return False
    try:
        return bool(tls.read(1))
    except ssl.SSLError:
        return True
