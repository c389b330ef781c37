"""The request of an exchange: what the client asked for, as stages read and change it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from gateway.auth.client_address import network_of
from gateway.auth.credentials import Credential, presented_key
from gateway.auth.oidc import Identity, TokenVerification, verification_unavailable
from gateway.azure.idempotency import is_idempotent
from gateway.azure.model_field import SEVERAL, map_image_deployment, map_several, model_in, read_model, several_models
from gateway.azure.operations import Operation, plain_path
from gateway.azure.resources import Target
from gateway.body.request_body import Body
from gateway.errors import ApiError
from gateway.exchange import Exchange, Outcome
from gateway.limits.memory_budget import BudgetExhausted
from gateway.protocol.headers import Headers
from gateway.protocol.json_fields import decode_json, encode_fields, encode_json, raw_fields
from gateway.protocol.media_type import media_type
from gateway.protocol.multipart import FormReader
from gateway.usage.metered_operations import METERED, PROMPTED, UNREPORTED
from gateway.usage.tokenizer import expected_prompt_tokens, max_output_tokens

__all__ = ("Request",)


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
        judgement: TokenVerification | None = None,
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

    @property
    def media_type(self) -> str:
        """The body's media type, in lower case and without parameters; "" if it has none."""
        return media_type(self.headers.get("content-type") or "")

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
            raise verification_unavailable(judgement)
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
            return encode_json(self._json)
        return await self._body.read()

    async def buffer(self, limit: int) -> None:
        """Keep the body, so that `call_next` can be called again. Raises ApiError 413 above `limit` bytes."""
        await self._body.read(limit)

    async def buffer_up_to(self, limit: int) -> bool:
        """Keep the body, as `buffer` does, if it is known to have no more than `limit` bytes; whether it is kept."""
        if self._json_set:
            self.set_body(encode_json(self._json))
        if self._body.keep() is not None:
            return True
        length = self._body.length
        if length is None or length > limit:
            return False
        try:
            await self._body.read()
        except BudgetExhausted:  # before a byte was read: it can still be streamed
            return False
        return True

    async def repeatable(self) -> bool:
        """Whether it does no harm to send it twice: it reads, or makes an answer that nobody keeps.

        What makes something that stays (a file, a batch, a response that is stored), or deletes it, is not.
        """
        return await is_idempotent(self)

    async def json(self) -> dict[str, Any]:
        """Return the body as a JSON object, decoded once. Raises ApiError 400 where it is none."""
        if self._json is None:
            decoded = decode_json(await self._body.read(), msgspec.json.decode)
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
        self.set_body(encode_fields(fields))

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
    def reports_usage(self) -> bool:
        """Whether the tokens that it uses, if any, are told in its answer: not those of batches, runs and the like."""
        return self.operation not in UNREPORTED

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
        return max(1, prompt), 0 if self.operation == "embeddings" else max_output_tokens(body)

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
