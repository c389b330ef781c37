"""Where a request's model sits: it is read from there, and the deployment's name is written there.

The operation table says the place. A JSON body is decoded for this one field; a form is read until the field has
come, wherever it stands, and passed on byte for byte but for its value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote, unquote_plus

import msgspec

from gateway.azure.batch_files import batch_models, map_batch
from gateway.azure.resources import common_resource
from gateway.errors import ApiError
from gateway.protocol.filters import EventFilter
from gateway.protocol.json_fields import decode_json, encode_fields, raw_fields, with_field
from gateway.protocol.media_type import media_type
from gateway.protocol.multipart import FormReader, boundary_of
from gateway.protocol.sse import Event

if TYPE_CHECKING:
    from gateway.azure.operations import Operation
    from gateway.azure.request_view import RequestView
    from gateway.azure.resources import Target
    from gateway.body.request_body import Body

__all__ = (
    "SEVERAL",
    "FrameModels",
    "map_image_deployment",
    "map_several",
    "model_in",
    "model_name",
    "placed_query",
    "read_model",
    "with_deployment",
)

# The places of more than one model.
SEVERAL = frozenset({"lines", "evals"})

_MAX_MODEL = 256
# The JSON of a model's name: escaped, each character takes up to 6 bytes.
_MAX_RAW_MODEL = 2048
_NAMES_MODEL = re.compile(r";\s*(model|deployment)\s*=", re.IGNORECASE)


class _Peek(msgspec.Struct):
    """The one field of a JSON body that every exchange needs; msgspec skips the rest unread."""

    model: msgspec.Raw = msgspec.Raw(b"null")


class _Session(msgspec.Struct):
    session: msgspec.Raw = msgspec.Raw(b"null")


_peek = msgspec.json.Decoder(_Peek)
_session = msgspec.json.Decoder(_Session)
_text = msgspec.json.Decoder(str)


# -- reading -------------------------------------------------------------------------------------------


async def read_model(request: RequestView) -> str | None:
    """Return the model that a request names; see `Request.model`."""
    row = request._row
    if row is None or row.model is None or row.model in SEVERAL or row.model == "frame":
        return None
    if request._model_set is not None:
        value: object = request._model_set
    elif row.model == "path":
        value = unquote(request.path.rpartition("/")[2])
    elif row.model == "query":
        value = _query_model(request.query, ("model", "deployment") if row.method == "WS" else ("model",))
    elif row.model == "session":
        value = await _call_model(request)
    elif row.model == "form" and (form := await read_form(request, "form")) is not None:
        field = form.fields.get("model")
        value = field.text if field is not None else None
    elif request._json is None:
        return model_in(await request._body.read(), row)
    else:
        value = _field_of(request._json, nested=row.model == "session.model")
    return _checked(value, row)


def model_in(data: bytes, row: Operation) -> str | None:
    """Return the model that a JSON body names; see `Request.model`."""
    if not data or data.isspace():
        if not row.needs_model:
            return None
        raise ApiError(400, "the body is empty; send a JSON object with a `model`", param="model")
    if row.model == "session.model":
        session = decode_json(data, _session.decode, skips=True)
        if session.__class__ is not _Session:
            return _checked(_field_of(session, nested=True), row)
        nested = bytes(session.session)
        return _checked(_model_of(nested) if nested.startswith(b"{") else None, row)
    return _checked(_model_of(data), row)


def _model_of(data: bytes) -> object:
    """Return the value of `model` in a JSON object. Raises ApiError 400 if it is long, or no text."""
    try:  # nearly always, at the least cost
        raw = _peek.decode(data).model
        if len(raw) <= _MAX_RAW_MODEL:
            return _text.decode(raw)
    except (msgspec.DecodeError, RecursionError, ValueError):
        peeked = decode_json(data, _peek.decode, skips=True)
        if not isinstance(peeked, _Peek):
            return _field_of(peeked, nested=False)
        raw = peeked.model
    if len(raw) > _MAX_RAW_MODEL:
        raise ApiError(400, f"`model` must be text of at most {_MAX_MODEL} characters", param="model")
    return decode_json(bytes(raw), msgspec.json.decode)


def _field_of(fields: Any, *, nested: bool) -> object:
    if nested:
        fields = fields.get("session") if isinstance(fields, dict) else None
    return fields.get("model") if isinstance(fields, dict) else None


def _checked(value: object, row: Operation) -> str | None:
    return None if value is None and not row.needs_model else model_name(value)


# The fields of a form that name the model; a call's session is JSON, or fields of its own (npm openai writes them so).
_IN_FORM = {"form": ("model",), "session": ("session", "session[model]")}


async def read_form(request: RequestView, place: str) -> FormReader | None:
    """Read a form until the field that names the model has come, or its end; None where the body is no form."""
    if request._form is None:
        boundary = boundary_of(request.headers.getall("content-type"))
        if boundary is None:
            return None
        names = _IN_FORM[place]
        reader = FormReader(boundary, dict.fromkeys(names, True), alike=frozenset(names))

        def watch(data: bytes | None) -> bool:
            if data is None:
                reader.end()
            else:
                reader.feed(data)
            return reader.done or any(field.whole for field in reader.fields.values())

        request._exchange.defer(lambda _: request._body.close())
        await request._body.scan(watch, f"send the field `{names[0]}` before the file")
        request._form = reader
    return request._form


async def _call_model(request: RequestView) -> object:
    """Return the model of a realtime call: in its form's session, or the query of a plain SDP offer."""
    in_query = _query_model(request.query)
    form = await read_form(request, "session")
    if form is None:
        if media_type(request.headers.get("content-type") or "") != "application/sdp":
            raise ApiError(400, "a call's body is application/sdp, or multipart/form-data with `sdp` and `session`")
        return in_query
    if (field := form.fields.get("session[model]")) is not None:
        return field.text
    if (field := form.fields.get("session")) is None:
        return in_query
    model = _model_of(bytes(field.value))
    return in_query if model is None else model


