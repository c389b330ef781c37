"""The response of an exchange: what the client will be answered, as stages read and change it."""

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
from gateway.protocol.media_type import cached_media_type
from gateway.protocol.retry_after import cooldown, retry_after
from gateway.transport.websocket_handshake import WebSocket

__all__ = ("Response", "check_body")


class Response:
    """What the client will be answered. Nothing is sent until the whole chain has returned.

    `body` is bytes, or an async iterator of bytes that nobody has read yet; that of a 101 is a WebSocket. `error` is
    the exception that a stage or Azure's connection raised, if this answer stands for one. `pace` spreads the events
    of a stream that come together: seconds that each may be kept for it, None for not at all.
    """

    # (`_exchange` is set by the upstream where the body is still to come, and else is not there.)
    _exchange: Exchange
    __slots__ = (
        "_exchange",
        "_filters",
        "_looked_at",
        "_media_type",
        "_shown",
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
        # The fields of which the media type is known.
        self._looked_at: list[Field] | None = None
        self._media_type: str
        self._shown: Credential | None = None  # the gateway's own credential, which Azure was shown for it
        self._filters: list[Filter | EventFilter] = []

    @classmethod
    def json(cls, content: object, status: int = 200) -> Self:
        """Return an answer whose body is `content` as JSON."""
        return cls(status, msgspec.json.encode(content), {"content-type": "application/json"})

    @classmethod
    def from_error(cls, error: ApiError) -> Self:
        """Return the OpenAI-shaped answer of an error."""
        response = cls(error.status, error.body(), {"content-type": "application/json"}, error=error)
        for name, value in error.headers.items():
            response.headers.set(name, value)
        return response

    @property
    def media_type(self) -> str:
        """The body's media type, in lower case and without parameters; "" where it is not told."""
        if self._looked_at is not self.headers.fields:
            self._look()
        return self._media_type

    @property
    def event_stream(self) -> bool:
        """Whether the body is server-sent events, by its media type, whatever its parameters."""
        if self._looked_at is not self.headers.fields:
            self._look()
        return self._media_type == "text/event-stream"

    def _look(self) -> None:
        """Look for the media type, for which most stages ask; changed fields are another list."""
        self._looked_at = fields = self.headers.fields
        self._media_type = next((cached_media_type(field[1]) for field in fields if field[0] == b"content-type"), "")

    async def peek(self, enough: Callable[[bytes], bool], seconds: float) -> bytes:
        """Return the first bytes of the body, before any filter; they stay in it.

        Waits until `enough` says of what has come that it is enough, at most so many seconds or 64 KiB, or to the
        body's end. Raises UpstreamError where Azure breaks off.
        """
        if isinstance(self.body, bytes):
            return self.body
        if isinstance(self.body, WebSocket):
            raise TypeError("a WebSocket has no body to look at")
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
        """Return the error with which a stream of events begins, before anything that is shown; None where it has none.

        Waits for its first event at most so many seconds, as `peek` does, and raises what that raises. `responses`
        looks for the errors of the Responses API as well, behind the events that only say that it has begun.
        """
        if (self.headers.get("content-encoding") or "identity").strip().lower() != "identity":
            return None
        beginning = StreamBeginning(responses=responses)
        begun = await self.peek(beginning.is_enough, seconds)
        if self._shown is not None:
            begun = begun.replace(self._shown.value.encode(), MASK)
        return beginning.error_in(begun)

    def told_as_error(self, error: StreamError) -> Response:
        """Return the answer that an error in this stream would have been."""
        answer = Response(error.status, json.dumps({"error": error.error}).encode(), self.headers.copy())
        answer.headers.remove("content-length")
        answer.headers.remove("content-encoding")
        answer.headers.set("content-type", "application/json")
        return answer

    def retry_after(self, message: str = "") -> float | None:
        """Return the seconds for which Azure asks to be left alone: by the headers, else by a message, or None."""
        return retry_after(self.headers, message)

    def cooldown(self, message: str = "") -> float | None:
        """Return `retry_after`; for a 429 that names no time, the default cooldown."""
        return cooldown(self.status, self.headers, message)

    def pipe(self, *filters: Filter | EventFilter, direction: Literal["down", "up"] = "down") -> None:
        """Put filters on the body; the one put on first, nearest Azure, runs first.

        On a WebSocket they are event filters, and see its messages as events: what Azure sends (`down`), or what the
        client sends (`up`; there the one put on last, nearest the client, runs first).
        """
        if isinstance(self.body, WebSocket):
            events = [each for each in filters if isinstance(each, EventFilter)]
            if len(events) < len(filters):
                raise TypeError("the filters of a WebSocket are event filters")
            if direction == "up":
                self.body.up[:0] = reversed(events)
                return
        elif direction == "up":
            raise ValueError("only a WebSocket has messages that go up")
        self._filters.extend(filters)
        # The length is another one now, and is not known yet.
        self.headers.remove("content-length")

    @property
    def filters(self) -> tuple[Filter | EventFilter, ...]:
        """The filters put on so far, in the order in which they run."""
        return tuple(self._filters)

    def pieces(self) -> AsyncIterator[bytes]:
        """Return the body's pieces as they come from Azure, before any filter; to be iterated over once."""
        if isinstance(self.body, WebSocket):
            raise TypeError("a WebSocket has no pieces")
        return _each(self.body)

    async def read(self, limit: int = 16 * 1024 * 1024) -> bytes:
        """Read the body whole, through its filters, and keep it as bytes.

        Raises ApiError 502 above `limit` bytes, 503 where the gateway or the caller holds too many, and whatever
        breaks the stream.
        """
        if isinstance(self.body, bytes) and not self._filters:
            return self.body
        if isinstance(self.body, WebSocket):
            raise TypeError("a WebSocket cannot be read whole")
        # Filters keep what they have seen: where the read fails, they are of no use to the body that takes its place.
        filters, self._filters = self._filters, []
        linked = chain_filters(filters, self.headers.get("content-encoding"))
        if filters:
            self.headers.remove("content-encoding")
        exchange: Exchange | None = getattr(self, "_exchange", None)
        chunks: list[bytes] = []
        size = held = 0
        try:
            async for chunk in self.pieces():
                data = linked.feed(chunk)
                size += len(data)
                if size > limit:
                    raise ApiError(502, f"the answer is larger than the {limit} bytes that a stage may keep")
                if exchange is not None and (now := size + linked.kept) > max(UNCOUNTED, held):
                    exchange.hold(now - held)
                    held = now
                chunks.append(data)
            chunks.append(linked.close())
        except FilterFailed as exc:
            raise exc.cause from None
        self.body = b"".join(chunks)
        return self.body

    async def read_json(self, limit: int = 16 * 1024 * 1024) -> Any:
        """Return the body as JSON, read as `read` does; None where it is none, or has a number too large for one."""
        body = await self.read(limit)
        try:
            return decode_json(body, msgspec.json.decode)
        except ApiError:
            return None

    def set_json(self, content: object) -> None:
        """Answer this, as JSON, in place of the body."""
        self.body = encode_json(content)
        self._filters.clear()
        self.headers.remove("content-length")

    def __repr__(self) -> str:
        return f"<Response {self.status}>"


def check_body(body: object) -> None:
    """Raise TypeError for what can be no response's body."""
    if not isinstance(body, bytes | WebSocket) and not hasattr(body, "__aiter__"):
        raise TypeError(f"a response's body is bytes or an async iterator of bytes, not {type(body).__name__}")


async def _each(body: bytes | AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    if isinstance(body, bytes):
        yield body
    else:
        async for chunk in body:
            yield chunk
