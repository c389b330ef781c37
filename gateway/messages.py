"""The two messages of an exchange: what the client asked, and what it will be answered.

Both are plain objects that stages read and change. Nothing here does I/O but `Body`, which reads what the
client still has to send.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import msgspec

from gateway.errors import ApiError, BodyConsumed
from gateway.exchange import Exchange, Outcome
from gateway.stream import EventFilter, Filter, link

__all__ = ("Body", "Credential", "Headers", "Request", "Resource", "Response", "Target")

# What a header value may never hold: it would end the line, or the string (RFC 9110, 5.5).
_UNSAFE = re.compile(rb"[\r\n\0]")
# A bearer token's alphabet (RFC 6750, 2.1), which Azure's and OpenAI's keys keep to.
_KEY = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_JWT = re.compile(r"eyJ[A-Za-z0-9_-]*\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
_MAX_KEY = 512
_MAX_TOKEN = 16_384
_MAX_MODEL = 256


class Headers:
    """Header fields as a list of (name, value) pairs, in order, found without regard to case.

    `raw` holds the bytes as they stand on the wire. Text is latin-1, as HTTP has it.
    """

    __slots__ = ("raw",)

    def __init__(self, pairs: Iterable[tuple[bytes, bytes]] | Mapping[str, str] = ()) -> None:
        self.raw: list[tuple[bytes, bytes]] = []
        if isinstance(pairs, Mapping):
            for name, value in pairs.items():
                self.add(name, value)
        else:
            self.raw.extend(pairs)

    def get(self, name: str, default: str | None = None) -> str | None:
        """Return the first value of `name`, or `default`."""
        wanted = name.lower().encode("latin-1")
        for key, value in self.raw:
            if key.lower() == wanted:
                return value.decode("latin-1")
        return default

    def getall(self, name: str) -> list[str]:
        """Return every value of `name`, in order."""
        wanted = name.lower().encode("latin-1")
        return [value.decode("latin-1") for key, value in self.raw if key.lower() == wanted]

    def set(self, name: str, value: str) -> None:
        """Give `name` this one value. Raises ValueError where a value would break out of its line."""
        self.remove(name)
        self.add(name, value)

    def add(self, name: str, value: str) -> None:
        """Add a field, beside others of its name. Raises ValueError as `set` does."""
        raw_name, raw_value = name.encode("latin-1"), value.encode("latin-1")
        if _UNSAFE.search(raw_name) or _UNSAFE.search(raw_value) or not raw_name:
            raise ValueError(f"header {name!r} has a line break or a NUL in it")
        self.raw.append((raw_name, raw_value))

    def remove(self, name: str) -> None:
        """Remove every field of this name; do nothing if there is none."""
        wanted = name.lower().encode("latin-1")
        self.raw = [pair for pair in self.raw if pair[0].lower() != wanted]

    def copy(self) -> Headers:
        """Return a copy that can be changed apart."""
        return Headers(self.raw)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.get(name) is not None

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for key, value in self.raw:
            yield key.decode("latin-1"), value.decode("latin-1")

    def __len__(self) -> int:
        return len(self.raw)

    def __repr__(self) -> str:
        # Names only: values may be keys.
        return f"<Headers {', '.join(name for name, _ in self)}>"


@dataclass(frozen=True, slots=True)
class Credential:
    """What Azure is shown: an `api-key`, or an Entra token as `Authorization: Bearer`."""

    value: str = field(repr=False)
    bearer: bool = False

    @property
    def digest(self) -> str:
        """`sha256:` and 64 hexadecimal digits: how logs and counters name a key."""
        return key_digest(self.value)


@dataclass(frozen=True, slots=True)
class Resource:
    """One Azure OpenAI endpoint, as the configuration names it."""

    name: str
    endpoint: str
    credential: Credential | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes. Stages replace it whole, with `dataclasses.replace`.

    `credential` is None where the resource's own is to be used.
    """

    resource: Resource | None = None
    deployment: str | None = None
    api_version: str | None = None
    credential: Credential | None = None


class Incoming(Protocol):
    """Where a body comes from: the server's connection to the client."""

    length: int | None

    async def read(self) -> bytes:
        """Return the next bytes, or b"" at the end. Raises ApiError where the client is slow or too big."""


