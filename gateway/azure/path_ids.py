"""Ids in the paths of requests: only an allow-list of characters reaches Azure; `..;` and escapes are refused."""

from __future__ import annotations

import re
from urllib.parse import unquote

from gateway.azure.operations import Operation
from gateway.errors import ApiError

__all__ = ("bad_id", "plain_path")

# An id in a path: resp_..., file-..., ftjob-..., or the name of a fine-tuned model, with its colons. Every server reads
# it as one segment of a path: nothing in it can be decoded, cut off (`;`) or resolved (`..`).
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:~=-]{0,511}")


def plain_path(operation: Operation, path: str) -> str | None:
    """Return the operation's path with the ids of a client's path, decoded once; None if one of them is not valid."""
    ids = _ids(operation, path)
    if ids is None or not all(_ID.fullmatch(each) for each in ids.values()):
        return None
    return "/".join(
        ids.get(segment, segment) if segment.startswith("{") else segment for segment in operation.path.split("/")
    )


def bad_id(operation: Operation, path: str) -> ApiError:
    """Return the error for a path with an invalid id."""
    name, value = next(
        ((name, value) for name, value in (_ids(operation, path) or {}).items() if not _ID.fullmatch(value)), ("id", "")
    )
    name = name.strip("{}")
    return ApiError(
        400,
        f"{value[:80]!r} is not a valid {name} of {operation.name}: ids consist of letters, digits and . _ : ~ = -",
        param=name,
        code="invalid_id",
    )


def _ids(operation: Operation, path: str) -> dict[str, str] | None:
    """Return the values of the path parameters, decoded; None if the path is not the operation's."""
    segments, parts = operation.path.split("/"), path.split("/")
    if len(segments) != len(parts):
        return None
    pairs = list(zip(segments, parts, strict=True))
    if any(segment != part for segment, part in pairs if not segment.startswith("{")):
        return None
    return {segment: unquote(part) for segment, part in pairs if segment.startswith("{")}
