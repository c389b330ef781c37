"""Writing one answer to a client: its head, its body through the filters, and an end that says how it ended.

Nothing else writes to clients, so that no second head can get out, least of all into a stream.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

from aiohttp import web
from aiohttp.http_writer import HttpVersion10

from gateway.errors import ApiError, StreamBroken, UpstreamError
from gateway.exchange import failure
from gateway.headers import Headers
from gateway.keys import secrets
from gateway.logs import get_logger, masked
from gateway.messages import Response, check_body
from gateway.stream import Linked, link, unfinished_event

if TYPE_CHECKING:
    from gateway.connection import Arrived, Connection
    from gateway.exchange import Exchange

__all__ = (
    "CLOSE",
    "KEEP_ALIVE",
    "ClientGone",
    "closing_answer",
    "write_answer",
)

_LAST_CHUNK = b"0\r\n\r\n"
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


class ClientGone(Exception):
    """The client left, or did not take what was sent to it in time."""


class Written(web.StreamResponse):
    """Tells aiohttp that the answer is written already, and whether the connection may go on."""

    def __init__(self, keep_alive: bool) -> None:
        super().__init__()
        self._stays_open = keep_alive

    @property
    def keep_alive(self) -> bool | None:
        """Whether the connection goes on."""
        return self._stays_open

    async def prepare(self, request: web.BaseRequest) -> Any:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


def closing_answer(error: ApiError) -> bytes:
    """Return the bytes of an error whose connection ends with it."""
    body = error.body()
    return b"%bcontent-type: application/json\r\ncontent-length: %d\r\ndate: %b\r\nconnection: close\r\n\r\n%b" % (
        _status_line(error.status),
        len(body),
        _date(),
        body,
    )


async def write_answer(
    arrived: Arrived, response: Response, exchange: Exchange, *, request_id: str, close: bool, patience: float
) -> web.StreamResponse:
    """Write an answer and its whole body; returns whether the connection goes on.

    The bytes, the times and who ended it are noted on the exchange. A stream that breaks ends with an SSE
    `error` event, where it is one, and never with the last chunk, so that nobody takes it for whole.
    """
    writer = _Writer(arrived.connection, exchange, patience)
    message = arrived.message
    old = message.version <= HttpVersion10
    close = close or old or message.should_close
    try:
        if old and not response.event_stream and _over_unix_socket(arrived.connection):
            # There the end of the connection is all that ends a body, and it cannot be told from a break.
            await response.read()
        linked = link(response.filters, response.headers.get("content-encoding"))
        body = response.body
        _check(response)
        if isinstance(body, bytes) and response.filters:
            body = linked.feed(body) + linked.close()
    except Exception as exc:
        response = _unreadable(exc, _secrets(arrived, exchange))
        body = response.body
        linked = link(())
    if response.filters:
        response.headers.remove("content-encoding")
    exchange.status = response.status
    streaming = not isinstance(body, bytes)
    no_body = message.method == "HEAD" or response.status in (204, 304)
    chunked = streaming and not old and "content-length" not in response.headers
    head = _head(
        response,
        request_id,
        close=close,
        chunked=chunked and not no_body,
        length=None if streaming or no_body else len(cast(bytes, body)),
    )
    if isinstance(body, bytes):
        await writer.send(head, b"" if no_body else body)
        _note_end(exchange, response.error)
        return CLOSE if close else KEEP_ALIVE
    try:
        await writer.send(head, b"")
        if not no_body:
            await _stream(writer, body, linked, chunked)
    except ClientGone:
        raise
    except asyncio.CancelledError:
        # Unless the client has left, the gateway ends this: the client is told.
        stopped = ApiError(503, "the gateway is stopping and cut this answer off", code="shutting_down")
        _break_off(writer, response, stopped, exchange, [], chunked=chunked, old=old)
        raise
    except Exception as exc:
        _break_off(writer, response, exc, exchange, _secrets(arrived, exchange), chunked=chunked, old=old)
        return CLOSE
    finally:
        if (aclose := getattr(body, "aclose", None)) is not None:
            await aclose()
    _note_end(exchange, response.error)
    return CLOSE if close else KEEP_ALIVE


def _check(response: Any) -> None:
    """Refuse what a stage without types may have made of a response."""
    if not isinstance(response.status, int):
        raise TypeError(f"a stage set the status {response.status!r}, which is no number")
    check_body(response.body)


def _note_end(exchange: Exchange, error: BaseException | None) -> None:
    """Note who ended an exchange, given what went wrong with it, if anything did."""
    if error is None:
        exchange.ended_by = "complete"
        return
    exchange.ended_by = "upstream" if isinstance(error, UpstreamError) else "gateway"
    exchange.error = (error.code or error.type) if isinstance(error, ApiError) else type(error).__name__


async def _stream(writer: _Writer, body: AsyncIterator[bytes], linked: Linked, chunked: bool) -> None:
    async for chunk in body:
        data = linked.feed(chunk)
        if data:
            await writer.send(b"%x\r\n" % len(data) if chunked else b"", data, b"\r\n" if chunked else b"")
    left = linked.close()
    if chunked:
        await writer.send(b"%x\r\n" % len(left) if left else b"", left, b"\r\n" + _LAST_CHUNK if left else _LAST_CHUNK)
    elif left:
        await writer.send(b"", left)


class _Writer:
    """Writes to one client, counting, and waiting where it does not read."""

    __slots__ = ("_exchange", "_patience", "connection", "tail")

    def __init__(self, connection: Connection, exchange: Exchange, patience: float) -> None:
        self.connection = connection
        self.tail = b""
        self._exchange = exchange
        self._patience = patience

    async def send(self, before: bytes, data: bytes, after: bytes = b"") -> None:
        """Write `data` of the body, framed. Raises ClientGone where the client left or does not read."""
        transport = self.connection.transport
        if transport is None or transport.is_closing():
            raise ClientGone
        transport.write(before + data + after if before or after else data)
        exchange = self._exchange
        if exchange.first_byte_at is None:
            exchange.first_byte_at = time.monotonic()
        if data:
            exchange.sent += len(data)
            self.tail = data[-4:] if len(data) >= 4 else (self.tail + data)[-4:]
        if self.connection.writing_paused:
            try:
                async with asyncio.timeout(self._patience):
                    await self.connection._drain_helper()
            except TimeoutError:
                exchange.error = "client_not_reading"
                transport.abort()
                raise ClientGone from None
            except ConnectionError:
                raise ClientGone from None


def _break_off(
    writer: _Writer,
    response: Response,
    exc: Exception,
    exchange: Exchange,
    hidden: list[str],
    *,
    chunked: bool,
    old: bool,
) -> None:
    """End a stream that cannot go on so that it is seen to be broken."""
    _note_end(exchange, exc)
    if isinstance(exc, ApiError):
        error = exc
    else:
        error = ApiError(502, str(exc) if isinstance(exc, StreamBroken) else "the gateway failed on this stream")
        get_logger().error("a filter or a stage's stream failed", **masked(failure(exc), hidden))
    transport = writer.connection.transport
    if transport is None or transport.is_closing():
        return
    if response.event_stream:
        event = unfinished_event(writer.tail) + b"data: " + error.body() + b"\n\n"
        transport.write(b"%x\r\n%b\r\n" % (len(event), event) if chunked else event)
        exchange.sent += len(event)
    if old:
        # Without chunks the end of the connection is the end of the body: only a reset says it is broken.
        if not _over_unix_socket(writer.connection):
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()


def _secrets(arrived: Arrived, exchange: Exchange) -> list[str]:
    return secrets(Headers(arrived.message.raw_headers), exchange.target)


def _over_unix_socket(connection: Connection) -> bool:
    sock = connection.transport.get_extra_info("socket") if connection.transport is not None else None
    return sock is not None and sock.family == socket.AF_UNIX


def _unreadable(exc: Exception, hidden: list[str]) -> Response:
    """Return the answer in place of a body that could not be had, or that the filters could not take."""
    if isinstance(exc, ApiError):
        return Response.from_error(exc)
    if isinstance(exc, StreamBroken):
        return Response.from_error(ApiError(502, str(exc)))
    get_logger().error("a filter failed", **masked(failure(exc), hidden))
    return Response.from_error(ApiError(500, "the gateway failed on this answer"))


def _head(response: Response, request_id: str, *, close: bool, chunked: bool, length: int | None) -> bytes:
    lines = [_status_line(response.status)]
    dated = False
    for name, value in response.headers.raw:
        lowered = name.lower()
        if lowered == b"content-length" and length is not None:
            continue
        if lowered == b"x-request-id":
            # Ours is the one that the log names; Azure's stays to be had.
            name = b"x-azure-request-id"  # noqa: PLW2901
        dated = dated or lowered == b"date"
        lines.append(b"%b: %b\r\n" % (name, value))
    if length is not None:
        lines.append(b"content-length: %d\r\n" % length)
    if chunked:
        lines.append(b"transfer-encoding: chunked\r\n")
    if response.event_stream and "x-accel-buffering" not in response.headers:
        # nginx sends events on at once when it sees this, whatever its own settings.
        lines.append(b"x-accel-buffering: no\r\n")
    if not dated:
        lines.append(b"date: %b\r\n" % _date())
    if close:
        lines.append(b"connection: close\r\n")
    lines.append(b"x-request-id: %b\r\n\r\n" % request_id.encode())
    return b"".join(lines)


def _status_line(status: int) -> bytes:
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


_date_cache = (0, b"")


def _date() -> bytes:
    global _date_cache  # noqa: PLW0603 -- one value for the process, made once a second
    now = int(time.time())
    if _date_cache[0] != now:
        _date_cache = (now, formatdate(now, usegmt=True).encode())
    return _date_cache[1]


KEEP_ALIVE = Written(keep_alive=True)
CLOSE = Written(keep_alive=False)
