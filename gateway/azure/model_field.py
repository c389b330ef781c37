"""Read the `model` that a request names: in JSON, a form, the path or the query.

The operation table says where it is. From a JSON body, one pass decodes only the fields of `_JsonFields`: to read
another field, such as `stream`, in the same pass as `model`, add it there. A form is read until its field has arrived.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, unquote_plus

import msgspec

from gateway.errors import ApiError
from gateway.protocol.json_fields import decode_json
from gateway.protocol.multipart import FormReader, boundary_of

if TYPE_CHECKING:
    from gateway.azure.operations import Operation
    from gateway.azure.request_view import RequestView

__all__ = ("SEVERAL", "model_in", "model_name", "read_form", "read_model")

# The locations of operations that name more than one model.
SEVERAL = frozenset({"lines", "evals"})

_MAX_MODEL = 256
# The JSON of a model's name, in bytes: an escaped character takes up to 6.
_MAX_RAW_MODEL = 2048
_QUERY_TRICK = re.compile(r";\s*(model|deployment)\s*=", re.IGNORECASE)


class _JsonFields(msgspec.Struct):
    """The fields of a JSON body that every exchange needs; msgspec skips all others without decoding them."""

    model: msgspec.Raw = msgspec.Raw(b"null")


class _SessionField(msgspec.Struct):
    session: msgspec.Raw = msgspec.Raw(b"null")


_decode_fields = msgspec.json.Decoder(_JsonFields).decode
_decode_session = msgspec.json.Decoder(_SessionField).decode
_decode_text = msgspec.json.Decoder(str).decode


async def read_model(request: RequestView) -> str | None:
    """Return the model that a request names; see `Request.model`."""
    operation = request._operation
    if operation is None or operation.model is None or operation.model in SEVERAL or operation.model == "frame":
        return None
    if request._path_model is not None:
        value: object = request._path_model
    elif operation.model == "path":
        value = unquote(request.path.rpartition("/")[2])
    elif operation.model == "query":
        value = _query_model(request.query, ("model", "deployment") if operation.method == "WS" else ("model",))
    elif operation.model == "session":
        value = await _call_model(request)
    elif operation.model == "form" and (form := await read_form(request, "form")) is not None:
        field = form.fields.get("model")
        value = field.text if field is not None else None
    elif request._json is None:
        return model_in(await request._body.read(), operation)
    else:
        value = _field_of(request._json, nested=operation.model == "session.model")
    return _checked(value, operation)


def model_in(data: bytes, operation: Operation) -> str | None:
    """Return the model that a JSON body names; see `Request.model`."""
    if not data or data.isspace():
        if not operation.needs_model:
            return None
        raise ApiError(400, "the body is empty; send a JSON object with a `model`", param="model")
    if operation.model == "session.model":
        session = decode_json(data, _decode_session, skips=True)
        if session.__class__ is not _SessionField:
            return _checked(_field_of(session, nested=True), operation)
        nested = bytes(session.session)
        return _checked(_model_of(nested) if nested.startswith(b"{") else None, operation)
    return _checked(_model_of(data), operation)


def _model_of(data: bytes) -> object:
    """Return the value of `model` in a JSON object. Raises ApiError 400 if it is too long or not text."""
    try:  # the fast path of nearly every request
        raw = _decode_fields(data).model
        if len(raw) <= _MAX_RAW_MODEL:
            return _decode_text(raw)
    except (msgspec.DecodeError, RecursionError, ValueError):
        fields = decode_json(data, _decode_fields, skips=True)
        if not isinstance(fields, _JsonFields):
            return _field_of(fields, nested=False)
        raw = fields.model
    if len(raw) > _MAX_RAW_MODEL:
        raise ApiError(400, f"`model` must be text of at most {_MAX_MODEL} characters", param="model")
    return decode_json(bytes(raw), msgspec.json.decode)


def _field_of(fields: Any, *, nested: bool) -> object:
    if nested:
        fields = fields.get("session") if isinstance(fields, dict) else None
    return fields.get("model") if isinstance(fields, dict) else None


def _checked(value: object, operation: Operation) -> str | None:
    return None if value is None and not operation.needs_model else model_name(value)


# The form fields that name the model. A call's session is one field of JSON, or several fields (npm's openai).
_FORM_FIELDS = {"form": ("model",), "session": ("session", "session[model]")}


async def read_form(request: RequestView, location: str) -> FormReader | None:
    """Read a form until the field that names the model has arrived, or to its end; None if the body is no form."""
    if request._form is None:
        boundary = boundary_of(request.headers.getall("content-type"))
        if boundary is None:
            return None
        names = _FORM_FIELDS[location]
        reader = FormReader(boundary, dict.fromkeys(names, True), alike=frozenset(names))

        def feed(data: bytes | None) -> bool:
            if data is None:
                reader.end()
            else:
                reader.feed(data)
            return reader.done or any(field.whole for field in reader.fields.values())

        request._exchange.defer(lambda _: request._body.close())
        await request._body.scan(feed, f"send the field `{names[0]}` before the file")
        request._form = reader
    return request._form


async def _call_model(request: RequestView) -> object:
    """Return the model of a realtime call: in the session of its form, or in the query of a plain SDP offer."""
    in_query = _query_model(request.query)
    form = await read_form(request, "session")
    if form is None:
        media_type = (request.headers.get("content-type") or "").partition(";")[0].strip().lower()
        if media_type != "application/sdp":
            raise ApiError(
                400, "the body of a call must be application/sdp, or multipart/form-data with `sdp` and `session`"
            )
        return in_query
    if (field := form.fields.get("session[model]")) is not None:
        return field.text
    if (field := form.fields.get("session")) is None:
        return in_query
    model = _model_of(bytes(field.value))
    return in_query if model is None else model


def _query_model(query: str, names: tuple[str, ...] = ("model",)) -> str | None:
    models = [value for name, value in parse_qsl(query, keep_blank_values=True) if name.strip().lower() in names]
    # Some servers also split parameters at `;`.
    if any(_QUERY_TRICK.search(unquote_plus(part)) for part in query.split("&")):
        raise ApiError(
            400, "the query names a model in a way that servers read differently; send one `model`", param="model"
        )
    if len(models) > 1:
        raise ApiError(400, "the query has two models; send one", param="model")
    return models[0] if models else None


def model_name(value: object) -> str:
    """Return `value` if it is a valid name of a model. Raises ApiError 400 if not."""
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
