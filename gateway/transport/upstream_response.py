"""One response from Azure: its head, and the reader of its body.

A short body of known length is delivered whole: if it breaks off, the client gets a clean 502, and the connection is
free sooner. The pieces of a longer one, or of a stream, are either iterated over, or passed to a sink as they arrive
(`UpstreamResponse.pump`), with no task in between: the server writes every stream in this way.

The connection calls `begin` with the head, `feed` (or `inflate`) with the bytes, and at last `end` or `fail`:

    waiting --begin--> reading --feed: `done`--> end
       |                  |
       +------ fail ------+------ abort (by the reader)

From `end`, `fail` and `abort` on, the connection is no longer the response's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, Self

from gateway.errors import UpstreamError
from gateway.fair_scheduler import SMALL, STEP
from gateway.protocol.content_coding import BadCoding, Inflater, UnknownCoding
from gateway.protocol.http1_chunked import ChunkedDecoder
from gateway.protocol.http1_fields import MalformedMessage

if TYPE_CHECKING:
    from gateway.protocol.headers import Field
    from gateway.protocol.http1_response import ResponseHead

__all__ = ("ResponseConnection", "UpstreamResponse", "unreadable_response")

# A body of known length up to this size, in bytes, is delivered whole.
_MAX_WHOLE = 1024 * 1024
# Unread bytes above which reading from Azure is paused.
_MAX_UNREAD = 64 * 1024
# Maximum size, in bytes, of a compressed response that is delivered whole, after decompression.
_MAX_INFLATED = 16 * 1024 * 1024
# Media types that the gateway reads.
_READABLE = re.compile(rb"json|event-stream", re.IGNORECASE)
_EVENT_STREAM = re.compile(rb"event-stream", re.IGNORECASE)


class ResponseConnection(Protocol):
    """The connection of a response, as the response uses it."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Its event loop."""

    def hold(self) -> None:
        """Pause reading."""

    def release(self) -> None:
        """Resume reading."""

    def abort(self) -> None:
        """Close at once."""


