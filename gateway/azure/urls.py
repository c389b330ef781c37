"""URLs: parse the client's path, and build the path at the Azure resource.

OpenAI's paths begin with `/v1`; Azure clients use `/openai/v1`, `/openai/deployments/{deployment}` or `/openai`. All of
these may follow a team's prefix, and all mean the same operations.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote, unquote_plus

from gateway.azure.operations import Operation
from gateway.azure.path_ids import bad_id, plain_path
from gateway.azure.resources import Target
from gateway.errors import ApiError

__all__ = ("DEPLOYMENT", "ClientPath", "parse_client_path", "upstream_path")

# A deployment's name: as Azure allows, and never a way out of `/openai/deployments/`.
DEPLOYMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

# Query parameters that select the api-version or a credential: the gateway sets these itself.
_RESERVED = frozenset({"api-version", "api-key", "subscription-key"})


class ClientPath(NamedTuple):
    """A parsed path: the team's prefix, OpenAI's path after `/v1`, and the model if the path names it."""

    prefix: str
    path: str
    model: str | None


def parse_client_path(path: str) -> ClientPath | None:
    """Parse a client's path; None if it is not a path of the API."""
    # Cache short paths only, so that clients cannot fill the memory with made-up ones.
    return _parse_cached(path) if len(path) <= 128 else _parse(path)


def _parse(path: str) -> ClientPath | None:
    openai, azure = path.find("/v1/"), path.find("/openai/")
    if azure < 0 or 0 <= openai < azure:
        if openai < 0:
            return None
        prefix, path = path[:openai], path[openai + 3 :]
        if path.startswith("/engines/"):
            # Used by the SDKs before 1.0, and by LangChain for long after.
            return _with_model(prefix, path[len("/engines") :])
        return ClientPath(prefix, path, None)
    prefix, path = path[:azure], path[azure + len("/openai") :]
    if path.startswith("/deployments/"):
        return _with_model(prefix, path[len("/deployments") :])
    return ClientPath(prefix, path[len("/v1") :] if path.startswith("/v1/") else path, None)


_parse_cached = lru_cache(maxsize=1024)(_parse)


def _with_model(prefix: str, path: str) -> ClientPath | None:
    """Parse `/{model}/{operation}`."""
    _, name, rest = [*path.split("/", 2), ""][:3]
    return ClientPath(prefix, f"/{rest}", unquote(name)) if name and rest else None


def upstream_path(operation: Operation, target: Target, path: str, query: str = "") -> str:
    """Return the path and query at the resource, after the endpoint's base path.

    `path` is the client's, after `/v1`. `target` must have an api-version, and a deployment if the path needs one.
    Raises ApiError 404 for an invalid name of a deployment, or if this api-version does not have the operation, and 400
    for an invalid id in the path.
    """
    key = (operation.name, target.api_version, target.deployment)
    base, fixed_path, version = _routes.get(key) or _make_route(key, operation, target)
    url = f"{base}{fixed_path or _with_ids(operation, path)}{version}"
    if query and (kept := other_query(query)):
        return f"{url}{'&' if version else '?'}{kept}"
    return url


def _with_ids(operation: Operation, path: str) -> str:
    plain = plain_path(operation, path)
    if plain is None:
        raise bad_id(operation, path)
    return plain


# For each validated key: the base, the path if it has no ids (else ""), and the query with the api-version.
_routes: dict[tuple[str, str | None, str | None], tuple[str, str, str]] = {}
_MAX_ROUTES = 1024


def _make_route(key: tuple[str, str | None, str | None], operation: Operation, target: Target) -> tuple[str, str, str]:
    version = target.api_version or ""
    if operation.model and (operation.classic == "deployment" or target.deployment is not None):
        _check_name(target.deployment)
    if not operation.supported_in(version):
        raise ApiError(
            404,
            f"{operation.name} is not in Azure's api-version {version}, which this gateway uses; it needs "
            f"{operation.supported_versions} (the operator can set that in the stage api_version: `otherwise` or "
            "`operations`)",
            code="operation_not_supported",
        )
    if target.is_v1:
        route = ("/openai/v1", "" if operation.has_ids else operation.path, "")
    else:
        fixed_path = "" if operation.has_ids else operation.classic_path
        deployment = f"/deployments/{target.deployment}" if operation.classic == "deployment" else ""
        route = (f"/openai{deployment}", fixed_path, f"?api-version={version}")
    if len(_routes) >= _MAX_ROUTES:
        _routes.clear()
    _routes[key] = route
    return route


def _check_name(deployment: str | None) -> None:
    if not deployment or not DEPLOYMENT.fullmatch(deployment):
        raise ApiError(
            404,
            f"{deployment!r} is not a valid name of an Azure deployment; map the model to one",
            param="model",
            code="model_not_found",
        )


def other_query(query: str) -> str:
    """Return a client's query without the parameters that the gateway sets itself."""
    if not query:
        return ""
    # A reserved name anywhere in a part counts: some servers also split at other separators.
    return "&".join(
        part for part in query.split("&") if part and not any(name in unquote_plus(part).lower() for name in _RESERVED)
    )
