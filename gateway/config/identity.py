"""The issuers of `identity:`, whose tokens clients may present, and the claims of a team's `match:`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from gateway.auth.jwks import url_problem
from gateway.auth.oidc import Claims, Issuer
from gateway.config.files import IdentityFile
from gateway.config.nodes import MappingNode, Node, Reader, SequenceNode, value_of

__all__ = ("has_issuers", "read_claims", "read_issuers")


def read_issuers(reader: Reader, given: IdentityFile | Sequence[IdentityFile] | None, root: Node) -> list[Issuer]:
    """Return the issuers of `identity:`; mistakes are noted."""
    whole = value_of(root, "identity")
    if has_issuers(reader, given, root) and any(find_spec(name) is None for name in ("jwt", "cryptography")):
        reader.mistake(
            whole,
            "identity needs the extra `identity`, which is not installed: pip install 'azure-openai-gateway[identity]'",
        )
    if not given:
        return []
    files = [given] if isinstance(given, IdentityFile) else given
    nodes = whole.value if isinstance(whole, SequenceNode) else [whole]
    issuers: dict[str, Issuer] = {}
    for file, node in zip(files, nodes, strict=True):
        for name, url in (("issuer", file.issuer), ("jwks", file.jwks)):
            problem = url_problem(url) if url is not None else None
            if problem:
                reader.mistake(value_of(node, name), f"{name} {problem}")
        if file.issuer in issuers:
            reader.mistake(
                value_of(node, "issuer"), f"the issuer {file.issuer!r} appears twice; list its audiences together"
            )
        audience = (file.audience,) if isinstance(file.audience, str) else tuple(file.audience)
        issuers[file.issuer] = Issuer(file.issuer, audience, file.jwks, file.caller, file.leeway)
    return list(issuers.values())


def has_issuers(reader: Reader, given: IdentityFile | Sequence[IdentityFile] | None, root: Node) -> bool:
    """Whether `identity:` names an issuer, even an invalid one."""
    node = value_of(root, "identity")
    return bool(given) or (given is None and node is not root and not reader.blank(node))


def read_claims(
    reader: Reader, given: Mapping[str, str | list[str]] | None, match: Node, *, with_identity: bool
) -> Claims:
    """Return the claims of a `match:`; a token must have one of each claim's values."""
    if given is None:
        return {}
    node = value_of(match, "claims")
    if not with_identity:
        reader.mistake(
            node, "claims need tokens, but gateway.yaml has no `identity:` with an issuer whose tokens are accepted"
        )
    if not given:
        reader.mistake(node, "claims must name at least one claim, such as {roles: research}")
    for name, values in given.items():
        if not values:
            reader.mistake(
                value_of(node, name) if isinstance(node, MappingNode) else node,
                f"claims.{name} must have at least one value",
            )
    return {name: (values,) if isinstance(values, str) else tuple(values) for name, values in given.items()}
