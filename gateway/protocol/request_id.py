"""The request id (`X-Request-ID`): the client's if it is safe, else a new one. Ids in paths: `azure/path_ids.py`."""

from __future__ import annotations

import re
from random import getrandbits

__all__ = ("request_id",)

# Safe in headers, logs and URLs: no separators, no control characters.
_VALID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


def request_id(given: bytes | None) -> str:
    """Return the client's `X-Request-ID` if it is valid, or a new id."""
    if given is not None and _VALID.fullmatch(given):
        return given.decode("ascii")
    return f"req_{getrandbits(96):024x}"
