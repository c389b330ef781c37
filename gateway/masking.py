"""Errors of Azure that quote the resource's key: it is masked before stages, logs and clients see them.

Some proxies and API gateways say which key they refuse. The key that the client itself presented is not masked.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from gateway.headers import Headers

__all__ = ("MASK", "mask_headers", "masked_pieces")

MASK = b"***"


def mask_headers(headers: Headers, secret: bytes) -> None:
    """Mask a secret in the values of header fields."""
    text = secret.decode("latin-1")
    for name, value in list(headers):
        if text in value:
            headers.set(name, value.replace(text, MASK.decode()))


async def masked_pieces(pieces: AsyncIterator[bytes], secret: bytes) -> AsyncIterator[bytes]:
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