def _query_model(query: str, names: tuple[str, ...] = ("model",)) -> str | None:
    named = [value for name, value in parse_qsl(query, keep_blank_values=True) if name.strip().lower() in names]
    # Servers differ in what else they take for a separator.
    if any(_NAMES_MODEL.search(unquote_plus(part)) for part in query.split("&")):
        raise ApiError(400, "the query names a model in a way that not every server reads alike", param="model")
    if len(named) > 1:
        raise ApiError(400, "the query has two models", param="model")
    return named[0] if named else None


def model_name(value: object) -> str:
    """Return a model's name. Raises ApiError 400 where it is none."""
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


# -- several models in one request ---------------------------------------------------------------------


async def map_several(request: RequestView, find: Callable[[str], Target]) -> None:
    """Write a deployment in each place of a body that names several models; see `Request.map_models`."""
    if request._row is not None and request._row.model == "lines":
        await map_batch(request, lambda name: find(model_name(name).strip()))
        return
    body = await request.json()
    _, found = _mapped_graders(body, find)
    if not found:
        request.set_json(body)  # each key once: of two, Azure might take the one that was not looked at
        return
    resource = common_resource(found.values())
    if resource is None and (len(found) > 1 or any(target.pool is not None for target in found.values())):
        raise ApiError(400, f"the models of one evaluation must be in one Azure resource: {', '.join(found)}")
    if resource is not None:
        found = {name: target.within(resource) or target for name, target in found.items()}
    changed, _ = _mapped_graders(body, found.__getitem__)
    request.notes["model"] = ", ".join(found)
    request.target = request.target.to(next(iter(found.values())))
    request.set_json(changed)


async def several_models(request: RequestView) -> tuple[str, ...]:
    """Return the models of a body that names several; see `Request.models`."""
    if request._row is not None and request._row.model == "lines":
        return await batch_models(request)
    _, found = _mapped_graders(await request.json(), lambda name: request.target.replace(deployment=name))
    return tuple(found)


def _mapped_graders(body: dict[str, Any], find: Callable[[str], Target]) -> tuple[dict[str, Any], dict[str, Target]]:
    """Return an evaluation with the models of its graders and its data source mapped, and the targets of each."""
    found: dict[str, Target] = {}

    def mapped(grader: object) -> object:
        """Map a grader's model; those of the graders in it, or in a list or a mapping of them."""
        if isinstance(grader, list):
            return [mapped(each) for each in grader]
        if not isinstance(grader, dict):
            return grader
        if not isinstance(grader.get("type"), str):
            return {name: mapped(each) for name, each in grader.items()}
        return with_model({**grader, "graders": mapped(grader["graders"])} if "graders" in grader else grader)

    def with_model(named: dict[str, Any]) -> dict[str, Any]:
        if named.get("model") is None:
            return named
        name = model_name(named["model"]).strip()
        found[name] = target = find(name)
        return {**named, "model": target.deployment}

    changed = {**body}
    try:
        if isinstance(body.get("data_source"), dict):
            changed["data_source"] = with_model(body["data_source"])
        if isinstance(body.get("testing_criteria"), list):
            changed["testing_criteria"] = [mapped(each) for each in body["testing_criteria"]]
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    return changed, found


