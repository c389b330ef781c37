"""The Azure OpenAI resources of a configuration: endpoint, proxy, TLS and credential."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from yarl import URL

from gateway.auth.credentials import Credential, is_key
from gateway.auth.entra_tokens import EntraIdentity, EntraTokens
from gateway.azure.resources import Resource, Tls
from gateway.config.convert import FAILED, fill
from gateway.config.credentials import read_identity
from gateway.config.files import ResourceFile, TlsFile
from gateway.config.nodes import NAME, MappingNode, Node, Reader, value_of
from gateway.protocol.proxy_url import Proxy
from gateway.services import Shared

__all__ = ("UNKNOWN", "read_resources")

# Replaces an invalid resource, so that its users are not reported, too.
UNKNOWN = Resource("unknown", "https://unknown.invalid")
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?|[0-9A-Fa-f.]*:[0-9A-Fa-f:.]+")


def read_resources(reader: Reader, node: Any, shared: Shared) -> dict[str, Resource]:
    """Return the resources of a `resources:` mapping by name, including invalid ones.

    Resources with the same identity share its tokens, which `shared` keeps across reloads.
    """
    resources: dict[str, Resource] = {}
    tokens: dict[EntraIdentity, EntraTokens] = {}
    if node is None:
        return resources
    if not isinstance(node, MappingNode):
        reader.mistake(node, "resources must be a mapping: name: {endpoint: https://...}")
        resources["unknown"] = UNKNOWN
        return resources
    for name, key, value in reader.pairs(node):
        label = f"resource {name!r}"
        if not NAME.fullmatch(name):
            reader.mistake(key, f"{name!r} is not a valid resource name: use letters, digits, . _ and -")
            continue
        settings = fill(reader, value, ResourceFile, label)
        if settings is FAILED:
            resources[name] = UNKNOWN
            continue
        endpoint = settings.endpoint.strip()
        problem = _endpoint_problem(endpoint)
        if problem:
            reader.mistake(value_of(value, "endpoint"), f"{label}: {problem}")
        if settings.api_key is not None and not is_key(settings.api_key):
            reader.mistake(value_of(value, "api_key"), f"{label}: api_key is empty, or has characters that no key has")
        credential = Credential(settings.api_key) if settings.api_key else None
        identity = None
        if settings.credential is not None:
            identity = read_identity(reader, settings.credential, value_of(value, "credential"), label)
            if settings.api_key is not None:
                reader.mistake(
                    value_of(value, "credential"), f"{label}: it has both an api_key and a credential; remove one"
                )
            if identity is None:
                credential = Credential("unknown")  # so that a missing credential is not reported, too
        if identity is not None and identity not in tokens:
            tokens[identity] = EntraTokens(identity, shared.session, cache=shared.state_of("", "entra"))
        proxy = None
        if settings.proxy and settings.proxy.strip():
            try:
                proxy = Proxy.parse(settings.proxy.strip())
            except ValueError as exc:
                reader.mistake(value_of(value, "proxy"), f"{label}: {exc}")
        tls = None
        if settings.tls is not None:
            tls = _tls(reader, settings.tls, value_of(value, "tls"), label, https=endpoint.lower().startswith("https:"))
        resources[name] = Resource(
            name,
            endpoint.rstrip("/"),
            credential,
            proxy,
            region=settings.region,
            api_version=settings.api_version,
            timeouts=settings.timeouts,
            tls=tls,
            tokens=tokens[identity] if identity is not None else None,
        )
    return resources


_WHY_BAD = {
    "ca": "it must be a PEM file of certificates",
    "certificate": "it must be a PEM file of a certificate and its key; or set `key`, too",
    "key": "it must be the PEM file of the certificate's key, without a passphrase",
}


def _display_name(given: str) -> str:
    """Return a file's name for a message; anything else, such as a key in its place, is not shown."""
    return given if given.isprintable() and len(given) < 200 and "PRIVATE" not in given else "this file"


def _tls(reader: Reader, settings: TlsFile, node: Node, label: str, *, https: bool) -> Tls | None:
    """Return the TLS settings of a resource; mistakes in its files are noted."""
    folder = reader.folder(node)
    digest = hashlib.sha256()
    before = len(reader.mistakes)
    paths: dict[str, Path] = {}
    for name in ("ca", "certificate", "key"):
        given = getattr(settings, name)
        if given is None:
            continue
        paths[name] = folder / given
        try:
            digest.update(reader.sources.read(paths[name]))
        except (OSError, ValueError) as exc:
            reason = getattr(exc, "strerror", None) or "the name is not valid"
            reader.mistake(value_of(node, name), f"{label}: tls: cannot read {_display_name(given)}: {reason}")
    if not https:
        reader.mistake(node, f"{label}: tls needs an endpoint that begins with https://")
    if "key" in paths and "certificate" not in paths:
        reader.mistake(value_of(node, "key"), f"{label}: tls: `key` needs `certificate`, too")
    if len(reader.mistakes) > before:
        return None
    tls = Tls(**paths, digest=digest.hexdigest())
    for part, names in ((Tls(tls.ca), ("ca",)), (tls, ("key", "certificate"))):
        try:
            part.context()
        except OSError as exc:
            wrong = next((name for name in names if name in paths), "ca")
            why = (
                _WHY_BAD[wrong]
                if not str(getattr(exc, "reason", "")).startswith("KEY_VALUES")
                else "they do not belong together"
            )
            reader.mistake(value_of(node, wrong), f"{label}: tls: the {wrong} is not usable: {why}")
            return None
    return tls


def _endpoint_problem(endpoint: str) -> str | None:
    """Return the problem of an endpoint's URL, or None."""
    try:
        url = URL(endpoint)
        host, port = url.host, url.port
    except ValueError:
        return "endpoint must be a URL, such as https://NAME.openai.azure.com"
    # (The message does not repeat the value: it may be a key in the wrong variable.)
    if url.scheme not in ("https", "http") or not host or not port or not _HOST_NAME.fullmatch(host):
        return "endpoint must be a URL, such as https://NAME.openai.azure.com"
    if url.user is not None or url.password is not None:
        return "endpoint must not contain a user name or a password"
    if host.endswith(".azure.com") and url.path.rstrip("/").endswith("/openai"):
        return "endpoint must end before /openai; the gateway adds it"
    if url.query_string or url.fragment:
        return "endpoint must not have a query; the stage api_version sets the api-version"
    if re.search(r"/openai/(v1|deployments)(/|$)", url.path):
        return "endpoint must end before /openai; the gateway adds the rest"
    if any(segment in (".", "..") for segment in url.raw_path.split("/")):
        return "endpoint must not have the path segments . or .."
    return None
