"""Map the models in the messages that a client sends on a WebSocket of the Responses API."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from gateway.azure.model_field import model_name
from gateway.errors import ApiError
from gateway.protocol.filters import EventFilter
from gateway.protocol.json_fields import decode_json, encode_fields, raw_fields
from gateway.protocol.sse import Event

if TYPE_CHECKING:
    from gateway.azure.request_view import RequestView
    from gateway.azure.resources import Target

__all__ = ("MessageModels",)

# The most colons, and so the most fields, of a message that is decoded into fields: each becomes an object.
_MAX_FIELDS = 50_000
_MAX_NAME = 2048
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_MODEL_KEY = re.compile(rb'"model"[ \t\r\n]*:[ \t\r\n]*')


class MessageModels(EventFilter):
    """Replaces models by deployments in a client's messages.

    Only the models are decoded: a message may carry 20 MiB of other data.
    """

    contains = (b'"model"', b"\\u006")  # the key, however it is written

    def __init__(self, request: RequestView, find: Callable[[str], Target]) -> None:
        self._request = request
        self._find = find

    def event(self, event: Event) -> Event:
        """Map the models of a message. Raises ApiError, which is sent to the client."""
        raw = event.raw
        event.raw = self._with_fields_mapped(raw) if raw.count(b":") <= _MAX_FIELDS else self._with_value_replaced(raw)
        return event

    def _with_fields_mapped(self, raw: bytes, *, top: bool = True) -> bytes:
        """Return a JSON object, and its `response`, with each key once: of two, Azure could read the unchecked one."""
        try:
            fields = _fields.decode(raw)
        except (msgspec.DecodeError, RecursionError, ValueError):
            fields = {name: msgspec.Raw(value) for name, value in raw_fields(raw).items()}
        if "model" in fields:
            fields["model"] = msgspec.Raw(self._deployment(bytes(fields["model"])))
        if top and "response" in fields:
            inner = bytes(fields["response"])
            if inner.startswith(b"{"):
                fields["response"] = msgspec.Raw(self._with_fields_mapped(inner, top=False))
        try:
            return msgspec.json.encode(fields)
        except UnicodeEncodeError:  # a lone surrogate in a key
            return encode_fields({name: bytes(value) for name, value in fields.items()})

    def _with_value_replaced(self, raw: bytes) -> bytes:
        """Return the message with its only model replaced; the rest keeps its bytes."""
        fields = raw_fields(raw, ("model", "response"))
        response = fields.get("response", b"")
        nested = raw_fields(response, ("model",)) if response.startswith(b"{") else {}
        key = _MODEL_KEY.search(raw)
        ambiguous = raw.count(b'"model"') > 1 or raw.count(b'"response"') > 1
        if ambiguous or b"\\u006" in raw or b"\\u007" in raw:
            raise ApiError(
                400,
                f"a message of more than {_MAX_FIELDS} fields must have the keys `model` and `response` at most once",
            )
        value = fields.get("model") or nested.get("model")
        if key is None or value is None:
            return raw
        return raw[: key.end()] + self._deployment(value) + raw[key.end() + len(value) :]

    def _deployment(self, model: bytes) -> bytes:
        if len(model) > _MAX_NAME:
            raise ApiError(400, "the model's name is too long", param="model")
        name = model_name(decode_json(model, msgspec.json.decode)).strip()
        found = self._find(name)
        opened = self._request.last_target
        target = found.within(opened.resource) if opened is not None and opened.resource is not None else None
        if target is None:
            raise ApiError(
                400,
                f"the model {name!r} is not in the Azure resource of this WebSocket; open another WebSocket for it",
                param="model",
                code="resource_mismatch",
            )
        self._request.notes.setdefault("model", name)
        return msgspec.json.encode(target.deployment or "")
