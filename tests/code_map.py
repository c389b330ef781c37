"""The code map of CONTRIBUTING.md, from the first docstring line of each file; `make map` writes it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.test_imports import ORDER

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- code map: `make map` writes it -->\n", "<!-- end of the code map -->\n"


def summary(path: Path) -> str:
    """Return the first docstring line of a module. Raises ValueError if it is not a whole sentence."""
    line = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
    if not line.endswith("."):
        raise ValueError(f"{path.relative_to(ROOT)}: the first docstring line is not a whole sentence")
    return line


def entry(path: Path) -> str:
    """Return the line of a file. The docstring of a stage or a command begins with its name, which is left out."""
    text = re.sub(rf"^`(gateway )?{path.stem}`: ", "", summary(path))
    return f"- `{path.name}`: {text[:1].upper()}{text[1:]}\n"


def folder(path: Path) -> Iterator[str]:
    """Yield the heading of a folder, its summary, and its files."""
    yield f"\n**`{path.relative_to(ROOT)}/`** {summary(path / '__init__.py')}\n\n"
    yield from (entry(file) for file in sorted(path.glob("[!_]*.py")))


def code_map() -> str:
    """Return the map: the files of `gateway/` itself, the wings in the order of their imports, and the stages."""
    gateway = ROOT / "gateway"
    names = [name for line in ORDER for name in line]
    lines = [f"\n**`gateway/`** {summary(gateway / '__init__.py')}\n\n"]
    lines += [entry(gateway / f"{name}.py") for name in names if (gateway / f"{name}.py").is_file()]
    for name in names:
        if (gateway / name).is_dir():
            lines += folder(gateway / name)
    lines += folder(ROOT / "plugins")
    return "".join(lines).lstrip("\n")


def with_map(page: str) -> str:
    """Return a page with the current map between its markers. Raises ValueError unless each is there once."""
    if (page.count(BEGIN), page.count(END)) != (1, 1):
        raise ValueError("the markers of the code map are missing or repeated")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{code_map()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(with_map(PAGE.read_text()))
