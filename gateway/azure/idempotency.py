"""Which requests may be sent twice: where the first time may have been the one that worked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from gateway.errors import ApiError
from gateway.protocol.json_fields import decode_json

if TYPE_CHECKING:
    from gateway.azure.request_view import RequestView

__all__ = ("is_idempotent", "seems_idempotent")

# What makes an answer, costs tokens, and leaves nothing behind.
_ANSWERS = frozenset({
    "audio.speech",
    "audio.transcriptions",
    "audio.translations",
    "completions",
    "embeddings",
    "images.edits",
    "images.generations",
    "responses.compact",
    "responses.input_tokens",
})  # fmt: skip


def seems_idempotent(request: RequestView, body: bytes) -> bool:
    """Whether a request is repeatable at first sight: without a look at its fields."""
    if request.operation == "chat.completions":
        return b'"store"' not in body
    return request.method in ("GET", "HEAD") or request.operation in _ANSWERS


async def is_idempotent(request: RequestView) -> bool:
    """Whether a request does no harm if it is processed twice; see `Request.repeatable`."""
    if request.method in ("GET", "HEAD") or request.operation in _ANSWERS:
        return True
    if request.operation not in ("chat.completions", "responses"):
        return False
    try:
        fields = await request.fields("store", "tools", "background")
    except ApiError:  # it is no JSON, and Azure will say so
        return True
    store = fields.get("store", b"null")
    if request.operation == "chat.completions":
        return store in (b"false", b"null")  # stored where it is asked for; responses are where it is not declined
    background = fields.get("background", b"null")
    return store == b"false" and background in (b"false", b"null") and _tools_do_nothing(fields.get("tools", b"null"))


def _tools_do_nothing(given: bytes) -> bool:
    """Whether Azure runs none of a response's tools itself: those of others' servers do what they like."""
    try:
        listed = decode_json(given, msgspec.json.decode)
    except ApiError:
        return False
    if listed is None:
        return True
    kinds = (
        [each.get("type") if isinstance(each, dict) else None for each in listed] if isinstance(listed, list) else [0]
    )
    return all(kind in ("function", "custom") for kind in kinds)
