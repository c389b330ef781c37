"""Opening a WebSocket, on both sides (RFC 6455, 4), and the body of the 101 that says it is open.

No extension is agreed on, so that messages can be read. Of the subprotocols that a client offers, the one that holds
its key (`openai-insecure-api-key.KEY`, for browsers, which can set no header) ends here.
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
    "accepted",
    "check_asked",
    "chosen_protocol",
    "new_key",
    "offered_protocols",
    "opening",
    "taken",
)

_TOKEN = re.compile(TOKEN)
# RFC 6455, 1.3
_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class WebSocket:
    """The body of a 101: a connection to Azure that has become a WebSocket, and the filters on its messages.

    `protocol` is the subprotocol that Azure chose. `up` are the filters on what the client sends, in the order in
    which they run; those on what Azure sends are the response's.
    """

    __slots__ = ("ended", "protocol", "up", "watch", "wire")

    def __init__(self, wire: UpstreamConnection) -> None:
        self.wire = wire
        self.protocol: str | None = None
        self.up: list[EventFilter] = []
        self.watch: Callable[[bytes], None] | None = None
        """Sees what Azure sends, as it comes."""
        self.ended = False
        """It was relayed to its end, and its connection is closing with what is still to be written."""

    def abort(self) -> None:
        """Close the connection to Azure at once, unless it is closing by itself."""
        if not self.ended:
            self.wire.abort()


def check_asked(headers: Headers) -> str:
    """Return the key of a client that asks for a WebSocket. Raises ApiError 400, or 426 for another version."""
    versions = headers.getall("sec-websocket-version")
    if versions != ["13"]:
        raise ApiError(
            426,
            "the version of the WebSocket protocol must be 13 (Sec-WebSocket-Version)",
            code="upgrade_required",
            headers={"sec-websocket-version": "13"},
        )
    keys = headers.getall("sec-websocket-key")
    try:
        sound = len(keys) == 1 and len(base64.b64decode(keys[0], validate=True)) == 16
    except (binascii.Error, ValueError):
        sound = False
    if not sound:
        raise ApiError(400, "a WebSocket's handshake has one Sec-WebSocket-Key, of 16 bytes", code="malformed_request")
    return keys[0]


def accepted(key: str) -> bytes:
    """Return the Sec-WebSocket-Accept of a key."""
    return base64.b64encode(hashlib.sha1(key.encode() + _MAGIC, usedforsecurity=False).digest())


def new_key() -> str:
    """Return a key for a handshake of ours."""
    return base64.b64encode(os.urandom(16)).decode()


def offered_protocols(headers: Headers) -> list[str]:
    """Return the subprotocols that a client offers, but for its key. Raises ApiError 400 where no other is sound."""
    lines = headers.getall("sec-websocket-protocol")
    offered = [each for line in lines for part in line.split(",") if (each := part.strip())]
    others = [each for each in offered if not each.lower().startswith(KEY_PROTOCOL)]
    if not all(map(_TOKEN.fullmatch, others)):
        raise ApiError(
            400, "a subprotocol that is offered is no token (Sec-WebSocket-Protocol)", code="malformed_request"
        )
    if offered and not others:
        raise ApiError(
            400, "the key is the only subprotocol that is offered; offer `realtime` beside it, which can be chosen"
        )
    return others


def chosen_protocol(offered: Sequence[str], by_azure: str | None) -> str | None:
    """Return the subprotocol to tell the client: Azure's choice, else the first; a browser must be told one."""
    if by_azure in offered:
        return by_azure
    return offered[0] if offered else None


def opening(key: str, protocols: Sequence[str]) -> bytes:
    """Return the lines of a handshake of ours, to Azure."""
    lines = [b"connection: Upgrade", b"upgrade: websocket", b"sec-websocket-version: 13"]
    lines.append(b"sec-websocket-key: " + key.encode())
    if protocols:
        lines.append(b"sec-websocket-protocol: " + ", ".join(protocols).encode("latin-1"))
    return b"\r\n".join(lines)


def taken(fields: Sequence[Field], key: str) -> str | None:
    """Return the subprotocol of Azure's 101. Raises UpstreamError where it is not the answer to our handshake."""
    headers = Headers.of(list(fields))
    if headers.getall("sec-websocket-accept") != [accepted(key).decode()]:
        raise UpstreamError("Azure's answer to a WebSocket's handshake is not the one to ours")
    if headers.getall("sec-websocket-extensions"):
        raise UpstreamError("Azure's answer to a WebSocket's handshake has an extension that nobody asked for")
    return headers.get("sec-websocket-protocol")