class Body:
    """A client's body: a stream until somebody asks for its bytes. Copies of a request share it."""

    __slots__ = ("_data", "_source", "_streamed")

    def __init__(self, source: Incoming | bytes) -> None:
        self._data = source if isinstance(source, bytes) else None
        self._source = None if isinstance(source, bytes) else source
        self._streamed = False

    @property
    def length(self) -> int | None:
        """The number of bytes, where it is known before they are read."""
        if self._data is not None:
            return len(self._data)
        return self._source.length if self._source is not None else None

    @property
    def buffered(self) -> bool:
        """Whether the bytes are at hand and can be sent more than once."""
        return self._data is not None

    async def read(self, limit: int | None = None) -> bytes:
        """Read it whole and keep it.

        Raises ApiError 413 above `limit` bytes, BodyConsumed where it was streamed away already.
        """
        if self._data is None:
            if self._streamed or self._source is None:
                raise BodyConsumed(BodyConsumed.__doc__)
            self._streamed = True
            chunks: list[bytes] = []
            size = 0
            while chunk := await self._source.read():
                size += len(chunk)
                if limit is not None and size > limit:
                    raise _too_much(limit)
                chunks.append(chunk)
            self._data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
            self._source = None
        elif limit is not None and len(self._data) > limit:
            raise _too_much(limit)
        return self._data

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield it as it comes, once; BodyConsumed the second time, unless it was read before."""
        if self._data is not None:
            if self._data:
                yield self._data
            return
        if self._streamed or self._source is None:
            raise BodyConsumed(BodyConsumed.__doc__)
        self._streamed = True
        while chunk := await self._source.read():
            yield chunk


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
            return msgspec.json.encode(self._json)
        return await self._body.read()

    async def buffer(self, limit: int) -> None:
        """Keep the body, so that `call_next` can be called again. Raises ApiError 413 above `limit` bytes."""
        await self._body.read(limit)

    async def json(self) -> dict[str, Any]:
        """Return the body as a JSON object, decoded once. Raises ApiError 400 where it is none."""
        if self._json is None:
            try:
                decoded = msgspec.json.decode(await self._body.read())
            except (msgspec.DecodeError, RecursionError, ValueError) as exc:
                raise _bad_json(exc) from None
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
                try:
                    value = _peek.decode(data).model
                except (msgspec.DecodeError, RecursionError, ValueError) as exc:
                    raise _bad_json(exc) from None
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
        media_type = (self.headers.get("content-type") or "").partition(";")[0]
        return media_type.strip().lower() == "text/event-stream"

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


async def _each(body: bytes | AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    if isinstance(body, bytes):
        yield body
    else:
        async for chunk in body:
            yield chunk


def presented_key(headers: Headers) -> Credential | None:
    """Return the key that these headers present; see `Request.key`."""
    found: list[tuple[str, bool]] = []
    for name, value in headers.raw:
        lowered = name.lower()
        if lowered == b"authorization":
            scheme, _, token = value.partition(b" ")
            if scheme.lower() != b"bearer":
                raise _bad_key("the Authorization header must be `Bearer YOUR_KEY`")
            found.append((_key_text(token), True))
        elif lowered == b"api-key":
            found.append((_key_text(value), False))
    if not found:
        return None
    if len({text for text, _ in found}) > 1:
        raise _bad_key("two different keys were presented; send one, as `Authorization: Bearer` or as `api-key`")
    text = found[0][0]
    return Credential(text, bearer=any(bearer for _, bearer in found) and is_jwt(text))


def _key_text(raw: bytes) -> str:
    text = raw.strip().decode("latin-1")
    if not text:
        raise _bad_key("the key is empty; send `Authorization: Bearer YOUR_KEY`")
    if not is_key(text):
        raise _bad_key("what was presented as a key cannot be one")
    return text


def is_key(text: str) -> bool:
    """Whether a text can be a key or a token: nothing else may become a header to Azure."""
    return _KEY.fullmatch(text) is not None and len(text) <= (_MAX_TOKEN if is_jwt(text) else _MAX_KEY)


def is_jwt(text: str) -> bool:
    """Whether a key looks like a JSON Web Token, as Entra's tokens do."""
    return _JWT.fullmatch(text) is not None


def secrets(headers: Headers, target: Target | None) -> list[str]:
    """Return what must not be printed if some text holds it: every value of a request that may be a key."""
    found = [value for name, value in headers if name.lower() in ("authorization", "api-key")]
    found += [value.rpartition(" ")[2] for value in found]
    if target is not None:
        stored = target.resource.credential if target.resource is not None else None
        found += [each.value for each in (target.credential, stored) if each is not None]
    return [value for value in found if value]


def _too_much(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than the {limit} bytes that may be kept", code="body_too_large")


def _bad_key(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def key_digest(key: str) -> str:
    """Return `sha256:` and the hexadecimal SHA-256 of a key: how the configuration and counters name it."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


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
    try:
        fields = _raw_fields.decode(body)
    except (msgspec.DecodeError, RecursionError, ValueError) as exc:
        raise _bad_json(exc) from None
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)
