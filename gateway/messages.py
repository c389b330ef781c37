"""The two messages of an exchange: what the client asked, and what it will be answered.

Both are plain objects that stages read and change.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import msgspec

from gateway.body import Body
from gateway.errors import ApiError
from gateway.exchange import Exchange, Outcome
from gateway.headers import Headers
from gateway.keys import Credential, presented_key
from gateway.stream import EventFilter, Filter, link

__all__ = ("Request", "Resource", "Response", "Target", "check_body", "replace_model")

_MAX_MODEL = 256


@dataclass(frozen=True, slots=True)
class Resource:
    """One Azure OpenAI endpoint, as the configuration names it."""

    name: str
    endpoint: str
    credential: Credential | None = None


class Target(msgspec.Struct, frozen=True):
    """Where a request goes. Stages replace it whole: `request.target = request.target.replace(deployment="x")`.

    `credential` is None where the resource's own is to be used.
    """

    resource: Resource | None = None
    deployment: str | None = None
    api_version: str | None = None
    credential: Credential | None = None

    def replace(self, **fields: Any) -> Target:
        """Return this target with other values in some of its fields."""
        return msgspec.structs.replace(self, **fields)


class _Peek(msgspec.Struct):
    """The one field of a JSON body that every exchange needs; msgspec skips the rest unread."""

    model: Any = None


_peek = msgspec.json.Decoder(_Peek)
_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Request:
    """What the client asked for, as stages see and change it.

    `operation` is the table's name for it, such as `chat.completions`, or None where there is none;
    `has_model` says whether its body names a `model`.
    `path` begins after the team's prefix and `/v1`. `caller` is who the key says it is, set by the stage
    that authenticates. `target` is where it will go. `notes` are facts for the log event; never put a
    body or a key there.
    """

    __slots__ = (
        "_address",
        "_body",
        "_exchange",
        "_json",
        "_json_set",
        "_model",
        "caller",
        "has_model",
        "headers",
        "id",
        "method",
        "notes",
        "operation",
        "path",
        "query",
        "target",
        "team",
    )

    def __init__(
        self,
        *,
        id: str,  # noqa: A002 -- the field's own word
        operation: str | None,
        has_model: bool = False,
        method: str,
        path: str,
        query: str = "",
        headers: Headers,
        body: Body,
        team: str,
        target: Target,
        exchange: Exchange,
        address: Callable[[], str] = str,
    ) -> None:
        self.id = id
        self.operation = operation
        self.has_model = has_model
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.team = team
        self.caller: str | None = None
        self.target = target
        self.notes: dict[str, object] = {}
        self._body = body
        self._exchange = exchange
        self._address = address
        self._json: dict[str, Any] | None = None
        self._json_set = False
        self._model: str | None = None

    @property
    def client(self) -> str:
        """The client's address; from `X-Forwarded-For` only where a trusted proxy says it."""
        return self._address()

    def key(self) -> Credential | None:
        """Return the key the client presents, or None: `Authorization: Bearer K` or `api-key: K`.

        A JSON Web Token (an Entra token) is `bearer`. Raises ApiError 401 where what is presented is no
        key, or where two keys disagree.
        """
        return presented_key(self.headers)

    async def body(self) -> bytes:
        """Return the body's bytes; they are kept, so that a second call is possible."""
        if self._json_set:
            try:
                return msgspec.json.encode(self._json)
            except UnicodeEncodeError:  # half of a surrogate pair; see _decoded
                return json.dumps(self._json).encode()
        return await self._body.read()

    async def buffer(self, limit: int) -> None:
        """Keep the body, so that `call_next` can be called again. Raises ApiError 413 above `limit` bytes."""
        await self._body.read(limit)

    async def json(self) -> dict[str, Any]:
        """Return the body as a JSON object, decoded once. Raises ApiError 400 where it is none."""
        if self._json is None:
            decoded = _decoded(await self._body.read(), msgspec.json.decode)
            if not isinstance(decoded, dict):
                raise ApiError(400, "the body must be a JSON object")
            self._json = decoded
        return self._json

    def set_json(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send `body` instead of what the client sent; returns it."""
        self._json = body
        self._json_set = True
        self._model = None
        return body

    async def model(self) -> str:
        """Return the `model` of the JSON body. Raises ApiError 400 where there is none or it is no name."""
        if self._model is None:
            if self._json is not None:
                value = self._json.get("model")
            else:
                data = await self._body.read()
                if not data.strip():
                    raise ApiError(400, "the body is empty; send a JSON object with a `model`", param="model")
                peeked = _decoded(data, _peek.decode)
                value = peeked.model if isinstance(peeked, _Peek) else _field(peeked, "model")
            self._model = _model_name(value)
            self.notes["model"] = self._model
        return self._model

    def copy(self, *, target: Target | None = None) -> Request:
        """Return a request of the same exchange that can be changed apart, for a second `call_next`."""
        twin = Request(
            id=self.id,
            operation=self.operation,
            has_model=self.has_model,
            method=self.method,
            path=self.path,
            query=self.query,
            headers=self.headers.copy(),
            body=self._body,
            team=self.team,
            target=target or self.target,
            exchange=self._exchange,
            address=self._address,
        )
        twin.caller = self.caller
        twin.notes = self.notes
        twin._json = self._json
        twin._json_set = self._json_set
        twin._model = self._model
        return twin

    def defer(self, callback: Callable[[Outcome], None]) -> None:
        """Run `callback(outcome)` once, when the exchange is over, however it ends.

        Register before `call_next`: what stands after it runs before the body streams.
        """
        self._exchange.defer(callback)

    def __repr__(self) -> str:
        return f"<Request {self.id} {self.method} {self.path}>"


class Response:
    """What the client will be answered. Nothing is sent until the whole chain has returned.

    `body` is bytes, or an async iterator of bytes that nobody has read yet. `error` is the exception that
    a stage or Azure's connection raised, if this answer stands for one.
    """

    __slots__ = ("_filters", "body", "error", "headers", "status")

    def __init__(
        self,
        status: int = 200,
        body: bytes | AsyncIterator[bytes] = b"",
        headers: Headers | Mapping[str, str] | None = None,
        *,
        error: BaseException | None = None,
    ) -> None:
        check_body(body)
        self.status = status
        self.body = body
        self.headers = headers if isinstance(headers, Headers) else Headers(headers or {})
        self.error = error
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
    def event_stream(self) -> bool:
        """Whether the body is server-sent events, by its media type, whatever its parameters."""
        for field in self.headers.fields:
            if field[0] == b"content-type":
                return _is_event_stream(field[1])
        return False

    def pipe(self, *filters: Filter | EventFilter) -> None:
        """Put filters on the body; the one put on first, nearest Azure, runs first."""
        self._filters.extend(filters)
        # The length is another one now, and is not known yet.
        self.headers.remove("content-length")

    @property
    def filters(self) -> tuple[Filter | EventFilter, ...]:
        """The filters put on so far, in the order in which they run."""
        return tuple(self._filters)

    async def read(self, limit: int = 16 * 1024 * 1024) -> bytes:
        """Read the body whole, through its filters, and keep it as bytes.

        Raises ApiError 502 above `limit` bytes, and whatever breaks the stream.
        """
        if isinstance(self.body, bytes) and not self._filters:
            return self.body
        linked = link(self._filters, self.headers.get("content-encoding"))
        if self._filters:
            self.headers.remove("content-encoding")
        chunks: list[bytes] = []
        size = 0
        async for chunk in _each(self.body):
            data = linked.feed(chunk)
            size += len(data)
            if size > limit:
                raise ApiError(502, f"the answer is larger than the {limit} bytes that a stage may keep")
            chunks.append(data)
        chunks.append(linked.close())
        self._filters.clear()
        self.body = b"".join(chunks)
        return self.body

    def __repr__(self) -> str:
        return f"<Response {self.status}>"


@lru_cache(maxsize=256)
def _is_event_stream(content_type: bytes) -> bool:
    return content_type.partition(b";")[0].strip().lower() == b"text/event-stream"


def check_body(body: object) -> None:
    """Raise TypeError for what can be no response's body."""
    if not isinstance(body, bytes) and not hasattr(body, "__aiter__"):
        raise TypeError(f"a response's body is bytes or an async iterator of bytes, not {type(body).__name__}")


async def _each(body: bytes | AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    if isinstance(body, bytes):
        yield body
    else:
        async for chunk in body:
            yield chunk


def _decoded(data: bytes, decode: Callable[[bytes], Any]) -> Any:
    r"""Return what `decode` makes of JSON. Raises ApiError 400 where it is none.

    msgspec refuses half of a surrogate pair (`"\ud83d"`), which JSON allows (RFC 8259, 8.2) and JavaScript
    sends where a program has cut a text in the wrong place: such a body is decoded the slow way.
    """
    try:
        return decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError) as exc:
        if b"\\ud" in data or b"\\uD" in data:
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(data)
        raise _bad_json(exc) from None


def _field(decoded: Any, name: str) -> Any:
    return decoded.get(name) if isinstance(decoded, dict) else None


def _bad_json(exc: Exception) -> ApiError:
    detail = "it is nested too deeply" if isinstance(exc, RecursionError) else str(exc)
    return ApiError(400, f"the body is not a JSON object: {detail}")


def _model_name(value: object) -> str:
    if value is None:
        raise ApiError(400, "you must provide a model: the body has no `model`", param="model")
    if not isinstance(value, str):
        raise ApiError(400, "`model` must be text", param="model")
    if not value.strip() or len(value) > _MAX_MODEL or not value.isprintable():
        raise ApiError(
            400,
            f"`model` must be 1 to {_MAX_MODEL} printable characters",
            param="model",
            code="model_not_found",
        )
    return value


def replace_model(body: bytes, model: str) -> bytes:
    """Return a JSON object's bytes with another `model`; every other value keeps its bytes."""
    fields = _decoded(body, _raw_fields.decode)
    if not all(isinstance(value, msgspec.Raw) for value in fields.values()):
        return json.dumps({**fields, "model": model}).encode()
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)
