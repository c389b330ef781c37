"""URLs: what a client's path says, and where the exchange is at its Azure resource.

OpenAI's paths begin with `/v1`; clients that know Azure say `/openai/v1`, `/openai/deployments/{deployment}` or
`/openai`. All of them may stand behind a team's prefix, and all of them mean the same operations.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote, unquote_plus

from gateway.azure.operations import Operation, bad_id, plain_path
from gateway.azure.resources import Target
from gateway.errors import ApiError

__all__ = ("DEPLOYMENT", "ClientPath", "parse_client_path", "upstream_path")

# A rule (no request may leave `/openai/deployments/`): Azure's own names, and nothing a path could misread.
DEPLOYMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

# Query parameters that would choose the api-version or a credential; those are the gateway's to choose.
_OURS = frozenset({"api-version", "api-key", "subscription-key"})


class ClientPath(NamedTuple):
    """What a path says: the team's prefix, OpenAI's path after `/v1`, and the model, where the path names it."""

    prefix: str
    path: str
    model: str | None


def parse_client_path(path: str) -> ClientPath | None:
    """Read a client's path; None where it is no API's."""
    # Only short ones are kept: what a client makes up must not fill the memory.
    return _short_place(path) if len(path) <= 128 else _place(path)


def _place(path: str) -> ClientPath | None:
    openai, azure = path.find("/v1/"), path.find("/openai/")
    if azure < 0 or 0 <= openai < azure:
        if openai < 0:
            return None
        prefix, path = path[:openai], path[openai + 3 :]
        if path.startswith("/engines/"):
            # As the SDKs had it before 1.0, and LangChain for long after.
            return _named(prefix, path[len("/engines") :])
        return ClientPath(prefix, path, None)
    prefix, path = path[:azure], path[azure + len("/openai") :]
    if path.startswith("/deployments/"):
        return _named(prefix, path[len("/deployments") :])
    return ClientPath(prefix, path[len("/v1") :] if path.startswith("/v1/") else path, None)


_short_place = lru_cache(maxsize=1024)(_place)


def _named(prefix: str, path: str) -> ClientPath | None:
    """Read `/{model}/{operation}`."""
    _, name, rest = [*path.split("/", 2), ""][:3]
    return ClientPath(prefix, f"/{rest}", unquote(name)) if name and rest else None


def upstream_path(operation: Operation, target: Target, path: str, query: str = "") -> str:
    """Return the path and query that an exchange has at its resource, after the endpoint's base path.

    `path` is the client's, after `/v1`. `target` must have an api-version, and a deployment where the path
    needs one. Raises ApiError 404 where the deployment's name cannot be one, or where this api-version does
    not have the operation, and 400 where an id in the path cannot be one.
    """
    key = (operation.name, target.api_version, target.deployment)
    before, own_path, version = _ways.get(key) or _find_way(key, operation, target)
    found = f"{before}{own_path or _with_ids(operation, path)}{version}"
    if query and (kept := other_query(query)):
        return f"{found}{'&' if version else '?'}{kept}"
    return found


def _with_ids(operation: Operation, path: str) -> str:
    plain = plain_path(operation, path)
    if plain is None:
        raise bad_id(operation, path)
    return plain


# What stands before and behind a path, and what stands in its place if it has no ids, once it was found to be right.
_ways: dict[tuple[str, str | None, str | None], tuple[str, str, str]] = {}
_MOST_WAYS = 1024


def _find_way(key: tuple[str, str | None, str | None], operation: Operation, target: Target) -> tuple[str, str, str]:
    version = target.api_version or ""
    if operation.model and (operation.classic == "deployment" or target.deployment is not None):
        _check_name(target.deployment)
    if not operation.is_in(version):
        raise ApiError(
            404,
            f"{operation.name} is not in Azure's api-version {version}, which this gateway is set to; it needs "
            f"{operation.versions} (the operator sets it: the stage api_version, `otherwise` or `operations`)",
            code="operation_not_supported",
        )
    if target.is_v1:
        way = ("/openai/v1", "" if operation.has_ids else operation.path, "")
    else:
        own_path = "" if operation.has_ids else operation.classic_path
        deployment = f"/deployments/{target.deployment}" if operation.classic == "deployment" else ""
        way = (f"/openai{deployment}", own_path, f"?api-version={version}")
    if len(_ways) >= _MOST_WAYS:
        _ways.clear()
    _ways[key] = way
    return way


def _check_name(deployment: str | None) -> None:
    if not deployment or not DEPLOYMENT.fullmatch(deployment):
        raise ApiError(
            404,
            f"{deployment!r} cannot be the name of an Azure deployment; map the model to one",
            param="model",
            code="model_not_found",
        )


def other_query(query: str) -> str:
    """Return a client's query without the parameters that the gateway sets itself."""
    if not query:
        return ""
    # Wherever one of them stands in a part: servers differ in what else they take for a separator.
    return "&".join(
        part for part in query.split("&") if part and not any(name in unquote_plus(part).lower() for name in _OURS)
    )
