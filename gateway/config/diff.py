"""Comparing the old and the new configuration: a line of text per change, without secrets.

Both are flattened into `path -> (shown text, compared value)`: a secret is shown as `***` and compared as itself.
"""

from __future__ import annotations

import dataclasses
import datetime
import types
from collections.abc import Iterator, Mapping
from typing import Any, Union, get_args, get_origin

from gateway.config.load import Loaded
from gateway.config.show import is_default, kind_of, shown
from gateway.fields import is_secret, settings_of, unwrap
from gateway.teams import Team

__all__ = ("diff",)

# Maximum numbers of changes listed, of teams named for one change, and of characters shown of a value.
_MAX_CHANGES, _MAX_TEAMS, _MAX_CHARACTERS = 50, 5, 200

# The shown text, and the compared value.
_Value = tuple[str, Any]
_Flat = dict[str, _Value]


def diff(old: Loaded, new: Loaded) -> list[str]:
    """Return a line for each change, such as `team research: rate_limit.requests_per_minute: 600 -> 60`."""
    lines = [
        *_changes(dict(_settings(old)), dict(_settings(new))),
        *_named("resource", dict(_resources(old)), dict(_resources(new))),
        *_named("pool", dict(_pools(old)), dict(_pools(new))),
        *_of_teams(old, new),
    ]
    if len(lines) > _MAX_CHANGES:
        lines = [*lines[:_MAX_CHANGES], f"and {len(lines) - _MAX_CHANGES} more"]
    return lines


def _changes(old: _Flat, new: _Flat) -> list[str]:
    lines = []
    for path in {**old, **new}:
        before, after = old.get(path), new.get(path)
        if before is None and after is not None:
            lines.append(f"{path}: {_pair(after[0])[0]} added")
        elif after is None and before is not None:
            lines.append(f"{path}: {_pair(before[0])[0]} removed")
        elif before is not None and after is not None and before[1] != after[1]:
            change = " -> ".join(_pair(before[0], after[0]))
            lines.append(f"{path}: {change}{' (changed)' if before[0] == after[0] else ''}")
    return lines


def _named(kind: str, old: Mapping[str, _Flat], new: Mapping[str, _Flat]) -> list[str]:
    """Return the changes of named things: added, removed, and changed ones."""
    lines = []
    for name in {**old, **new}:
        if name not in old:
            lines.append(f"{kind} {name}: added")
        elif name not in new:
            lines.append(f"{kind} {name}: removed")
        else:
            lines += [f"{kind} {name}: {line}" for line in _changes(old[name], new[name])]
    return lines


def _of_teams(old: Loaded, new: Loaded) -> list[str]:
    """Return the changes of all teams; a change that many teams inherit is one line."""
    before, after = ({team.name: team for team in loaded.teams.all} for loaded in (old, new))
    lines: list[str] = []
    shared: dict[str, list[str]] = {}
    for name in {**before, **after}:
        if name not in before or name not in after:
            lines.append(f"team {name}: {'added' if name in after else 'removed'}")
            continue
        for line in _of_team(before[name], after[name]):
            shared.setdefault(line, []).append(name)
    for line, names in shared.items():
        more = len(names) - _MAX_TEAMS
        shown_names = ", ".join(names[:_MAX_TEAMS]) + (f" and {more} more" if more > 0 else "")
        lines.append(f"team{'s' if len(names) > 1 else ''} {shown_names}: {line}")
    return lines


def _of_team(old: Team, new: Team) -> Iterator[str]:
    yield from _changes(dict(_team(old)), dict(_team(new)))
    before, after = ({stage.id: stage for stage in team.stages} for team in (old, new))
    for name in {**before, **after}:
        if name not in before:
            yield f"{name}: stage added"
            given = {
                f"{name}.{key}": value
                for key, (kind, field) in settings_of(type(after[name])).items()
                if not is_default(getattr(after[name], key), field)
                for value in [(_text(getattr(after[name], key), kind), None)]
            }
            yield from _changes({}, given)
        elif name not in after:
            yield f"{name}: stage removed"
        elif type(before[name]) is not type(after[name]):
            kinds = type(before[name]).__qualname__, type(after[name]).__qualname__
            yield f"{name}: {' -> '.join(kinds)}, {'code changed' if kinds[0] == kinds[1] else 'another stage'}"
        else:
            yield from _changes(dict(_fields(name, before[name])), dict(_fields(name, after[name])))
    kept = [name for name in before if name in after], [name for name in after if name in before]
    if kept[0] != kept[1]:
        yield f"order of the pipeline: {' -> '.join(map(_list, (list(before), list(after))))}"


