"""A team's `match:`: the path prefixes, hosts, keys and claims whose requests are the team's."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gateway.auth.credentials import ListedKey
from gateway.config.files import KeyFile, MatchFile
from gateway.config.identity import read_claims
from gateway.config.keys import read_key
from gateway.config.nodes import MappingNode, Node, Reader, SequenceNode, value_of
from gateway.config.paths import as_list
from gateway.teams import Match, Team

__all__ = ("check_unique", "read_match")

_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


def read_match(reader: Reader, match: MatchFile | None, root: MappingNode, *, with_identity: bool) -> Match:
    """Return the match of a file."""
    if match is None:
        # Don't report an invalid `match` as missing, too.
        return Match() if value_of(root, "match") is root else Match(keys=(ListedKey("unknown"),))
    node = value_of(root, "match")
    prefixes = [text.rstrip("/") for text in as_list(match.path_prefix)]
    hosts = [text.lower() for text in as_list(match.host)]
    keys = [match.keys] if isinstance(match.keys, KeyFile) else match.keys or []
    for prefix in prefixes:
        if not _PREFIX.fullmatch(prefix) or {"v1", "openai", ".", ".."} & set(prefix.split("/")):
            reader.mistake(
                value_of(node, "path_prefix"),
                f"path_prefix {prefix!r} must be a plain path without /v1 and /openai, such as /research",
            )
    for host in hosts:
        if not _HOST.fullmatch(host):
            reader.mistake(value_of(node, "host"), f"{host!r} is not a host name; leave out the scheme and the port")
    key_nodes = _items(value_of(node, "keys"))
    listed = [read_key(reader, key, each) for key, each in zip(keys, key_nodes, strict=False)]
    claims = read_claims(reader, match.claims, node, with_identity=with_identity)
    return Match(tuple(prefixes), tuple(hosts), tuple(listed), claims)


def _items(node: Node) -> list[Node]:
    return node.value if isinstance(node, SequenceNode) else [node]


def check_unique(reader: Reader, teams: Sequence[tuple[Team, MappingNode]]) -> None:
    """Note prefixes, hosts and keys of two teams, and two teams of one name."""
    for setting in ("path_prefix", "host", "keys"):
        seen: dict[str, str] = {}
        for team, root in teams:
            values = getattr(team.match, setting)
            for value in [key.digest for key in values] if setting == "keys" else values:
                if value in seen:
                    shown = "a key" if setting == "keys" else f"{setting} {value!r}"
                    reader.mistake(
                        value_of(value_of(root, "match"), setting),
                        f"{shown} already belongs to team {seen[value]!r}",
                    )
                seen.setdefault(value, team.name)
    names: dict[str, str] = {}
    for team, root in teams:
        if team.name in names:
            reader.mistake(root, f"there is already a team {team.name!r}, in {names[team.name]}")
        names.setdefault(team.name, root.start_mark.name)