_IMAGES = "x-ms-oai-image-generation-deployment"


def map_image_deployment(request: RequestView, find: Callable[[str], Target]) -> None:
    """Map the model of the image tool, which Azure's Responses API takes from a header of its own."""
    name = request.headers.get(_IMAGES)
    if name is None:
        return
    found, target = find(model_name(name).strip()), request.target
    if target.deployment is not None or target.pool is not None:
        resource = common_resource((target, found))
        if resource is None:
            raise ApiError(400, f"the model in {_IMAGES} is in another Azure resource than the other one")
        request.target, found = target.within(resource) or target, found.within(resource) or found
    elif found.pool is not None:
        found = found.settled(target.resource)
    request.headers.set(_IMAGES, found.deployment or "")


# -- writing -------------------------------------------------------------------------------------------


async def with_deployment(request: RequestView, operation: Operation, target: Target) -> bytes | Body:
    """Return the body to send, with the deployment where Azure looks for it.

    It stays as it came where the path names the deployment, unless Azure wants no model beside it.
    """
    deployment = target.deployment
    in_path = operation.classic == "deployment" and not target.is_v1
    place = operation.model
    if place is None or place in SEVERAL or (in_path and not operation.drops_model):
        return await as_it_is(request)
    if deployment is None:
        return await as_it_is(request) if await request.model() is not None else await _without_model(request, place)
    if operation.model in ("form", "session"):
        form = await read_form(request, operation.model)
        if form is not None:
            return _placed_in_form(request, form, operation, None if in_path else deployment)
        if operation.model == "session":
            return await as_it_is(request)
    body = await request.body()
    if operation.model == "session.model":
        fields = decode_json(body, msgspec.json.decode)
        session = fields.get("session") if isinstance(fields, dict) else None
        return with_field(body, "session", json.dumps({**session, "model": deployment}).encode()) if session else body
    if operation.model not in ("body", "form"):
        return body
    if in_path:
        return with_field(body, "model", None)
    if request._model_set is None and await request.model() == deployment and _once(body):
        return body
    return with_field(body, "model", deployment)


async def _without_model(request: RequestView, place: str) -> bytes | Body:
    """Return the body of a request that names no model, without what only some readers would find in its place."""
    if place in ("form", "session") and (form := await read_form(request, place)) is not None:
        field = form.fields.get("session")
        if field is None:
            return await as_it_is(request)
        return request._body.with_replacement(field.start, field.end, with_field(bytes(field.value), "model", None))
    if place not in ("body", "form", "session.model"):
        return await as_it_is(request)
    body = await request.body()
    if b"model" not in body and b"\\u006" not in body:
        return body
    if place != "session.model":
        return with_field(body, "model", None)
    fields = decode_json(body, msgspec.json.decode)
    session = fields.get("session") if isinstance(fields, dict) else None
    if isinstance(session, dict):
        session.pop("model", None)
    return with_field(body, "session", None if session is None else json.dumps(session).encode())


async def as_it_is(request: RequestView) -> bytes | Body:
    """Return the body as it came, or as a stage left it: its bytes if they are at hand, else as it streams."""
    if request._json_set:
        return await request.body()
    return request._body.unmodified()


def _once(body: bytes) -> bool:
    """Whether JSON has the key `model` once at most: of two, Azure might take the one that was not looked at."""
    return body.count(b'"model"') <= 1 and b"\\u006" not in body


def _placed_in_form(
    request: RequestView, form: FormReader, operation: Operation, deployment: str | None
) -> bytes | Body:
    body = request._body
    if (field := form.fields.get("session")) is not None:
        return body.with_replacement(field.start, field.end, with_field(bytes(field.value), "model", deployment))
    field = form.fields.get("model") or form.fields.get("session[model]")
    if field is not None:
        if deployment is None:
            return body.with_replacement(field.part_start, field.part_end, b"")
        if field.text == deployment:
            return body.with_replacement(0, 0, b"")
        return body.with_replacement(field.start, field.end, deployment.encode())
    if deployment is None or form.first < 0 or operation.model == "session":
        return body.with_replacement(0, 0, b"")
    part = b'--%b\r\ncontent-disposition: form-data; name="model"\r\n\r\n%b\r\n' % (form.boundary, deployment.encode())
    return body.with_replacement(form.first, form.first, part)


