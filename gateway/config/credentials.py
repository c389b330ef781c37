"""The Entra identities of a configuration's resources; what Azure itself says to a machine or a pod is the default."""

from __future__ import annotations

import re

from gateway.auth.entra_tokens import EntraIdentity
from gateway.auth.jwks import url_problem
from gateway.config.files import CredentialFile
from gateway.config.nodes import Node, Reader, value_of

__all__ = ("read_identity",)

# What becomes part of a URL.
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")
_AUTHORITY = "https://login.microsoftonline.com"
# What each kind must have, and where it may be taken from, as AKS's webhook for workload identities sets it.
_NEEDS = {
    "client_secret": {"tenant": "AZURE_TENANT_ID", "client_id": "AZURE_CLIENT_ID", "client_secret": ""},
    "workload_identity": {
        "tenant": "AZURE_TENANT_ID",
        "client_id": "AZURE_CLIENT_ID",
        "token_file": "AZURE_FEDERATED_TOKEN_FILE",
    },
    "managed_identity": {},
}
# What only some kinds have.
_ONLY = {
    "client_secret": ("client_secret",),
    "token_file": ("workload_identity",),
    "tenant": ("client_secret", "workload_identity"),
    "authority": ("client_secret", "workload_identity"),
}


def read_identity(reader: Reader, made: CredentialFile, node: Node, what: str) -> EntraIdentity | None:
    """Return the identity of a resource's `credential:`; what is wrong with it is noted."""
    before = len(reader.mistakes)
    values: dict[str, str | None] = {}
    for name in ("tenant", "client_id", "client_secret", "token_file", "authority"):
        given: str | None = getattr(made, name)
        variable = _NEEDS[made.kind].get(name)
        if given is not None and made.kind not in _ONLY.get(name, (made.kind,)):
            reader.mistake(value_of(node, name), f"{what}: credential: {made.kind} has no `{name}`")
        if given is None and variable:
            given = reader.env.get(variable) or None
        if given is None and variable is not None:
            where = f", or the environment variable {variable}" if variable else ""
            reader.mistake(node, f"{what}: credential: {made.kind} needs `{name}`{where}")
        values[name] = given
    tenant, authority = values["tenant"], values["authority"]
    if made.kind != "managed_identity":
        authority = (authority or reader.env.get("AZURE_AUTHORITY_HOST") or _AUTHORITY).rstrip("/")
        if url_problem(authority):
            reader.mistake(
                value_of(node, "authority"),
                f"{what}: credential: authority must be a URL that begins with https://, such as {_AUTHORITY}",
            )
        if tenant is not None and not _TENANT.fullmatch(tenant):
            reader.mistake(value_of(node, "tenant"), f"{what}: credential: tenant must be a tenant's id or domain")
    if len(reader.mistakes) > before:
        return None
    managed = made.kind == "managed_identity"
    endpoint = reader.env.get("IDENTITY_ENDPOINT") if managed else None
    header = reader.env.get("IDENTITY_HEADER") if managed else None
    token_file = values["token_file"]
    return EntraIdentity(
        made.kind,
        tenant=tenant,
        client_id=values["client_id"],
        client_secret=values["client_secret"],
        token_file=reader.folder(node) / token_file if token_file is not None else None,
        scope=made.scope,
        authority=authority or _AUTHORITY,
        # (App Service sets both; other hosts have an endpoint of that name that is another's.)
        endpoint=endpoint if header else None,
        endpoint_header=header if endpoint else None,
    )
