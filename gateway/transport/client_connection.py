"""A client's connection: parses incoming bytes into requests and runs them one at a time, each in its own task.

`web.Server` of aiohttp holds the connections, and its `BaseProtocol` the write flow control. `protocol/http1_*.py`
parses heads and bodies: it rejects every message that can be read in two ways (docs/architecture.md has the costs).
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from aiohttp.base_protocol import BaseProtocol

from gateway.body.incoming_body import INLINE_FRAMING_LINES, IncomingBody
from gateway.body.request_body import Body
from gateway.errors import ApiError
from gateway.fair_scheduler import FairScheduler
from gateway.logs import exception_fields, get_logger
from gateway.protocol.http1_chunked import MOST_LINES
from gateway.protocol.http1_fields import HEAD_END, MAX_HEAD, MalformedMessage
from gateway.protocol.http1_request import HeadCheck, HeadReader, RequestHead, malformed_request
from gateway.settings import Limits, Timeouts
from gateway.transport.connection_limit import PROBE_CONNECTIONS, PROBE_HEAD_TIMEOUT, connection_limit_reached
from gateway.transport.deadline import Deadline
from gateway.transport.response_head import closing_response
from gateway.transport.socket_state import peer_closed, unsent_socket_bytes
from gateway.transport.write_buffer import WriteBuffer
from gateway.transport.write_timeout import WriteTimeout

if TYPE_CHECKING:
    from aiohttp.web_server import Server

__all__ = ("PROBE_PATHS", "ClientConnection", "ConnectionState", "Handler", "IncomingRequest")

PROBE_PATHS = ("/healthz", "/readyz")
"""The paths of an orchestrator's probes, which are also served above the connection limit."""

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# Maximum number of pipelined bytes to buffer before reading is paused.
_MAX_PIPELINED = 64 * 1024
# Larger responses, in bytes, are written immediately: the writer must know whether the client takes them.
_MAX_BUFFERED_WRITE = 64 * 1024
# Lingering close, in seconds and bytes: keep discarding input before closing, because an immediate close may send an
# RST that destroys the response. The time is nginx's lingering_timeout, but for the whole close, so that no client can
# draw it out. The bytes cover the largest audio file that OpenAI takes (25 MB): a client that uploads one with a wrong
# key reads the 401.
_LINGERING_CLOSE_TIMEOUT = 5.0
_LINGERING_CLOSE_BYTES = 32 * 1024 * 1024
# Keep-alive after a response to an incomplete request: at most this many bytes of its body are discarded, counted but
# not parsed. A chunked body cannot be skipped without parsing it.
_MAX_DISCARDED_BODY = 256 * 1024
# Interval, in seconds, for checking whether the client of a connection whose reading is paused has disconnected.
_DISCONNECT_CHECK_INTERVAL = 0.5


class ConnectionState(enum.Enum):
    """The state of a client's connection; `ClientConnection` lists the transitions."""

    IDLE = "idle"
    READING_HEAD = "reading head"
    RUNNING = "running"
    UPGRADED = "upgraded"
    MUST_CLOSE = "must close"
    DISCARDING_BODY = "discarding body"
    LINGERING_CLOSE = "lingering close"
    CLOSED = "closed"


# Module constants, because the hot path reads them: a look-up in the enum costs more.
_IDLE = ConnectionState.IDLE
_READING_HEAD = ConnectionState.READING_HEAD
_RUNNING = ConnectionState.RUNNING
_UPGRADED = ConnectionState.UPGRADED
_MUST_CLOSE = ConnectionState.MUST_CLOSE
_DISCARDING_BODY = ConnectionState.DISCARDING_BODY
_LINGERING_CLOSE = ConnectionState.LINGERING_CLOSE
_CLOSED = ConnectionState.CLOSED


class IncomingRequest:
    """A request as it arrived: its head, its body, and the connection for its response."""

    __slots__ = ("body", "connection", "head", "headers")

    def __init__(self, connection: ClientConnection, head: RequestHead, body: Body) -> None:
        self.connection = connection
        self.head = head
        self.headers = head.headers
        self.body = body


# Handles a request; returns whether the connection is kept alive.
Handler = Callable[[IncomingRequest], Awaitable[bool]]


