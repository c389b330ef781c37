"""The response writer: writes a response's head and body to the client, and ends it as complete or as broken.

No other code writes responses of exchanges. So no second head can follow the first, or end up in a stream.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, cast

from gateway.azure.key_redaction import secrets_of
from gateway.errors import ApiError, StreamBroken, UpstreamError
from gateway.logs import exception_fields, get_logger, redacted
from gateway.protocol.filters import EventFilter, FilterChain, chain_filters
from gateway.protocol.header_policy import MANAGED
from gateway.protocol.media_type import EVENT_STREAM, cached_media_type
from gateway.protocol.sse import unfinished_event
from gateway.response import Response, check_body
from gateway.stream_writer import ClientDisconnected, StreamWriter, drain, write_counted
from gateway.transport.response_head import date_line, status_line
from gateway.transport.websocket_handshake import WebSocket, accept_value, offered_protocols, select_protocol
from gateway.transport.websocket_relay import WebSocketRelay

if TYPE_CHECKING:
    from gateway.exchange import Exchange
    from gateway.settings import Limits, Timeouts
    from gateway.transport.client_connection import ClientConnection, IncomingRequest

__all__ = ("note_end", "write_response")

# Statuses without a body (RFC 9110, 15.3.5, 15.3.6, 15.4.5); a 204 has no Content-Length either (8.6).
_WITHOUT_BODY = (204, 205, 304)


async def write_response(
    incoming: IncomingRequest,
    response: Response,
    exchange: Exchange,
    *,
    request_id: str,
    close: bool,
    timeouts: Timeouts,
    limits: Limits,
) -> bool:
    """Write a response and its whole body; returns whether the connection is kept alive.

    Records the bytes, the times and the end on the exchange. A broken stream ends with an SSE `error` event if it is an
    event stream, and never with the last chunk, so that no client takes it for complete.
    """
    connection, request = incoming.connection, incoming.head
    http_1_0 = request.http10
    close = close or request.close or connection.closes_after_response()
    if isinstance(websocket := response.body, WebSocket):
        try:
            _check_websocket(response)
        except TypeError as exc:
            response = _failed_response(exc, _secrets(incoming, exchange), request_id)
        else:
            return await _relay_websocket(incoming, response, websocket, exchange, request_id, timeouts, limits)
    filters: FilterChain | None = None
    try:
        if http_1_0 and not response.is_event_stream and _over_unix_socket(connection):
            # Only the end of the connection ends such a body, and on a Unix socket it looks the same if it broke.
            await response.read()
        body = cast("bytes | AsyncIterator[bytes]", response.body)
        _check_response(response)
        if response.filters:
            filters = chain_filters(response.filters, response.headers.get("content-encoding"))
            response.headers.remove("content-encoding")
            if isinstance(body, bytes):
                body = filters.whole(body)
    except Exception as exc:
        response = _failed_response(exc, _secrets(incoming, exchange), request_id)
        body = cast(bytes, response.body)
    exchange.status = response.status
    no_body = request.method == "HEAD" or response.status in _WITHOUT_BODY
    if isinstance(body, bytes):
        head = _response_head(response, request_id, close=close, chunked=False, length=None if no_body else len(body))
        write_counted(connection, exchange, head, b"" if no_body else body)
        if connection.writing_paused:
            await drain(connection, exchange, timeouts.client)
        note_end(exchange, response.error)
        return not close
    chunked = not http_1_0 and not no_body and "content-length" not in response.headers
    writer = StreamWriter(connection, exchange, timeouts.client, filters, chunked=chunked, pace=response.pace)
    try:
        head = _response_head(response, request_id, close=close, chunked=chunked, length=None)
        write_counted(connection, exchange, head, b"")
        if not no_body:
            await writer.stream(body)
    except ClientDisconnected:
        raise
    except asyncio.CancelledError:
        if writer.ended and connection.transport is not None and (task := asyncio.current_task()) is not None:
            # The whole response is written. It is complete, and nothing may follow it.
            task.uncancel()
            note_end(exchange, response.error)
            return False
        if connection.transport is not None:
            # The gateway ends the stream, not the client: say so.
            stopped = ApiError(503, "the gateway is shutting down and ended this response; retry", code="shutting_down")
            _abort_stream(writer, response, stopped, exchange, [], request_id, http_1_0=http_1_0)
        raise
    except Exception as exc:
        _abort_stream(writer, response, exc, exchange, _secrets(incoming, exchange), request_id, http_1_0=http_1_0)
        return False
    finally:
        if (aclose := getattr(body, "aclose", None)) is not None:
            await aclose()
    note_end(exchange, response.error)
    return not close


def _check_response(response: Any) -> None:
    """Check the types of a response: a stage without type hints may have set anything."""
    if not isinstance(response.status, int):
        raise TypeError(f"a stage set the status {response.status!r}, which is not a number")
    if response.status == 101:
        raise TypeError("a stage returned status 101 without a WebSocket")
    check_body(response.body)


def _check_websocket(response: Response) -> None:
    """Check the status and the filters of a WebSocket's response."""
    if response.status != 101:
        raise TypeError(f"a stage returned a WebSocket with status {response.status}, not 101")
    if not all(isinstance(each, EventFilter) for each in response.filters):
        raise TypeError("a stage added a filter to a WebSocket that is not an EventFilter")


