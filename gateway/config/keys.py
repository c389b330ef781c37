"""The keys of a team's `match`: their digests, and when they expire."""

from __future__ import annotations

import datetime
import re

from gateway.auth.credentials import ListedKey
from gateway.config.files import KeyFile
from gateway.config.nodes import Node, Reader, value_of
from gateway.config.paths import as_list

__all__ = ("parse_expiry", "read_key")

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def read_key(reader: Reader, key: KeyFile, node: Node) -> ListedKey:
    """Return a key of `match: keys:`."""
    digest = key.digest.lower()
    if not _DIGEST.fullmatch(digest):
        reader.mistake(
            value_of(node, "digest"),
            "write a key as its digest, sha256: and 64 hexadecimal digits (gateway keys digest), never as itself",
        )
    times: dict[str, float] = {}
    for name, text in (("created", key.created), ("expires", key.expires)):
        try:
            times |= {name: parse_expiry(text)} if text is not None else {}
        except ValueError as exc:
            reader.mistake(value_of(node, name), f"{name} {exc}")
    models = None if key.models is None else tuple(as_list(key.models))
    return ListedKey(digest, key.label, times.get("expires"), key.disabled, models)


def parse_expiry(text: str) -> float:
    """Return the end of a day (`2027-01-31`) or a time (`2027-01-31T18:00:00Z`), in seconds since the epoch.

    Both are in UTC unless the text has an offset. Raises ValueError.
    """
    try:
        moment = datetime.datetime.fromisoformat(text)
        if len(text) == len("2027-01-31"):
            moment += datetime.timedelta(days=1)
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=datetime.UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(f"must be a day (2027-01-31) or a time (2027-01-31T18:00:00Z), not {text!r}") from None
