"""One client's connection: when it is closed on, and how a request's body is read from it.

aiohttp parses requests and keeps the connection; what it does not watch is watched here: heads that never
end, bodies that stop, malformed requests (whose text may hold keys and is never logged or echoed).
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from gateway.answer import CLOSE, closing_answer
from gateway.errors import ApiError
from gateway.exchange import failure
from gateway.logs import get_logger
from gateway.settings import Limits, Timeouts

__all__ = ("Arrived", "ClientBody", "Connection", "too_large")

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# A chunked body may take this many bytes on the wire, and this many for each byte of its own.
_FRAMING = 4096
_FRAMING_SHARE = 16
# How often, in seconds, a connection that is not read from is asked whether its client is still there.
_LEAVE_CHECK = 0.5
# States of a TCP connection that the other end has not closed (linux/tcp_states.h).
_ESTABLISHED, _SYN_RECEIVED = 1, 3


class Arrived:
    """A request as aiohttp hands it over: the parsed head, the body's stream, the connection.

    It stands in for aiohttp's BaseRequest, of which the server protocol uses `_finish` and `_cancel` alone.
    """

    __slots__ = ("_task", "connection", "message", "payload")

    def __init__(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        connection: RequestHandler,
        _writer: object,
        _task: object,
    ) -> None:
        self.message = message
        self.payload = payload
        self.connection = cast(Connection, connection)
        self._task = None

    def _finish(self) -> None:
        pass

    def _cancel(self, exc: BaseException) -> None:
        if not self.payload.is_eof():
            self.payload.set_exception(exc)


class Connection(RequestHandler):
    """aiohttp's server protocol, with the deadlines and the manners that it lacks."""

    __slots__ = ("_chunked", "_framing", "_head_timer", "_leave_timer", "_limits", "_timeouts")

    def __init__(
        self,
        manager: Any,
        *,
        loop: asyncio.AbstractEventLoop,
        limits: Limits,
        timeouts: Timeouts,
        **settings: Any,
    ) -> None:
        super().__init__(manager, loop=loop, **settings)
        self._limits = limits
        self._timeouts = timeouts
        self._head_timer: asyncio.TimerHandle | None = None
        self._leave_timer: asyncio.TimerHandle | None = None
        self._chunked: StreamReader | None = None  # a chunked body that is arriving
        self._framing = 0  # the bytes it took on the wire

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a first request, unless there are too many connections."""
        super().connection_made(transport)
        manager = self._manager
        if manager is not None and len(manager.connections) > self._limits.connections:
            self._refuse(503, "the gateway has as many connections as it may; try again", "overloaded")
            return
        self._head_timer = self._loop.call_later(self._timeouts.head, self._head_too_slow)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Let go of what waits."""
        self._stop_head_timer()
        self._stop_leave_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, and keep the head's deadline in step with it."""
        super().data_received(data)
        if self._messages:
            self._stop_head_timer()
            message, payload = self._messages[-1]
            current = self._current_request
            if isinstance(message, _ErrInfo):
                if current is not None:
                    # What follows the head is no body: whoever is reading it must not wait for the rest.
                    current._cancel(HttpProcessingError(message="malformed body"))
                return
            if message.chunked:
                self._chunked = payload
                self._framing = len(data) - _head_size(message)
        elif self._chunked is not None:
            self._framing += len(data)
        elif self._head_timer is None and self.idle and not self._force_close:
            self._head_timer = self._loop.call_later(self._timeouts.head, self._head_too_slow)
        if self._chunked is not None:
            self._watch_framing(self._chunked)

    def _watch_framing(self, payload: StreamReader) -> None:
        """Refuse a chunked body that is nearly all chunk extensions, zeros and trailers."""
        if self._framing > _FRAMING + _FRAMING_SHARE * payload.total_bytes:
            self._chunked = None
            payload.set_exception(HttpProcessingError(message="more framing than body"))
            self._refuse(400, "the body's chunks are nearly all framing", "malformed_request")
        elif payload.is_eof():
            self._chunked = None

    # While reading is paused (an upload that Azure does not take, very many pipelined requests) the event loop does
    # not see a client leave: the socket's state is asked for instead.

    def _pause_transport_reading(self) -> None:
        super()._pause_transport_reading()
        if self._leave_timer is None:
            self._leave_timer = self._loop.call_later(_LEAVE_CHECK, self._check_left)

    def _resume_transport_reading(self) -> None:
        self._stop_leave_timer()
        super()._resume_transport_reading()

    def _stop_leave_timer(self) -> None:
        if self._leave_timer is not None:
            self._leave_timer.cancel()
            self._leave_timer = None

    def _check_left(self) -> None:
        self._leave_timer = None
        if self.transport is None:
            return
        if _peer_closed(self.transport.get_extra_info("socket")):
            self.transport.abort()
        else:
            self._leave_timer = self._loop.call_later(_LEAVE_CHECK, self._check_left)

    @property
    def idle(self) -> bool:
        """Whether no request is being handled."""
        return self._waiter is not None and not self._waiter.done()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_too_slow(self) -> None:
        self._head_timer = None
        if self.idle:
            self._refuse(408, "the request's head took too long to arrive", "request_timeout")

    def _refuse(self, status: int, message: str, code: str) -> None:
        # Where an answer is on its way already, a second head would be read as a part of it.
        if self.transport is not None and self._current_request is None:
            self.transport.write(closing_answer(ApiError(status, message, code=code)))
        self.force_close()

    def handle_error(
        self,
        request: Any,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a request that could not be parsed; its text, which may hold keys, goes nowhere."""
        get_logger().info("malformed request", error=type(exc).__name__)
        if isinstance(exc, LineTooLong):
            answer = ApiError(431, "a line of the request's head is too long", code="head_too_large")
        else:
            answer = ApiError(400, "this is not a valid HTTP/1.1 request", code="malformed_request")
        if self.transport is not None:
            self.transport.write(closing_answer(answer))
        return CLOSE

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        """Log what escaped every handler, by its kind only."""
        exc = kwargs.get("exc_info")
        facts = failure(exc) if isinstance(exc, BaseException) else {}
        facts.pop("message", None)
        get_logger().error("connection failed", **facts)


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


def _head_size(message: RawRequestMessage) -> int:
    """Return about how many bytes a head took."""
    return len(message.path) + 16 + sum(len(name) + len(value) + 4 for name, value in message.raw_headers)


class ClientBody:
    """The body that a client is still sending. Reading it says `100 Continue` where that is awaited."""

    __slots__ = ("_arrived", "_expects", "_limit", "_seen", "_timeout", "length")

    def __init__(self, arrived: Arrived, *, length: int | None, expects: bool, limit: int, timeout: float) -> None:
        self.length = length
        self._arrived = arrived
        self._expects = expects
        self._limit = limit
        self._timeout = timeout
        self._seen = 0

    async def read(self) -> bytes:
        """Return the next bytes, or b"" at the end.

        Raises ApiError: 408 where the client stops sending, 413 where the body is too large, 400 where it
        is malformed.
        """
        payload = self._arrived.payload
        if self._expects:
            self._expects = False
            if (transport := self._arrived.connection.transport) is not None:
                transport.write(_CONTINUE)
        try:
            if payload.is_eof():
                chunk = await payload.readany()
            else:
                async with asyncio.timeout(self._timeout):
                    chunk = await payload.readany()
        except TimeoutError:
            raise ApiError(408, f"no more of the body came for {self._timeout:g} s", code="request_timeout") from None
        except asyncio.CancelledError:
            raise
        except Exception:
            raise ApiError(400, "the body is malformed or broke off", code="malformed_request") from None
        self._seen += len(chunk)
        if self._seen > self._limit:
            raise too_large(self._limit)
        return chunk


def too_large(limit: int) -> ApiError:
    """Return the error for a body above the limit."""
    return ApiError(413, f"the body is larger than the {limit} bytes this gateway takes", code="body_too_large")
