"""Settings of a stage: the fields of its dataclass, their types, and which of them are secret."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from msgspec import Meta

__all__ = ("check_settings", "is_secret", "settings_of", "unwrap")

Settings: TypeAlias = Mapping[str, tuple[Any, dataclasses.Field[Any]]]

_META = ("gt", "ge", "lt", "le", "pattern", "min_length", "max_length", "description", "examples")


# Caches by the id of a type: reading types is the most expensive part of loading a team. An entry keeps its type alive,
# so that no other type can get the same id.
_settings: dict[int, tuple[type, Settings]] = {}
_unwrapped: dict[int, tuple[Any, tuple[Any, Meta | None]]] = {}
_MAX_CACHED = 10_000


def settings_of(cls: type) -> Settings:
    """Return the settings of a dataclass: name -> (type, field), in order."""
    if (known := _settings.get(id(cls))) is not None:
        return known[1]
    found: Settings = {}
    if dataclasses.is_dataclass(cls):
        hints = get_type_hints(cls, include_extras=True)
        found = {each.name: (hints[each.name], each) for each in dataclasses.fields(cls) if each.init}
    if len(_settings) >= _MAX_CACHED:
        _settings.clear()
    _settings[id(cls)] = cls, found
    return found


def unwrap(kind: Any) -> tuple[Any, Meta | None]:
    """Return a type without its `Annotated`, and its Meta; several are merged."""
    if (known := _unwrapped.get(id(kind))) is not None:
        return known[1]
    if len(_unwrapped) >= _MAX_CACHED:
        _unwrapped.clear()
    found = _unwrap(kind)
    _unwrapped[id(kind)] = kind, found
    return found


def _unwrap(kind: Any) -> tuple[Any, Meta | None]:
    if get_origin(kind) is not Annotated:
        return kind, None
    base, *extras = get_args(kind)
    metas = [each for each in extras if isinstance(each, Meta)]
    if len(metas) < 2:
        return base, metas[0] if metas else None
    merged: dict[str, Any] = {}
    for meta in metas:
        given = {name: getattr(meta, name) for name in _META if getattr(meta, name) is not None}
        merged = {**merged, **given, "extra": {**(merged.get("extra") or {}), **(meta.extra or {})}}
    return base, Meta(**merged)


def is_secret(kind: Any) -> bool:
    """Whether a setting's value must be redacted: `Meta(extra={"secret": True})`."""
    _, meta = unwrap(kind)
    return bool(meta is not None and (meta.extra or {}).get("secret"))


def check_settings(cls: type) -> None:
    """Check that YAML can express all settings of a dataclass. Raises TypeError with the name of one that fails."""
    try:
        known = settings_of(cls)
    except Exception as exc:
        raise TypeError(f"the types of its settings cannot be read: {type(exc).__name__}: {exc}") from exc
    for name, (kind, _) in known.items():
        if name in ("id", "needs", "provides", "check", "start", "stop"):
            raise TypeError(f"its setting {name!r} would hide an attribute of every stage; rename it")
        if not _supported(kind, (cls,)):
            raise TypeError(
                f"its setting {name!r} has an unsupported type; use str, int, float, bool, Literal, list[...], "
                "dict[str, ...], a dataclass, or X | None of these"
            )


def _supported(kind: Any, above: tuple[Any, ...]) -> bool:
    base, _ = unwrap(kind)
    origin, args = get_origin(base), get_args(base)
    if origin is Literal:
        return True
    if origin in (Union, types.UnionType):
        return all(_supported(each, above) for each in args)
    if origin in (list, tuple):
        return (
            len(args) == (1 if origin is list else 2)
            and (origin is list or args[1] is ...)
            and (_supported(args[0], above))
        )
    if origin in (dict, Mapping):
        return unwrap(args[0])[0] is str and _supported(args[1], above)
    if isinstance(base, type) and dataclasses.is_dataclass(base):
        return base not in above and all(_supported(each, (*above, base)) for each, _ in settings_of(base).values())
    return base in (str, int, float, bool, type(None))