def _settings(loaded: Loaded) -> Iterator[tuple[str, _Value]]:
    settings = loaded.settings
    yield "listen", (settings.listen.described, settings.listen)
    if settings.admin is not None:
        yield "admin", (settings.admin.described, settings.admin)
    kinds = ("timeouts", settings.timeouts), ("limits", settings.limits), ("health", settings.health)
    for name, each in (*kinds, ("log", loaded.log)):
        yield from _fields(name, each)
    proxies = [str(each) for each in settings.trusted_proxies]
    yield "trusted_proxies", (_list(proxies), proxies)
    if loaded.store is not None:
        yield "store", (str(loaded.store), loaded.store)
    yield "watch", (_plain(loaded.watch), loaded.watch)
    for name, price in loaded.prices.items():
        yield from _fields(f"prices.{name}", price)
    for issuer in loaded.teams.issuers.all if loaded.teams.issuers is not None else ():
        yield f"identity {issuer.issuer}", (_list(list(issuer.audience)), issuer)


def _resources(loaded: Loaded) -> Iterator[tuple[str, _Flat]]:
    for name, each in loaded.resources.items():
        stored = each.credential
        flat: _Flat = {"endpoint": (each.endpoint, each.endpoint)}
        if stored is not None:
            flat["api_key"] = ("***", stored.value)
        if each.tokens is not None:
            flat["credential"] = (each.tokens.identity.kind, each.tokens.identity)
        for key in ("region", "api_version"):
            if (value := getattr(each, key)) is not None:
                flat[key] = (value, value)
        if each.timeouts is not None:
            flat.update(_fields("timeouts", each.timeouts))
        if each.tls is not None:
            flat["tls"] = ("custom", each.tls)
        if each.proxy is not None:
            flat["proxy"] = (str(each.proxy), each.proxy)
        yield name, flat


def _pools(loaded: Loaded) -> Iterator[tuple[str, _Flat]]:
    for name, pool in loaded.pools.items():
        terms = {str(each): f"priority {each.priority}, weight {each.weight:g}" for each in pool.deployments}
        yield name, {each: (text, text) for each, text in terms.items()}


def _team(team: Team) -> Iterator[tuple[str, _Value]]:
    for field in dataclasses.fields(team.match):
        value = getattr(team.match, field.name)
        if field.name == "keys":
            for key in value:
                # A digest is no secret; its first characters distinguish keys with the same label.
                name = f"{key.label} ({key.digest[:15]})" if key.label else key.digest[:15]
                until = "" if key.expires is None else f" until {_moment(key.expires)}"
                state = "disabled" if key.disabled else f"good{until}"
                yield f"match.keys {name}", (state, key)
        elif value:
            yield f"match.{field.name}", (_plain(value), value)
    resource = team.target.resource
    if resource is not None:
        yield "resource", (resource.name, resource.name)


def _fields(path: str, value: Any) -> Iterator[tuple[str, _Value]]:
    """Flatten a dataclass's settings."""
    for name, (kind, _) in settings_of(type(value)).items():
        if (each := getattr(value, name)) is not None:
            yield from _flat(f"{path}.{name}", each, kind)


def _flat(path: str, value: Any, kind: Any) -> Iterator[tuple[str, _Value]]:
    """Flatten one setting: a mapping's entries and a dataclass's fields get a path each."""
    base, _ = unwrap(kind)
    args = get_args(base)
    if is_secret(kind):
        yield path, ("***", value)
    elif get_origin(base) in (Union, types.UnionType):
        yield from [(path, ("***", value))] if any(map(is_secret, args)) else _flat(path, value, kind_of(value, args))
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _flat(f"{path}.{key}", each, args[1] if len(args) > 1 else str)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _fields(path, value)
    else:
        yield path, (_text(value, kind), value)


def _moment(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M")


def _text(value: Any, kind: Any) -> str:
    return str(value).lower() if isinstance(value, bool) and not is_secret(kind) else shown(value, kind)


def _plain(value: Any) -> str:
    """Return a value as it is written in YAML."""
    if isinstance(value, (tuple, list)):
        return _list([str(each) for each in value])
    return str(value).lower() if isinstance(value, bool) else str(value)


def _list(values: list[str]) -> str:
    return f"[{', '.join(values)}]"


def _pair(*texts: str) -> list[str]:
    """Return texts for display: long ones are cut to a part that begins shortly before they differ."""
    texts = tuple(text if text.isprintable() else ascii(text) for text in texts)
    long = len(texts) > 1 and max(map(len, texts)) > _MAX_CHARACTERS
    differ = next((index for index, each in enumerate(zip(*texts, strict=False)) if len(set(each)) > 1), 0)
    start = max(0, differ - 20) if long else 0
    end = start + _MAX_CHARACTERS
    return [("..." if start else "") + text[start:end] + ("..." if len(text) > end else "") for text in texts]
