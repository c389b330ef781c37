"""The body that a client is still sending: fed by its connection, read by one reader.

The end of a body is a state of its own, `done`: bytes of the connection that hold only framing give no bytes of the
body and say nothing about its end.

Only the time counts in which a reader waits for the client: a client is not slow while its body is held because the
reader is.
"""

from __future__ import annotations

import asyncio
import math
from typing import Protocol

from gateway.body.request_body import too_much
from gateway.errors import ApiError
from gateway.protocol.http1_chunked import FRAMING_OF_REQUESTS, MOST_LINES, ChunkedDecoder
from gateway.protocol.http1_request import too_large

__all__ = ("LINES_AT_ONCE", "BodyTransport", "IncomingBody")

# What may wait to be read before the client is asked to wait.
_WAITING = 64 * 1024
LINES_AT_ONCE = 32
"""Lines of framing that are read the moment they arrive: more than the usual client sends in one read (16 chunks)."""


class BodyTransport(Protocol):
    """The connection that a body comes from."""

    def say_continue(self) -> None:
        """Tell the client that its body is wanted."""

    def hold(self) -> None:
        """Take nothing more from the client for now."""

    def release(self) -> None:
        """Go on taking: first what is `unread`, then from the client."""

    def waits(self, waiting: bool) -> None:
        """Note whether the client is waited for: the time of the answer does not run meanwhile."""


class IncomingBody:
    """A body that has not arrived whole. `length` is None where it comes in chunks.

    `done` says that all of it has come, `error` why the rest does not, `discarded` that nobody wants it. `unread` are
    bytes of the connection that were not read yet, because one call of `feed` reads a bounded number of chunks.
    What cannot go on raises ApiError from `read` and `rest`: 408 where
    the client stops sending or is too slow, 413 where the body is too large, 400 where it is malformed or breaks off.
    """

    __slots__ = (
        "_begun",
        "_came",
        "_chunks",
        "_expects",
        "_least",
        "_limit",
        "_loop",
        "_most",
        "_parts",
        "_patience",
        "_sender",
        "_size",
        "_timer",
        "_total",
        "_waited",
        "_waiter",
        "_whole",
        "discarded",
        "done",
        "error",
        "length",
        "unread",
    )

    def __init__(
        self,
        sender: BodyTransport,
        loop: asyncio.AbstractEventLoop,
        *,
        length: int | None,
        expects: bool,
        limit: int,
        patience: float,
        least: int,
    ) -> None:
        """Wait `patience` seconds for the next bytes, and in all so long plus one second for each `least` bytes."""
        self.length = length
        self.done = False
        self.unread = b""
        self._sender = sender
        self._loop = loop
        self._expects = expects
        self._limit = limit
        self._patience = patience
        self._least = least
        self._chunks = ChunkedDecoder(FRAMING_OF_REQUESTS) if length is None else None
        self._parts: list[bytes] = []
        self._size = 0  # of the parts
        self._total = 0  # of all that has come
        self._whole = False  # a reader waits for all of it
        self._most: int | None = None
        self.discarded = False
        self.error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waited = 0.0  # seconds, in all waits before this one
        self._begun = 0.0  # when this wait began
        self._came = 0.0  # when the last byte of this wait came, or the wait began

    # -- the connection's side -------------------------------------------------------------------------

    def feed(self, data: bytes, most: int = MOST_LINES) -> bytes:
        """Take what came on the wire; returns what follows the body's end. Raises Malformed.

        At most `most` lines of a chunked body's framing are read; the bytes after them are `unread`, and fed again
        before anything newer.
        """
        extra = b""
        if self._chunks is not None:
            data = self._chunks.feed(data, most)
            self.done, self.unread, extra = self._chunks.done, self._chunks.unread, self._chunks.extra
        else:
            missing = (self.length or 0) - self._total
            if len(data) > missing:
                data, extra = data[:missing], data[missing:]
            self.done = len(data) == missing
        if data:
            self._take_in(data)
        if self.unread:
            self._sender.hold()
        if self.done or (data and not self._whole):
            self._wake()
        return extra

    def _take_in(self, data: bytes) -> None:
        self._total += len(data)
        if self._waiter is not None:
            self._came = self._loop.time()
        if self._total > self._limit:
            self.fail(too_large(self._limit))
        elif not self.discarded:
            self._parts.append(data)
            self._size += len(data)
            if self._whole:
                if self._most is not None and self._size > self._most:
                    self.fail(too_much(self._most))
            elif self._size > _WAITING and not self.done:
                self._sender.hold()

    @property
    def full(self) -> bool:
        """Whether its reader is slow: nothing more is to be read for now."""
        return not self._whole and self._size > _WAITING

    @property
    def goes_on(self) -> bool:
        """Whether more of `unread` is to be read in a later turn, without waiting for the reader."""
        return bool(self.unread) and not self.full

    @property
    def left(self) -> float:
        """How many bytes are still to come; infinite if that is not known."""
        return math.inf if self.length is None else self.length - self._total

    def fail(self, error: ApiError) -> None:
        """Tell the reader that the rest does not come."""
        self.error = self.error or error
        self._wake()

    def discard(self) -> None:
        """Drop what is here and what still comes."""
        self.discarded = True
        self._parts.clear()
        self._size = 0
        self._sender.release()

    @property
    def unasked(self) -> bool:
        """Whether the client still waits to be told to send, and so perhaps never sends."""
        return self._expects and not self._total

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- the reader's side -----------------------------------------------------------------------------

    async def read(self) -> bytes | None:
        """Return the next bytes, never b"", or None at the end."""
        while not self._parts:
            if self.done and self.error is None:
                return None
            await self._wait()
        return self._take()

    async def rest(self, limit: int | None) -> bytes:
        """Return all that is still to come, at most `limit` bytes."""
        if limit is not None and self.length is not None and self.length > limit:
            raise too_much(limit)
        self._whole, self._most = True, limit
        self._sender.release()
        while not self.done:
            await self._wait()
        return self._take()

    async def _wait(self) -> None:
        """Wait until something has happened. Raises what `error` says."""
        if self.error is not None:
            raise self.error
        if self._expects:
            self._expects = False
            self._sender.say_continue()
        loop = self._loop
        self._begun = self._came = loop.time()
        self._waiter = loop.create_future()
        self._timer = loop.call_at(self._due(), self._look)
        self._sender.waits(True)
        try:
            await self._waiter
        finally:
            self._waiter = None
            self._timer.cancel()
            self._timer = None
            self._waited += loop.time() - self._begun
            self._sender.waits(False)

    def _due(self) -> float:
        """When the client is given up, if nothing more comes: too long without a byte, or too slow in all."""
        in_all = self._patience + self._total / self._least - self._waited
        return min(self._came + self._patience, self._begun + in_all)

    def _look(self) -> None:
        """Give up a client that is too slow, or look again when it next may be."""
        due, now = self._due(), self._loop.time()
        if now < due:
            self._timer = self._loop.call_at(due, self._look)
            return
        if now >= self._came + self._patience:
            why = f"no more of the body arrived for {self._patience:g} s"
        else:
            waited = self._waited + now - self._begun
            why = (
                f"the body arrived too slowly: {self._total} bytes in {waited:.0f} s; "
                f"after {self._patience:g} s at least {self._least} bytes per second are needed"
            )
        self.fail(ApiError(408, why, code="request_timeout"))

    def _take(self) -> bytes:
        if self.error is not None:
            raise self.error
        parts = self._parts
        self._parts, self._size = [], 0
        self._sender.release()
        return parts[0] if len(parts) == 1 else b"".join(parts)
