"""Which requests are idempotent: they may be sent again, even if Azure may have processed the first one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from gateway.errors import ApiError
from gateway.protocol.json_fields import decode_json

if TYPE_CHECKING:
    from gateway.azure.request_view import RequestView

__all__ = ("is_idempotent", "seems_idempotent")

# Operations that use tokens but store nothing.
_STATELESS = frozenset({
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
    """Whether a request is idempotent, decided quickly, without parsing its fields; False if unsure."""
    if request.operation == "chat.completions":
        return b'"store"' not in body
    return request.method in ("GET", "HEAD") or request.operation in _STATELESS


async def is_idempotent(request: RequestView) -> bool:
    """Whether a request can be processed twice without harm; see `Request.is_idempotent`."""
    if request.method in ("GET", "HEAD") or request.operation in _STATELESS:
        return True
    if request.operation not in ("chat.completions", "responses"):
        return False
    try:
        fields = await request.fields("store", "tools", "background")
    except ApiError:  # not JSON: Azure will reject it
        return True
    store = fields.get("store", b"null")
    if request.operation == "chat.completions":
        return store in (b"false", b"null")  # completions are stored on request; responses unless `store` is false
    background = fields.get("background", b"null")
    return (
        store == b"false" and background in (b"false", b"null") and _tools_run_on_client(fields.get("tools", b"null"))
    )


def _tools_run_on_client(raw: bytes) -> bool:
    """Whether Azure runs none of the tools itself: a tool on another server may have side effects."""
    try:
        tools = decode_json(raw, msgspec.json.decode)
    except ApiError:
        return False
    if tools is None:
        return True
    kinds = [each.get("type") if isinstance(each, dict) else None for each in tools] if isinstance(tools, list) else [0]
    return all(kind in ("function", "custom") for kind in kinds)
