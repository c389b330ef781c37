"""The registry of stages: finds the class of a stage's name in YAML.

A bare name is a file `NAME.py` in the built-in `plugins/` or in a folder of `plugins_path`, or an entry point of the
group `gateway.stages`; `package.module:Class` is imported literally. If two stages have one name, the error names both:
nothing shadows anything.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from gateway.fields import check_settings
from gateway.stage import Stage

__all__ = ("ENTRY_POINTS", "Registry", "UnknownStage")

ENTRY_POINTS = "gateway.stages"
BUILT_IN = Path(__file__).resolve().parents[1] / "plugins"

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


class UnknownStage(LookupError):
    """A name has no stage or two stages, or its stage cannot be imported; the message says which."""


class Registry:
    """Finds stages for one configuration, which may add folders."""

    def __init__(self, plugins_path: Sequence[Path] = ()) -> None:
        self._folders = (BUILT_IN, *plugins_path)
        for folder in plugins_path:
            # For `package.module:Class` in such a folder. It is last in sys.path, so that it shadows nothing.
            if str(folder) not in sys.path:
                sys.path.append(str(folder))
        self._found: dict[str, type[Stage]] = {}
        self._entry_points = _entry_points(tuple((folder, _mtime_of(folder)) for folder in sys.path))

    def names(self) -> list[str]:
        """Return every bare name of a stage, sorted."""
        files = {
            file.stem
            for folder in self._folders
            if folder.is_dir()
            for file in folder.glob("*.py")
            if _NAME.fullmatch(file.stem)
        }
        return sorted(files | set(self._entry_points))

    def find(self, name: str) -> type[Stage]:
        """Return the stage of this name. Raises UnknownStage."""
        if name not in self._found:
            self._found[name] = self._by_class(name) if ":" in name else self._by_name(name)
        return self._found[name]

    def _by_class(self, name: str) -> type[Stage]:
        module_name, _, class_name = name.partition(":")
        module = _import(name, lambda: importlib.import_module(module_name))
        found = getattr(module, class_name, None)
        if found is None:
            raise UnknownStage(f"module {module_name!r} has no {class_name!r}")
        return _validated(found, name)

    def _by_name(self, name: str) -> type[Stage]:
        if not _NAME.fullmatch(name):
            similar = difflib.get_close_matches(name.lower().replace("-", "_"), self.names(), n=1)
            hint = f"; did you mean {similar[0]!r}?" if similar else ""
            shown = name if len(name) < 80 else name[:80] + "..."
            raise UnknownStage(
                f"{shown!r} is not a valid name of a stage: use lowercase letters, digits and _, or "
                f"package.module:Class{hint}"
            )
        files = [folder / f"{name}.py" for folder in self._folders if (folder / f"{name}.py").is_file()]
        points = self._entry_points.get(name, [])
        sources = [_describe(file) for file in files] + [f"the entry point {point.value}" for point in points]
        if len(sources) > 1:
            raise UnknownStage(f"the name {name!r} has {len(sources)} stages: {' and '.join(sources)}; rename one")
        if files:
            module = _import(name, lambda: _load_file(files[0]))
            return _single_stage(module, name)
        if points:
            return _validated(_import(name, points[0].load), name)
        similar = difflib.get_close_matches(name, self.names(), n=1)
        hint = f"; did you mean {similar[0]!r}?" if similar else f"; there are {', '.join(self.names())}"
        raise UnknownStage(f"there is no stage {name!r}{hint}")


@lru_cache(maxsize=1)
def _entry_points(_path: tuple[tuple[str, int], ...]) -> dict[str, list[EntryPoint]]:
    """Return the entry points of installed packages by name; the argument is `sys.path` with each folder's mtime.

    Finding them reads a file for each installed package, hence the cache. An installation changes its folder's mtime.
    """
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=ENTRY_POINTS):
        found.setdefault(point.name, []).append(point)
    return found


def _mtime_of(folder: str) -> int:
    try:
        return os.stat(folder or os.curdir).st_mtime_ns
    except OSError:
        return 0  # the folder or zip file does not exist


def _import(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except ModuleNotFoundError as exc:
        raise UnknownStage(f"the stage {name!r} cannot be imported: {exc}") from exc
    except SyntaxError as exc:
        raise UnknownStage(
            f"the stage {name!r} cannot be imported: {exc.msg} ({exc.filename}:{exc.lineno}:{exc.offset})"
        ) from exc
    except (Exception, SystemExit) as exc:
        frame = traceback.extract_tb(exc.__traceback__)[-1]
        raise UnknownStage(
            f"the stage {name!r} cannot be imported: {type(exc).__name__}: {exc} ({frame.filename}:{frame.lineno})"
        ) from exc


def _describe(file: Path) -> str:
    return f"the built-in plugins/{file.name}" if file.parent == BUILT_IN else str(file)


def _load_file(file: Path) -> ModuleType:
    """Import a stage's file by its path, so that no other `plugins` folder can replace the built-in one."""
    package = "plugins" if file.parent == BUILT_IN else f"gateway_plugins_path.{file.parent.name}"
    name = f"{package}.{file.stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ is not None and Path(known.__file__).resolve() == file.resolve():
        return known
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up their module while it runs.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _single_stage(module: ModuleType, name: str) -> type[Stage]:
    found = [
        each
        for each in vars(module).values()
        if inspect.isclass(each) and issubclass(each, Stage) and each.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(each.__name__ for each in found) or "none"
        raise UnknownStage(f"{module.__file__} must define exactly one Stage; it defines {names}")
    return _validated(found[0], name)


def _validated(found: object, name: str) -> type[Stage]:
    if not (inspect.isclass(found) and issubclass(found, Stage)):
        raise UnknownStage(f"{name!r} is not a subclass of gateway.Stage")
    if "__dataclass_fields__" not in vars(found) and getattr(found, "__annotations__", {}):
        raise UnknownStage(f"{name!r} has settings but is not a dataclass; put @dataclass above its class")
    if not inspect.iscoroutinefunction(found.__call__):
        raise UnknownStage(f"the stage {name!r} cannot be used: its __call__ must be `async def`")
    try:
        check_settings(found)
    except TypeError as exc:
        raise UnknownStage(f"the stage {name!r} cannot be used: {exc}") from None
    return found
