"""Which requests may be sent twice: where the first time may have been the one that worked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.errors import ApiError

if TYPE_CHECKING:
    from gateway.messages import Request

__all__ = ("is_repeatable",)

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


async def is_repeatable(request: Request) -> bool:
    """Whether a request does no harm if it is processed twice; see `Request.repeatable`."""
    if request.method in ("GET", "HEAD") or request.operation in _ANSWERS:
        return True
    if request.operation not in ("chat.completions", "responses"):
        return False
    try:
        store = (await request.fields("store")).get("store", b"null")
    except ApiError:  # it is no JSON, and Azure will say so
        return True
    # Chats are stored where it is asked for, responses where it is not declined.
    return store in (b"false", b"null") if request.operation == "chat.completions" else store == b"false"
