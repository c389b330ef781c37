"""The opening handshake of a WebSocket, on both sides (RFC 6455, 4), and the body of the 101 response.

The gateway accepts no extension, so that it can read messages. Of the subprotocols that a client offers, the one with
its key is not forwarded (`openai-insecure-api-key.KEY`, for browsers, which cannot set headers).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Callable, Sequence

from gateway.auth.credentials import KEY_PROTOCOL
from gateway.errors import ApiError, UpstreamError
from gateway.protocol.filters import EventFilter
from gateway.protocol.headers import TOKEN, Field, Headers
from gateway.transport.upstream_connection import UpstreamConnection

__all__ = (
    "WebSocket",
    "accept_value",
    "check_accepted",
    "check_handshake",
    "handshake_lines",
    "new_key",
    "offered_protocols",
    "select_protocol",
)

_TOKEN = re.compile(TOKEN)
# RFC 6455, 1.3
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class WebSocket:
    """The body of a 101 response: an upstream connection that is a WebSocket now, and the filters on its messages.

    `protocol` is the subprotocol that Azure selected. `up` are the filters on messages of the client, in the order in
    which they run; the filters on messages of Azure are the response's.
    """

    __slots__ = ("ended", "protocol", "up", "upstream", "watch")

    def __init__(self, upstream: UpstreamConnection) -> None:
        self.upstream = upstream
        self.protocol: str | None = None
        self.up: list[EventFilter] = []
        self.watch: Callable[[bytes], None] | None = None
        """Called with the bytes that Azure sends, as they arrive."""
        self.ended = False
        """The relay has ended, and the connection closes after its last bytes are written."""

    def abort(self) -> None:
        """Close the upstream connection at once, unless it is closing already."""
        if not self.ended:
            self.upstream.abort()


def check_handshake(headers: Headers) -> str:
    """Return the key of a client's handshake. Raises ApiError 400, or 426 for another version."""
    versions = headers.getall("sec-websocket-version")
    if versions != ["13"]:
        raise ApiError(
            426,
            "The WebSocket protocol version is not supported. Send `Sec-WebSocket-Version: 13`.",
            code="upgrade_required",
            headers={"sec-websocket-version": "13"},
        )
    keys = headers.getall("sec-websocket-key")
    try:
        valid = len(keys) == 1 and len(base64.b64decode(keys[0], validate=True)) == 16
    except (binascii.Error, ValueError):
        valid = False
    if not valid:
        raise ApiError(
            400,
            "The WebSocket handshake is invalid. Send one Sec-WebSocket-Key header with 16 bytes in base64.",
            code="malformed_request",
        )
    return keys[0]


def accept_value(key: str) -> bytes:
    """Return the Sec-WebSocket-Accept value for a key."""
    return base64.b64encode(hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest())


def new_key() -> str:
    """Return a key for a handshake with Azure."""
    return base64.b64encode(os.urandom(16)).decode()


def offered_protocols(headers: Headers) -> list[str]:
    """Return the subprotocols that a client offers, without its key. Raises ApiError 400 if one is invalid."""
    lines = headers.getall("sec-websocket-protocol")
    offered = [each for line in lines for part in line.split(",") if (each := part.strip())]
    others = [each for each in offered if not each.lower().startswith(KEY_PROTOCOL)]
    if not all(map(_TOKEN.fullmatch, others)):
        raise ApiError(
            400,
            "An offered subprotocol has a character that is not allowed. Correct the Sec-WebSocket-Protocol header.",
            code="malformed_request",
        )
    if offered and not others:
        raise ApiError(
            400,
            "The key is the only subprotocol that the client offers. Offer `realtime`, too, so that the server can "
            "select it.",
        )
    return others


def select_protocol(offered: Sequence[str], by_azure: str | None) -> str | None:
    """Return the subprotocol for the client: Azure's selection, else the first, because browsers require one."""
    if by_azure in offered:
        return by_azure
    return offered[0] if offered else None


def handshake_lines(key: str, protocols: Sequence[str]) -> bytes:
    """Return the header lines of a handshake with Azure."""
    lines = [b"connection: Upgrade", b"upgrade: websocket", b"sec-websocket-version: 13"]
    lines.append(b"sec-websocket-key: " + key.encode())
    if protocols:
        lines.append(b"sec-websocket-protocol: " + ", ".join(protocols).encode("latin-1"))
    return b"\r\n".join(lines)


def check_accepted(fields: Sequence[Field], key: str) -> str | None:
    """Return the subprotocol of Azure's 101 response. Raises UpstreamError if the response does not match the key."""
    headers = Headers.of(list(fields))
    if headers.getall("sec-websocket-accept") != [accept_value(key).decode()]:
        raise UpstreamError("Azure's response does not match the gateway's WebSocket handshake.")
    if headers.getall("sec-websocket-extensions"):
        raise UpstreamError("Azure selected a WebSocket extension that the gateway did not offer.")
    return headers.get("sec-websocket-protocol")
