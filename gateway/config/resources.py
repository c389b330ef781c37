"""The Azure OpenAI resources of a configuration: where they are, how they are spoken to, and by what credential."""

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

# Stands for a resource that is named but cannot be used, so that its users are not reported as well.
UNKNOWN = Resource("unknown", "https://unknown.invalid")
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?|[0-9A-Fa-f.]*:[0-9A-Fa-f:.]+")


def read_resources(reader: Reader, node: Any, shared: Shared) -> dict[str, Resource]:
    """Return the resources of a `resources:` mapping by name; those that are wrong are known all the same.

    Those of one identity share its tokens, which outlive a reload in `shared`.
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
        identity = None
        if made.credential is not None:
            identity = read_identity(reader, made.credential, value_of(value, "credential"), what)
            if made.api_key is not None:
                reader.mistake(
                    value_of(value, "credential"), f"{what}: it has both an api_key and a credential, and needs one"
                )
            if identity is None:
                credential = Credential("unknown")  # whoever needs one has not made a second mistake
        if identity is not None and identity not in tokens:
            tokens[identity] = EntraTokens(identity, shared.session, kept=shared.state_of("", "entra"))
        proxy = None
        if made.proxy and made.proxy.strip():
            try:
                proxy = Proxy.parse(made.proxy.strip())
            except ValueError as exc:
                reader.mistake(value_of(value, "proxy"), f"{what}: {exc}")
        tls = None
        if made.tls is not None:
            tls = _tls(reader, made.tls, value_of(value, "tls"), what, https=endpoint.lower().startswith("https:"))
        resources[name] = Resource(
            name,
            endpoint.rstrip("/"),
            credential,
            proxy,
            region=made.region,
            api_version=made.api_version,
            timeouts=made.timeouts,
            tls=tls,
            tokens=tokens[identity] if identity is not None else None,
        )
    return resources


_WHY_BAD = {
    "ca": "it must be a PEM file of certificates",
    "certificate": "it must be a PEM file of a certificate and its key, or the `key` must be named",
    "match": "it is the key of another certificate",
    "key": "it must be the PEM file of the certificate's key, without a passphrase",
}


def _file(given: str) -> str:
    """Return a file's name to show: what is none, such as a key in the place of one, is not shown."""
    return given if given.isprintable() and len(given) < 200 and "PRIVATE" not in given else "this file"


def _tls(reader: Reader, made: TlsFile, node: Node, what: str, *, https: bool) -> Tls | None:
    """Return how a resource is spoken to over TLS; what is wrong with its files is noted."""
    folder = reader.folder(node)
    digest = hashlib.sha256()
    before = len(reader.mistakes)
    paths: dict[str, Path] = {}
    for name in ("ca", "certificate", "key"):
        given = getattr(made, name)
        if given is None:
            continue
        paths[name] = folder / given
        try:
            digest.update(reader.sources.read(paths[name]))
        except (OSError, ValueError) as exc:
            reason = getattr(exc, "strerror", None) or "its name is no name"
            reader.mistake(value_of(node, name), f"{what}: tls: cannot read {_file(given)}: {reason}")
    if not https:
        reader.mistake(node, f"{what}: tls is for an endpoint that begins with https://")
    if "key" in paths and "certificate" not in paths:
        reader.mistake(value_of(node, "key"), f"{what}: tls: a key without its `certificate`")
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
            reader.mistake(value_of(node, wrong), f"{what}: tls: the {wrong} is not good: {why}")
            return None
    return tls


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
