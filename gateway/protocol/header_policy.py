"""What the gateway does with header fields, by their names: which go on to Azure or to clients, which it reads."""

from __future__ import annotations

__all__ = ("DOWN", "FRAMING", "KEY", "OURS", "UP", "WRITTEN", "policy_of")

# Bits: it goes up to Azure, it goes down to clients; it says something about the message itself; it is read from
# a request; it presents a key; and what a client gets of it, the server writes or looks at.
UP, DOWN, FRAMING, OURS, KEY, WRITTEN = 1, 2, 4, 8, 16, 32

# Fields that end at this hop (RFC 9110, 7.6.1), that the gateway writes itself, that carry credentials or
# cookies, or that would tell Azure (or a gateway before it) who the client is or where to go instead.
_NOT_UP = frozenset(
    b"""connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer
    transfer-encoding upgrade http2-settings host content-length expect accept-encoding authorization api-key
    x-api-key ocp-apim-subscription-key x-ms-authorization-auxiliary cookie cookie2 forwarded via proxy
    max-forwards range x-real-ip true-client-ip cf-connecting-ip x-client-ip x-original-url x-original-host
    x-rewrite-url x-host x-http-method x-http-method-override x-method-override sec-websocket-key
    sec-websocket-version sec-websocket-protocol sec-websocket-extensions x-ms-client-principal
    x-ms-client-principal-id x-ms-client-principal-name api-version x-request-id""".split()
)
_NOT_DOWN = frozenset(
    b"""connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer
    transfer-encoding upgrade sec-websocket-accept sec-websocket-protocol sec-websocket-extensions set-cookie
    set-cookie2 strict-transport-security alt-svc""".split()
)
_BITS = {
    b"host": FRAMING | OURS,
    b"content-length": FRAMING | OURS | WRITTEN,
    b"transfer-encoding": FRAMING | OURS,
    b"connection": FRAMING | OURS,
    b"expect": OURS,
    b"upgrade": OURS,
    b"sec-websocket-protocol": KEY,
    b"content-encoding": FRAMING | OURS,
    b"x-request-id": OURS | WRITTEN,
    b"authorization": KEY,
    b"api-key": KEY,
    b"content-type": WRITTEN,
    b"date": WRITTEN,
    b"x-accel-buffering": WRITTEN,
}


def policy_of(name: bytes) -> int:
    """Return the bits of a field's name, which is in lower case."""
    up = not (name in _NOT_UP or name.startswith(b"x-forwarded-") or b"_" in name)
    return (UP if up else 0) | (DOWN if name not in _NOT_DOWN else 0) | _BITS.get(name, 0)
