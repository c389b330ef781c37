"""The import graph: no cycle, no upward import, and a paragraph for each wing."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports only from its own line and from the lines above it. A name is a wing
# (a folder of `gateway/`) or a file of `gateway/` itself; `gateway` is its `__init__.py`, the public names.
ORDER = (
    ("errors", "settings", "logs", "log_events", "version", "fields", "fair_scheduler", "dns_resolver"),
    ("protocol",),
    ("limits",),
    ("usage",),
    ("auth",),
    ("body",),
    ("azure",),
    ("exchange",),
    ("transport",),
    ("request", "response"),
    ("balancing",),
    ("services", "stage", "upstream", "teams"),
    ("gateway",),
    ("registry", "watchdog"),
    ("config",),
    ("admin",),
    ("stream_writer", "response_writer", "generation", "server"),
    ("process",),
    ("testing",),
    ("cli", "__main__"),
)
FLOORS = {name: floor for floor, names in enumerate(ORDER) for name in names}


def modules() -> dict[str, Path]:
    """Return the path of each module below `gateway`, by its dotted name."""
    found = {}
    for path in sorted((ROOT / "gateway").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str, known: Mapping[str, object]) -> Iterator[str]:
    """Yield each module of the gateway that a source imports: at run time, for types, or inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "gateway")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gateway":
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in known else str(node.module)


def graph() -> dict[str, set[str]]:
    """Return the imports of each module."""
    known = modules()
    return {name: set(imported(path.read_text(), known)) - {name} for name, path in known.items()}


def floor_of(module: str) -> int:
    """Return the line of `ORDER` that a module belongs to."""
    return FLOORS[module.split(".")[1] if "." in module else module]


def upward(arrows: Mapping[str, set[str]]) -> list[str]:
    """Return the imports from a later line of `ORDER`."""
    return [
        f"{name} -> {target}"
        for name, targets in arrows.items()
        for target in sorted(targets)
        if floor_of(target) > floor_of(name)
    ]


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """Return the modules that are in a cycle or depend on one, or an empty list: remove leaves until none is left."""
    left = {name: {target for target in targets if target in arrows} for name, targets in arrows.items()}
    while leaves := {name for name, targets in left.items() if not targets}:
        left = {name: targets - leaves for name, targets in left.items() if name not in leaves}
    return sorted(left)


def test_no_import_runs_upward() -> None:
    """Each module imports only from its line of `ORDER` and from earlier lines."""
    assert upward(graph()) == []


def test_no_circle_of_imports() -> None:
    """No cycle at run time, in types or inside functions."""
    assert circle(graph()) == []


def test_a_circle_and_an_upward_arrow_are_found() -> None:
    """The same functions find both in a graph that has them."""
    arrows = {"gateway.errors": {"gateway.server"}, "gateway.server": {"gateway.errors"}, "gateway.logs": set[str]()}
    assert upward(arrows) == ["gateway.errors -> gateway.server"]
    assert circle(arrows) == ["gateway.errors", "gateway.server"]
    source = "def f():\n    from gateway.logs import get_logger\nif TYPE_CHECKING:\n    import gateway.server\n"
    assert set(imported(source, modules())) == {"gateway.logs", "gateway.server"}


@pytest.mark.parametrize("path", sorted((ROOT / "plugins").glob("*.py")), ids=lambda path: path.stem)
def test_plugins_import_from_gateway_alone(path: Path) -> None:
    """A built-in stage uses only the API of plugin authors, and no other stage."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            assert name.split(".")[0] not in ("gateway", "plugins") or name == "gateway"


def test_each_wing_says_what_lives_there() -> None:
    """In a paragraph of its `__init__.py`; only `cli`, `config` and `testing` export names."""
    for wing in sorted(path for path in (ROOT / "gateway").iterdir() if (path / "__init__.py").is_file()):
        tree = ast.parse((wing / "__init__.py").read_text())
        paragraph = ast.get_docstring(tree) or ""
        assert len(paragraph) > 100, f"gateway/{wing.name}/__init__.py has no paragraph"
        assert len(tree.body) == 1 or wing.name in ("cli", "config", "testing")


def test_tests_mirror_the_wings() -> None:
    """Each folder of `gateway/` has a folder of tests with its name."""
    for wing in (ROOT / "gateway").iterdir():
        if (wing / "__init__.py").is_file() and wing.name != "testing":
            assert list((ROOT / "tests" / wing.name).glob("test_*.py")), wing.name