class UpstreamResponse:
    """One response from Azure. Its head is there after `await begun()`; its body is iterated over or pumped.

    `whole` is the body if it is delivered whole. Until it has ended, a response belongs to its request's exchange, and
    so does its connection.
    """

    # There is one response per request, and most of these are never set: class defaults cost nothing.
    status = 0
    fields: list[Field] = []  # noqa: RUF012 -- replaced, never changed
    whole: bytes | None = None
    done = False
    close = False
    upload: asyncio.Task[None] | None = None
    upgrade = False  # the request asked for a WebSocket
    watch: Callable[[bytes], None] | None = None  # sees the bytes of the body as they arrive
    inflated = False  # the body was compressed; the reader gets it decompressed
    remaining = 0  # bytes of the body still to come, if its length is known; -1 if the connection's end is its end
    _chunks: ChunkedDecoder | None = None
    _inflater: Inflater | None = None
    _compressed_done = False  # all compressed bytes have arrived,
    _extra = b""  # and these follow them
    _size = 0  # of the pieces
    _held = False
    _error: Exception | None = None
    _sink: Callable[[bytes], None] | None = None
    _waiter: asyncio.Future[None] | None = None

    def __init__(self, connection: ResponseConnection) -> None:
        self._connection: ResponseConnection | None = connection
        self._pieces: list[bytes] = []

    async def begun(self) -> None:
        """Wait for the head, and for the body if it is delivered whole. Raises UpstreamError."""
        await self._wait()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        connection = self._connection
        assert connection is not None, "the response has ended already"  # noqa: S101 -- a bug of ours
        self._waiter = connection.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    # -- called by the connection ----------------------------------------------------------------------

    def begin(self, head: ResponseHead) -> None:
        """Take the head. Raises BadCoding if the gateway reads the body and cannot decompress it."""
        self.status, self.fields, length, chunked, self.close, coding = head
        if chunked:
            self._chunks = ChunkedDecoder()
        elif length is None:
            self.remaining = -1
        else:
            self.remaining = length
            # (Filters look at each event: a stream of many is handled in steps, even if its length is known.)
            if length <= SMALL or (length <= _MAX_WHOLE and not any(map(_EVENT_STREAM.search, self._content_types()))):
                self.whole = b""
        if coding and length != 0 and self._is_readable():
            self._inflater, self.inflated = Inflater(coding), True
        if self.whole is None:
            self._wake()

    def _is_readable(self) -> bool:
        """Whether the gateway reads the body: errors, JSON and events; other content passes unchanged."""
        return self.status >= 400 or any(map(_READABLE.search, self._content_types()))

    def _content_types(self) -> list[bytes]:
        return [value for name, value, _, _ in self.fields if name == b"content-type"]

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the body; return the bytes after its end. Raises MalformedMessage."""
        extra = b""
        done = False
        if self._chunks is not None:
            # (Steps limit the lines already; there are fewer lines than bytes, so none is left unread.)
            data = self._chunks.feed(data, len(data))
            done, extra = self._chunks.done, self._chunks.extra
        elif self.remaining >= 0:
            remaining = self.remaining
            if len(data) > remaining:
                data, extra = data[:remaining], data[remaining:]
            self.remaining = remaining - len(data)
            done = not self.remaining
        if self._inflater is not None:
            self._inflater.feed(data)
            self._compressed_done, self._extra = done, extra
            return self.inflate()
        if self._sink is None:
            self._deliver(data, done)
            return extra
        # Nearly every piece of a stream: as `_deliver`, without the call.
        if data:
            if self.watch is not None:
                self.watch(data)
            self._sink(data)  # if it raises, the response is not done, and the waiting reader gets the exception
        self.done = done
        return extra

    @property
    def pending(self) -> bool:
        """Whether received bytes wait to be decompressed; an aborted response has no reader for them."""
        return self._inflater is not None and self._inflater.pending and self._connection is not None

    def inflate(self) -> bytes:
        """Decompress and deliver a bounded piece; return the bytes after the body's end. Raises BadCoding."""
        inflater = self._inflater
        assert inflater is not None, "the body is not compressed"  # noqa: S101 -- a bug of ours
        data = inflater.read(STEP)
        ended = self._compressed_done and not inflater.pending
        if ended:
            inflater.check_end()
        elif self.whole is not None and self._size > _MAX_INFLATED:
            raise BadCoding(f"Azure's response inflates to more than {_MAX_INFLATED} bytes")
        self._deliver(data, ended)
        return self._extra

    def _deliver(self, data: bytes, done: bool) -> None:
        if self.watch is not None and data:
            self.watch(data)
        if self._sink is not None:
            if data:
                self._sink(data)  # if it raises, the response is not done, and the waiting reader gets the exception
        elif data:
            self._pieces.append(data)
            self._size += len(data)
            if self.whole is None:
                self._wake()
                if self._size > _MAX_UNREAD and not done:
                    self.hold()
        self.done = done

    @property
    def ends_with_connection(self) -> bool:
        """Whether the body has neither a length nor chunks, and lasts until the connection closes."""
        return self.remaining < 0

    def end_with_connection(self) -> None:
        """End a body that lasts until the connection closes; fail if its compressed data is incomplete."""
        if self._inflater is not None:
            try:
                self._inflater.check_end()
            except BadCoding as exc:
                self.fail(unreadable_response(exc))
                return
        self.end()

    def end(self, whole: bytes | None = None) -> None:
        """End well, and release the connection; `whole` is the body if it arrived in one piece."""
        self.done = True
        if self.whole is not None:
            self.whole = b"".join(self._pieces) if whole is None else whole
        self._connection = None
        self._sink = None
        self._wake()

    def fail(self, error: Exception) -> None:
        """End with an error, and release the connection."""
        self._connection = None
        self._sink = None
        if self._error is None and not self.done:
            self._error = error
            waiter = self._waiter
            if waiter is not None and not waiter.done():
                waiter.set_exception(error)

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def switch_protocols(self) -> None:
        """End at a 101: its connection becomes a WebSocket."""
        self.done = True
        self._wake()

    @property
    def switching(self) -> bool:
        """Whether its connection becomes a WebSocket."""
        return self.status == 101

    @property
    def uploading(self) -> bool:
        """Whether the request's body is still being sent."""
        return self.upload is not None and not self.upload.done()

    # -- called by the reader --------------------------------------------------------------------------

    def switched(self) -> ResponseConnection:
        """Hand over the connection, which has become a WebSocket."""
        connection, self._connection = self._connection, None
        assert connection is not None, "a connection is handed over twice"  # noqa: S101 -- a bug of ours
        return connection

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while not self._pieces:
            if self.done:
                raise StopAsyncIteration
            await self._wait()
        return self._take_pieces()

    def _take_pieces(self) -> bytes:
        pieces = self._pieces
        self._pieces, self._size = [], 0
        if self._held:
            self.release()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def peeked(self) -> bytes:
        """Return the received bytes of the body that were not taken yet; they stay."""
        if len(self._pieces) > 1:
            self._pieces = [b"".join(self._pieces)]
        return self._pieces[0] if self._pieces else b""

    async def grow(self) -> bool:
        """Wait for more of the body; False at its end, or if no more is kept unread. Raises UpstreamError."""
        if self.done or self._held:
            return False
        await self._wait()
        return True

    async def pump(self, sink: Callable[[bytes], None]) -> None:
        """Pass every piece of the body to `sink` as it arrives; return at the clean end.

        Raises UpstreamError if Azure breaks off, and the exceptions of `sink`.
        """
        if self._pieces:
            sink(self._take_pieces())
        if self.done:
            return
        self._sink = sink
        await self._wait()

    def hold(self) -> None:
        """Pause reading from Azure."""
        if not self._held and self._connection is not None:
            self._held = True
            self._connection.hold()

    def release(self) -> None:
        """Resume reading."""
        if self._held:
            self._held = False
            if self._connection is not None:
                self._connection.release()

    def abort(self) -> None:
        """Close the connection at once, if it is still this response's."""
        if self.upload is not None:
            self.upload.cancel()
        connection, self._connection = self._connection, None
        self._sink = None
        if connection is not None:
            connection.abort()
        if self._error is not None:
            # Its frames hold this response: a cycle, which would keep the request until the collector finds it.
            self._error.with_traceback(None)

    async def aclose(self) -> None:
        """Close, as async iteration requires."""
        self.abort()


def unreadable_response(exc: Exception) -> Exception:
    """Return the error for a response that cannot be read; a filter's own exception stays as it is."""
    if isinstance(exc, MalformedMessage):
        return UpstreamError(f"Azure's response is not valid HTTP: {exc}")
    if isinstance(exc, UnknownCoding):
        return UpstreamError(str(exc), code="unsupported_encoding", fault="encoding")
    return UpstreamError(str(exc), fault="encoding") if isinstance(exc, BadCoding) else exc
