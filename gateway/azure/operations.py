"""The operation table: the operations of the API, where each has its `model`, and its path at Azure.

The table itself is `operations.txt`; this file parses its lines and looks them up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from gateway.errors import ApiError

__all__ = ("BY_NAME", "OPERATIONS", "Operation", "find_operation", "unknown_operation")

# Where an operation can have the model's name; a JSON path has a dot (`session.model`).
_MODEL_LOCATIONS = frozenset({"body", "form", "session", "lines", "evals", "query", "path", "frame", "session.model"})

Classic = Literal["deployment", "resource"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One line of the table.

    `model` is the location of the model's name, or None; `needs_model` means that the model is required, `drops_model`
    that Azure rejects it in the body if the path names the deployment. `classic` is None and `v1` False if Azure does
    not have the operation there; `classic_path` is its path below `/openai` or `/openai/deployments/{deployment}`.
    `previews` means that only the previews among the dated api-versions have it. The gateway itself answers `local`
    operations.
    """

    name: str
    method: str
    path: str
    model: str | None
    needs_model: bool
    drops_model: bool
    streams: bool
    classic: Classic | None
    classic_path: str
    v1: bool
    since: str | None
    previews: bool
    local: bool
    evidence: str

    @property
    def has_ids(self) -> bool:
        """Whether its path has ids that are sent to Azure."""
        return "{" in self.path and not self.local

    @property
    def on_azure(self) -> bool:
        """Whether Azure has it, or the gateway answers it."""
        return self.local or self.v1 or self.classic is not None

    def supported_in(self, version: str) -> bool:
        """Whether an api-version (`2024-10-21`, `v1`) has it, as far as is known."""
        if self.local:
            return True
        if version == "v1":
            return self.v1
        if self.classic is None or (self.previews and not version.endswith("-preview")):
            return False
        return self.since is None or version[:10] >= self.since[:10]

    @property
    def supported_versions(self) -> str:
        """The api-versions that have it, as text for people."""
        later = "a later preview" if self.previews else "later"
        dated = f"{self.since} or {later}" if self.since is not None else "a dated api-version"
        return ", or ".join(([dated] if self.classic is not None else []) + (["v1"] if self.v1 else []))


def _parse(text: str) -> Iterator[Operation]:
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        name, method, path, model, streams, classic, v1, since, evidence = re.split(r" {2,}", line)
        location = model.rstrip("?!")
        if location not in _MODEL_LOCATIONS | {"-"}:
            raise ValueError(f"operations.txt: {name}: {model!r} is not a location of a model")
        located: Classic | None = None
        if classic in ("deployment", "resource"):
            located = "deployment" if classic == "deployment" else "resource"
        elif classic.startswith("/"):
            located = "resource"
        elif classic not in ("-", "gateway"):
            raise ValueError(f"operations.txt: {name}: {classic!r} is not a location of an operation")
        yield Operation(
            name=name,
            method=method,
            path=path,
            model=None if location == "-" else location,
            needs_model=location != "-" and not model.endswith("?"),
            drops_model=model.endswith("!"),
            streams=streams == "sse",
            classic=located,
            classic_path=classic if classic.startswith("/") else path,
            v1=v1 == "yes",
            since=None if since == "-" else since.rstrip("!"),
            previews=since.endswith("!"),
            local=classic == "gateway",
            evidence=evidence,
        )


OPERATIONS = tuple(_parse(Path(__file__).with_name("operations.txt").read_text(encoding="utf-8")))

BY_NAME = {row.name: row for row in OPERATIONS}
_METHODS = {row.method for row in OPERATIONS}
_EXACT = {(row.method, row.path): row for row in OPERATIONS if "{" not in row.path}

# Paths with parameters, by method and number of segments, those with fewer parameters first: `/threads/runs` is not
# `/threads/{thread_id}`.
_WITH_PARAMETERS: dict[tuple[str, int], list[tuple[tuple[str | None, ...], Operation]]] = {}
for _row in sorted(OPERATIONS, key=lambda row: row.path.count("{")):
    if "{" in _row.path:
        _segments = tuple(None if part.startswith("{") else part for part in _row.path.split("/"))
        _WITH_PARAMETERS.setdefault((_row.method, len(_segments)), []).append((_segments, _row))


def find_operation(method: str, path: str) -> Operation | None:
    """Return the operation of a method and a path after `/v1`, or None."""
    return _EXACT.get((method, path)) or (_find_short if len(path) <= 128 else _find)(method, path)


def _find(method: str, path: str) -> Operation | None:
    parts = path.split("/")
    for segments, row in _WITH_PARAMETERS.get((method, len(parts)), ()):
        if all(part == segment if segment is not None else part for part, segment in zip(parts, segments, strict=True)):
            return row
    return None


_find_short = lru_cache(maxsize=1024)(_find)


def unknown_operation(method: str, path: str) -> ApiError:
    """Return the error for a request that is in no line of the table, or that Azure does not have."""
    row = find_operation(method, path)
    if row is not None and row.method != "WS":
        return ApiError(404, f"Azure OpenAI does not have the operation {row.name}", code="operation_not_supported")
    others = [found for each in sorted(_METHODS) if (found := find_operation(each, path)) is not None]
    allowed = [found.method for found in others if found.on_azure and found.method != "WS"]
    if allowed:
        return ApiError(
            405,
            f"{method} is not allowed on /v1{path}; use {' or '.join(allowed)}",
            headers={"allow": ", ".join(allowed)},
            code="method_not_allowed",
        )
    for found in sorted(others, key=lambda found: found.method != "WS"):
        if found.method == "WS" and found.on_azure:
            return ApiError(
                426,
                f"{found.name} is a WebSocket: open one to this URL (ws:// or wss://); a proxy in between must forward "
                "the headers Upgrade and Connection",
                headers={"upgrade": "websocket"},
                code="upgrade_required",
            )
        message = f"Azure OpenAI does not have the operation {found.name}"
        return ApiError(404, message, code="operation_not_supported")
    for right, why in (
        (path.rstrip("/"), "remove the slash at the end"),
        (path.removeprefix("/v1"), "the base URL has one /v1 too many"),
    ):
        if right != path and any(find_operation(each, right) for each in _METHODS):
            return ApiError(404, f"there is nothing at /v1{path}; {why}", code="unknown_url")
    family = path.split("/")[1] if "/" in path else ""
    offered = [f"{row.method} /v1{row.path}" for row in OPERATIONS if row.on_azure and row.path.split("/")[1] == family]
    hint = f"/v1/{family} has {', '.join(offered)}" if offered else "the OpenAI API has no such URL"
    return ApiError(404, f"this gateway does not offer {method} /v1{path}; {hint}", code="unknown_url")
