"""Converting YAML nodes to typed values; every mistake is noted with its position.

A setting's type is its specification: plain Python types, `Literal`, `Annotated[..., Meta(...)]` with msgspec's bounds,
lists, mappings, and dataclasses. A dataclass may be written as a single value, which is then its first field.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from msgspec import Meta

from gateway.config.nodes import MappingNode, Node, Reader, ScalarNode, SequenceNode
from gateway.fields import is_secret, settings_of, unwrap

__all__ = ("FAILED", "RawNode", "convert", "did_you_mean", "fill", "fill_from")

_INT = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?")
_NULL = ("", "~", "null")


class _Failed:
    """The result of a conversion that failed; the mistake is noted."""


FAILED = _Failed()


class RawNode:
    """The type of a setting that is kept as a node."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or the known names if none is close."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known names: {', '.join(names)}" if names else ""


def convert(reader: Reader, node: Node, kind: Any, label: str, *, secret: bool = False) -> Any:
    """Return a node's value as `kind`, or FAILED; `label` names the setting in messages.

    A message never shows the value of a `secret`.
    """
    base, meta = unwrap(kind)
    secret = secret or is_secret(kind)
    value = _convert(reader, node, base, label, secret)
    if value is not FAILED and meta is not None:
        problem = _out_of_bounds(value, meta)
        if problem:
            reader.mistake(node, f"{label} must be {problem}{_but_is(node, secret)}")
            return FAILED
    return value


def _convert(reader: Reader, node: Node, kind: Any, label: str, secret: bool) -> Any:
    if kind is RawNode:
        return node
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _one_of(reader, node, args, label, secret)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return fill(reader, node, kind, label)
    if origin in (list, tuple):
        return _items(reader, node, origin, args[0], label, secret)
    if origin in (dict, Mapping):
        return _mapping(reader, node, args[1], label, secret)
    if reader.blank(node) and kind is not type(None):
        reader.mistake(node, f"{label} has no value")
        return FAILED
    if not isinstance(node, ScalarNode):
        reader.mistake(node, f"{label} must be {_kind_name(kind)}, not {_shape(node)}")
        return FAILED
    text = reader.text(node)
    if text is None:
        return FAILED
    value = _scalar(kind, args if origin is Literal else (), text)
    if value is FAILED:
        hint = did_you_mean(text, map(str, args)) if origin is Literal else ""
        hint = hint if "mean" in hint else ""
        reader.mistake(node, f"{label} must be {_kind_name(kind)}{_but_is(node, secret)}{hint}")
    return value


def _scalar(kind: Any, choices: tuple[Any, ...], text: str) -> Any:
    for choice in choices:
        if text == (str(choice).lower() if isinstance(choice, bool) else str(choice)):
            return choice
    if choices:
        return FAILED
    if kind is str:
        return text
    if kind is bool and text in ("true", "false"):
        return text == "true"
    if kind is int and _INT.fullmatch(text):
        return int(text)
    if kind is float and _FLOAT.fullmatch(text):
        return float(text)
    if kind is type(None) and text in _NULL:
        return None
    return FAILED


def _one_of(reader: Reader, node: Node, kinds: tuple[Any, ...], label: str, secret: bool) -> Any:
    """Return the value by the first kind of a union that takes the node; a plain `null` is None."""
    if type(None) in kinds and reader.blank(node):
        return None
    others = [each for each in kinds if each is not type(None)]
    fitting = [each for each in others if _fits(node, unwrap(each)[0])]
    before = len(reader.mistakes)
    for each in fitting:
        value = convert(reader, node, each, label, secret=secret)
        if value is not FAILED or each is fitting[-1]:
            return value
        del reader.mistakes[before:]  # another kind may take it
    names = " or ".join(_kind_name(unwrap(each)[0]) for each in others)
    reader.mistake(node, f"{label} must be {names}, not {_shape(node)}")
    return FAILED


def _fits(node: Node, kind: Any) -> bool:
    """Whether a node has the shape of a kind."""
    origin = get_origin(kind)
    if kind is RawNode or origin in (Union, types.UnionType):
        return True
    if isinstance(node, MappingNode):
        return origin in (dict, Mapping) or dataclasses.is_dataclass(kind)
    if isinstance(node, SequenceNode):
        return origin in (list, tuple)
    return origin not in (dict, Mapping, list, tuple)


