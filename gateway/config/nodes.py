"""YAML as nodes with their positions: reading a file, mistakes at file:line:column, `${...}` in scalars.

Every scalar is text until a setting's type converts it, which avoids the traps of YAML 1.1 (`no`, `010`, `12:30:00`,
`2024-10-21`). Variables are replaced in scalars after parsing, never in the file's text: a value cannot change the
file's structure or the positions of mistakes.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from gateway.config.sources import Sources
from gateway.errors import Mistake

__all__ = ("NAME", "MappingNode", "Node", "Reader", "ScalarNode", "SequenceNode", "value_of")

# A default may hold variables, but those hold no further ones: `${A:-${B:-}}`.
_VARIABLE = re.compile(r"\$(?:\$|\{(?P<inside>(?:[^{}]|\$\{[^{}]*\})*)\}|(?P<bare>\{))")
_SOURCE = re.compile(r"\$\{(file:[^{}]*|[A-Za-z_][A-Za-z0-9_]*)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MAX_DEPTH = 50
# The name of a team, a resource or a pool.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _NamedText(io.StringIO):
    """Text with the name of its file, which PyYAML copies to every mark."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name


@dataclass
class Reader:
    """Reads the files of one configuration and collects every mistake in them."""

    env: Mapping[str, str] = field(default_factory=lambda: os.environ)
    mistakes: list[Mistake] = field(default_factory=list)
    sources: Sources = field(default_factory=Sources)
    """The files that were read."""
    _folders: dict[str, Path] = field(default_factory=dict)

    def mistake(self, node: Node, message: str) -> None:
        """Note a mistake at a node."""
        if isinstance(node, ScalarNode) and "${" in node.value and "${" not in message:
            message += f" (the value comes from {_variables_of(node.value)})"
        self.mistakes.append(self.at(node, message))

    @staticmethod
    def at(node: Node, message: str) -> Mistake:
        """Return a message with the position of a node."""
        mark = node.start_mark
        return Mistake(mark.name, mark.line + 1, mark.column + 1, message)

    def read(self, path: Path) -> MappingNode | None:
        """Return a file's top mapping; None, with mistakes noted, if it has none."""
        name = _display_path(path)
        self._folders[name] = path.parent
        try:
            # (Text mode converts the newlines of any system.)
            text = io.TextIOWrapper(io.BytesIO(self.sources.read(path)), encoding="utf-8-sig").read()
        except (OSError, UnicodeDecodeError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
            self.mistakes.append(Mistake(name, 1, 1, f"cannot read this file: {reason}"))
            return None
        loader = _Loader(_NamedText(text, name))
        try:
            self._check_depth(text, name)
            node = loader.get_single_node()
        except yaml.MarkedYAMLError as exc:
            mark = exc.problem_mark or exc.context_mark
            line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            problem = exc.problem or exc.context or "this is not YAML"
            if "cannot start any token" in problem:
                problem += " (a tab? indent with spaces)"
            self.mistakes.append(Mistake(name, line, column, f"not valid YAML: {problem}"))
            return None
        except (yaml.YAMLError, RecursionError) as exc:
            self.mistakes.append(Mistake(name, 1, 1, f"not valid YAML: {str(exc).splitlines()[0]}"))
            return None
        finally:
            loader.dispose()
        if node is None:
            self.mistakes.append(Mistake(name, 1, 1, "this file is empty"))
            return None
        if not isinstance(node, MappingNode):
            self.mistake(node, "a configuration file must be a mapping of settings")
            return None
        return node if self._is_valid(node, set()) else None

    @staticmethod
    def _check_depth(text: str, name: str) -> None:
        """Refuse deep nesting before nodes are made: making them is recursive, in C as well."""
        depth = 0
        for event in yaml.parse(_NamedText(text, name), Loader=_Loader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > _MAX_DEPTH:
                mark: Any = event.start_mark
                raise yaml.MarkedYAMLError(problem="this is nested too deeply", problem_mark=mark)

    def _is_valid(self, node: Node, known: set[int], above: tuple[int, ...] = ()) -> bool:
        """Refuse tags, anchors that contain themselves, and deep nesting.

        `known` are nodes that are valid: with aliases, a node appears many times.
        """
        if id(node) in known:
            return True
        if id(node) in above or len(above) > _MAX_DEPTH:
            self.mistake(node, "this is nested too deeply, or contains itself")
            return False
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
            self.mistake(node, f"the tag {node.tag} is not supported; remove it")
            return False
        if isinstance(node, MappingNode):
            inside = [each for pair in node.value for each in pair]
        else:
            inside = node.value if isinstance(node, SequenceNode) else []
        valid = all(self._is_valid(each, known, (*above, id(node))) for each in inside)
        if valid:
            known.add(id(node))
        return valid

    def pairs(self, node: MappingNode) -> Iterator[tuple[str, ScalarNode, Node]]:
        """Yield (key, its node, the value's node); duplicate keys and keys that are not text are mistakes."""
        seen: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                self.mistake(key, "a key must be text")
                continue
            if key.value in seen:
                self.mistake(key, f"{key.value!r} appears twice; the first is on line {seen[key.value]}")
                continue
            seen[key.value] = key.start_mark.line + 1
            yield key.value, key, value

    def text(self, node: ScalarNode) -> str | None:
        """Return a scalar's text with its variables replaced; None, with the mistake noted, if one is not set."""
        return self._replaced(node, node.value)

    def _replaced(self, node: ScalarNode, value: str) -> str | None:
        if "$" not in value:
            return value
        failed = False

        def replace(found: re.Match[str]) -> str:
            nonlocal failed
            if found.group() == "$$":
                return "$"
            inside = found.group("inside")
            value = self._variable(node, inside) if inside is not None else None
            if inside is None:
                self.mistake(node, "a `${` has no closing `}`; for a dollar sign, write $$")
            failed = failed or value is None
            return value or ""

        text = _VARIABLE.sub(replace, value)
        return None if failed else text

    def _variable(self, node: ScalarNode, inside: str) -> str | None:
        if inside.startswith("file:"):
            path = self.folder(node) / inside[5:]
            try:
                return self.sources.read(path).decode().rstrip("\r\n")
            except (OSError, ValueError) as exc:
                reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8, or the name is not valid"
                self.mistake(node, f"cannot read {inside[5:]}: {reason}")
                return None
        name, default, otherwise = inside.partition(":-")
        if not _NAME.fullmatch(name):
            self.mistake(node, f"${{{inside}}} must be ${{NAME}}, ${{NAME:-default}} or ${{file:PATH}}")
            return None
        value = self.env.get(name)
        if value or (value is not None and not default):
            return value
        if default:
            # Variables are replaced in the file's text only, never in a variable's value.
            return self._replaced(node, otherwise) if "${" in otherwise else otherwise
        self.mistake(
            node,
            f"the environment variable {name} is not set; set it, or write ${{{name}:-...}} for a default",
        )
        return None

    @staticmethod
    def blank(node: Node) -> bool:
        """Whether a node has no value: empty, `~` or `null`, unquoted."""
        return isinstance(node, ScalarNode) and not node.style and node.value in ("", "~", "null")

    def folder(self, node: Node) -> Path:
        """Return the folder of a node's file; relative paths start there."""
        return self._folders.get(node.start_mark.name, Path())


def _variables_of(value: str) -> str:
    """Return the names of a value's variables and files only: the text around them, or a default, may be a secret."""
    return ", ".join(f"${{{found}}}" for found in _SOURCE.findall(value)) or "a variable"


def _display_path(path: Path) -> str:
    """Return a path as an operator would type it: relative if it is below the working directory."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def value_of(node: Node, name: str) -> Node:
    """Return the node of a mapping's value, or the node itself if there is none."""
    if isinstance(node, MappingNode):
        for key, value in node.value:
            if key.value == name:
                return value  # type: ignore[no-any-return] # PyYAML's nodes are untyped inside
    return node
