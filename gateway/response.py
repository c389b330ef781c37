"""The response of an exchange, as stages read and change it before it is sent to the client."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Literal, Self

import msgspec

from gateway.auth.credentials import Credential
from gateway.azure.key_redaction import MASK
from gateway.azure.stream_errors import StreamBeginning, StreamError
from gateway.body.peekable_body import PeekableBody, PeekedBody
from gateway.errors import ApiError
from gateway.exchange import Exchange
from gateway.limits.memory_budget import UNCOUNTED
from gateway.protocol.filters import EventFilter, Filter, FilterFailed, chain_filters
from gateway.protocol.headers import Field, Headers
from gateway.protocol.json_fields import decode_json, encode_json
from gateway.protocol.media_type import EVENT_STREAM, cached_media_type
from gateway.protocol.retry_after import cooldown, retry_after
from gateway.transport.websocket_handshake import WebSocket

__all__ = ("Response", "check_body")


class Response:
    """The response to the client. Nothing is sent until the whole pipeline has returned it.

    `body` is bytes, or an async iterator of bytes that is still unread; for status 101 it is a WebSocket. `error` is
    the exception of a stage or of the connection to Azure, if this response reports one. `pace` spreads out events of a
    stream that arrive together: the maximum delay of each event, in seconds; None switches it off.
    """

    # (The upstream sets `_exchange` if the body is still to be received; otherwise the slot is empty.)
    _exchange: Exchange
    __slots__ = (
        "_exchange",
        "_filters",
        "_gateway_credential",
        "_media_type",
        "_media_type_fields",
        "body",
        "error",
        "headers",
        "pace",
        "status",
    )

    def __init__(
        self,
        status: int = 200,
        body: bytes | AsyncIterator[bytes] | WebSocket = b"",
        headers: Headers | Mapping[str, str] | None = None,
        *,
        error: BaseException | None = None,
    ) -> None:
        check_body(body)
        self.status = status
        self.body = body
        self.headers = headers if isinstance(headers, Headers) else Headers(headers or {})
        self.error = error
        self.pace: float | None = None
        # `_media_type` is the media type in this list of fields.
        self._media_type_fields: list[Field] | None = None
        self._media_type: str
        self._gateway_credential: Credential | None = None  # the gateway's own credential, if it was sent to Azure
        self._filters: list[Filter | EventFilter] = []

    @classmethod
    def json(cls, content: object, status: int = 200) -> Self:
        """Return a response whose body is `content` as JSON."""
        return cls(status, msgspec.json.encode(content), {"content-type": "application/json"})

    @classmethod
    def from_error(cls, error: ApiError) -> Self:
        """Return the response to an error, in OpenAI's shape."""
        response = cls(error.status, error.body(), {"content-type": "application/json"}, error=error)
        for name, value in error.headers.items():
            response.headers.set(name, value)
        return response

    @property
    def media_type(self) -> str:
        """The body's media type, in lower case and without parameters; "" without a Content-Type header."""
        if self._media_type_fields is not self.headers.fields:
            self._read_media_type()
        return self._media_type

    @property
    def is_event_stream(self) -> bool:
        """Whether the body consists of server-sent events, by its media type."""
        if self._media_type_fields is not self.headers.fields:
            self._read_media_type()
        return self._media_type == EVENT_STREAM

    def _read_media_type(self) -> None:
        """Cache the media type, which most stages ask for. A change of the headers makes a new list of fields."""
        self._media_type_fields = fields = self.headers.fields
        for field in fields:  # (A generator expression costs twice as much.)
            if field[0] == b"content-type":
                self._media_type = cached_media_type(field[1])
                return
        self._media_type = ""

    async def peek(self, enough: Callable[[bytes], bool], seconds: float) -> bytes:
        """Return the first bytes of the body, before any filter, and leave them in it.

        Waits until `enough(bytes)` is true, for at most `seconds`, up to 64 KiB or the end of the body. Raises
        UpstreamError if Azure breaks off.
        """
        if isinstance(self.body, bytes):
            return self.body
        if isinstance(self.body, WebSocket):
            raise TypeError("a WebSocket has no body to peek at")
        if isinstance(self.body, PeekableBody):
            body = self.body
        else:
            self.body = body = PeekedBody(self.body)
        if enough(body.peeked()):
            return body.peeked()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while await body.grow() and not enough(body.peeked()):
                    pass
        return body.peeked()

    async def opening_error(self, seconds: float, *, responses: bool = False) -> StreamError | None:
        """Return the error at the beginning of a stream of events, before any content; None if there is none.

        Waits for the first event for at most `seconds`, and raises as `peek` does. With `responses`, also looks for
        errors of the Responses API, after the events that only announce the response.
        """
        if (self.headers.get("content-encoding") or "identity").strip().lower() != "identity":
            return None
        beginning = StreamBeginning(responses=responses)
        data = await self.peek(beginning.is_enough, seconds)
        if self._gateway_credential is not None:
            data = data.replace(self._gateway_credential.value.encode(), MASK)
        return beginning.error_in(data)

    def error_response(self, error: StreamError) -> Response:
        """Return the error response to send instead of a stream with this error."""
        response = Response(error.status, json.dumps({"error": error.error}).encode(), self.headers.copy())
        response.headers.remove("content-length")
        response.headers.remove("content-encoding")
        response.headers.set("content-type", "application/json")
        return response

    def retry_after(self, message: str = "") -> float | None:
        """Return the seconds to wait before the next request: from the headers, else from a message, or None."""
        return retry_after(self.headers, message)

    def cooldown(self, message: str = "") -> float | None:
        """Return `retry_after`; for a 429 without one, the default cooldown."""
        return cooldown(self.status, self.headers, message)

    def pipe(self, *filters: Filter | EventFilter, direction: Literal["down", "up"] = "down") -> None:
        """Add filters to the body. The one added first, nearest to Azure, runs first.

        A WebSocket takes event filters only, which see its messages as events: those from Azure (`down`), or those from
        the client (`up`, where the one added last, nearest to the client, runs first).
        """
        if isinstance(self.body, WebSocket):
            events = [each for each in filters if isinstance(each, EventFilter)]
            if len(events) < len(filters):
                raise TypeError("a WebSocket takes event filters only")
            if direction == "up":
                self.body.up[:0] = reversed(events)
                return
        elif direction == "up":
            raise ValueError("only a WebSocket has messages that go up")
        self._filters.extend(filters)
        # Filters may change the length.
        self.headers.remove("content-length")

    @property
    def filters(self) -> tuple[Filter | EventFilter, ...]:
        """The filters added so far, in the order in which they run."""
        return tuple(self._filters)

    def raw_chunks(self) -> AsyncIterator[bytes]:
        """Iterate once over the chunks of the body as they arrive from Azure, before any filter."""
        if isinstance(self.body, WebSocket):
            raise TypeError("a WebSocket has no chunks")
        return _chunks_of(self.body)

    async def read(self, limit: int = 16 * 1024 * 1024) -> bytes:
        """Read the complete body through its filters, and keep it as bytes.

        Raises ApiError 502 above `limit` bytes, 503 if the gateway's or the caller's memory budget is exhausted, and
        the error that breaks the stream.
        """
        if isinstance(self.body, bytes) and not self._filters:
            return self.body
        if isinstance(self.body, WebSocket):
            raise TypeError("a WebSocket cannot be read as one body")
        # Filters have state: if the read fails, they must not run on the body that replaces this one.
        filters, self._filters = self._filters, []
        chain = chain_filters(filters, self.headers.get("content-encoding"))
        if filters:
            self.headers.remove("content-encoding")
        exchange: Exchange | None = getattr(self, "_exchange", None)
        chunks: list[bytes] = []
        size = reserved = 0
        try:
            async for chunk in self.raw_chunks():
                data = chain.feed(chunk)
                size += len(data)
                if size > limit:
                    raise ApiError(502, f"the response is larger than the {limit} bytes that a stage may buffer")
                if exchange is not None and (needed := size + chain.kept) > max(UNCOUNTED, reserved):
                    exchange.reserve_memory(needed - reserved)
                    reserved = needed
                chunks.append(data)
            chunks.append(chain.close())
        except FilterFailed as exc:
            raise exc.cause from None
        self.body = b"".join(chunks)
        return self.body

    async def read_json(self, limit: int = 16 * 1024 * 1024) -> Any:
        """Read the body as `read` does and return it as JSON; None if it is not JSON, or has a number out of range."""
        body = await self.read(limit)
        try:
            return decode_json(body, msgspec.json.decode)
        except ApiError:
            return None

    def set_json(self, content: object) -> None:
        """Replace the body with `content` as JSON, and drop the filters."""
        self.body = encode_json(content)
        self._filters.clear()
        self.headers.remove("content-length")

    def __repr__(self) -> str:
        return f"<Response {self.status}>"


def check_body(body: object) -> None:
    """Raise TypeError if this cannot be the body of a response."""
    if not isinstance(body, bytes | WebSocket) and not hasattr(body, "__aiter__"):
        raise TypeError(f"a response's body is bytes or an async iterator of bytes, not {type(body).__name__}")


async def _chunks_of(body: bytes | AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    if isinstance(body, bytes):
        yield body
    else:
        async for chunk in body:
            yield chunk
