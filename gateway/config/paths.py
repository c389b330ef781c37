"""Files and folders that a configuration names: `plugins_path` and `teams`, from the folder of `gateway.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gateway.config.nodes import MappingNode, Reader, value_of

__all__ = ("as_list", "existing_folder", "find_files", "read_plugin_folder", "read_team_files")


def as_list(value: str | Sequence[str] | None) -> list[str]:
    """Return the values of a setting that takes one value or a list."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def existing_folder(base: Path, name: str) -> Path | None:
    """Return a folder by its path from `base`; None if there is none, or if the name is not valid."""
    try:
        path = (base / name).resolve()
        return path if path.is_dir() else None
    except (OSError, ValueError):
        return None


def find_files(reader: Reader, pattern: Path, setting: str, root: MappingNode) -> list[Path]:
    """Return the files that match a pattern; note an error as a mistake of the setting."""
    try:
        return reader.sources.find(pattern)
    except OSError as exc:
        reader.mistake(value_of(root, setting), f"{setting}: cannot search for {pattern}: {exc.strerror}")
        return []


def read_plugin_folder(reader: Reader, base: Path, name: str, root: MappingNode) -> Path:
    """Return a folder of `plugins_path`, and `base` in place of a missing one."""
    path = existing_folder(base, name)
    if path is None:
        reader.mistake(value_of(root, "plugins_path"), f"plugins_path: there is no folder {name}")
    return path or base


def read_team_files(reader: Reader, main: Path, patterns: str | list[str], root: MappingNode) -> list[Path]:
    """Return the files that `teams` names, without `gateway.yaml` itself."""
    files: list[Path] = []
    for pattern in as_list(patterns):
        path = main.parent / pattern
        found = find_files(reader, path, "teams", root)
        files += found
        if not found and not any(sign in pattern for sign in "*?["):
            reader.mistake(value_of(root, "teams"), f"teams: there is no file {pattern}")
        elif not found and (reason := _why_nothing_matches(path)):
            reader.mistake(value_of(root, "teams"), f"teams: no file matches {pattern}; {reason}")
    return [file for file in dict.fromkeys(files) if file.resolve() != main.resolve()]


def _why_nothing_matches(pattern: Path) -> str | None:
    """Return why no file of a team matches a pattern; None if its folder is simply empty."""
    folder = pattern.parent
    if any(sign in str(folder) for sign in "*?["):
        return None
    try:
        present = sorted(each.name for each in folder.iterdir() if each.suffix in (".yaml", ".yml"))
    except OSError:
        return f"there is no folder {folder.name}"
    return f"the folder has {', '.join(present)}" if present else None
