"""A body that the client is still sending: fed by its connection, read by one reader.

The end of a body is a separate flag, `done`: input that consists of chunked framing alone yields no bytes of the body,
and is not its end.

The timeouts count only the time in which a reader waits for the client. A client is not slow if its reader is.
"""

from __future__ import annotations

import asyncio
import math
from typing import Protocol

from gateway.body.request_body import body_too_large
from gateway.errors import ApiError
from gateway.protocol.http1_chunked import FRAMING_OF_REQUESTS, MOST_LINES, ChunkedDecoder
from gateway.protocol.http1_request import too_large

__all__ = ("INLINE_FRAMING_LINES", "BodyTransport", "IncomingBody")

# Maximum number of bytes to buffer before reading is paused.
_MAX_BUFFERED = 64 * 1024
INLINE_FRAMING_LINES = 32
"""Lines of chunked framing that are parsed on arrival: more than most clients send in one read (16 chunks)."""


class BodyTransport(Protocol):
    """The connection that a body arrives on."""

    def send_continue(self) -> None:
        """Send `100 Continue`: the client waits for it before it sends the body."""

    def pause_input(self) -> None:
        """Pause reading from the client."""

    def resume_input(self) -> None:
        """Resume reading: first the body's `unread` bytes, then the client."""

    def client_awaited(self, awaited: bool) -> None:
        """Note whether a reader waits for the client: the deadline of the response is paused meanwhile."""


