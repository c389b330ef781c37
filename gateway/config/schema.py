"""JSON Schema of the configuration, for editors, generated from the types that read it."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from msgspec import Meta

from gateway.config.convert import RawNode
from gateway.config.files import GatewayFile, MatchFile, PooledFile, ResourceFile, TeamFile
from gateway.fields import settings_of, unwrap
from gateway.registry import Registry, UnknownStage
from gateway.stage import Stage

__all__ = ("schema", "stage_schema", "type_name")

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
# A variable in place of a number or boolean: `${PORT}`.
_VARIABLE = {"type": "string", "pattern": r"\$\{"}


def schema(registry: Registry, *, team: bool = False) -> dict[str, Any]:
    """Return the schema of `gateway.yaml`, or of a team's file."""
    made = _settings(TeamFile if team else GatewayFile)
    properties = made["properties"]
    properties["pipeline"] = {**properties["pipeline"], **_pipeline(registry, team)}
    properties["match"] = _settings(MatchFile)
    if team:
        properties["change"] = {**properties["change"], **_change(registry)}
        made["required"] = ["match"]
    else:
        properties["resources"] = {
            **properties["resources"],
            "type": "object",
            "additionalProperties": _type(ResourceFile),
        }
        pooled = {"type": "array", "items": _type(PooledFile), "minItems": 1}
        properties["pools"] = {**properties["pools"], "type": "object", "additionalProperties": pooled}
        made["required"] = ["resources", "pipeline"]
    return {
        "$schema": _DRAFT,
        "title": "azure-openai-gateway: a team's file" if team else "azure-openai-gateway: gateway.yaml",
        **made,
    }


def stage_schema(cls: type[Stage]) -> dict[str, Any]:
    """Return the schema of one stage's settings."""
    made = _settings(cls)
    first = next(iter(settings_of(cls).values()), None)
    if first is None:
        return {**made, "type": ["object", "null"]}
    short = _type(first[0])
    if short.get("type") == "object":
        return made
    return {"description": made.get("description", ""), "anyOf": [made, short]}


def _stages(registry: Registry) -> dict[str, type[Stage]]:
    found: dict[str, type[Stage]] = {}
    for name in registry.names():
        try:
            found[name] = registry.find(name)
        except UnknownStage:
            continue  # `gateway stages` and `gateway check` report its error
    return found


def _pipeline(registry: Registry, team: bool) -> dict[str, Any]:
    stages = _stages(registry)
    names = [*(["inherit"] if team else []), *stages]
    of_name = {name: stage_schema(cls) for name, cls in stages.items()}
    with_id = {f"^{name} as .+$": made for name, made in of_name.items()}
    literal: dict[str, Any] = {"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_]+": {}}
    return {
        "type": "array",
        "items": {
            "anyOf": [
                {"enum": names},
                {"type": "string", "pattern": "(^.+ as .+$)|:"},
                {
                    "type": "object",
                    "properties": of_name,
                    "patternProperties": {**with_id, **literal},
                    "additionalProperties": False,
                    "minProperties": 1,
                    "maxProperties": 1,
                },
            ]
        },
    }


def _change(registry: Registry) -> dict[str, Any]:
    properties = {}
    for name, cls in _stages(registry).items():
        made = stage_schema(cls)
        if "anyOf" in made:
            made = {**made, "anyOf": [_partial(each) for each in made["anyOf"]]}
        properties[name] = {"anyOf": [{"const": "off"}, _partial(made)]}
    return {"type": "object", "properties": properties}


def _partial(made: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without `required`: `change` lists only the settings to change."""
    return {key: value for key, value in made.items() if key != "required"}


def _settings(cls: type) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    required: list[str] = []
    for name, (kind, field) in settings_of(cls).items():
        properties[name] = _type(kind)
        if field.default is not dataclasses.MISSING:
            if isinstance(field.default, (str, int, float, bool)):
                properties[name]["default"] = field.default
        elif field.default_factory is dataclasses.MISSING:
            required.append(name)
    made: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    doc = (cls.__doc__ or "").strip().splitlines()
    if doc:
        made["description"] = doc[0]
    if required:
        made["required"] = required
    return made


def _type(kind: Any) -> dict[str, Any]:
    base, meta = unwrap(kind)
    made = _plain(base)
    if meta is not None:
        _bounds(made, meta)
    return made


def _plain(kind: Any) -> dict[str, Any]:
    if kind is RawNode:
        return {}
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        choices = [_type(each) for each in args]
        return choices[0] if len(choices) == 1 else {"anyOf": choices}
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (list, tuple):
        return {"type": "array", "items": _type(args[0])}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _type(args[1])}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        made, short = _settings(kind), _type(next(iter(settings_of(kind).values()))[0])
        return made if short.get("type") == "object" else {"anyOf": [made, short]}
    plain: dict[Any, dict[str, Any]] = {
        str: {"type": ["string", "number", "boolean"]},  # the gateway reads an unquoted 2024 or true as text
        int: {"anyOf": [{"type": "integer"}, _VARIABLE]},
        float: {"anyOf": [{"type": "number"}, _VARIABLE]},
        bool: {"anyOf": [{"type": "boolean"}, _VARIABLE]},
        type(None): {"type": "null"},
    }
    return plain.get(kind, {})


def _bounds(made: dict[str, Any], meta: Meta) -> None:
    if meta.description:
        made["description"] = meta.description
    number = made["anyOf"][0] if "anyOf" in made else made
    for bound, word in (
        (meta.gt, "exclusiveMinimum"),
        (meta.ge, "minimum"),
        (meta.lt, "exclusiveMaximum"),
        (meta.le, "maximum"),
    ):
        if bound is not None:
            number[word] = bound
    if meta.pattern is not None and made.get("type"):
        made["anyOf"] = [{"type": made.pop("type"), "pattern": meta.pattern}, _VARIABLE]


def type_name(kind: Any) -> str:
    """Return the name of a setting's type for the command line and the docs."""
    base, _ = unwrap(kind)
    origin, args = get_origin(base), get_args(base)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(each) for each in args if each is not type(None))
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin in (list, tuple):
        return f"list of {type_name(args[0])}"
    if origin in (dict, Mapping):
        return f"mapping of {type_name(args[1])}"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(base, "mapping")
