"""One client's connection: what arrives on it becomes requests, one at a time, each in a task of its own.

aiohttp's low-level server (`web.Server`) keeps the connections, and its protocol the flow control; heads
and bodies are read by `protocol/http1_*.py`, which read them in one way only and cost a third of aiohttp's parser.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import sys
import termios
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from aiohttp.base_protocol import BaseProtocol

from gateway.body.incoming_body import LINES_AT_ONCE, IncomingBody
from gateway.body.request_body import Body
from gateway.errors import ApiError
from gateway.fair_scheduler import FairScheduler
from gateway.logs import exception_fields, get_logger
from gateway.protocol.http1_chunked import MOST_LINES
from gateway.protocol.http1_fields import HEAD_END, MAX_HEAD, MalformedMessage
from gateway.protocol.http1_request import HeadCheck, HeadReader, RequestHead, malformed_request
from gateway.settings import Limits, Timeouts
from gateway.transport.deadline import Deadline
from gateway.transport.response_head import closing_response
from gateway.transport.write_buffer import WriteBuffer
from gateway.transport.write_timeout import WriteTimeout

if TYPE_CHECKING:
    from aiohttp.web_server import Server

__all__ = ("PROBES", "ClientConnection", "Handler", "IncomingRequest")

PROBES = ("/healthz", "/readyz")
"""The paths that an orchestrator asks, and that are answered when no other request is."""

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# Bytes behind the request at hand (pipelined ones) that may wait before the client is asked to wait.
_WAITING = 64 * 1024
# Above this size, an answer is written at once: whether its client takes it must be known.
_SOON = 64 * 1024
# Lingering close: how long, in seconds, and for how many bytes input is still read and discarded before a connection
# is closed. An immediate close may send a reset that destroys the response at a client which is still sending. The
# time is nginx's lingering_timeout; it is for all of it, so that no client can draw it out. The bytes are those of the
# largest audio file that OpenAI takes (25 MB) and some more: a client that uploads one with a wrong key reads the 401.
_LINGER = 5.0
_MOST_LINGERED = 32 * 1024 * 1024
# Unwanted bytes of a body, at most this many, are skipped and the connection is kept; they are counted, not parsed.
# A chunked body cannot be skipped without parsing it.
_SKIPPED = 256 * 1024
# Connections above the limit that are taken all the same, to answer the probes of an orchestrator, and how long, in
# seconds, each has to send its head.
_SPARE = 256
_SPARE_HEAD = 1.0
# How often, in seconds, a connection that is not read from is asked whether its client is still there.
_LEAVE_CHECK = 0.5
# States of a TCP connection that the other end has not closed (linux/tcp_states.h).
_ESTABLISHED, _SYN_RECEIVED = 1, 3


class IncomingRequest:
    """A request as it arrived: its head, its body, and the connection to answer on."""

    __slots__ = ("body", "connection", "head", "headers")

    def __init__(self, connection: ClientConnection, head: RequestHead, body: Body) -> None:
        self.connection = connection
        self.head = head
        self.headers = head.headers
        self.body = body


# Handles a request; returns whether the connection may go on.
Handler = Callable[[IncomingRequest], Awaitable[bool]]


class ClientConnection(BaseProtocol):
    """The protocol of one client's connection."""

    __slots__ = (
        "_arriving",
        "_buffer",
        "_check",
        "_closer",
        "_closing",
        "_deadline",
        "_handle",
        "_head_begun",
        "_heads",
        "_held",
        "_leave_timer",
        "_limits",
        "_lingered",
        "_manager",
        "_outbox",
        "_relay",
        "_spare",
        "_task_handler",
        "_timeouts",
        "_unsent",
        "on_flow",
    )

    def __init__(
        self,
        manager: Server,
        handle: Handler,
        loop: asyncio.AbstractEventLoop,
        limits: Limits,
        timeouts: Timeouts,
        outbox: WriteBuffer,
    ) -> None:
        super().__init__(loop)
        self._outbox = outbox
        self._unsent = b""
        self._closer: WriteTimeout | None = None  # until what is still to be written is taken
        self._manager = manager
        self._handle = handle
        self._limits = limits
        self._timeouts = timeouts
        self._buffer = b""  # a head that has not ended, or what follows the request at hand
        self._arriving: IncomingBody | None = None  # the body that has not arrived whole
        self._task_handler: asyncio.Task[None] | None = None  # the request at hand; aiohttp's server asks
        self._closing = False  # nothing more is taken from this client
        self._heads = HeadReader()
        self._check: HeadCheck | None = None  # of a head that comes in several reads
        self._lingered = 0  # bytes discarded since nothing more is taken
        self._spare = False  # it is one above the limit: only probes are answered
        self._held = False
        self._head_begun = True  # the time for a head runs
        self._deadline = Deadline(loop)
        self._leave_timer: asyncio.TimerHandle | None = None
        self._relay: Callable[[bytes], None] | None = None  # who is given what comes, once this is a WebSocket
        self.on_flow: Callable[[bool], None] | None = None
        """Called with True when the client takes no more for now, and with False when it does again."""

    # -- life ------------------------------------------------------------------------------------------

    def use(self, limits: Limits, timeouts: Timeouts) -> None:
        """Have other limits and timeouts, from the next request on."""
        self._limits = limits
        self._timeouts = timeouts

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a first request, unless there are too many connections."""
        super().connection_made(transport)
        self._manager.connection_made(self, self.transport)  # type: ignore[arg-type] # aiohttp names its own class
        over = self._manager.above(self._limits.connections)  # type: ignore[attr-defined] # it is the server's own
        if over <= 0:
            self._expect_in(self._timeouts.head)
        elif over <= _SPARE:
            self._spare = True
            self._expect_in(min(_SPARE_HEAD, self._timeouts.head))
        else:
            # (No lingering close: it would keep the descriptor.)
            self.write(closing_response(_overloaded()))
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Let go of what waits: the client has left."""
        self._manager.connection_lost(self, exc)  # type: ignore[arg-type] # aiohttp names its own class
        super().connection_lost(exc)
        self._closing = True
        self._deadline.stop()
        if self._closer is not None:
            self._closer.cancel()
        if self._leave_timer is not None:
            self._leave_timer.cancel()
            self._leave_timer = None
        if self._arriving is not None:
            self._arriving.fail(ApiError(400, "the body broke off", code="malformed_request"))
            self._arriving = None
        if self._task_handler is not None:
            self._task_handler.cancel()

    @property
    def task(self) -> asyncio.Task[None] | None:
        """The task of the request at hand."""
        return self._task_handler

    @property
    def idle(self) -> bool:
        """Whether no request is being handled."""
        return self._task_handler is None

    def force_close(self) -> None:
        """Close; what was written still leaves."""
        self._closing = True
        self.flush()
        if self.transport is not None:
            self.transport.close()
            # A client that takes nothing more would never let it be closed.
            self._closer = self._closer or WriteTimeout(self, self._timeouts.client, self._abort)

    def _abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    @property
    def unsent(self) -> int:
        """How many bytes the client has not taken yet, those in the system's buffer included where it tells them."""
        if self.transport is None:
            return 0
        waiting = self.transport.get_write_buffer_size()
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError, ValueError):
                waiting += int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        return waiting

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 -- aiohttp's server calls it
        """Close, as aiohttp's server asks of its connections."""
        if self._task_handler is not None:
            self._task_handler.cancel()
        self.force_close()

    # -- what leaves -----------------------------------------------------------------------------------

    @property
    def gone(self) -> bool:
        """Whether nothing can be written any more."""
        return self.transport is None or self.transport.is_closing()

    def write(self, data: bytes) -> None:
        """Write to the client, unless it is gone."""
        if self._unsent:
            self.flush()
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def write_soon(self, data: bytes) -> None:
        """Write at the end of this turn of the loop, together with other connections; what follows stays behind it."""
        if self._unsent or len(data) > _SOON:
            self.write(data)
        else:
            self._unsent = data
            self._outbox.add(self)

    def flush(self) -> None:
        """Write what `write_soon` left."""
        if self._unsent:
            unsent, self._unsent = self._unsent, b""
            if self.transport is not None and not self.transport.is_closing():
                self.transport.write(unsent)

    # -- a WebSocket -----------------------------------------------------------------------------------

    def start_relay(self, take: Callable[[bytes], None], flow: Callable[[bool], None]) -> None:
        """Give what comes from now on to a relay."""
        self.flush()
        self._relay = take
        self.on_flow = flow
        data, self._buffer = self._buffer, b""
        self.release()
        if data:
            take(data)
        if self.writing_paused:
            flow(True)

    def stop_relay(self) -> None:
        """Give nothing to it any more."""
        self._relay = self.on_flow = None
        self._closing = True

    # -- what arrives ----------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Take what came: more of a body, or the next request."""
        arriving = self._arriving
        if arriving is not None:
            if arriving.unread:
                arriving.unread += data  # it was on its way when reading stopped
                return
            data = self._feed(arriving, data, LINES_AT_ONCE)
            if arriving.goes_on:
                FairScheduler.of(self._loop).add(self)
        if self._closing:
            self._discard(len(data))
            return
        if not data:
            return
        if self._buffer:
            data = self._buffer + data
        if self._task_handler is None:
            self._next(data)
            return
        if self._relay is not None:
            self._relay(data)
            return
        self._buffer = data
        if len(data) > _WAITING:
            self.hold()

    def step(self) -> bool:
        """Read more of what has come of a body in many chunks; see `fair_scheduler.ScheduledWork`."""
        arriving = self._arriving
        if arriving is None:
            return False
        extra = self._feed(arriving, arriving.unread, MOST_LINES)
        if arriving.done or not (arriving.unread or arriving.full):
            self.release()
        if extra:
            self.data_received(extra)
        return arriving.goes_on

    def _feed(self, arriving: IncomingBody, data: bytes, most: int) -> bytes:
        try:
            extra = arriving.feed(data, most)
        except MalformedMessage as exc:
            arriving.fail(malformed_request(str(exc)))
            extra = b""
        if arriving.error is not None:
            # What follows might be anything.
            self._closing = True
            arriving.unread = b""
        if arriving.done or self._closing:
            self._arriving = None
            if arriving.discarded:
                # Its answer is out already.
                self._after(keep=not self._closing)
        return extra

    def _discard(self, size: int) -> None:
        """Count what comes after all that is taken, and end a lingering close of too many bytes."""
        self._lingered += size
        if self._lingered > _MOST_LINGERED:
            self.force_close()

    def _next(self, data: bytes) -> None:
        """Begin the next request, if its head is there."""
        if data[:2] == b"\r\n":
            data = data[2:]  # RFC 9112, 2.2: an empty line before a request is ignored
        end = data.find(HEAD_END)
        if end < 0 or end > MAX_HEAD:
            self._wait_for_head(data)
            return
        try:
            head = self._heads.read(data[:end], self._limits.body)
        except ApiError as exc:
            self._refuse(exc)
            return
        if self._spare and head.path not in PROBES:
            self._refuse(_overloaded())
            return
        self._check = None
        end += 4
        length = head.length
        have = len(data) - end
        body: Body
        if length is not None and length <= have:
            body = Body(data[end : end + length], kept=False)
            self._buffer = data[end + length :]
        else:
            arriving = IncomingBody(
                self,
                self._loop,
                length=length,
                expects=head.expects,
                limit=self._limits.body,
                patience=self._timeouts.client,
                least=self._limits.body_rate,
            )
            body = Body(arriving, most=self._limits.form)
            self._buffer = b""
            self._arriving = arriving
            if have:
                self._buffer = self._feed(arriving, data[end:], LINES_AT_ONCE)
                if arriving.unread:
                    FairScheduler.of(self._loop).add(self)
            if arriving.error is not None:
                self._refuse(arriving.error)
                return
        self._head_begun = False
        self._deadline.clear()
        # Named, because the name that asyncio makes for each costs a tenth of the task.
        self._task_handler = asyncio.Task(self._run(IncomingRequest(self, head, body)), loop=self._loop, name="request")

    def _wait_for_head(self, data: bytes) -> None:
        """Keep the beginning of a head, unless it can never become one."""
        self._buffer = data
        if len(data) > MAX_HEAD:
            self._refuse(ApiError(431, f"the request's head is larger than {MAX_HEAD} bytes", code="head_too_large"))
            return
        self._check = self._check or HeadCheck()
        try:
            self._check.check(data)
        except ApiError as exc:
            self._refuse(exc)
            return
        if data and not self._head_begun:
            self._head_begun = True
            self._expect_in(self._timeouts.head)

    async def _run(self, arrived: IncomingRequest) -> None:
        keep = False
        try:
            keep = await self._handle(arrived)
        except ConnectionError:
            pass  # the client left while it was written to
        except asyncio.CancelledError:
            # A task keeps the exception that cancelled it, with its frames, which hold the task: a cycle, which would
            # keep the body and all else of the request until the collector finds it.
            pass
        except Exception as exc:
            facts = exception_fields(exc)
            facts.pop("message", None)
            get_logger().error("connection failed", **facts)
            if self.transport is not None:
                self.transport.abort()
        finally:
            self._task_handler = None
            self.on_flow = None
            self._after(keep and not self._closing)

    def _after(self, keep: bool) -> None:
        """Go on after an answer: with the next request, or to the end of the connection."""
        if self.transport is None:
            return
        arriving = self._arriving
        if arriving is not None:
            if keep and not self.ends_after_answer():
                arriving.discard()
                self._expect_in(_LINGER)
            else:
                self._linger()
        elif not keep:
            if self._closing:
                self._linger()
            else:
                self.force_close()
        else:
            self.release()
            self._expect_in(self._timeouts.keep_alive)
            if self._buffer:
                data, self._buffer = self._buffer, b""
                self._next(data)

    def ends_after_answer(self) -> bool:
        """Whether the connection cannot be kept after the answer, which should say so: too much is still to come."""
        arriving = self._arriving
        if arriving is None:
            return self._closing or self._spare
        return arriving.left > _SKIPPED or arriving.unasked or arriving.error is not None

    def _linger(self) -> None:
        """Close, once the client has had the time to read its answer."""
        self._closing = True
        self._arriving = None
        self._buffer = b""
        self.flush()
        if self.transport is None or self.transport.is_closing():
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.release()
            self._expect_in(_LINGER)
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer what is no request that can be handled, and close."""
        get_logger().info("refused before any team", status=error.status, error=error.code, reason=str(error))
        self.write(closing_response(error))
        if self._spare:
            self.force_close()  # its place is for the next probe
        else:
            self._linger()

    # -- how long it may take --------------------------------------------------------------------------

    def expire_in(self, seconds: float, expire: Callable[[], None]) -> None:
        """Call `expire` in `seconds`, unless `no_expiry` is called or the answer is over before."""
        self._deadline.set(seconds, expire)

    def no_expiry(self) -> None:
        """Forget what `expire_in` was told."""
        self._deadline.clear()

    def _expect_in(self, seconds: float) -> None:
        self._deadline.set(seconds, self._too_slow)

    def _too_slow(self) -> None:
        if self._head_begun and not self._closing:
            slow = ApiError(408, "the request's head took too long to arrive", code="request_timeout")
            self._refuse(_overloaded() if self._spare else slow)
        else:
            self.force_close()

    # -- flow ------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """Note that the client does not read fast enough."""
        super().pause_writing()
        if self.on_flow is not None:
            self.on_flow(True)

    def resume_writing(self) -> None:
        """Note that it does again."""
        super().resume_writing()
        if self.on_flow is not None:
            self.on_flow(False)

    def waits(self, waiting: bool) -> None:
        """Let the time of the answer not run while the client is waited for: it has its own limits."""
        if waiting:
            self._deadline.pause()
        else:
            self._deadline.resume()

    def say_continue(self) -> None:
        """Tell the client that its body is wanted."""
        self.write(_CONTINUE)

    # While reading is held, the event loop does not see a client leave: the socket's state is asked for instead.

    def hold(self, *, check_left: bool = True) -> None:
        """Stop reading from the client for now. With `check_left`, close when it leaves, and drop its unread bytes."""
        if self.transport is None:
            return
        if not self._held:
            self._held = True
            self.transport.pause_reading()
        if check_left and self._leave_timer is None:
            self._leave_timer = self._loop.call_later(_LEAVE_CHECK, self._check_left)
        elif not check_left and self._leave_timer is not None:
            self._leave_timer.cancel()
            self._leave_timer = None

    def release(self) -> None:
        """Go on taking: first what is left of the last read, then from the client."""
        if self._held:
            if self._arriving is not None and self._arriving.unread:
                FairScheduler.of(self._loop).add(self)
                return
            self._held = False
            if self._leave_timer is not None:
                self._leave_timer.cancel()
                self._leave_timer = None
            if self.transport is not None and not self.transport.is_closing():
                self.transport.resume_reading()

    def _check_left(self) -> None:
        self._leave_timer = None
        if self.transport is None:
            return
        if _peer_closed(self.transport.get_extra_info("socket")):
            self.transport.abort()
        else:
            self._leave_timer = self._loop.call_later(_LEAVE_CHECK, self._check_left)


def _overloaded() -> ApiError:
    return ApiError(503, "the gateway's connection limit is reached; try again in a moment", code="overloaded")


def _peer_closed(sock: socket.socket | None) -> bool:
    """Whether the other end of a TCP connection has closed it, whatever is still unread; Linux knows."""
    tcp_info = getattr(socket, "TCP_INFO", None)
    if sock is None or tcp_info is None or sock.family == socket.AF_UNIX:
        return False
    try:
        state = sock.getsockopt(socket.IPPROTO_TCP, tcp_info, 1)[0]
    except OSError:
        return True
    return state not in (_ESTABLISHED, _SYN_RECEIVED)