class IncomingBody:
    """A body that is not complete. `length` is None if it is chunked.

    `done` is set when all of it has arrived, `error` when the rest cannot arrive, and `discarded` when no reader wants
    it. `unread` holds bytes of the connection that are not parsed yet, because one call of `feed` parses a bounded
    number of chunks. `read` and `rest` raise ApiError: 408 if the client stops sending or is too slow, 413 if the body
    is too large, 400 if it is malformed or the connection closes.
    """

    __slots__ = (
        "_chunked_decoder",
        "_expects_continue",
        "_last_byte_at",
        "_limit",
        "_loop",
        "_min_rate",
        "_parts",
        "_read_all",
        "_read_limit",
        "_size",
        "_timeout",
        "_timer",
        "_total",
        "_transport",
        "_wait_started",
        "_waited",
        "_waiter",
        "discarded",
        "done",
        "error",
        "length",
        "unread",
    )

    def __init__(
        self,
        transport: BodyTransport,
        loop: asyncio.AbstractEventLoop,
        *,
        length: int | None,
        expects_continue: bool,
        limit: int,
        timeout: float,
        min_rate: int,
    ) -> None:
        """Wait at most `timeout` seconds for the next byte.

        All waits together may take `timeout` seconds plus one second for each `min_rate` bytes.
        """
        self.length = length
        self.done = False
        self.unread = b""
        self._transport = transport
        self._loop = loop
        self._expects_continue = expects_continue
        self._limit = limit
        self._timeout = timeout
        self._min_rate = min_rate
        self._chunked_decoder = ChunkedDecoder(FRAMING_OF_REQUESTS) if length is None else None
        self._parts: list[bytes] = []
        self._size = 0  # of the parts
        self._total = 0  # bytes received
        self._read_all = False  # a reader waits for the whole body
        self._read_limit: int | None = None
        self.discarded = False
        self.error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waited = 0.0  # seconds, in all earlier waits
        self._wait_started = 0.0
        self._last_byte_at = 0.0  # when the last byte of this wait arrived, or the wait began

    # -- the connection's side -------------------------------------------------------------------------

    def feed(self, data: bytes, max_lines: int = MOST_LINES) -> bytes:
        """Take input of the connection; returns the bytes after the body's end. Raises MalformedMessage.

        Parses at most `max_lines` lines of chunked framing. The bytes after them are `unread`, and must be fed again
        before newer ones.
        """
        extra = b""
        if (decoder := self._chunked_decoder) is not None:
            data = decoder.feed(data, max_lines)
            self.done, self.unread, extra = decoder.done, decoder.unread, decoder.extra
        else:
            missing = (self.length or 0) - self._total
            if len(data) > missing:
                data, extra = data[:missing], data[missing:]
            self.done = len(data) == missing
        if data:
            self._add(data)
        if self.unread:
            self._transport.pause_input()
        if self.done or (data and not self._read_all):
            self._wake()
        return extra

    def _add(self, data: bytes) -> None:
        self._total += len(data)
        if self._waiter is not None:
            self._last_byte_at = self._loop.time()
        if self._total > self._limit:
            self.fail(too_large(self._limit))
        elif not self.discarded:
            self._parts.append(data)
            self._size += len(data)
            if self._read_all:
                if self._read_limit is not None and self._size > self._read_limit:
                    self.fail(body_too_large(self._read_limit))
            elif self._size > _MAX_BUFFERED and not self.done:
                self._transport.pause_input()

    @property
    def full(self) -> bool:
        """Whether the buffer is full, because the reader is slow."""
        return not self._read_all and self._size > _MAX_BUFFERED

    @property
    def has_work(self) -> bool:
        """Whether `unread` can be parsed further in a later turn, without waiting for the reader."""
        return bool(self.unread) and not self.full

    @property
    def missing(self) -> float:
        """The number of bytes that have not arrived; infinite if the length is unknown."""
        return math.inf if self.length is None else self.length - self._total

    def fail(self, error: ApiError) -> None:
        """Raise an error in the reader: the rest cannot arrive."""
        self.error = self.error or error
        self._wake()

    def discard(self) -> None:
        """Drop the buffered bytes and the missing ones."""
        self.discarded = True
        self._parts.clear()
        self._size = 0
        self._transport.resume_input()

    @property
    def awaits_continue(self) -> bool:
        """Whether the client still waits for `100 Continue`, and so may never send the body."""
        return self._expects_continue and not self._total

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- the reader's side -----------------------------------------------------------------------------

    async def read(self) -> bytes | None:
        """Return the next bytes, never b"", or None at the end. Raises ApiError."""
        while not self._parts:
            if self.done and self.error is None:
                return None
            await self._wait()
        return self._take()

    async def rest(self, limit: int | None) -> bytes:
        """Return the rest of the body, at most `limit` bytes. Raises ApiError."""
        if limit is not None and self.length is not None and self.length > limit:
            raise body_too_large(limit)
        self._read_all, self._read_limit = True, limit
        self._transport.resume_input()
        while not self.done:
            await self._wait()
        return self._take()

    async def _wait(self) -> None:
        """Wait for bytes, the end, or an error. Raises `error`."""
        if self.error is not None:
            raise self.error
        if self._expects_continue:
            self._expects_continue = False
            self._transport.send_continue()
        loop = self._loop
        self._wait_started = self._last_byte_at = loop.time()
        self._waiter = loop.create_future()
        self._timer = loop.call_at(self._due(), self._check_timeout)
        self._transport.client_awaited(True)
        try:
            await self._waiter
        finally:
            self._waiter = None
            self._timer.cancel()
            self._timer = None
            self._waited += loop.time() - self._wait_started
            self._transport.client_awaited(False)

    def _due(self) -> float:
        """Return when the timeout expires if no byte arrives: too long without a byte, or too slow overall."""
        budget = self._timeout + self._total / self._min_rate - self._waited
        return min(self._last_byte_at + self._timeout, self._wait_started + budget)

    def _check_timeout(self) -> None:
        """Fail if the client is too slow; otherwise set the timer again."""
        due, now = self._due(), self._loop.time()
        if now < due:
            self._timer = self._loop.call_at(due, self._check_timeout)
            return
        if now >= self._last_byte_at + self._timeout:
            message = f"the body is incomplete, and no byte arrived for {self._timeout:g} s; send the request again"
        else:
            waited = self._waited + now - self._wait_started
            message = (
                f"the body arrived too slowly: {self._total} bytes in {waited:.0f} s; "
                f"after {self._timeout:g} s, send at least {self._min_rate} bytes per second"
            )
        self.fail(ApiError(408, message, code="request_timeout"))

    def _take(self) -> bytes:
        if self.error is not None:
            raise self.error
        parts = self._parts
        self._parts, self._size = [], 0
        self._transport.resume_input()
        return parts[0] if len(parts) == 1 else b"".join(parts)
