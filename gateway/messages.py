"""The two messages of an exchange: what the client asked, and what it will be answered.

Both are plain objects that stages read and change.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from functools import lru_cache
from typing import Any, Literal, Self

import msgspec

from gateway.azure import Operation, plain_path
from gateway.body import Body
from gateway.errors import ApiError
from gateway.exchange import Exchange, Outcome
from gateway.headers import Field, Headers
from gateway.heads import network_of
from gateway.identity import Identity, Judgement, unavailable
from gateway.jsonbody import decoded_json, encoded_json, of_fields, raw_fields
from gateway.keys import Credential, presented_key
from gateway.masking import MASK
from gateway.memory_budget import UNCOUNTED, BudgetSpent
from gateway.models import SEVERAL, map_image_deployment, map_several, model_in, read_model, several_models
from gateway.multipart import FormReader
from gateway.peek import Peekable, Peeked
from gateway.repeatable import is_repeatable
from gateway.retry_after import retry_after
from gateway.stream import CutShort, EventFilter, Filter, link
from gateway.stream_error import Beginning, StreamError
from gateway.targets import Target
from gateway.tokens import expected_prompt_tokens, most_output
from gateway.usage import METERED, PROMPTED, UNTOLD
from gateway.websocket import WebSocket

__all__ = ("Request", "Response", "check_body")


class Request:
    """What the client asked for, as stages see and change it.

    `operation` is the table's name for it, such as `chat.completions`, or None where there is none.
    `path` begins after the team's prefix and `/v1`. `caller` is who the key says it is, set by the stage
    that authenticates; `allowed_models` are the only ones that it may use (names or globs), None for all of the
    team's. `target` is where it will go. `begin_by` is when Azure must have begun to answer, on
    `time.monotonic`'s clock, where that is sooner than the resource's time-outs. `notes` are facts for the log event;
    never put a body or a key there.
    """

    __slots__ = (
        "_address",
        "_body",
        "_exchange",
        "_find",
        "_form",
        "_json",
        "_json_set",
        "_judgement",
        "_model",
        "_model_read",
        "_model_set",
        "_row",
        "allowed_models",
        "begin_by",
        "caller",
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
        operation: Operation | None,
        method: str,
        path: str,
        query: str = "",
        headers: Headers,
        body: Body,
        team: str,
        target: Target,
        exchange: Exchange,
        model: str | None = None,
        address: Callable[[], str] = str,
        judgement: Judgement | None = None,
    ) -> None:
        self.id = id
        self.operation = operation.name if operation is not None else None
        self.method = method
        # (An id that is written with escapes is decoded once, so that all decide on what Azure will be sent.)
        if operation is not None and "%" in path and operation.has_ids:
            path = plain_path(operation, path) or path
        self.path = path
        self.query = query
        self.headers = headers
        self.team = team
        self.caller: str | None = None
        self.allowed_models: tuple[str, ...] | None = None
        self.begin_by: float | None = None
        self.target = target
        self.notes: dict[str, object] = {}
        self._body = body
        self._exchange = exchange
        self._address = address
        self._judgement = judgement
        self._json: dict[str, Any] | None = None
        self._json_set = False
        self._row = operation
        self._form: FormReader | None = None
        self._find: Callable[[str], Target] | None = None  # for the models that a WebSocket's messages name
        self._model_set = model  # the path names it
        self._model: str | None = None
        self._model_read = False

    @property
    def client(self) -> str:
        """The client's address; from `X-Forwarded-For` only where a trusted proxy says it."""
        return self._address()

    def is_in(self, api_version: str) -> bool:
        """Whether an api-version has the operation, as far as is known; True where there is no operation."""
        return self._row is None or not self._row.on_azure or self._row.is_in(api_version)

    @property
    def sent_to(self) -> Target | None:
        """Where Azure was last asked for this request or a copy of it; None if it was not yet."""
        return self._exchange.target

    @property
    def api_versions(self) -> str:
        """The api-versions that are known to have the operation, in words; "" where there is none."""
        return self._row.versions if self._row is not None else ""

    def key(self) -> Credential | None:
        """Return the key the client presents, or None: `Authorization: Bearer K` or `api-key: K`.

        A JSON Web Token (an Entra token) is `bearer`. Raises ApiError 401 where what is presented is no
        key, or where two keys disagree.
        """
        return presented_key(self.headers)

    @property
    def identity(self) -> Identity | None:
        """Who the client's token says it is, by an issuer of `identity:`; None where it has none that is good.

        Raises ApiError 503 where it has one that cannot be judged for now.
        """
        judgement = self._judgement
        if judgement is not None and judgement.retry_after is not None:
            raise unavailable(judgement)
        return judgement.identity if judgement is not None else None

    @property
    def unidentified(self) -> str | None:
        """Why the client's token is not good, in words for the log; None where it is, or where there is none."""
        return self._judgement.reason if self._judgement is not None else None

    @property
    def holder(self) -> str:
        """Whose share of the gateway's memory it uses: the team's caller's, else the client's address's.

        A key that is only passed on to Azure was not checked here. Clients could make up any number of such keys, so
        they have no shares of their own; neither have the addresses of one IPv6 network (a /64), which is one client's.
        """
        caller, passed_on = self.caller, self.target.credential
        if caller is not None and (passed_on is None or passed_on.digest != caller):
            return f"caller {self.team}/{caller}"
        return f"address {network_of(self.client)}"

    def hold(self, size: int) -> None:
        """Count `size` more bytes that a stage keeps for this exchange; call it before they are kept.

        They are given back at the exchange's end. Raises ApiError 503 if the gateway or the caller holds too much,
        and 413 where it is more than one caller may ever hold.
        """
        exchange = self._exchange
        exchange.request = exchange.request or self
        exchange.hold(size)

    def let_go(self, size: int) -> None:
        """Count `size` bytes less: a stage keeps them no longer."""
        self._exchange.let_go(size)

    @property
    def taken(self) -> dict[str, Any]:
        """What stages took in `before_body`, for their `__call__`, by the ids of the stages; of the whole exchange."""
        if self._exchange.taken is None:
            self._exchange.taken = {}
        return self._exchange.taken

    async def body(self) -> bytes:
        """Return the body's bytes; they are kept, so that a second call is possible."""
        if self._json_set:
            return encoded_json(self._json)
        return await self._body.read()

    async def buffer(self, limit: int) -> None:
        """Keep the body, so that `call_next` can be called again. Raises ApiError 413 above `limit` bytes."""
        await self._body.read(limit)

    async def buffer_up_to(self, limit: int) -> bool:
        """Keep the body, as `buffer` does, if it is known to have no more than `limit` bytes; whether it is kept."""
        if self._json_set:
            self.set_body(encoded_json(self._json))
        if self._body.keep() is not None:
            return True
        length = self._body.length
        if length is None or length > limit:
            return False
        try:
            await self._body.read()
        except BudgetSpent:  # before a byte was read: it can still be streamed
            return False
        return True

    async def repeatable(self) -> bool:
        """Whether it does no harm to send it twice: it reads, or makes an answer that nobody keeps.

        What makes something that stays (a file, a batch, a response that is stored), or deletes it, is not.
        """
        return await is_repeatable(self)

    async def json(self) -> dict[str, Any]:
        """Return the body as a JSON object, decoded once. Raises ApiError 400 where it is none."""
        if self._json is None:
            decoded = decoded_json(await self._body.read(), msgspec.json.decode)
            if not isinstance(decoded, dict):
                raise ApiError(400, "the body must be a JSON object")
            self._json = decoded
        return self._json

    def set_json(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send `body` instead of what the client sent; returns it."""
        self._json = body
        self._json_set = True
        self._model_read = False
        return body

    async def fields(self, *names: str) -> dict[str, bytes]:
        """Return the fields of the JSON body, each value as its bytes of JSON; only those named, if any are.

        To name a few costs next to nothing, and the rest is not decoded. Raises ApiError 400 where the body is no
        JSON object.
        """
        data = None if self._json_set else self._body.keep()
        return raw_fields(await self.body() if data is None else data, names)

    def set_fields(self, fields: Mapping[str, bytes]) -> None:
        """Send a JSON object of these fields instead: what `fields()` returned, with changes.

        Values are bytes of JSON and are sent as they are.
        """
        self.set_body(of_fields(fields))

    def set_body(self, body: bytes) -> None:
        """Send these bytes instead of what the client sent."""
        self._body = Body(body)
        self._json, self._json_set, self._form = None, False, None
        self._model_read = False

    async def model(self) -> str | None:
        """Return the model that the request names, where its operation has it: in JSON, a form, the path or the query.

        None where the operation has none or several, or where it may be left out and was. Nothing is read in vain.
        Raises ApiError 400 where it is missing, or no name.
        """
        if not self._model_read:
            row = self._row
            if row is not None and row.model == "body" and self._model_set is None and self._json is None:
                # Nearly every request, at the least cost.
                data = self._body.keep()
                self._model = model_in(await self._body.read() if data is None else data, row)
            else:
                self._model = await read_model(self)
            self._model_read = True
            if self._model is not None:
                self.notes["model"] = self._model
        return self._model

    @property
    def tells_usage(self) -> bool:
        """Whether the tokens that it uses, if any, are told in its answer: not those of batches, runs and the like."""
        return self.operation not in UNTOLD

    async def expected_tokens(self) -> tuple[int, int | None]:
        """Return how many tokens the request is going to use: its prompt's, and the most that its answer may have.

        The answer's is None where the request does not bound it. (0, 0) of what uses none, and (1, None) where they
        are not known beforehand, as of sound, pictures and assistants. The prompt is counted where the extra `tokens`
        is installed, and estimated else.
        """
        if self.operation not in PROMPTED:
            return (1, None) if self.operation in METERED else (0, 0)
        body = await self.body()
        prompt = await expected_prompt_tokens(body, await self.model())
        return max(1, prompt), 0 if self.operation == "embeddings" else most_output(body)

    async def models(self) -> tuple[str, ...]:
        """Return every model that the request names, each once: also those of a batch file's lines and an evaluation.

        Such a file is read whole for it. Raises ApiError 400 as `model` does, or with the line that is wrong.
        """
        if self._row is not None and self._row.model in SEVERAL:
            return await several_models(self)
        name = await self.model()
        return () if name is None else (name,)

    async def map_models(self, find: Callable[[str], Target]) -> None:
        """Go where `find` says for the model that the request names: its resource and its deployment.

        A batch file, or an evaluation, names several: each becomes its deployment, and all must be in one resource.
        So do the messages of a WebSocket, each when it is sent.
        Raises what `find` raises, and ApiError 400 where a name is none or the resources differ.
        """
        if self._row is not None and self._row.model in SEVERAL:
            await map_several(self, find)
        elif self._row is not None and self._row.model == "frame":
            self._find = find
        elif (name := await self.model()) is not None:
            found = find(name.strip())
            self.target = self.target.to(found)
        elif self._model_set is not None:  # no model is asked for, but a deployment in the path chooses the resource
            self.target = self.target.to(find(self._model_set.strip())).replace(deployment=None)
        map_image_deployment(self, find)

    def copy(self, *, target: Target | None = None) -> Request:
        """Return a request of the same exchange that can be changed apart, for a second `call_next`."""
        twin = Request(
            id=self.id,
            operation=self._row,
            method=self.method,
            path=self.path,
            query=self.query,
            headers=self.headers.copy(),
            body=self._body,
            team=self.team,
            target=target or self.target,
            exchange=self._exchange,
            model=self._model_set,
            address=self._address,
            judgement=self._judgement,
        )
        twin.operation = self.operation
        twin.caller = self.caller
        twin.allowed_models = self.allowed_models
        twin.begin_by = self.begin_by
        twin.notes = self.notes
        twin._json = self._json
        twin._json_set = self._json_set
        twin._form = self._form
        twin._find = self._find
        twin._model = self._model
        twin._model_read = self._model_read
        return twin

    def saved(self) -> tuple[Any, ...]:
        """Return what stages may change of it, for `restore`: as good as a copy, at a tenth of its price.

        Its body must be kept, and not be JSON that was set.
        """
        return (
            self.operation, self.path, self.query, self.headers.fields, self.target, self.caller, self.allowed_models,
            self.begin_by, self._body, self._form, self._find, self._model, self._model_read,
        )  # fmt: skip

    def restore(self, saved: tuple[Any, ...]) -> None:
        """Make it again what it was when it was saved, so that it can be sent once more."""
        (
            self.operation, self.path, self.query, fields, self.target, self.caller, self.allowed_models,
            self.begin_by, self._body, self._form, self._find, self._model, self._model_read,
        ) = saved  # fmt: skip
        self.headers = Headers.of(fields)
        # What was decoded may have been changed since: it is decoded again.
        self._json, self._json_set = None, False

    def defer(self, callback: Callable[[Outcome], None]) -> None:
        """Run `callback(outcome)` once, when the exchange is over, however it ends.

        Register before `call_next`: what stands after it runs before the body streams.
        """
        self._exchange.defer(callback)

    def count(self, name: str) -> None:
        """Count something that a stage or its filter did, such as a repair; `Outcome.counts` has the sums."""
        self._exchange.count(name)

    def adapted(self, change: str) -> None:
        """Note a change that a stage made to what the client sent, for the log event; names, never values."""
        changes = self.notes.setdefault("adapted", [])
        if isinstance(changes, list) and change not in changes:  # a second try makes it again
            changes.append(change)

    def __repr__(self) -> str:
        return f"<Request {self.id} {self.method} {self.path}>"


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
        self._media_type = next((_media_type(field[1]) for field in fields if field[0] == b"content-type"), "")

    async def peek(self, enough: Callable[[bytes], bool], seconds: float) -> bytes:
        """Return the first bytes of the body, before any filter; they stay in it.

        Waits until `enough` says of what has come that it is enough, at most so many seconds or 64 KiB, or to the
        body's end. Raises UpstreamError where Azure breaks off.
        """
        if isinstance(self.body, bytes):
            return self.body
        if isinstance(self.body, WebSocket):
            raise TypeError("a WebSocket has no body to look at")
        if isinstance(self.body, Peekable):
            body = self.body
        else:
            self.body = body = Peeked(self.body)
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
        beginning = Beginning(responses=responses)
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
        linked = link(filters, self.headers.get("content-encoding"))
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
        except CutShort as exc:
            raise exc.cause from None
        self.body = b"".join(chunks)
        return self.body

    async def read_json(self, limit: int = 16 * 1024 * 1024) -> Any:
        """Return the body as JSON, read as `read` does; None where it is none, or has a number too large for one."""
        body = await self.read(limit)
        try:
            return decoded_json(body, msgspec.json.decode)
        except ApiError:
            return None

    def set_json(self, content: object) -> None:
        """Answer this, as JSON, in place of the body."""
        self.body = encoded_json(content)
        self._filters.clear()
        self.headers.remove("content-length")

    def __repr__(self) -> str:
        return f"<Response {self.status}>"


@lru_cache(maxsize=256)
def _media_type(content_type: bytes) -> str:
    return content_type.partition(b";")[0].strip().lower().decode("latin-1")


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
