"""Writing the stream of a response to a client: filters, memory of incomplete events, pacing, and backpressure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from gateway.errors import ApiError
from gateway.limits.memory_budget import UNCOUNTED, BudgetExhausted
from gateway.protocol.filters import FilterChain, FilterFailed
from gateway.transport.pacing import Pacer
from gateway.transport.upstream_response import UpstreamResponse
from gateway.transport.write_timeout import WriteTimeout

if TYPE_CHECKING:
    from gateway.exchange import Exchange
    from gateway.transport.client_connection import ClientConnection

__all__ = ("ClientDisconnected", "StreamWriter", "drain", "write_counted")

_LAST_CHUNK = b"0\r\n\r\n"


class ClientDisconnected(Exception):
    """The client disconnected, or the write timeout closed its connection."""


def write_counted(connection: ClientConnection, exchange: Exchange, framing: bytes, data: bytes) -> None:
    """Write framing and then bytes of the body, which count as sent. Raises ClientDisconnected."""
    if connection.gone:
        raise ClientDisconnected
    connection.write_soon(framing + data)
    if exchange.first_byte_at is None:
        exchange.first_byte_at = time.monotonic()
    exchange.sent += len(data)


async def drain(connection: ClientConnection, exchange: Exchange, write_timeout: float) -> None:
    """Wait until the client has caught up. Raises ClientDisconnected, also if it takes nothing for `write_timeout`."""
    timeout = WriteTimeout(connection, write_timeout, lambda: _write_timed_out(connection, exchange))
    try:
        await connection._drain_helper()
    except ConnectionError:
        raise ClientDisconnected from None
    finally:
        timeout.cancel()


def _write_timed_out(connection: ClientConnection, exchange: Exchange) -> None:
    """Abort the connection of a client that does not read; the loss of the connection ends the exchange."""
    exchange.error = "client_not_reading"
    if connection.transport is not None:
        connection.transport.abort()


class StreamWriter:
    """Writes one stream to one client, and counts its bytes.

    If the client reads too slowly, the upstream connection is paused, or the stage's stream waits.
    """

    __slots__ = (
        "_counted",
        "_exchange",
        "_filters",
        "_pacer",
        "_timeout",
        "_upstream",
        "_write_timeout",
        "chunked",
        "connection",
        "ended",
        "tail",
    )

    def __init__(
        self,
        connection: ClientConnection,
        exchange: Exchange,
        write_timeout: float,
        filters: FilterChain | None = None,
        *,
        chunked: bool = False,
        pace: float | None = None,
    ) -> None:
        self.connection = connection
        self.tail = b""
        self._exchange = exchange
        self._write_timeout = write_timeout
        self._filters = filters
        self._counted = 0  # bytes of an incomplete event in the memory budget
        self.chunked = chunked
        self._upstream: UpstreamResponse | None = None
        self._timeout: WriteTimeout | None = None  # while the client reads too slowly
        self.ended = False
        self._pacer = Pacer(pace, self._write, asyncio.get_running_loop()) if pace is not None else None

    def _write(self, data: bytes, after: bytes = b"") -> None:
        """Write a piece of the stream, with its framing."""
        if self.connection.gone:
            raise ClientDisconnected
        self._exchange.sent += len(data)
        self.connection.write(b"%x\r\n%b\r\n%b" % (len(data), data, after) if self.chunked else data)
        self.tail = data[-4:] if len(data) >= 4 else (self.tail + data)[-4:]

    def _take(self, chunk: bytes) -> None:
        """Filter and write a piece; every streamed byte passes here."""
        if self._filters is not None:
            try:
                chunk = self._filters.feed(chunk)
            except FilterFailed as exc:
                self._write_paced(exc.left)
                raise exc.cause from None
            if not chunk or self._counted:
                self._count_incomplete(self._filters.kept)
        self._write_paced(chunk)

    def _count_incomplete(self, kept: int) -> None:
        """Count the bytes of a large incomplete event. Raises ApiError 503 if the memory budget is exhausted."""
        kept = kept if kept > UNCOUNTED else 0
        if kept > self._counted:
            try:
                self._exchange.reserve_memory(kept - self._counted)
            except BudgetExhausted:
                full = "an event of this response exceeds the memory that the gateway has left"
                raise ApiError(503, f"{full}; retry shortly", code="overloaded") from None
        else:
            self._exchange.release_memory(self._counted - kept)
        self._counted = kept

    def _write_paced(self, chunk: bytes) -> None:
        if chunk:
            if self._pacer is None:
                self._write(chunk)
            else:
                self._pacer.take(chunk)

    async def stream(self, body: AsyncIterator[bytes]) -> None:
        """Write a whole body, and its end. Raises the errors of its source, and ClientDisconnected."""
        if isinstance(body, UpstreamResponse) or self._pacer is not None:
            await self._drain()  # the client may not have taken the head yet
            self.connection.on_backpressure = self._on_backpressure
        try:
            if isinstance(body, UpstreamResponse):
                self._upstream = body
                await body.pump(self._take)
            else:
                async for chunk in body:
                    self._take(chunk)
                    await self._drain()
            rest = self._close_filters()
            if self._pacer is not None:
                if rest:
                    self._pacer.take(rest)
                rest = b""
                await self._end_pacing(self._pacer)
        except BaseException:
            if self._pacer is not None and not self.connection.gone:
                self._pacer.flush()  # the client gets the events that arrived before the error
            raise
        finally:
            self.connection.on_backpressure = None
            self._cancel_timeout()
            if self._pacer is not None:
                self._pacer.stop()
        if rest:
            self._write(rest, _LAST_CHUNK if self.chunked else b"")
        elif self.chunked:
            write_counted(self.connection, self._exchange, _LAST_CHUNK, b"")
        self.ended = True
        await self._drain()

    async def _end_pacing(self, pacer: Pacer) -> None:
        """Wait until the last event is written. When the gateway shuts down, all are written immediately."""
        try:
            await pacer.end()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.connection.gone or task is None:
                raise
            task.uncancel()
            pacer.flush()

    def _close_filters(self) -> bytes:
        """Return the last bytes of the filters."""
        if self._filters is None:
            return b""
        try:
            return self._filters.close()
        except FilterFailed as exc:
            self._write_paced(exc.left)
            raise exc.cause from None

    def flush_filters(self) -> None:
        """Write the bytes that the filters keep of a broken stream."""
        if self._filters is not None and (rest := self._filters.cut()):
            self._write(rest)

    async def _drain(self) -> None:
        if self.connection.writing_paused:
            await drain(self.connection, self._exchange, self._write_timeout)

    def _on_backpressure(self, paused: bool) -> None:
        """Pause Azure and the pacer while the client reads too slowly, at most until the write timeout."""
        self._cancel_timeout()
        if paused:
            self._timeout = WriteTimeout(
                self.connection, self._write_timeout, lambda: _write_timed_out(self.connection, self._exchange)
            )
        if self._upstream is not None:
            (self._upstream.hold if paused else self._upstream.release)()
        if self._pacer is not None:
            (self._pacer.pause if paused else self._pacer.resume)()

    def _cancel_timeout(self) -> None:
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None
