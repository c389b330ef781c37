"""The code map of CONTRIBUTING.md is current, complete, and short enough to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.code_map import BEGIN, END, PAGE, ROOT, code_map, entry, summary, with_map


def test_the_code_map_is_current() -> None:
    """`make map` would change nothing."""
    page = PAGE.read_text()
    assert with_map(page) == page, "the code map is out of date; run `make map`"


def test_every_file_has_one_line_in_the_map() -> None:
    """Each module of `gateway/` and `plugins/`, in a line of at most 150 characters."""
    lines = code_map().splitlines()
    assert all(len(line) <= 150 for line in lines)
    files = [path for name in ("gateway", "plugins") for path in (ROOT / name).rglob("*.py")]
    assert len([line for line in lines if line.startswith(("- ", "**"))]) == len(files)


def test_a_changed_docstring_changes_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line begins with the name of the file; a stage's own name is not repeated."""
    monkeypatch.setattr("tests.code_map.ROOT", tmp_path)
    path = tmp_path / "cors.py"
    path.write_text('"""`cors`: preflights.\n\nMore of it."""\n')
    assert entry(path) == "- `cors.py`: Preflights.\n"
    path.write_text('"""A sentence that goes\non in the next line."""\n')
    with pytest.raises(ValueError, match=r"cors\.py: the first docstring line"):
        summary(path)


def test_only_the_text_between_the_markers_is_replaced() -> None:
    """What is before and after them stays; a page without them is an error."""
    page = with_map(f"before\n{BEGIN}old\n{END}after\n")
    assert page.startswith(f"before\n{BEGIN}\n**`gateway/`** ")
    assert page.endswith(f"\n{END}after\n")
    assert "old\n" not in page
    for broken in ("none", BEGIN, END, BEGIN + END + END):
        with pytest.raises(ValueError, match="markers"):
            with_map(broken)
