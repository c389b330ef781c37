"""Writing nodes as YAML text, with comments above settings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from gateway.config.nodes import MappingNode, Node, ScalarNode, SequenceNode

__all__ = ("write",)

# Text that needs no quotes in any position.
_PLAIN = re.compile(r"[A-Za-z0-9$/](?:[A-Za-z0-9._/@{}$-]|:(?=[A-Za-z0-9/$:-]))*")
_WORDS = ("null", "true", "false", "off", "on", "yes", "no")

Path = tuple[str, ...]


def write(root: MappingNode, comments: Mapping[Path, str]) -> str:
    """Return a mapping as YAML; a comment's path is the keys that lead to its setting, through lists, too."""
    lines: list[str] = []
    for index, line in enumerate(_mapping(root, comments, ())):
        if index and line[0] not in " -" and not lines[-1].startswith("#"):
            lines.append("")
        lines.append(line)
    return "\n".join([*lines, ""])


def _mapping(node: MappingNode, comments: Mapping[Path, str], path: Path) -> Iterator[str]:
    for key, value in node.value:
        here = (*path, key.value)
        for line in comments.get(here, "").splitlines():
            yield f"# {line}"
        inside = list(_inside(value, comments, here))
        if isinstance(value, ScalarNode) or not value.value:
            yield f"{_scalar(key)}: {inside[0]}"
        else:
            yield f"{_scalar(key)}:"
            yield from (f"  {line}" for line in inside)


def _inside(node: Node, comments: Mapping[Path, str], path: Path) -> Iterator[str]:
    if isinstance(node, MappingNode):
        yield from _mapping(node, comments, path) if node.value else ("{}",)
    elif isinstance(node, SequenceNode):
        for item in node.value:
            first, *others = _inside(item, comments, path)
            yield f"- {first}"
            yield from (f"  {line}" for line in others)
        if not node.value:
            yield "[]"
    else:
        yield _scalar(node)


def _scalar(node: Node) -> str:
    text: str = node.value
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(each if each.isprintable() else f"\\U{ord(each):08x}" for each in quoted)