def _items(reader: Reader, node: Node, origin: Any, kind: Any, label: str, secret: bool) -> Any:
    if not isinstance(node, SequenceNode):
        reader.mistake(node, f"{label} must be a list, not {_shape(node)}")
        return FAILED
    values = [convert(reader, each, kind, f"{label}[{index}]", secret=secret) for index, each in enumerate(node.value)]
    return FAILED if FAILED in values else origin(values)


def _mapping(reader: Reader, node: Node, kind: Any, label: str, secret: bool) -> Any:
    if not isinstance(node, MappingNode):
        reader.mistake(node, f"{label} must be a mapping, not {_shape(node)}")
        return FAILED
    values = {
        key: convert(reader, value, kind, f"{label}.{key}", secret=secret) for key, _, value in reader.pairs(node)
    }
    return FAILED if FAILED in values.values() else values


def fill(reader: Reader, node: Node, cls: type, label: str, *, lenient: bool = False) -> Any:
    """Return a dataclass filled from a mapping, or from a single value, its first field; see `fill_from`."""
    known = settings_of(cls)
    if isinstance(node, MappingNode):
        given: dict[str, tuple[Node, Node]] = {key: (key_node, value) for key, key_node, value in reader.pairs(node)}
    elif known and not reader.blank(node):
        given = {next(iter(known)): (node, node)}
    elif known:
        given = {}
    else:
        reader.mistake(node, f"{label} takes no settings")
        return FAILED
    return fill_from(reader, node, cls, given, label, lenient=lenient)


def fill_from(
    reader: Reader,
    node: Node,
    cls: type,
    given: Mapping[str, tuple[Node, Node]],
    label: str,
    *,
    lenient: bool = False,
) -> Any:
    """Return a dataclass filled from nodes by name: name -> (the key's node, the value's node).

    FAILED if there are mistakes. With `lenient`, wrong settings get their defaults instead, so that checks that
    depend on the others still run.
    """
    known = settings_of(cls)
    before = len(reader.mistakes)
    values: dict[str, Any] = {}
    for name, (key, value) in given.items():
        if name not in known:
            reader.mistake(key, f"{label or 'this file'} has no setting {name!r}{did_you_mean(name, known)}")
            continue
        values[name] = convert(reader, value, known[name][0], _setting_label(label, name))
    for name, (_, each) in known.items():
        required = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        if required and name not in given:
            reader.mistake(node, f"{label} needs the setting {name!r}")
    if len(reader.mistakes) > before:
        if not lenient:
            return FAILED
        values = {name: value for name, value in values.items() if value is not FAILED}
    try:
        return cls(**values)
    except Exception as exc:  # a stage's own code may refuse its settings
        reader.mistake(
            node, f"{label}: {exc}" if isinstance(exc, ValueError) else f"{label}: {type(exc).__name__}: {exc}"
        )
        return FAILED


def _setting_label(label: str, name: str) -> str:
    """Name a setting in messages: `timeouts.idle`, `stage 'burst': per`."""
    if not label:
        return name
    return f"{label}: {name}" if label.endswith("'") else f"{label}.{name}"


def _out_of_bounds(value: Any, meta: Meta) -> str | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        outside = (
            (meta.gt, "above", operator.le),
            (meta.ge, "at least", operator.lt),
            (meta.lt, "below", operator.ge),
            (meta.le, "at most", operator.gt),
        )
        for bound, words, wrong in outside:
            if bound is not None and wrong(value, bound):
                return f"{words} {bound}" if isinstance(bound, int) else f"{words} {bound:g}"
    if isinstance(value, (str, list, tuple, dict)):
        unit = "character" if isinstance(value, str) else "item"
        if meta.min_length is not None and len(value) < meta.min_length:
            return f"at least {meta.min_length} {unit}{'s' if meta.min_length != 1 else ''} long"
        if meta.max_length is not None and len(value) > meta.max_length:
            return f"at most {meta.max_length} {unit}{'s' if meta.max_length != 1 else ''} long"
    if isinstance(value, str) and meta.pattern is not None and not re.search(meta.pattern, value):
        return f"text like {(meta.examples or [meta.pattern])[0]}"
    return None


def _but_is(node: Node, secret: bool = False) -> str:
    """Show the value in the file; a variable is not replaced, so that no secret is printed."""
    if secret:
        return ", not ***"
    if isinstance(node, ScalarNode) and node.value:
        return f", not {node.value[:80]!r}"
    return ""


def _kind_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    if kind in names:
        return names[kind]
    return "a list" if get_origin(kind) in (list, tuple) else "a mapping"


def _shape(node: Node) -> str:
    if isinstance(node, MappingNode):
        return "a mapping"
    return "a list" if isinstance(node, SequenceNode) else "a single value"
