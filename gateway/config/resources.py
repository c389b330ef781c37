"""The Azure OpenAI resources of a configuration: their endpoints and stored keys."""

from __future__ import annotations

import re
from typing import Any

from yarl import URL

from gateway.config.convert import FAILED, fill
from gateway.config.files import ResourceFile
from gateway.config.nodes import NAME, MappingNode, Reader, value_of
from gateway.keys import Credential, is_key
from gateway.messages import Resource
from gateway.proxy import Proxy

__all__ = ("UNKNOWN", "read_resources")

# Stands for a resource that is named but cannot be used, so that its users are not reported as well.
UNKNOWN = Resource("unknown", "https://unknown.invalid")
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?|[0-9A-Fa-f.]*:[0-9A-Fa-f:.]+")


def read_resources(reader: Reader, node: Any) -> dict[str, Resource]:
    """Return the resources of a `resources:` mapping by name; those that are wrong are known all the same."""
    resources: dict[str, Resource] = {}
    if node is None:
        return resources
    if not isinstance(node, MappingNode):
        reader.mistake(node, "resources must be a mapping: name: {endpoint: https://...}")
        resources["unknown"] = UNKNOWN
        return resources
    for name, key, value in reader.pairs(node):
        what = f"resource {name!r}"
        if not NAME.fullmatch(name):
            reader.mistake(key, f"{name!r} cannot be a resource's name: letters, digits, _ . -")
            continue
        made = fill(reader, value, ResourceFile, what)
        if made is FAILED:
            # Known all the same: whoever uses it has not made a second mistake.
            resources[name] = UNKNOWN
            continue
        endpoint = made.endpoint.strip()
        problem = _endpoint_problem(endpoint)
        if problem:
            reader.mistake(value_of(value, "endpoint"), f"{what}: {problem}")
        if made.api_key is not None and not is_key(made.api_key):
            reader.mistake(value_of(value, "api_key"), f"{what}: api_key is empty or cannot be a key")
        credential = Credential(made.api_key) if made.api_key else None
        proxy = None
        if made.proxy and made.proxy.strip():
            try:
                proxy = Proxy.parse(made.proxy.strip())
            except ValueError as exc:
                reader.mistake(value_of(value, "proxy"), f"{what}: {exc}")
        resources[name] = Resource(name, endpoint.rstrip("/"), credential, proxy)
    return resources


def _endpoint_problem(endpoint: str) -> str | None:
    """Return what is wrong with an endpoint's URL, or None."""
    try:
        url = URL(endpoint)
        host, port = url.host, url.port
    except ValueError:
        return "endpoint must be a URL, such as https://NAME.openai.azure.com"
    # (What it is instead is not repeated: it may be a key that went into the wrong variable.)
    if url.scheme not in ("https", "http") or not host or not port or not _HOST_NAME.fullmatch(host):
        return "endpoint must be a URL, such as https://NAME.openai.azure.com"
    if url.user is not None or url.password is not None:
        return "endpoint must not hold a user name or a password"
    if host.endswith(".azure.com") and url.path.rstrip("/").endswith("/openai"):
        return "endpoint must end before /openai; the gateway adds it"
    if url.query_string or url.fragment:
        return "endpoint must not have a query; the api-version is a stage's setting"
    if re.search(r"/openai/(v1|deployments)(/|$)", url.path):
        return "endpoint must end before /openai; the gateway adds the rest"
    if any(segment in (".", "..") for segment in url.raw_path.split("/")):
        return "endpoint must not have dot segments"
    return None