def placed_query(operation: Operation, query: str, target: Target) -> str:
    """Return the query to send: where it names the model, it names the deployment instead."""
    deployment = target.deployment
    if deployment is None or operation.model not in ("session", "query"):
        return query
    socket = operation.method == "WS"
    names = ("model", "deployment") if socket else ("model",)
    parts = [part for part in query.split("&") if part]
    others = [part for part in parts if unquote_plus(part.partition("=")[0]).strip().lower() not in names]
    name = "deployment" if socket and not target.is_v1 else "model"
    return query if len(others) == len(parts) else "&".join([*others, f"{name}={quote(deployment, safe='')}"])


# The most colons, and so the most fields, of a message that is written anew: each field is an object meanwhile.
_MOST_FIELDS = 50_000
_MOST_NAME = 2048
_raw_values = msgspec.json.Decoder(dict[str, msgspec.Raw])
_MODEL_KEY = re.compile(rb'"model"[ \t\r\n]*:[ \t\r\n]*')


class FrameModels(EventFilter):
    """Puts deployments in the place of models in what a client sends on a WebSocket of the Responses API.

    Only the models are decoded; a message may carry 20 MiB beside them.
    """

    finds = (b'"model"', b"\\u006")  # the key, however it is written

    def __init__(self, request: RequestView, find: Callable[[str], Target]) -> None:
        self._request = request
        self._find = find

    def event(self, event: Event) -> Event:
        """Map the models of a message. Raises ApiError, which the client is told."""
        raw = event.raw
        event.raw = self._rewritten(raw) if raw.count(b":") <= _MOST_FIELDS else self._replaced(raw)
        return event

    def _rewritten(self, raw: bytes, *, top: bool = True) -> bytes:
        """Return an object, and `response` in the top one, with each key once: of two, Azure might take the other."""
        try:
            fields = _raw_values.decode(raw)
        except (msgspec.DecodeError, RecursionError, ValueError):
            fields = {name: msgspec.Raw(value) for name, value in raw_fields(raw).items()}
        if "model" in fields:
            fields["model"] = msgspec.Raw(self._deployment(bytes(fields["model"])))
        if top and "response" in fields:
            inner = bytes(fields["response"])
            if inner.startswith(b"{"):
                fields["response"] = msgspec.Raw(self._rewritten(inner, top=False))
        try:
            return msgspec.json.encode(fields)
        except UnicodeEncodeError:  # half of a surrogate pair in a name
            return encode_fields({name: bytes(value) for name, value in fields.items()})

    def _replaced(self, raw: bytes) -> bytes:
        """Return the message with another value in the place of its only model."""
        fields = raw_fields(raw, ("model", "response"))
        inner = fields.get("response", b"")
        within = raw_fields(inner, ("model",)) if inner.startswith(b"{") else {}
        key = _MODEL_KEY.search(raw)
        several = raw.count(b'"model"') > 1 or raw.count(b'"response"') > 1
        if several or b"\\u006" in raw or b"\\u007" in raw:
            raise ApiError(
                400, f"a message of more than {_MOST_FIELDS} fields must have the keys model and response once"
            )
        value = fields.get("model") or within.get("model")
        if key is None or value is None:
            return raw
        return raw[: key.end()] + self._deployment(value) + raw[key.end() + len(value) :]

    def _deployment(self, model: bytes) -> bytes:
        if len(model) > _MOST_NAME:
            raise ApiError(400, "the model's name is too long", param="model")
        name = model_name(decode_json(model, msgspec.json.decode)).strip()
        found = self._find(name)
        asked = self._request.sent_to
        there = found.within(asked.resource) if asked is not None and asked.resource is not None else None
        if there is None:
            raise ApiError(
                400,
                f"the model {name!r} is in another Azure resource than the one that this WebSocket is open to",
                param="model",
                code="resource_mismatch",
            )
        self._request.notes.setdefault("model", name)
        return msgspec.json.encode(there.deployment or "")
