"""Retry-After: how long Azure asks the gateway to wait, in headers or only in the words of an error."""

from __future__ import annotations

import re
from email.utils import parsedate_to_datetime
from time import time

from gateway.protocol.headers import Headers

__all__ = ("cooldown", "retry_after")

# Default cooldown after a 429 without Retry-After, in seconds: about what clients wait by themselves.
_DEFAULT_COOLDOWN = 1.0

_WAIT = re.compile(
    r"(?:retry|try again)\s+(?:after|in)\s+(?:about\s+)?(\d{1,9}(?:\.\d{1,6})?)\s*"
    r"(ms|milliseconds?|s|seconds?|m|minutes?|h|hours?|d|days?)(?![a-z])(?:(\d{1,9})s\b)?",
    re.IGNORECASE,
)
_UNITS = {"ms": 0.001, "millisecond": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def retry_after(headers: Headers, message: str = "") -> float | None:
    """Return the wait in seconds, from the headers or else from the message; None if neither has it."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = (headers.get(name) or "").strip()
        if re.fullmatch(r"\d{1,9}(\.\d{1,6})?", value):
            return float(value) * unit
        if value and name == "retry-after":
            try:
                return max(0.0, parsedate_to_datetime(value).timestamp() - time())
            except (ValueError, OverflowError):
                continue
    if (found := _WAIT.search(message)) is not None:
        name = found.group(2).lower()
        unit = _UNITS.get(name) or _UNITS.get(name.removesuffix("s")) or _UNITS[name[0]]
        return float(found.group(1)) * unit + float(found.group(3) or 0)
    return None


def cooldown(status: int, headers: Headers, message: str = "") -> float | None:
    """Return `retry_after`; for a 429 without one, the default cooldown."""
    wait = retry_after(headers, message)
    return _DEFAULT_COOLDOWN if wait is None and status == 429 else wait
