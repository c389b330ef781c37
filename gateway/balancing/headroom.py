"""Headroom of a deployment: the share of its quota that is left, according to the headers of Azure's responses."""

from __future__ import annotations

import math
from collections.abc import Iterable

from gateway.protocol.headers import Field

__all__ = ("FULL", "HEADROOM_SECONDS", "headroom_of")

HEADROOM_SECONDS = 5.0
"""How long a reported headroom is valid, in seconds."""
FULL = 1e-3
"""The headroom of a deployment whose quota is used up: above 0, because the selection divides by it."""

_LIMIT_OF = {
    b"x-ratelimit-remaining-requests": b"x-ratelimit-limit-requests",
    b"x-ratelimit-remaining-tokens": b"x-ratelimit-limit-tokens",
}
_LIMITS = frozenset(_LIMIT_OF.values())
# The used share of a provisioned deployment, as in `98.5%`.
_UTILISATION = b"azure-openai-deployment-utilization"


def headroom_of(fields: Iterable[Field], largest: dict[bytes, float]) -> float | None:
    """Return the smallest share left of any quota, from `FULL` to 1; None if the header fields report no quota.

    `largest` keeps the limit of each quota between calls. If Azure sends no limit, it is the largest remainder so far.
    """
    shares: list[float] = []
    seen: dict[bytes, float] = {}
    for name, value, _, _ in fields:
        if name in _LIMIT_OF or name in _LIMITS:
            if (number := _number(value)) is not None:
                seen[name] = number
        elif name == _UTILISATION and (number := _number(value.rstrip(b" %"))) is not None:
            shares.append(1 - number / 100)
    for name, limit_name in _LIMIT_OF.items():
        remaining = seen.get(name)
        if remaining is not None:
            limit = largest[name] = seen.get(limit_name) or max(remaining, largest.get(name, 0.0))
            shares.append(remaining / limit if limit > 0 else 0.0)
    return min(1.0, max(FULL, min(shares))) if shares else None


def _number(text: bytes) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
