"""Media types (RFC 9110, 8.3.1): a Content-Type without its parameters, in lower case."""

from __future__ import annotations

from functools import lru_cache

__all__ = ("EVENT_STREAM", "cached_media_type", "media_type")

EVENT_STREAM = "text/event-stream"
"""The media type of server-sent events."""


def media_type(content_type: str) -> str:
    """Return the media type of a Content-Type."""
    return content_type.partition(";")[0].strip().lower()


@lru_cache(maxsize=256)
def cached_media_type(content_type: bytes) -> str:
    """Return the media type of a response's Content-Type.

    Azure sends few different ones. Clients send many (each form has its own boundary): use `media_type` for theirs.
    """
    return media_type(content_type.decode("latin-1"))
