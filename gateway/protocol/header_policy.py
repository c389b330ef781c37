"""Header policy: which header fields go on to Azure or to clients, and which the gateway interprets.

To keep a request header from Azure, add its name to one of the lists in `_NOT_TO_AZURE`; to keep a response header
from clients, to one in `_NOT_TO_CLIENT`. All other fields pass, except request fields with `_` in their name.
"""

from __future__ import annotations

__all__ = ("CREDENTIAL", "FRAMING", "MANAGED", "PARSED", "TO_AZURE", "TO_CLIENT", "policy_of")

# Flags of a name:
TO_AZURE = 1  # a request field that goes on to Azure
TO_CLIENT = 2  # a response field that goes on to clients
FRAMING = 4  # describes the message itself, such as its length
PARSED = 8  # the gateway interprets it in a request
CREDENTIAL = 16  # a client presents its key in it
MANAGED = 32  # the server writes it in a response, or checks it

# Hop-by-hop fields (RFC 9110, 7.6.1), in requests and in responses.
_HOP_BY_HOP = frozenset(
    b"""connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding
    upgrade""".split()
)
# Request fields that the gateway writes itself, or whose hop ends here.
_REWRITTEN = frozenset(b"http2-settings host content-length expect accept-encoding x-request-id api-version".split())
# Clients' credentials and cookies, and claims about the client's identity.
_CREDENTIALS = frozenset(
    b"""authorization api-key x-api-key ocp-apim-subscription-key x-ms-authorization-auxiliary cookie cookie2
    x-ms-client-principal x-ms-client-principal-id x-ms-client-principal-name""".split()
)
# Fields that tell Azure, or a gateway before it, the client's address or another destination or method; and `range`.
# (`x-forwarded-*` is among them, by its prefix.)
_ROUTING = frozenset(
    b"""forwarded via proxy max-forwards range x-real-ip true-client-ip cf-connecting-ip x-client-ip x-original-url
    x-original-host x-rewrite-url x-host x-http-method x-http-method-override x-method-override""".split()
)
_WEBSOCKET_REQUEST = frozenset(
    b"sec-websocket-key sec-websocket-version sec-websocket-protocol sec-websocket-extensions".split()
)
_NOT_TO_AZURE = _HOP_BY_HOP | _REWRITTEN | _CREDENTIALS | _ROUTING | _WEBSOCKET_REQUEST

_WEBSOCKET_RESPONSE = frozenset(b"sec-websocket-accept sec-websocket-protocol sec-websocket-extensions".split())
# Azure's cookies, and what it says about its own host.
_OF_AZURE_HOST = frozenset(b"set-cookie set-cookie2 strict-transport-security alt-svc".split())
_NOT_TO_CLIENT = _HOP_BY_HOP | _WEBSOCKET_RESPONSE | _OF_AZURE_HOST

_FLAGS = {
    b"host": FRAMING | PARSED,
    b"content-length": FRAMING | PARSED | MANAGED,
    b"transfer-encoding": FRAMING | PARSED,
    b"connection": FRAMING | PARSED,
    b"expect": PARSED,
    b"upgrade": PARSED,
    b"sec-websocket-protocol": CREDENTIAL,
    b"content-encoding": FRAMING | PARSED,
    b"x-request-id": PARSED | MANAGED,
    b"authorization": CREDENTIAL,
    b"api-key": CREDENTIAL,
    b"content-type": MANAGED,
    b"date": MANAGED,
    b"x-accel-buffering": MANAGED,
}


def policy_of(name: bytes) -> int:
    """Return the flags of a field's name, which is in lower case."""
    to_azure = not (name in _NOT_TO_AZURE or name.startswith(b"x-forwarded-") or b"_" in name)
    return (TO_AZURE if to_azure else 0) | (TO_CLIENT if name not in _NOT_TO_CLIENT else 0) | _FLAGS.get(name, 0)