class ClientConnection(BaseProtocol):
    """The protocol of one client's connection.

    | state             | event                                                | next state        |
    |-------------------|------------------------------------------------------|-------------------|
    | (connected)       | within the connection limit, or a probe may come     | `READING_HEAD`    |
    | (connected)       | far above the connection limit                       | `CLOSED`          |
    | `IDLE`            | the beginning of a head arrives                      | `READING_HEAD`    |
    | `IDLE`            | `timeouts.keep_alive` expires                        | `CLOSED`          |
    | `IDLE`            | a head is complete                                   | `RUNNING`         |
    | `IDLE`            | a request is rejected                                | `LINGERING_CLOSE` |
    | `READING_HEAD`    | the head is complete                                 | `RUNNING`         |
    | `READING_HEAD`    | the request is rejected, or `timeouts.head` expires  | `LINGERING_CLOSE` |
    | `RUNNING`         | response and request body are complete               | `IDLE`            |
    | `RUNNING`         | response complete, a short rest of the body missing  | `DISCARDING_BODY` |
    | `RUNNING`         | response complete, a long rest of the body missing   | `LINGERING_CLOSE` |
    | `RUNNING`         | response complete, the connection is not kept alive  | `CLOSED`          |
    | `RUNNING`         | the request body is malformed or too large           | `MUST_CLOSE`      |
    | `RUNNING`         | a WebSocket opens                                    | `UPGRADED`        |
    | `UPGRADED`        | the relay ends                                       | `MUST_CLOSE`      |
    | `MUST_CLOSE`      | the request's task ends                              | `LINGERING_CLOSE` |
    | `DISCARDING_BODY` | the request body is complete                         | `IDLE`            |
    | `DISCARDING_BODY` | the rest of the body takes too long                  | `CLOSED`          |
    | `LINGERING_CLOSE` | it takes too long, or too many bytes arrive          | `CLOSED`          |
    | any               | `force_close`, or the client disconnects             | `CLOSED`          |

    A request's task runs in `RUNNING`, `UPGRADED` and `MUST_CLOSE`, and may still run in `CLOSED`. Input is parsed in
    `IDLE` and `READING_HEAD`, buffered in `RUNNING` (pipelined requests), passed to the relay in `UPGRADED` and
    discarded in the other states. Above the connection limit, a rejected request closes without lingering.
    """

    __slots__ = (
        "_body",
        "_buffer",
        "_deadline",
        "_discarded_bytes",
        "_disconnect_timer",
        "_handler",
        "_head_check",
        "_head_reader",
        "_input_paused",
        "_limits",
        "_pending_write",
        "_probes_only",
        "_relay",
        "_server",
        "_state",
        "_task_handler",
        "_timeouts",
        "_write_buffer",
        "_write_timeout",
        "on_backpressure",
    )

    def __init__(
        self,
        server: Server,
        handler: Handler,
        loop: asyncio.AbstractEventLoop,
        limits: Limits,
        timeouts: Timeouts,
        write_buffer: WriteBuffer,
    ) -> None:
        super().__init__(loop)
        self._state = _READING_HEAD  # `timeouts.head` also limits the wait for the first byte
        self._server = server
        self._handler = handler
        self._limits = limits
        self._timeouts = timeouts
        self._probes_only = False  # it is above the connection limit
        self._buffer = b""  # an incomplete head, or pipelined bytes
        self._head_reader = HeadReader()
        self._head_check: HeadCheck | None = None  # of a head that arrives in several reads
        self._body: IncomingBody | None = None  # until it is complete
        self._task_handler: asyncio.Task[None] | None = None  # of the current request; aiohttp's server reads it
        self._relay: Callable[[bytes], None] | None = None  # takes the input of a WebSocket
        self._discarded_bytes = 0
        self._input_paused = False
        self._deadline = Deadline(loop)
        self._disconnect_timer: asyncio.TimerHandle | None = None
        self._write_buffer = write_buffer
        self._pending_write = b""
        self._write_timeout: WriteTimeout | None = None  # while pending writes delay the close
        self.on_backpressure: Callable[[bool], None] | None = None
        """Called with True when the client reads too slowly, and with False when it has caught up."""

    # -- open and close --------------------------------------------------------------------------------

    def use(self, limits: Limits, timeouts: Timeouts) -> None:
        """Apply other limits and timeouts from the next request on."""
        self._limits = limits
        self._timeouts = timeouts

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first request, unless the connection limit is reached."""
        super().connection_made(transport)
        self._server.connection_made(self, self.transport)  # type: ignore[arg-type] # aiohttp names its own class
        excess = self._server.excess(self._limits.connections)  # type: ignore[attr-defined] # of our own subclass
        if excess <= 0:
            self._close_in(self._timeouts.head)
        elif excess <= PROBE_CONNECTIONS:
            self._probes_only = True
            self._close_in(min(PROBE_HEAD_TIMEOUT, self._timeouts.head))
        else:
            # (No lingering close: it would keep the descriptor.)
            self.write(closing_response(connection_limit_reached()))
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Release everything: the client has disconnected."""
        self._server.connection_lost(self, exc)  # type: ignore[arg-type] # aiohttp names its own class
        super().connection_lost(exc)
        self._state = _CLOSED
        self._deadline.stop()
        if self._write_timeout is not None:
            self._write_timeout.cancel()
        if self._disconnect_timer is not None:
            self._disconnect_timer.cancel()
            self._disconnect_timer = None
        if self._body is not None:
            error = ApiError(400, "the connection closed before the body was complete", code="malformed_request")
            self._body.fail(error)
            self._body = None
        if self._task_handler is not None:
            self._task_handler.cancel()

    @property
    def task(self) -> asyncio.Task[None] | None:
        """The task of the current request."""
        return self._task_handler

    @property
    def idle(self) -> bool:
        """Whether no request is running."""
        return self._task_handler is None

    def force_close(self) -> None:
        """Close after the pending writes."""
        self._state = _CLOSED
        self.flush()
        if self.transport is not None:
            self.transport.close()
            # Without it, a client that reads nothing keeps the connection open for ever.
            self._write_timeout = self._write_timeout or WriteTimeout(self, self._timeouts.client, self._abort)

    def _abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 -- aiohttp's server calls it
        """Cancel the current request and close; aiohttp's server calls it."""
        if self._task_handler is not None:
            self._task_handler.cancel()
        self.force_close()

    # -- output ----------------------------------------------------------------------------------------

    @property
    def gone(self) -> bool:
        """Whether nothing can be written any more."""
        return self.transport is None or self.transport.is_closing()

    @property
    def unsent_bytes(self) -> int:
        """The number of bytes that the client has not acknowledged, those in the socket's buffer included on Linux."""
        if self.transport is None:
            return 0
        sock = self.transport.get_extra_info("socket")
        return self.transport.get_write_buffer_size() + unsent_socket_bytes(sock)

    def write(self, data: bytes) -> None:
        """Write to the client, unless it is gone."""
        if self._pending_write:
            self.flush()
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def write_soon(self, data: bytes) -> None:
        """Write at the end of this turn of the loop, together with other connections; later writes stay in order."""
        if self._pending_write or len(data) > _MAX_BUFFERED_WRITE:
            self.write(data)
        else:
            self._pending_write = data
            self._write_buffer.add(self)

    def flush(self) -> None:
        """Write what `write_soon` has buffered."""
        if self._pending_write:
            data, self._pending_write = self._pending_write, b""
            if self.transport is not None and not self.transport.is_closing():
                self.transport.write(data)

    def send_continue(self) -> None:
        """Send `100 Continue`: the client waits for it before it sends the body."""
        self.write(_CONTINUE)

    # -- WebSocket -------------------------------------------------------------------------------------

    def start_relay(self, take: Callable[[bytes], None], on_backpressure: Callable[[bool], None]) -> None:
        """Pass all further input to a relay."""
        self.flush()
        self._relay = take
        self.on_backpressure = on_backpressure
        if self._state is _RUNNING:
            self._state = _UPGRADED
        data, self._buffer = self._buffer, b""
        self.resume_input()
        if data:
            take(data)
        if self.writing_paused:
            on_backpressure(True)

    def stop_relay(self) -> None:
        """Pass no more input to the relay."""
        self._relay = self.on_backpressure = None
        self._reject_input()

    # -- input -----------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Take input: more of a body, or the next request."""
        body = self._body
        if body is not None:
            if body.unread:
                body.unread += data  # it was in flight when reading was paused
                return
            data = self._feed(body, data, INLINE_FRAMING_LINES)
            if body.has_work:
                FairScheduler.of(self._loop).add(self)
            if not data:
                return
        state = self._state
        if state is _IDLE or state is _READING_HEAD:
            self._next_request(self._buffer + data if self._buffer else data)
        elif state is _RUNNING:
            self._buffer = data = self._buffer + data
            if len(data) > _MAX_PIPELINED:
                self.pause_input()
        elif state is _UPGRADED and self._relay is not None:
            self._relay(data)
        else:
            self._discard(len(data))

    def step(self) -> bool:
        """Parse more of a body that arrived in many chunks; see `fair_scheduler.ScheduledWork`."""
        body = self._body
        if body is None:
            return False
        extra = self._feed(body, body.unread, MOST_LINES)
        if body.done or not (body.unread or body.full):
            self.resume_input()
        if extra:
            self.data_received(extra)
        return body.has_work

    def _feed(self, body: IncomingBody, data: bytes, max_lines: int) -> bytes:
        """Feed a body; returns the bytes after its end."""
        try:
            extra = body.feed(data, max_lines)
        except MalformedMessage as exc:
            body.fail(malformed_request(str(exc)))
            extra = b""
        if body.error is not None:
            # The bytes that follow have no known meaning.
            self._reject_input()
            body.unread = b""
        if body.done or self._state is _MUST_CLOSE or self._state is _CLOSED:
            self._body = None
            if body.discarded:
                # Its response is complete.
                self._after_response(keep_alive=self._state is _DISCARDING_BODY)
        return extra

    def _reject_input(self) -> None:
        """Accept no further request, and close after the current response."""
        if self._state is not _CLOSED:
            self._state = _MUST_CLOSE

    def _discard(self, size: int) -> None:
        """Discard input, and close if there is too much of it."""
        self._discarded_bytes += size
        if self._discarded_bytes > _LINGERING_CLOSE_BYTES:
            self.force_close()

    def _next_request(self, data: bytes) -> None:
        """Start the next request if its head is complete."""
        if data[:2] == b"\r\n":
            data = data[2:]  # RFC 9112, 2.2: an empty line before a request is ignored
        end = data.find(HEAD_END)
        if end < 0 or end > MAX_HEAD:
            self._wait_for_head(data)
            return
        try:
            head = self._head_reader.read(data[:end], self._limits.body)
        except ApiError as exc:
            self._reject(exc)
            return
        if self._probes_only and head.path not in PROBE_PATHS:
            self._reject(connection_limit_reached())
            return
        if self._head_check is not None:
            self._head_check = None
        end += 4
        length = head.length
        available = len(data) - end
        body: Body
        if length is not None and length <= available:
            body = Body(data[end : end + length], kept=False)
            self._buffer = data[end + length :]
        else:
            incoming = IncomingBody(
                self,
                self._loop,
                length=length,
                expects_continue=head.expects,
                limit=self._limits.body,
                timeout=self._timeouts.client,
                min_rate=self._limits.body_rate,
            )
            body = Body(incoming, scan_limit=self._limits.form)
            self._buffer = b""
            self._body = incoming
            if available:
                self._buffer = self._feed(incoming, data[end:], INLINE_FRAMING_LINES)
                if incoming.unread:
                    FairScheduler.of(self._loop).add(self)
            if incoming.error is not None:
                self._reject(incoming.error)
                return
        self._state = _RUNNING
        self._deadline.clear()
        # Named, because the name that asyncio makes for each costs a tenth of the task.
        self._task_handler = asyncio.Task(self._run(IncomingRequest(self, head, body)), loop=self._loop, name="request")

    def _wait_for_head(self, data: bytes) -> None:
        """Keep the beginning of a head, unless it can no longer become a valid one."""
        self._buffer = data
        if len(data) > MAX_HEAD:
            error = ApiError(431, f"the request's headers exceed {MAX_HEAD} bytes; send fewer", code="head_too_large")
            self._reject(error)
            return
        self._head_check = self._head_check or HeadCheck()
        try:
            self._head_check.check(data)
        except ApiError as exc:
            self._reject(exc)
            return
        if data and self._state is _IDLE:
            self._state = _READING_HEAD
            self._close_in(self._timeouts.head)

    async def _run(self, incoming: IncomingRequest) -> None:
        keep_alive = False
        try:
            keep_alive = await self._handler(incoming)
        except ConnectionError:
            pass  # the client disconnected during a write
        except asyncio.CancelledError:
            # A task keeps the exception that cancelled it, with its frames, which hold the task: a cycle, which would
            # keep the body and all else of the request until the collector finds it.
            pass
        except Exception as exc:
            facts = exception_fields(exc)
            facts.pop("message", None)
            get_logger().error("connection_failed", **facts)
            if self.transport is not None:
                self.transport.abort()
        finally:
            self._task_handler = None
            self.on_backpressure = None
            self._after_response(keep_alive and self._state is _RUNNING)

    def _after_response(self, keep_alive: bool) -> None:
        """Continue with the next request, or close."""
        if self.transport is None:
            return
        body = self._body
        if body is not None:
            if keep_alive and not self.closes_after_response():
                self._state = _DISCARDING_BODY
                body.discard()
                self._close_in(_LINGERING_CLOSE_TIMEOUT)
            else:
                self._start_lingering_close()
        elif not keep_alive:
            if self._state is _MUST_CLOSE:
                self._start_lingering_close()
            else:
                self.force_close()
        else:
            self._state = _IDLE
            self.resume_input()
            self._close_in(self._timeouts.keep_alive)
            if self._buffer:
                data, self._buffer = self._buffer, b""
                self._next_request(data)

    def closes_after_response(self) -> bool:
        """Whether the response must say `connection: close`, because too much of the request is missing."""
        body = self._body
        if body is None:
            return self._state is not _RUNNING or self._probes_only
        return body.missing > _MAX_DISCARDED_BODY or body.awaits_continue or body.error is not None

    def _start_lingering_close(self) -> None:
        """Close the sending side, and give the client time to read the response before closing the other."""
        self._state = _LINGERING_CLOSE
        self._body = None
        self._buffer = b""
        self.flush()
        if self.transport is None or self.transport.is_closing():
            self._state = _CLOSED
        elif self.transport.can_write_eof():
            self.transport.write_eof()
            self.resume_input()
            self._close_in(_LINGERING_CLOSE_TIMEOUT)
        else:
            self._state = _CLOSED
            self.transport.close()

    def _reject(self, error: ApiError) -> None:
        """Send an error instead of starting a request, and close."""
        get_logger().info("request_rejected", status=error.status, error=error.code, reason=str(error))
        self.write(closing_response(error))
        if self._probes_only:
            self.force_close()  # its slot is for the next probe
        else:
            self._start_lingering_close()

    # -- timeouts --------------------------------------------------------------------------------------

    def expire_in(self, seconds: float, expire: Callable[[], None]) -> None:
        """Call `expire` in `seconds`, unless `cancel_expiry` is called or the response is complete before."""
        self._deadline.set(seconds, expire)

    def cancel_expiry(self) -> None:
        """Cancel `expire_in`."""
        self._deadline.clear()

    def client_awaited(self, awaited: bool) -> None:
        """Pause the deadline while a reader waits for the client's body, which has its own timeouts."""
        if awaited:
            self._deadline.pause()
        else:
            self._deadline.resume()

    def _close_in(self, seconds: float) -> None:
        self._deadline.set(seconds, self._timed_out)

    def _timed_out(self) -> None:
        if self._state is _READING_HEAD:
            slow = ApiError(408, "the request's headers took too long to arrive", code="request_timeout")
            self._reject(connection_limit_reached() if self._probes_only else slow)
        else:
            self.force_close()

    # -- flow control ----------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """Note that the client reads too slowly."""
        super().pause_writing()
        if self.on_backpressure is not None:
            self.on_backpressure(True)

    def resume_writing(self) -> None:
        """Note that the client has caught up."""
        super().resume_writing()
        if self.on_backpressure is not None:
            self.on_backpressure(False)

    # While reading is paused, the event loop does not see a client disconnect: the socket's state is polled instead.

    def pause_input(self, *, check_disconnect: bool = True) -> None:
        """Pause reading. With `check_disconnect`, close when the client disconnects, and drop its unread bytes."""
        if self.transport is None:
            return
        if not self._input_paused:
            self._input_paused = True
            self.transport.pause_reading()
        if check_disconnect and self._disconnect_timer is None:
            self._disconnect_timer = self._loop.call_later(_DISCONNECT_CHECK_INTERVAL, self._check_disconnect)
        elif not check_disconnect and self._disconnect_timer is not None:
            self._disconnect_timer.cancel()
            self._disconnect_timer = None

    def resume_input(self) -> None:
        """Resume reading: first the unread rest of the last read, then the client."""
        if self._input_paused:
            if self._body is not None and self._body.unread:
                FairScheduler.of(self._loop).add(self)
                return
            self._input_paused = False
            if self._disconnect_timer is not None:
                self._disconnect_timer.cancel()
                self._disconnect_timer = None
            if self.transport is not None and not self.transport.is_closing():
                self.transport.resume_reading()

    def _check_disconnect(self) -> None:
        self._disconnect_timer = None
        if self.transport is None:
            return
        if peer_closed(self.transport.get_extra_info("socket")):
            self.transport.abort()
        else:
            self._disconnect_timer = self._loop.call_later(_DISCONNECT_CHECK_INTERVAL, self._check_disconnect)
