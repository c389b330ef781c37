"""The body that a client is still sending: fed by its connection, read by whoever wants it."""

from __future__ import annotations

import asyncio
from typing import Protocol

from gateway.body import too_much
from gateway.errors import ApiError
from gateway.http1 import FRAMING_OF_REQUESTS, Chunks, too_large

__all__ = ("ArrivingBody", "Sender")

# What may wait to be read before the client is asked to wait.
_WAITING = 64 * 1024


class Sender(Protocol):
    """The connection that a body comes from."""

    def say_continue(self) -> None:
        """Tell the client that its body is wanted."""

    def hold(self) -> None:
        """Take nothing more from the client for now."""

    def release(self) -> None:
        """Go on taking."""


class ArrivingBody:
    """A body that has not arrived whole. `length` is None where it comes in chunks.

    `done` says that all of it has come, `error` why the rest does not, `discarded` that nobody wants it.
    What cannot go on raises ApiError from `read` and `rest`: 408 where
    the client stops sending, 413 where the body is too large, 400 where it is malformed or breaks off.
    """

    __slots__ = (
        "_chunks",
        "_expects",
        "_limit",
        "_loop",
        "_most",
        "_parts",
        "_patience",
        "_sender",
        "_size",
        "_total",
        "_waiter",
        "_whole",
        "discarded",
        "done",
        "error",
        "length",
    )

    def __init__(
        self,
        sender: Sender,
        loop: asyncio.AbstractEventLoop,
        *,
        length: int | None,
        expects: bool,
        limit: int,
        patience: float,
    ) -> None:
        self.length = length
        self.done = False
        self._sender = sender
        self._loop = loop
        self._expects = expects
        self._limit = limit
        self._patience = patience
        self._chunks = Chunks(FRAMING_OF_REQUESTS) if length is None else None
        self._parts: list[bytes] = []
        self._size = 0  # of the parts
        self._total = 0  # of all that has come
        self._whole = False  # somebody waits for all of it
        self._most: int | None = None
        self.discarded = False
        self.error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None

    # -- the connection's side -------------------------------------------------------------------------

    def feed(self, data: bytes) -> bytes:
        """Take what came on the wire; returns what follows the body's end. Raises Malformed."""
        extra = b""
        if self._chunks is not None:
            data = self._chunks.feed(data)
            while self._chunks.unread:
                data += self._chunks.feed(self._chunks.unread)
            self.done, extra = self._chunks.done, self._chunks.extra
        else:
            missing = (self.length or 0) - self._total
            if len(data) > missing:
                data, extra = data[:missing], data[missing:]
            self.done = len(data) == missing
        self._total += len(data)
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
        if self.done or not self._whole:
            self._wake()
        return extra

    def fail(self, error: ApiError) -> None:
        """Let whoever reads know that the rest does not come."""
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

    async def read(self) -> bytes:
        """Return the next bytes, or b"" at the end."""
        while not self._parts and not self.done:
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
        if self.error is not None:
            raise self.error
        if self._expects:
            self._expects = False
            self._sender.say_continue()
        came = self._total
        self._waiter = self._loop.create_future()
        try:
            async with asyncio.timeout(self._patience):
                await self._waiter
        except TimeoutError:
            if self._total == came:
                raise ApiError(
                    408, f"no more of the body came for {self._patience:g} s", code="request_timeout"
                ) from None
        finally:
            self._waiter = None

    def _take(self) -> bytes:
        if self.error is not None:
            raise self.error
        parts = self._parts
        self._parts, self._size = [], 0
        self._sender.release()
        return parts[0] if len(parts) == 1 else b"".join(parts)
