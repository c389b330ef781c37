"""Log events have stable names, and `gateway.log_events.EVENTS` explains each of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.log_events import EVENTS, KEYS

ROOT = Path(__file__).parents[1]

# The folders whose events are checked.
PATHS = ("gateway", "plugins")
LEVELS = {"critical", "debug", "error", "exception", "info", "warning"}
# Expressions that are a logger: `log`, `logger`, `self.logger`, `services.logger`, `get_logger()`, `logs.get_logger()`.
LOGGER = re.compile(r"(\w+\.)*(_?log|_?logger|get_logger\(\))")


def logged(source: str) -> Iterator[tuple[int, str | None]]:
    """Yield the line and the name of each log event of a source; None if the name is not a literal."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in LEVELS
            and LOGGER.fullmatch(ast.unparse(node.func.value))
        ):
            name = node.args[0] if node.args else None
            literal = isinstance(name, ast.Constant) and isinstance(name.value, str)
            yield node.lineno, name.value if literal else None  # type: ignore[union-attr]


def files(paths: tuple[str, ...]) -> list[Path]:
    """Return the Python files of some paths."""
    found = [ROOT / path for path in paths]
    return sorted(file for path in found for file in (path.rglob("*.py") if path.is_dir() else [path]))


def mistakes(path: Path) -> list[str]:
    """Return the log events of a file whose names are not snake_case, or not in `EVENTS`."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {name!r}"
        for line, name in logged(path.read_text())
        if name is None or not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or name not in EVENTS
    ]


@pytest.mark.parametrize("path", files(PATHS), ids=lambda path: str(path.relative_to(ROOT)))
def test_each_log_event_has_a_stable_name_and_a_meaning(path: Path) -> None:
    """The name is a literal in snake_case, and `EVENTS` has it."""
    assert mistakes(path) == []


def test_each_event_of_the_table_is_logged_somewhere() -> None:
    """An event that is no longer logged is not documented either."""
    names = {name for path in files(("gateway", "plugins")) for _, name in logged(path.read_text())}
    assert EVENTS.keys() <= names


def test_meanings_are_sentences() -> None:
    """In order of the names, so that an operator finds them."""
    assert list(EVENTS) == sorted(EVENTS)
    assert all(re.fullmatch(r"[A-Z`].*\.", meaning) for meaning in EVENTS.values())


def test_events_are_found_in_a_source() -> None:
    """With each way to get a logger; a name that is not a literal is found as None."""
    source = (
        'get_logger().info("one")\nlog.error("two words", a=1)\nself.logger.warning(name)\n'
        'services.logger.debug("four")\nself._list.error("none")\nlogs.get_logger().info("six")\n'
    )
    assert list(logged(source)) == [(1, "one"), (2, "two words"), (3, None), (4, "four"), (6, "six")]


def keys_of(source: str) -> set[str]:
    """Return the keys that the log events of a source are given by name."""
    return {
        keyword.arg
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in LEVELS
        and LOGGER.fullmatch(ast.unparse(node.func.value))
        for keyword in node.keywords
        if keyword.arg is not None
    }


def test_keys_of_events_are_from_one_table() -> None:
    """One name for one fact: an operator's query works for every event."""
    used = set().union(*(keys_of(path.read_text()) for path in files(PATHS)))
    assert used <= KEYS.keys()
    assert list(KEYS) == sorted(KEYS)
    assert keys_of('log.info("one", a=1, **more)\nother.info("two", b=2)') == {"a"}


def test_each_event_is_documented() -> None:
    """In the table of docs/operating.md, which names no other event."""
    page = (ROOT / "docs" / "operating.md").read_text().partition("## The log")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]*) \|", page, re.MULTILINE)[1:]
    named = {name for row in rows for name in re.findall(r"`([^`]*)`", row)}
    mentioned = set(re.findall(r"`([a-z_]+)`", page))
    assert named <= EVENTS.keys()
    assert EVENTS.keys() <= mentioned
