"""Messages of a WebSocket: the event that filters see, and the error event that a client gets."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec

from gateway.errors import ApiError
from gateway.protocol.json_fields import decode_json, encode_json, raw_fields
from gateway.protocol.sse import Event
from gateway.transport.websocket_limits import MAX_DECODED_MESSAGE

__all__ = ("MessageEvent", "error_event")

# The longest event id that an error event repeats, in bytes of JSON.
_MAX_EVENT_ID = 2048


class MessageEvent(Event):
    """A message, as filters see it: its raw bytes are its data."""

    __slots__ = ()

    @property
    def data(self) -> bytes:
        """The message."""
        return self.raw

    def json(self) -> Any:
        """Return the message as JSON, decoded once; None if it is not JSON. Raises ApiError 413 for large ones."""
        if not self._parsed and len(self.raw) > MAX_DECODED_MESSAGE:
            raise ApiError(
                413,
                f"The message has {len(self.raw)} bytes; the limit is {MAX_DECODED_MESSAGE} bytes. Send smaller "
                "messages.",
                code="message_too_large",
            )
        return super().json()

    def set_json(self, content: object) -> None:
        """Replace the message."""
        self.raw = encode_json(content)
        self._json = content
        self._parsed = True


def error_event(error: ApiError, message: bytes) -> bytes:
    """Return the event that reports an error in a client's message, in OpenAI's format."""
    details: dict[str, Any] = {"type": error.type, "code": error.code, "message": error.message, "param": error.param}
    with contextlib.suppress(ApiError):
        # (Only the id is decoded: the message may be long.)
        event_id = raw_fields(message, ("event_id",)).get("event_id", b"")
        if event_id.startswith(b'"') and len(event_id) <= _MAX_EVENT_ID:
            details["event_id"] = decode_json(event_id, msgspec.json.decode)
    return msgspec.json.encode({"type": "error", "status": error.status, "error": details})