async def _relay_websocket(
    incoming: IncomingRequest,
    response: Response,
    websocket: WebSocket,
    exchange: Exchange,
    request_id: str,
    timeouts: Timeouts,
    limits: Limits,
) -> bool:
    """Accept the client's WebSocket, and relay it until it closes; returns False, as the connection closes with it."""
    connection = incoming.connection
    relay = WebSocketRelay(
        connection,
        websocket.upstream,
        exchange,
        request_id,
        up=websocket.up,
        down=[each for each in response.filters if isinstance(each, EventFilter)],
        max_message=limits.body,
        ping_interval=timeouts.ping,
        client_timeout=timeouts.client,
        idle_timeout=timeouts.idle,
        secrets=_secrets(incoming, exchange),
        watch=websocket.watch,
    )
    response.headers.remove("content-length")  # RFC 9110, 8.6
    for name, value in (
        ("connection", "Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-accept", accept_value(incoming.headers.get("sec-websocket-key") or "").decode()),
        ("sec-websocket-protocol", select_protocol(offered_protocols(incoming.headers), websocket.protocol)),
    ):
        if value is not None:
            response.headers.set(name, value)
    exchange.status = response.status
    head = _response_head(response, request_id, close=False, chunked=False, length=None)
    write_counted(connection, exchange, head, b"")
    try:
        await relay.run()
        note_end(exchange, None)
    except ApiError as exc:
        note_end(exchange, exc)
    finally:
        websocket.ended = True
    if connection.writing_paused:
        await drain(connection, exchange, timeouts.client)
    return False


def note_end(exchange: Exchange, error: BaseException | None) -> None:
    """Record which side ended an exchange, and why if it failed."""
    if error is None:
        exchange.ended_by = "complete"
        return
    exchange.ended_by = "upstream" if isinstance(error, UpstreamError) else "gateway"
    exchange.error = (error.code or error.type) if isinstance(error, ApiError) else type(error).__name__
    exchange.reason = error.message if isinstance(error, ApiError) else None


def _abort_stream(
    writer: StreamWriter,
    response: Response,
    exc: Exception,
    exchange: Exchange,
    hidden: list[str],
    request_id: str,
    *,
    http_1_0: bool,
) -> None:
    """End a stream after an error, in a way that the client detects."""
    note_end(exchange, exc)
    if isinstance(exc, ApiError):
        error = exc
    elif isinstance(exc, StreamBroken):
        error = ApiError(502, str(exc))  # an error of Azure, not a bug
    else:
        error = _internal_error(502, "stream", request_id)
        get_logger().error("stream_failed", request_id=request_id, **redacted(exception_fields(exc), hidden))
    connection = writer.connection
    transport = connection.transport
    if transport is None or transport.is_closing():
        return
    if response.is_event_stream:
        writer.flush_filters()
        event = unfinished_event(writer.tail) + b"data: " + error.body() + b"\n\n"
        connection.write(b"%x\r\n%b\r\n" % (len(event), event) if writer.chunked else event)
        exchange.sent += len(event)
    connection.flush()
    if http_1_0:
        # Without chunked framing, the end of the connection ends the body: only an RST shows that it is broken.
        if not _over_unix_socket(writer.connection):
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()


def _secrets(incoming: IncomingRequest, exchange: Exchange) -> list[str]:
    return secrets_of(incoming.headers, exchange.target)


def _over_unix_socket(connection: ClientConnection) -> bool:
    sock = connection.transport.get_extra_info("socket") if connection.transport is not None else None
    return sock is not None and sock.family == socket.AF_UNIX


def _internal_error(status: int, what: str, request_id: str) -> ApiError:
    return ApiError(
        status, f"the gateway failed on this {what}. Contact its operator and quote request id {request_id}"
    )


def _failed_response(exc: Exception, hidden: list[str], request_id: str) -> Response:
    """Return the error response for a body that could not be read, or that a filter failed on."""
    if isinstance(exc, ApiError):
        return Response.from_error(exc)
    if isinstance(exc, StreamBroken):
        return Response.from_error(ApiError(502, str(exc)))
    get_logger().error("filter_failed", request_id=request_id, **redacted(exception_fields(exc), hidden))
    return Response.from_error(_internal_error(500, "response", request_id))


def _response_head(response: Response, request_id: str, *, close: bool, chunked: bool, length: int | None) -> bytes:
    fields = response.headers.fields
    lines = [status_line(response.status)]
    lines += [field[2] for field in fields if not field[3] & MANAGED]
    has_date = is_event_stream = has_buffering = False
    for name, value, line, _ in [field for field in fields if field[3] & MANAGED]:
        if name == b"content-type":
            lines.append(line)
            is_event_stream = cached_media_type(value) == EVENT_STREAM
        elif name == b"content-length":
            if length is None and response.status not in (204, 205):
                lines.append(line)
        elif name == b"x-request-id":
            # The log names the gateway's id; Azure's is kept under another name.
            lines.append(b"x-azure-request-id: " + value)
        else:
            lines.append(line)
            has_date = has_date or name == b"date"
            has_buffering = has_buffering or name == b"x-accel-buffering"
    if response.status == 205:
        lines.append(b"content-length: 0")
    elif length is not None:
        lines.append(b"content-length: %d" % length)
    elif chunked:
        lines.append(b"transfer-encoding: chunked")
    if is_event_stream and not has_buffering:
        # Makes nginx forward events immediately, whatever its settings.
        lines.append(b"x-accel-buffering: no")
    if not has_date:
        lines.append(date_line())
    if close:
        lines.append(b"connection: close")
    lines.append(b"x-request-id: %b\r\n\r\n" % request_id.encode())
    return b"\r\n".join(lines)
