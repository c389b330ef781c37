"""Writing one answer to a client: its head, its body through the filters, and an end that says how it ended.

Nothing else writes to clients, so that no second head can get out, least of all into a stream.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, cast

from gateway.azure.key_redaction import secrets_of
from gateway.errors import ApiError, StreamBroken, UpstreamError
from gateway.limits.memory_budget import UNCOUNTED, BudgetExhausted
from gateway.logs import exception_fields, get_logger, redacted
from gateway.protocol.header_policy import WRITTEN
from gateway.protocol.sse import EventFilter, FilterChain, FilterFailed, chain_filters, unfinished_event
from gateway.response import Response, check_body
from gateway.transport.pacing import Pacer
from gateway.transport.response_head import date_line, status_line
from gateway.transport.upstream_connection import UpstreamResponse
from gateway.transport.websocket_handshake import WebSocket, accepted, chosen_protocol, offered_protocols
from gateway.transport.websocket_relay import WebSocketRelay
from gateway.transport.write_timeout import WriteTimeout

if TYPE_CHECKING:
    from gateway.exchange import Exchange
    from gateway.settings import Limits, Timeouts
    from gateway.transport.client_connection import ClientConnection, IncomingRequest

__all__ = (
    "ClientDisconnected",
    "note_end",
    "write_response",
)

_LAST_CHUNK = b"0\r\n\r\n"
# Their responses have no body (RFC 9110, 15.3.5, 15.3.6, 15.4.5), and that of a 204 no Content-Length either (8.6).
_WITHOUT_BODY = (204, 205, 304)


class ClientDisconnected(Exception):
    """The client left, or did not take what was sent to it in time."""


async def write_response(
    arrived: IncomingRequest,
    response: Response,
    exchange: Exchange,
    *,
    request_id: str,
    close: bool,
    timeouts: Timeouts,
    limits: Limits,
) -> bool:
    """Write an answer and its whole body; returns whether the connection goes on.

    The bytes, the times and who ended it are noted on the exchange. A stream that breaks ends with an SSE
    `error` event, where it is one, and never with the last chunk, so that nobody takes it for whole.
    """
    connection, request = arrived.connection, arrived.head
    old = request.old
    close = close or request.close or connection.ends_after_answer()
    if isinstance(opened := response.body, WebSocket):
        try:
            _check_socket(response)
        except TypeError as exc:
            response = _unreadable(exc, _secrets(arrived, exchange), request_id)
        else:
            return await _relay(arrived, response, opened, exchange, request_id, timeouts, limits)
    linked: FilterChain | None = None
    patience = timeouts.client
    try:
        if old and not response.is_event_stream and _over_unix_socket(connection):
            # There the end of the connection is all that ends a body, and it cannot be told from a break.
            await response.read()
        body = cast("bytes | AsyncIterator[bytes]", response.body)
        _check(response)
        if response.filters:
            linked = chain_filters(response.filters, response.headers.get("content-encoding"))
            response.headers.remove("content-encoding")
            if isinstance(body, bytes):
                body = linked.whole(body)
    except Exception as exc:
        response = _unreadable(exc, _secrets(arrived, exchange), request_id)
        body = cast(bytes, response.body)
    exchange.status = response.status
    no_body = request.method == "HEAD" or response.status in _WITHOUT_BODY
    if isinstance(body, bytes):
        head = _head(response, request_id, close=close, chunked=False, length=None if no_body else len(body))
        _write(connection, exchange, head, b"" if no_body else body)
        if connection.writing_paused:
            await _drained(connection, exchange, patience)
        note_end(exchange, response.error)
        return not close
    chunked = not old and not no_body and "content-length" not in response.headers
    writer = _Writer(connection, exchange, patience, linked, chunked=chunked, pace=response.pace)
    try:
        _write(connection, exchange, _head(response, request_id, close=close, chunked=chunked, length=None), b"")
        if not no_body:
            await writer.stream(body)
    except ClientDisconnected:
        raise
    except asyncio.CancelledError:
        if writer.ended and connection.transport is not None and (task := asyncio.current_task()) is not None:
            # All is written: nothing may follow it, and the answer is whole for whoever takes the rest.
            task.uncancel()
            note_end(exchange, response.error)
            return False
        if connection.transport is not None:
            # The gateway ends this, not the client: it is told.
            stopped = ApiError(503, "the gateway is stopping and cut this answer off", code="shutting_down")
            _break_off(writer, response, stopped, exchange, [], request_id, old=old)
        raise
    except Exception as exc:
        _break_off(writer, response, exc, exchange, _secrets(arrived, exchange), request_id, old=old)
        return False
    finally:
        if (aclose := getattr(body, "aclose", None)) is not None:
            await aclose()
    note_end(exchange, response.error)
    return not close


def _check(response: Any) -> None:
    """Refuse what a stage without types may have made of a response."""
    if not isinstance(response.status, int):
        raise TypeError(f"a stage set the status {response.status!r}, which is no number")
    if response.status == 101:
        raise TypeError("a stage answered with status 101 and no WebSocket")
    check_body(response.body)


def _check_socket(response: Response) -> None:
    """Refuse what cannot be done with a WebSocket."""
    if response.status != 101:
        raise TypeError(f"a stage gave a WebSocket the status {response.status}")
    if not all(isinstance(each, EventFilter) for each in response.filters):
        raise TypeError("a stage put a filter on a WebSocket that is no event filter")


async def _relay(
    arrived: IncomingRequest,
    response: Response,
    socket: WebSocket,
    exchange: Exchange,
    request_id: str,
    timeouts: Timeouts,
    limits: Limits,
) -> bool:
    """Tell the client that its WebSocket is open, and relay it to its end; the connection ends with it."""
    connection = arrived.connection
    relay = WebSocketRelay(
        connection,
        socket.wire,
        exchange,
        request_id,
        up=socket.up,
        down=[each for each in response.filters if isinstance(each, EventFilter)],
        most=limits.body,
        ping=timeouts.ping,
        patience=(timeouts.client, timeouts.idle),
        hidden=_secrets(arrived, exchange),
        watch=socket.watch,
    )
    response.headers.remove("content-length")  # RFC 9110, 8.6
    for name, value in (
        ("connection", "Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-accept", accepted(arrived.headers.get("sec-websocket-key") or "").decode()),
        ("sec-websocket-protocol", chosen_protocol(offered_protocols(arrived.headers), socket.protocol)),
    ):
        if value is not None:
            response.headers.set(name, value)
    exchange.status = response.status
    _write(connection, exchange, _head(response, request_id, close=False, chunked=False, length=None), b"")
    try:
        await relay.run()
        note_end(exchange, None)
    except ApiError as exc:
        note_end(exchange, exc)
    finally:
        socket.ended = True
    if connection.writing_paused:
        await _drained(connection, exchange, timeouts.client)
    return False


def note_end(exchange: Exchange, error: BaseException | None) -> None:
    """Note who ended an exchange, given what went wrong with it, if anything did."""
    if error is None:
        exchange.ended_by = "complete"
        return
    exchange.ended_by = "upstream" if isinstance(error, UpstreamError) else "gateway"
    exchange.error = (error.code or error.type) if isinstance(error, ApiError) else type(error).__name__
    exchange.reason = error.message if isinstance(error, ApiError) else None


def _write(connection: ClientConnection, exchange: Exchange, before: bytes, data: bytes) -> None:
    """Write `data` of the body behind `before`. Raises ClientGone where the client has left."""
    if connection.gone:
        raise ClientDisconnected
    connection.write_soon(before + data)
    if exchange.first_byte_at is None:
        exchange.first_byte_at = time.monotonic()
    exchange.sent += len(data)


async def _drained(connection: ClientConnection, exchange: Exchange, patience: float) -> None:
    """Wait until the client has taken enough. Raises ClientGone where it takes nothing for too long, or leaves."""
    waiting = WriteTimeout(connection, patience, lambda: _give_up(connection, exchange))
    try:
        await connection._drain_helper()
    except ConnectionError:
        raise ClientDisconnected from None
    finally:
        waiting.cancel()


def _give_up(connection: ClientConnection, exchange: Exchange) -> None:
    """Close on a client that does not read; the loss of its connection ends the rest."""
    exchange.error = "client_not_reading"
    if connection.transport is not None:
        connection.transport.abort()


class _Writer:
    """Writes one answer to one client, counting.

    A client that does not read is waited for: where the body is pumped from Azure, Azure is told to wait.
    """

    __slots__ = (
        "_exchange",
        "_held",
        "_linked",
        "_pacer",
        "_patience",
        "_pumped",
        "_waiting",
        "chunked",
        "connection",
        "ended",
        "tail",
    )

    def __init__(
        self,
        connection: ClientConnection,
        exchange: Exchange,
        patience: float,
        linked: FilterChain | None = None,
        *,
        chunked: bool = False,
        pace: float | None = None,
    ) -> None:
        self.connection = connection
        self.tail = b""
        self._exchange = exchange
        self._patience = patience
        self._linked = linked
        self._held = 0  # bytes of an event that has not ended, as far as they are counted
        self.chunked = chunked
        self._pumped: UpstreamResponse | None = None
        self._waiting: WriteTimeout | None = None  # for a client that takes nothing
        self.ended = False
        self._pacer = Pacer(pace, self._put, asyncio.get_running_loop()) if pace is not None else None

    def _put(self, data: bytes, after: bytes = b"") -> None:
        """Write a piece of a stream, framed."""
        if self.connection.gone:
            raise ClientDisconnected
        self._exchange.sent += len(data)
        self.connection.write(b"%x\r\n%b\r\n%b" % (len(data), data, after) if self.chunked else data)
        self.tail = data[-4:] if len(data) >= 4 else (self.tail + data)[-4:]

    def _take(self, chunk: bytes) -> None:
        """Pass a piece on: the one way of every streamed byte."""
        if self._linked is not None:
            try:
                chunk = self._linked.feed(chunk)
            except FilterFailed as exc:
                self._pass(exc.left)
                raise exc.cause from None
            if not chunk or self._held:
                self._hold_kept(self._linked.kept)
        self._pass(chunk)

    def _hold_kept(self, kept: int) -> None:
        """Count the bytes of a large event that has not ended. Raises ApiError 503 where too many are held."""
        kept = kept if kept > UNCOUNTED else 0
        if kept > self._held:
            try:
                self._exchange.reserve_memory(kept - self._held)
            except BudgetExhausted:
                full = "an event of this answer is larger than the memory that the gateway has left for it"
                raise ApiError(503, f"{full}; try again in a moment", code="overloaded") from None
        else:
            self._exchange.release_memory(self._held - kept)
        self._held = kept

    def _pass(self, chunk: bytes) -> None:
        if chunk:
            if self._pacer is None:
                self._put(chunk)
            else:
                self._pacer.take(chunk)

    async def stream(self, body: AsyncIterator[bytes]) -> None:
        """Write a whole body, and its end. Raises what its source raises, and ClientGone."""
        if isinstance(body, UpstreamResponse) or self._pacer is not None:
            await self._drained()  # what came before may not be taken yet
            self.connection.on_flow = self._flow
        try:
            if isinstance(body, UpstreamResponse):
                self._pumped = body
                await body.pump(self._take)
            else:
                async for chunk in body:
                    self._take(chunk)
                    await self._drained()
            left = self._closed()
            if self._pacer is not None:
                if left:
                    self._pacer.take(left)
                left = b""
                await self._end_pacing(self._pacer)
        except BaseException:
            if self._pacer is not None and not self.connection.gone:
                self._pacer.flush()  # what came before it broke is the client's
            raise
        finally:
            self.connection.on_flow = None
            self._stop_waiting()
            if self._pacer is not None:
                self._pacer.stop()
        if left:
            self._put(left, _LAST_CHUNK if self.chunked else b"")
        elif self.chunked:
            _write(self.connection, self._exchange, _LAST_CHUNK, b"")
        self.ended = True
        await self._drained()

    async def _end_pacing(self, pacer: Pacer) -> None:
        """Wait until the last event has left; a gateway that stops lets them leave at once, and the answer is whole."""
        try:
            await pacer.end()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.connection.gone or task is None:
                raise
            task.uncancel()
            pacer.flush()

    def _closed(self) -> bytes:
        """Return what the filters leave at the end."""
        if self._linked is None:
            return b""
        try:
            return self._linked.close()
        except FilterFailed as exc:
            self._pass(exc.left)
            raise exc.cause from None

    def cut(self) -> None:
        """Write what the filters kept of a stream that broke."""
        if self._linked is not None and (left := self._linked.cut()):
            self._put(left)

    async def _drained(self) -> None:
        if self.connection.writing_paused:
            await _drained(self.connection, self._exchange, self._patience)

    def _flow(self, paused: bool) -> None:
        """Let Azure wait for a client that does not read fast enough, but not for ever."""
        self._stop_waiting()
        if paused:
            self._waiting = WriteTimeout(
                self.connection, self._patience, lambda: _give_up(self.connection, self._exchange)
            )
        if self._pumped is not None:
            (self._pumped.hold if paused else self._pumped.release)()
        if self._pacer is not None:
            (self._pacer.hold if paused else self._pacer.release)()

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


def _break_off(
    writer: _Writer,
    response: Response,
    exc: Exception,
    exchange: Exchange,
    hidden: list[str],
    request_id: str,
    *,
    old: bool,
) -> None:
    """End a stream that cannot go on so that it is seen to be broken."""
    note_end(exchange, exc)
    if isinstance(exc, ApiError):
        error = exc
    elif isinstance(exc, StreamBroken):
        error = ApiError(502, str(exc))  # Azure's fault, and no bug
    else:
        error = _our_fault(502, "stream", request_id)
        get_logger().error(
            "a filter or a stage's stream failed", request_id=request_id, **redacted(exception_fields(exc), hidden)
        )
    connection = writer.connection
    transport = connection.transport
    if transport is None or transport.is_closing():
        return
    if response.is_event_stream:
        writer.cut()
        event = unfinished_event(writer.tail) + b"data: " + error.body() + b"\n\n"
        connection.write(b"%x\r\n%b\r\n" % (len(event), event) if writer.chunked else event)
        exchange.sent += len(event)
    connection.flush()
    if old:
        # Without chunks the end of the connection is the end of the body: only a reset says it is broken.
        if not _over_unix_socket(writer.connection):
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()


def _secrets(arrived: IncomingRequest, exchange: Exchange) -> list[str]:
    return secrets_of(arrived.headers, exchange.target)


def _over_unix_socket(connection: ClientConnection) -> bool:
    sock = connection.transport.get_extra_info("socket") if connection.transport is not None else None
    return sock is not None and sock.family == socket.AF_UNIX


def _our_fault(status: int, what: str, request_id: str) -> ApiError:
    return ApiError(
        status, f"the gateway failed on this {what}. Contact its operator and quote request id {request_id}"
    )


def _unreadable(exc: Exception, hidden: list[str], request_id: str) -> Response:
    """Return the answer in place of a body that could not be had, or that the filters could not take."""
    if isinstance(exc, ApiError):
        return Response.from_error(exc)
    if isinstance(exc, StreamBroken):
        return Response.from_error(ApiError(502, str(exc)))
    get_logger().error("a filter failed", request_id=request_id, **redacted(exception_fields(exc), hidden))
    return Response.from_error(_our_fault(500, "response", request_id))


def _head(response: Response, request_id: str, *, close: bool, chunked: bool, length: int | None) -> bytes:
    fields = response.headers.fields
    lines = [status_line(response.status)]
    lines += [field[2] for field in fields if not field[3] & WRITTEN]
    dated = events = buffering = False
    for name, value, line, _ in [field for field in fields if field[3] & WRITTEN]:
        if name == b"content-type":
            lines.append(line)
            events = True
        elif name == b"content-length":
            if length is None and response.status not in (204, 205):
                lines.append(line)
        elif name == b"x-request-id":
            # Ours is the one that the log names; Azure's stays to be had.
            lines.append(b"x-azure-request-id: " + value)
        else:
            lines.append(line)
            dated = dated or name == b"date"
            buffering = buffering or name == b"x-accel-buffering"
    if response.status == 205:
        lines.append(b"content-length: 0")
    elif length is not None:
        lines.append(b"content-length: %d" % length)
    elif chunked:
        lines.append(b"transfer-encoding: chunked")
    if events and not buffering and response.is_event_stream:
        # nginx sends events on at once when it sees this, whatever its own settings.
        lines.append(b"x-accel-buffering: no")
    if not dated:
        lines.append(date_line())
    if close:
        lines.append(b"connection: close")
    lines.append(b"x-request-id: %b\r\n\r\n" % request_id.encode())
    return b"\r\n".join(lines)
