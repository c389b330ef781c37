"""Redaction: masks the resource's key in Azure's errors before stages, logs and clients see them.

Some proxies and API gateways quote the key that they reject. The client's own key is not masked.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from gateway.auth.credentials import key_protocols
from gateway.azure.resources import Target
from gateway.protocol.headers import Headers

__all__ = ("MASK", "redact_chunks", "redact_headers", "secrets_of")

MASK = b"***"


def redact_headers(headers: Headers, secret: bytes) -> None:
    """Mask a secret in the values of header fields."""
    text = secret.decode("latin-1")
    for name, value in list(headers):
        if text in value:
            headers.set(name, value.replace(text, MASK.decode()))


async def redact_chunks(chunks: AsyncIterator[bytes], secret: bytes) -> AsyncIterator[bytes]:
    """Return a body with the secret masked, even if it is split across chunks."""
    buffered = b""
    async for data in chunks:
        buffered = (buffered + data).replace(secret, MASK)
        # The last bytes may be the beginning of the secret.
        safe = max(0, len(buffered) - len(secret) + 1)
        if safe:
            yield buffered[:safe]
            buffered = buffered[safe:]
    if buffered:
        yield buffered


def secrets_of(headers: Headers, target: Target | None) -> list[str]:
    """Return the secrets to redact in any text about a request: every value that may be a key."""
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
