"""Write the deployment's name where Azure looks for it: in the JSON body, a form or the query.

The rest of the body keeps its bytes. If the path names the deployment, the body usually passes unchanged.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote_plus

import msgspec

from gateway.azure.model_field import SEVERAL, read_form
from gateway.protocol.json_fields import decode_json, with_field

if TYPE_CHECKING:
    from gateway.azure.operations import Operation
    from gateway.azure.request_view import RequestView
    from gateway.azure.resources import Target
    from gateway.body.request_body import Body
    from gateway.protocol.multipart import FormReader

__all__ = ("query_with_deployment", "with_deployment")


async def with_deployment(request: RequestView, operation: Operation, target: Target) -> bytes | Body:
    """Return the body to send, with the deployment where Azure looks for it.

    The body passes unchanged if the path names the deployment, unless Azure rejects a model in the body then.
    """
    deployment = target.deployment
    in_path = operation.classic == "deployment" and not target.is_v1
    location = operation.model
    if location is None or location in SEVERAL or (in_path and not operation.drops_model):
        return await _unchanged(request)
    if deployment is None:
        return (
            await _unchanged(request) if await request.model() is not None else await _without_model(request, location)
        )
    if operation.model in ("form", "session"):
        form = await read_form(request, operation.model)
        if form is not None:
            return _form_with_deployment(request, form, operation, None if in_path else deployment)
        if operation.model == "session":
            return await _unchanged(request)
    body = await request.body()
    if operation.model == "session.model":
        fields = decode_json(body, msgspec.json.decode)
        session = fields.get("session") if isinstance(fields, dict) else None
        return with_field(body, "session", json.dumps({**session, "model": deployment}).encode()) if session else body
    if operation.model not in ("body", "form"):
        return body
    if in_path:
        return with_field(body, "model", None)
    if request._path_model is None and await request.model() == deployment and _names_model_once(body):
        return body
    return with_field(body, "model", deployment)


async def _without_model(request: RequestView, location: str) -> bytes | Body:
    """Return the body of a request that names no model, without a `model` that only some JSON readers would find."""
    if location in ("form", "session") and (form := await read_form(request, location)) is not None:
        field = form.fields.get("session")
        if field is None:
            return await _unchanged(request)
        return request._body.with_replacement(field.start, field.end, with_field(bytes(field.value), "model", None))
    if location not in ("body", "form", "session.model"):
        return await _unchanged(request)
    body = await request.body()
    if b"model" not in body and b"\\u006" not in body:
        return body
    if location != "session.model":
        return with_field(body, "model", None)
    fields = decode_json(body, msgspec.json.decode)
    session = fields.get("session") if isinstance(fields, dict) else None
    if isinstance(session, dict):
        session.pop("model", None)
    return with_field(body, "session", None if session is None else json.dumps(session).encode())


async def _unchanged(request: RequestView) -> bytes | Body:
    """Return the body as the client or a stage left it: its bytes if they are in memory, otherwise the stream."""
    if request._json_replaced:
        return await request.body()
    return request._body.unmodified()


def _names_model_once(body: bytes) -> bool:
    """Whether JSON has the key `model` at most once: of two, Azure could read the unchecked one."""
    return body.count(b'"model"') <= 1 and b"\\u006" not in body


def _form_with_deployment(
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


def query_with_deployment(operation: Operation, query: str, target: Target) -> str:
    """Return the query to send, with the deployment in place of the model if the query names it."""
    deployment = target.deployment
    if deployment is None or operation.model not in ("session", "query"):
        return query
    websocket = operation.method == "WS"
    names = ("model", "deployment") if websocket else ("model",)
    parts = [part for part in query.split("&") if part]
    others = [part for part in parts if unquote_plus(part.partition("=")[0]).strip().lower() not in names]
    name = "deployment" if websocket and not target.is_v1 else "model"
    return query if len(others) == len(parts) else "&".join([*others, f"{name}={quote(deployment, safe='')}"])
