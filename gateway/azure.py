"""What the client can ask for, and where Azure has it: the operation table, and the URL of one exchange.

Data first. Each row: OpenAI's method and path (after `/v1`), Azure's path under
`/openai/deployments/{deployment}` for a dated api-version, and under `/openai/v1` for `v1`; None where Azure
does not have it. Facts: Azure's own specifications (2025-03-01-preview classic, 2026-02 v1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import unquote_plus

from gateway.errors import ApiError
from gateway.messages import Target

__all__ = ("DEPLOYMENT", "Operation", "find_operation", "upstream_path")

# A rule (no request may leave `/openai/deployments/`): Azure's own names, and nothing a path could misread.
DEPLOYMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Operation:
    """One row of the table. `local` is answered by the gateway itself and never sent to Azure."""

    name: str
    method: str
    path: str
    classic: str | None = None
    v1: str | None = None
    local: bool = False

    has_model: bool = field(init=False)
    """Whether the JSON body names a `model`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "has_model", not self.local)


OPERATIONS = (
    Operation("chat.completions", "POST", "/chat/completions", classic="/chat/completions", v1="/chat/completions"),
    Operation("completions", "POST", "/completions", classic="/completions"),
    Operation("embeddings", "POST", "/embeddings", classic="/embeddings", v1="/embeddings"),
    Operation("models.list", "GET", "/models", local=True),
    Operation("models.retrieve", "GET", "/models/{model}", local=True),
)

BY_NAME = {row.name: row for row in OPERATIONS}
_EXACT = {(row.method, row.path): row for row in OPERATIONS if "{" not in row.path}
_PATHS = {row.path for row in OPERATIONS}
_RETRIEVE = BY_NAME["models.retrieve"]

# Query parameters that would choose the api-version or a credential; those are the gateway's to choose.
_OURS = frozenset({"api-version", "api-key", "subscription-key"})


def find_operation(method: str, path: str) -> Operation | None:
    """Return the operation of a method and a path after `/v1`, or None."""
    found = _EXACT.get((method, path))
    if found is None and method == "GET" and path.startswith("/models/") and path.count("/") == 2 and path[8:]:
        return _RETRIEVE
    return found


def upstream_path(operation: Operation, target: Target, query: str = "") -> str:
    """Return the path and query that an exchange has at its resource, after the endpoint's base path.

    `target` must have a deployment and an api-version. Raises ApiError 404 where the deployment's name
    cannot be one, or where this api-version does not have the operation.
    """
    deployment, version = target.deployment, target.api_version
    if not deployment or not DEPLOYMENT.fullmatch(deployment):
        raise ApiError(
            404,
            f"{deployment!r} cannot be the name of an Azure deployment; map the model to one",
            param="model",
            code="model_not_found",
        )
    kept = other_query(query)
    if version == "v1":
        if operation.v1 is None:
            raise ApiError(
                404,
                f"Azure's v1 API does not have {operation.name}; this model needs a dated api_version",
                code="operation_not_supported",
            )
        return f"/openai/v1{operation.v1}" + (f"?{kept}" if kept else "")
    return f"/openai/deployments/{deployment}{operation.classic}?api-version={version}" + (f"&{kept}" if kept else "")


def other_query(query: str) -> str:
    """Return a client's query without the parameters that the gateway sets itself."""
    if not query:
        return ""
    # Wherever one of them stands in a part: servers differ in what else they take for a separator.
    return "&".join(
        part for part in query.split("&") if part and not any(name in unquote_plus(part).lower() for name in _OURS)
    )


def unknown_operation(method: str, path: str) -> ApiError:
    """Return the error for what no operation of the table answers."""
    if path in _PATHS:
        allowed = next(row.method for row in OPERATIONS if row.path == path)
        return ApiError(
            405,
            f"{method} is not allowed on /v1{path}; use {allowed}",
            headers={"allow": allowed},
            code="method_not_allowed",
        )
    offered = ", ".join(f"{row.method} /v1{row.path}" for row in OPERATIONS)
    return ApiError(404, f"this gateway does not offer {method} /v1{path}; it offers {offered}", code="unknown_url")
