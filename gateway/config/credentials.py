"""The Entra identity of a resource's `credential:`; the environment of an Azure machine or pod has the defaults."""

from __future__ import annotations

import re

from gateway.auth.entra_tokens import EntraIdentity
from gateway.auth.jwks import url_problem
from gateway.config.files import CredentialFile
from gateway.config.nodes import Node, Reader, value_of

__all__ = ("read_identity",)

# It becomes part of a URL.
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")
_AUTHORITY = "https://login.microsoftonline.com"
# Required settings of each kind, with their default variables, which AKS's webhook for workload identities sets.
_NEEDS = {
    "client_secret": {"tenant": "AZURE_TENANT_ID", "client_id": "AZURE_CLIENT_ID", "client_secret": ""},
    "workload_identity": {
        "tenant": "AZURE_TENANT_ID",
        "client_id": "AZURE_CLIENT_ID",
        "token_file": "AZURE_FEDERATED_TOKEN_FILE",
    },
    "managed_identity": {},
}
# Settings of some kinds only.
_ONLY = {
    "client_secret": ("client_secret",),
    "token_file": ("workload_identity",),
    "tenant": ("client_secret", "workload_identity"),
    "authority": ("client_secret", "workload_identity"),
}


def read_identity(reader: Reader, settings: CredentialFile, node: Node, label: str) -> EntraIdentity | None:
    """Return the identity of a resource's `credential:`; mistakes are noted."""
    before = len(reader.mistakes)
    values: dict[str, str | None] = {}
    for name in ("tenant", "client_id", "client_secret", "token_file", "authority"):
        given: str | None = getattr(settings, name)
        variable = _NEEDS[settings.kind].get(name)
        if given is not None and settings.kind not in _ONLY.get(name, (settings.kind,)):
            reader.mistake(value_of(node, name), f"{label}: credential: {settings.kind} takes no `{name}`; remove it")
        if given is None and variable:
            given = reader.env.get(variable) or None
        if given is None and variable is not None:
            where = f", or the environment variable {variable}" if variable else ""
            reader.mistake(node, f"{label}: credential: {settings.kind} needs `{name}`{where}")
        values[name] = given
    tenant, authority = values["tenant"], values["authority"]
    if settings.kind != "managed_identity":
        authority = (authority or reader.env.get("AZURE_AUTHORITY_HOST") or _AUTHORITY).rstrip("/")
        if url_problem(authority):
            reader.mistake(
                value_of(node, "authority"),
                f"{label}: credential: authority must be a URL that begins with https://, such as {_AUTHORITY}",
            )
        if tenant is not None and not _TENANT.fullmatch(tenant):
            reader.mistake(
                value_of(node, "tenant"), f"{label}: credential: tenant must be the id or a domain of a tenant"
            )
    if len(reader.mistakes) > before:
        return None
    managed = settings.kind == "managed_identity"
    endpoint = reader.env.get("IDENTITY_ENDPOINT") if managed else None
    header = reader.env.get("IDENTITY_HEADER") if managed else None
    token_file = values["token_file"]
    return EntraIdentity(
        settings.kind,
        tenant=tenant,
        client_id=values["client_id"],
        client_secret=values["client_secret"],
        token_file=reader.folder(node) / token_file if token_file is not None else None,
        scope=settings.scope,
        authority=authority or _AUTHORITY,
        # (App Service sets both; on other hosts, the endpoint's variable may belong to another program.)
        endpoint=endpoint if header else None,
        endpoint_header=header if endpoint else None,
    )
