"""The request of an exchange, as stages read and change it before it is sent to Azure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from gateway.auth.client_address import network_of
from gateway.auth.credentials import Credential, presented_key
from gateway.auth.oidc import Identity, TokenVerification, verification_unavailable
from gateway.azure.idempotency import is_idempotent
from gateway.azure.model_field import SEVERAL, model_in, read_model
from gateway.azure.operations import Operation
from gateway.azure.path_ids import plain_path
from gateway.azure.resources import Target
from gateway.azure.several_models import map_image_deployment, map_several, several_models
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
    """The client's request, as stages read and change it.

    `operation` is the operation's name, such as `chat.completions`, or None if the table has no such operation.
    `path` is the path after the team's prefix and `/v1`. `caller` is the owner of the key; the stage that
    authenticates sets it. `allowed_models` are the only models (names or globs) that the caller may use; None allows
    all of the team's. `target` is the destination. `first_byte_deadline` is the time, on `time.monotonic`'s clock, by
    which Azure must begin its response, if that is earlier than the resource's timeouts. `notes` are facts for the log
    event; never put a body or a key there.
    """

    __slots__ = (
        "_address",
        "_body",
        "_exchange",
        "_find_target",
        "_form",
        "_json",
        "_json_replaced",
        "_model",
        "_model_known",
        "_operation",
        "_path_model",
        "_verification",
        "allowed_models",
        "caller",
        "first_byte_deadline",
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
        id: str,  # noqa: A002 -- the usual word for a request id
        operation: Operation | None,
        method: str,
        path: str,
        query: str = "",
        headers: Headers,
        body: Body,
        team: str,
        target: Target,
        exchange: Exchange,
        path_model: str | None = None,
        address: Callable[[], str] = str,
        verification: TokenVerification | None = None,
    ) -> None:
        self.id = id
        self.operation = operation.name if operation is not None else None
        self.method = method
        # Decode percent-escapes in ids once, so that every stage sees the path that Azure receives.
        if operation is not None and "%" in path and operation.has_ids:
            path = plain_path(operation, path) or path
        self.path = path
        self.query = query
        self.headers = headers
        self.team = team
        self.caller: str | None = None
        self.allowed_models: tuple[str, ...] | None = None
        self.first_byte_deadline: float | None = None
        self.target = target
        self.notes: dict[str, object] = {}
        self._body = body
        self._exchange = exchange
        self._address = address
        self._verification = verification
        self._json: dict[str, Any] | None = None
        self._json_replaced = False
        self._operation = operation
        self._form: FormReader | None = None
        self._find_target: Callable[[str], Target] | None = None  # maps the models in a WebSocket's messages
        self._path_model = path_model  # the model or deployment that the path names
        self._model: str | None = None
        self._model_known = False

    @property
    def client_address(self) -> str:
        """The client's IP address; taken from `X-Forwarded-For` only if a trusted proxy sent it."""
        return self._address()

    @property
    def media_type(self) -> str:
        """The body's media type, in lower case and without parameters; "" if it has none."""
        return media_type(self.headers.get("content-type") or "")

    def supported_in(self, api_version: str) -> bool:
        """Whether an api-version is known to support the operation; True if there is no known operation."""
        operation = self._operation
        return operation is None or not operation.on_azure or operation.supported_in(api_version)

    @property
    def supported_versions(self) -> str:
        """The api-versions that are known to support the operation, as text; "" if there is no known operation."""
        return self._operation.supported_versions if self._operation is not None else ""

    @property
    def last_target(self) -> Target | None:
        """The target of the last attempt at Azure, for this request or a copy of it; None before the first."""
        return self._exchange.target

    def key(self) -> Credential | None:
        """Return the key that the client presents (`Authorization: Bearer K` or `api-key: K`), or None.

        A JSON Web Token, such as an Entra token, has `bearer` set. Raises ApiError 401 if the header has no valid key,
        or if two headers have different keys.
        """
        return presented_key(self.headers)

    @property
    def identity(self) -> Identity | None:
        """The identity in the client's token, from an issuer of `identity:`; None without a valid token.

        Raises ApiError 503 if the token cannot be verified at the moment.
        """
        verification = self._verification
        if verification is not None and verification.retry_after is not None:
            raise verification_unavailable(verification)
        return verification.identity if verification is not None else None

    @property
    def identity_error(self) -> str | None:
        """Why the client's token is not valid, for the log; None if it is valid, or if there is no token."""
        return self._verification.reason if self._verification is not None else None

    @property
    def holder(self) -> str:
        """The owner of the memory that the request uses: the team's caller, or else the client's address.

        The gateway does not check a key that it only passes on to Azure. A client could invent any number of such keys,
        so these have no share of their own. Neither have the addresses of one IPv6 network (a /64): that is one client.
        """
        caller, passed_on = self.caller, self.target.credential
        if caller is not None and (passed_on is None or passed_on.digest != caller):
            return f"caller {self.team}/{caller}"
        return f"address {network_of(self.client_address)}"

    def reserve_memory(self, size: int) -> None:
        """Reserve `size` bytes of the memory budget for data that a stage keeps; call it before keeping the data.

        The gateway releases them when the exchange ends. Raises ApiError 503 if the gateway's or the caller's budget is
        exhausted, and 413 if `size` is more than one caller may ever use.
        """
        exchange = self._exchange
        exchange.request = exchange.request or self
        exchange.reserve_memory(size)

    def release_memory(self, size: int) -> None:
        """Release `size` reserved bytes before the exchange ends."""
        self._exchange.release_memory(size)

    @property
    def reservations(self) -> dict[str, Any]:
        """What stages reserved in `before_body`, for their `__call__`: stage id -> any value. Copies share it."""
        if self._exchange.reservations is None:
            self._exchange.reservations = {}
        return self._exchange.reservations

    async def body(self) -> bytes:
        """Return the body's bytes. The gateway keeps them, so that a second call is possible."""
        if self._json_replaced:
            return encode_json(self._json)
        return await self._body.read()

    async def buffer(self, limit: int) -> None:
        """Keep the body, so that `call_next` can be called again. Raises ApiError 413 above `limit` bytes."""
        await self._body.read(limit)

    async def buffer_up_to(self, limit: int) -> bool:
        """Keep the body, as `buffer` does, if it is known to have at most `limit` bytes. Returns whether it is kept."""
        if self._json_replaced:
            self.set_body(encode_json(self._json))
        if self._body.keep() is not None:
            return True
        length = self._body.length
        if length is None or length > limit:
            return False
        try:
            await self._body.read()
        except BudgetExhausted:  # before the first byte was read: the body can still be streamed
            return False
        return True

    async def is_idempotent(self) -> bool:
        """Whether the request can be sent twice without harm: it only reads, or its response is not stored.

        A request that creates or deletes something (a file, a batch, a stored response) is not idempotent.
        """
        return await is_idempotent(self)

    async def json(self) -> dict[str, Any]:
        """Return the body as a JSON object, decoded once. Raises ApiError 400 if it is not one."""
        if self._json is None:
            decoded = decode_json(await self._body.read(), msgspec.json.decode)
            if not isinstance(decoded, dict):
                raise ApiError(400, "the body must be a JSON object")
            self._json = decoded
        return self._json

    def set_json(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send `body` to Azure instead of the client's body. Returns `body`."""
        self._json = body
        self._json_replaced = True
        self._model_known = False
        return body

    async def fields(self, *names: str) -> dict[str, bytes]:
        """Return the fields of the JSON body, each value as bytes of JSON; with `names`, only these fields.

        The values are not decoded, so that this costs little. Raises ApiError 400 if the body is not a JSON object.
        """
        data = None if self._json_replaced else self._body.keep()
        return raw_fields(await self.body() if data is None else data, names)

    def set_fields(self, fields: Mapping[str, bytes]) -> None:
        """Send a JSON object of these fields to Azure: the result of `fields()`, with changes.

        Values are bytes of JSON and are sent unchanged.
        """
        self.set_body(encode_fields(fields))

    def set_body(self, body: bytes) -> None:
        """Send these bytes to Azure instead of the client's body."""
        self._body = Body(body)
        self._json, self._json_replaced, self._form = None, False, None
        self._model_known = False

    async def model(self) -> str | None:
        """Return the model that the request names: in JSON, a form, the path or the query, as its operation has it.

        None if the operation has no model or several, or if an optional model is missing. The body is read only if the
        model is in it. Raises ApiError 400 if a required model is missing or is not a valid name.
        """
        if not self._model_known:
            operation = self._operation
            if operation is not None and operation.model == "body" and self._path_model is None and self._json is None:
                # The fast path of nearly every request.
                data = self._body.keep()
                self._model = model_in(await self._body.read() if data is None else data, operation)
            else:
                self._model = await read_model(self)
            self._model_known = True
            if self._model is not None:
                self.notes["model"] = self._model
        return self._model

    @property
    def reports_usage(self) -> bool:
        """Whether the response reports the tokens used, if any. The responses of batches and runs do not."""
        return self.operation not in UNREPORTED

    async def expected_tokens(self) -> tuple[int, int | None]:
        """Return the expected tokens: those of the prompt, and the maximum number of output tokens.

        The second is None if the request sets no maximum. (0, 0) if the operation uses no tokens, (1, None) if they are
        not known in advance (audio, images, assistants). Prompt tokens are counted if the extra `tokens` is installed,
        and estimated otherwise.
        """
        if self.operation not in PROMPTED:
            return (1, None) if self.operation in METERED else (0, 0)
        body = await self.body()
        prompt = await expected_prompt_tokens(body, await self.model())
        return max(1, prompt), 0 if self.operation == "embeddings" else max_output_tokens(body)

    async def models(self) -> tuple[str, ...]:
        """Return every model that the request names, each once, including those of batch files and evaluations.

        Reads a batch file completely. Raises ApiError 400 as `model` does, or with the number of the invalid line.
        """
        if self._operation is not None and self._operation.model in SEVERAL:
            return await several_models(self)
        name = await self.model()
        return () if name is None else (name,)

    async def map_models(self, find: Callable[[str], Target]) -> None:
        """Set the target to `find(model)`: the resource and the deployment of the model that the request names.

        In a batch file or an evaluation, each model becomes its deployment, and all must be in one resource. In the
        messages of a WebSocket, models are mapped when a message is sent. Raises what `find` raises, and ApiError 400
        for an invalid name or different resources.
        """
        if self._operation is not None and self._operation.model in SEVERAL:
            await map_several(self, find)
        elif self._operation is not None and self._operation.model == "frame":
            self._find_target = find
        elif (name := await self.model()) is not None:
            found = find(name.strip())
            self.target = self.target.routed_to(found)
        elif self._path_model is not None:  # no model is needed, but the deployment in the path selects the resource
            self.target = self.target.routed_to(find(self._path_model.strip())).replace(deployment=None)
        map_image_deployment(self, find)

    def copy(self, *, target: Target | None = None) -> Request:
        """Return an independent copy within the same exchange, for a second `call_next`."""
        twin = Request(
            id=self.id,
            operation=self._operation,
            method=self.method,
            path=self.path,
            query=self.query,
            headers=self.headers.copy(),
            body=self._body,
            team=self.team,
            target=target or self.target,
            exchange=self._exchange,
            path_model=self._path_model,
            address=self._address,
            verification=self._verification,
        )
        twin.operation = self.operation
        twin.caller = self.caller
        twin.allowed_models = self.allowed_models
        twin.first_byte_deadline = self.first_byte_deadline
        twin.notes = self.notes
        twin._json = self._json
        twin._json_replaced = self._json_replaced
        twin._form = self._form
        twin._find_target = self._find_target
        twin._model = self._model
        twin._model_known = self._model_known
        return twin

    def snapshot(self) -> tuple[Any, ...]:
        """Return all that stages may change, for `restore`: as good as a copy, at a tenth of the cost.

        The body must be kept, and must not be JSON from `set_json`.
        """
        return (
            self.operation, self.path, self.query, self.headers.fields, self.target, self.caller, self.allowed_models,
            self.first_byte_deadline, self._body, self._form, self._find_target, self._model, self._model_known,
        )  # fmt: skip

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Restore the state of a snapshot, so that the request can be sent again."""
        (
            self.operation, self.path, self.query, fields, self.target, self.caller, self.allowed_models,
            self.first_byte_deadline, self._body, self._form, self._find_target, self._model, self._model_known,
        ) = snapshot  # fmt: skip
        self.headers = Headers.of(fields)
        # A stage may have changed the decoded JSON: decode it again.
        self._json, self._json_replaced = None, False

    def defer(self, callback: Callable[[Outcome], None]) -> None:
        """Run `callback(outcome)` once, when the exchange ends, for whatever reason.

        Register it before `call_next`: code after `call_next` runs before the body streams.
        """
        self._exchange.defer(callback)

    def count(self, name: str) -> None:
        """Count an action of a stage or its filter, such as a repair; `Outcome.counts` has the totals."""
        self._exchange.count(name)

    def record_adaptation(self, change: str) -> None:
        """Record a change that a stage made to the request, for the log event's `adapted`: names, never values."""
        changes = self.notes.setdefault("adapted", [])
        if isinstance(changes, list) and change not in changes:  # a retry makes the same change again
            changes.append(change)

    def __repr__(self) -> str:
        return f"<Request {self.id} {self.method} {self.path}>"
