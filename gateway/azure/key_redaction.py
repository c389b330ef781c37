"""Errors of Azure that quote the resource's key: it is masked before stages, logs and clients see them.

Some proxies and API gateways say which key they refuse. The key that the client itself presented is not masked.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from gateway.auth.credentials import key_protocols
from gateway.azure.resources import Target
from gateway.protocol.headers import Headers

__all__ = ("MASK", "redact_headers", "redact_pieces", "secrets_of")

MASK = b"***"


def redact_headers(headers: Headers, secret: bytes) -> None:
    """Mask a secret in the values of header fields."""
    text = secret.decode("latin-1")
    for name, value in list(headers):
        if text in value:
            headers.set(name, value.replace(text, MASK.decode()))


async def redact_pieces(pieces: AsyncIterator[bytes], secret: bytes) -> AsyncIterator[bytes]:
    """Return a body with the secret masked, wherever its pieces are cut."""
    kept = b""
    async for data in pieces:
        kept = (kept + data).replace(secret, MASK)
        # The end may be the beginning of another one.
        sure = max(0, len(kept) - len(secret) + 1)
        if sure:
            yield kept[:sure]
            kept = kept[sure:]
    if kept:
        yield kept


def secrets_of(headers: Headers, target: Target | None) -> list[str]:
    """Return what must not be printed if some text holds it: every value of a request that may be a key."""
    found = [value for name, value in headers if name.lower() in ("authorization", "api-key", "x-api-key")]
    found += [value.rpartition(" ")[2] for value in found]
    for value in headers.getall("sec-websocket-protocol"):
        found += [key.decode("latin-1") for key in key_protocols(value.encode("latin-1"))]
    if target is not None:
        stored = target.resource.credential if target.resource is not None else None
        found += [each.value for each in (target.credential, stored) if each is not None]
        proxy = target.resource.proxy if target.resource is not None else None
        found += [proxy.password] if proxy is not None else []
    return [value for value in found if value]
