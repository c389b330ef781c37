"""Showing a configuration, or the available stages, as text, without secrets."""

from __future__ import annotations

import dataclasses
import inspect
import math
import time
import types
from collections.abc import Sequence
from typing import Any, Union, get_args, get_origin

from gateway.azure.resources import Deployment
from gateway.config.load import Loaded
from gateway.config.schema import type_name
from gateway.fields import is_secret, settings_of, unwrap
from gateway.registry import Registry, UnknownStage
from gateway.stage import Stage
from gateway.teams import Team

__all__ = ("kind_of", "show", "show_stage", "show_stages", "shown")


def show(loaded: Loaded) -> str:
    """Return the text that `gateway check` prints for a valid configuration."""
    lines = [f"listen {loaded.settings.listen.described}"]
    for resource in loaded.resources.values():
        stored = " with a stored key" if resource.credential is not None else ""
        if resource.tokens is not None:
            stored = f" with tokens of {_IDENTITIES[resource.tokens.identity.kind]}"
        through = f" through the proxy {resource.proxy}" if resource.proxy is not None else ""
        more = [f"api-version {resource.api_version}"] if resource.api_version is not None else []
        more += [f"region {resource.region}"] if resource.region is not None else []
        more += ["custom TLS settings"] if resource.tls is not None else []
        lines.append(
            f"resource {resource.name}: {resource.endpoint}{stored}{through}{''.join(f', {each}' for each in more)}"
        )
    lines += [f"pool {each.name}: {', '.join(map(_pooled, each.deployments))}" for each in loaded.pools.values()]
    if loaded.settings.admin is not None:
        lines.append(f"admin listener {loaded.settings.admin.described}")
    if loaded.store is not None:
        lines.append(f"limits counted in {loaded.store}")
    if loaded.teams.issuers is not None:
        lines += [f"identity {each.issuer} for {', '.join(each.audience)}" for each in loaded.teams.issuers.all]
    for team in loaded.teams.all:
        lines.append(f"team {team.name}: {_requests_of(team, loaded)}")
        if team.target.resource is not None and len(loaded.resources) > 1:
            lines.append(f"  (resource {team.target.resource.name})")
        lines += [f"  {line}" for stage in team.stages for line in _stage_lines(stage)]
    return "\n".join(lines) + "\n"


_IDENTITIES = {
    "client_secret": "an application",
    "managed_identity": "a managed identity",
    "workload_identity": "a workload identity",
}


def _pooled(deployment: Deployment) -> str:
    terms = [f"priority {deployment.priority}"] if deployment.priority != 1 else []
    terms += [f"weight {deployment.weight:g}"] if deployment.weight != 1 else []
    return f"{deployment} ({', '.join(terms)})" if terms else str(deployment)


def _requests_of(team: Team, loaded: Loaded) -> str:
    if team is loaded.teams.default:
        return "every request that no other team matches"
    parts = [f"{prefix}/v1" for prefix in team.match.path_prefix]
    parts += [f"host {host}" for host in team.match.host]
    if team.match.keys:
        count = len(team.match.keys)
        ended = sum(key.disabled or (key.expires or math.inf) <= time.time() for key in team.match.keys)
        parts.append(f"{count} key{'s' if count > 1 else ''}" + (f" ({ended} expired or disabled)" if ended else ""))
    if team.match.claims:
        claims = [f"{name} {' or '.join(values)}" for name, values in team.match.claims.items()]
        parts.append(f"tokens with {' and '.join(claims)}")
    return ", ".join(parts)


def _stage_lines(stage: Stage) -> list[str]:
    changed = []
    for name, (kind, field) in settings_of(type(stage)).items():
        value = getattr(stage, name)
        if not is_default(value, field):
            changed.append(f"{name}={shown(value, kind)}")
    return [f"{stage.id}{': ' if changed else ''}{' '.join(changed)}"]


def shown(value: Any, kind: Any) -> str:
    """Return a value as text, with `***` in place of each secret part."""
    if is_secret(kind):
        return "***"
    base, _ = unwrap(kind)
    args = get_args(base)
    if get_origin(base) in (Union, types.UnionType):
        return "***" if any(map(is_secret, args)) else shown(value, kind_of(value, args))
    if isinstance(value, dict):
        inside = args[1] if len(args) > 1 else str
        return "{" + ", ".join(f"{key}: {shown(each, inside)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(shown(each, args[0] if args else str) for each in value) + "]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = [
            f"{name}: {shown(getattr(value, name), kind)}"
            for name, (kind, field) in settings_of(type(value)).items()
            if is_secret(kind) or not is_default(getattr(value, name), field)
        ]
        return "{" + ", ".join(given) + "}"
    return str(value)


def is_default(value: Any, field: dataclasses.Field[Any]) -> bool:
    """Whether a setting has its default value."""
    if field.default_factory is not dataclasses.MISSING:
        return bool(value == field.default_factory())
    return bool(value == field.default)


def kind_of(value: Any, kinds: Sequence[Any]) -> Any:
    """Return the kind of a union that a value has, as far as it decides how to show the value."""
    for kind in kinds:
        base, _ = unwrap(kind)
        shape = get_origin(base) or base
        if isinstance(shape, type) and isinstance(value, shape):
            return kind
    return str


def show_stages(registry: Registry) -> str:
    """Return a line for each available stage."""
    lines = []
    for name in registry.names():
        try:
            lines.append((name, _summary(registry.find(name))))
        except UnknownStage as exc:
            lines.append((name, f"BROKEN: {exc}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {summary}" for name, summary in lines) + "\n"


def _doc(cls: type[Stage]) -> str:
    """Return a stage's own docstring, not the one of the base class."""
    return inspect.cleandoc(cls.__doc__ or "")


def _summary(cls: type[Stage]) -> str:
    return _doc(cls).split("\n", 1)[0]


def show_stage(name: str, cls: type[Stage]) -> str:
    """Return a stage's documentation and its settings."""
    lines = [name, "", *_doc(cls).splitlines(), ""]
    settings = settings_of(cls)
    if not settings:
        return "\n".join([*lines, "It takes no settings.", ""])
    lines.append("Settings:")
    for setting, (kind, field) in settings.items():
        _, meta = unwrap(kind)
        lines.append(f"  {setting}: {type_name(kind)}{_default(kind, field)}")
        if meta is not None and meta.description:
            lines.append(f"      {meta.description}")
    return "\n".join([*lines, ""])


def _default(kind: Any, field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return "" if field.default is None else f" (default: {shown(field.default, kind)})"
    if field.default_factory is not dataclasses.MISSING:
        return ""
    return " (required)"
