"""A team's pipeline: reading the list, applying the team's `change:`, and building the stages.

Teams are merged here, once, as nodes: a mistake in a changed setting is reported at its own place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gateway.azure.resources import Target
from gateway.config.convert import FAILED, did_you_mean, fill_from
from gateway.config.nodes import MappingNode, Node, Reader, ScalarNode, SequenceNode
from gateway.fields import settings_of
from gateway.registry import Registry, UnknownStage
from gateway.services import Services
from gateway.stage import Stage

__all__ = (
    "Entry",
    "apply_changes",
    "build_stages",
    "check_stage",
    "names_of",
    "read_pipeline",
    "targets_of",
    "with_cors",
)

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]*")
INHERIT = "inherit"
OFF = "off"


@dataclass(frozen=True)
class Entry:
    """One stage of a pipeline before it is built: the node of its name, and the nodes of its settings."""

    id: str
    name: str
    node: Node
    cls: type[Stage]
    settings: dict[str, tuple[Node, Node]]
    valid: bool = True
    """Whether the stage has every setting that is given."""


def read_pipeline(reader: Reader, node: Node, registry: Registry, inherited: Sequence[Entry] | None) -> list[Entry]:
    """Read a `pipeline:` list; `inherit` in it is the pipeline of `gateway.yaml`."""
    if not isinstance(node, SequenceNode):
        reader.mistake(node, "pipeline must be a list of stages")
        return []
    entries: list[Entry] = []
    inherits = False
    for item in node.value:
        if isinstance(item, ScalarNode) and item.value == INHERIT:
            if inherited is None:
                reader.mistake(item, "there is nothing to inherit here; use `inherit` in a team's file")
            elif inherits:
                reader.mistake(item, "`inherit` appears twice")
            else:
                entries.extend(inherited)
            inherits = True
            continue
        entry = _read_entry(reader, item, registry)
        if entry is not None:
            entries.append(entry)
    seen: dict[str, Entry] = {}
    for entry in entries:
        if entry.id in seen:
            of_parent = inherited is not None and seen[entry.id] in inherited
            reader.mistake(
                entry.node,
                f"the pipeline already has a stage {entry.id!r}; "
                + (f"to change it, write change: {{{entry.id}: ...}}; " if of_parent else "")
                + f"to add a second one, give it another id: {entry.name} as another_id",
            )
        seen.setdefault(entry.id, entry)
    return list(seen.values())


def with_cors(pipeline: Node) -> Node:
    """Return a `pipeline:` with a stage `cors` that allows every page, unless it has one.

    It goes after `access_log`, which then logs preflights too, and above every stage that could ask them for a key.
    """
    if not isinstance(pipeline, SequenceNode):
        return pipeline  # a mistake that `read_pipeline` reports
    names = [_name_in(item) for item in pipeline.value]
    if "cors" in names:
        return pipeline
    at, index = pipeline.start_mark, 1 if names[:1] == ["access_log"] else 0
    every = SequenceNode("tag:yaml.org,2002:seq", [ScalarNode("tag:yaml.org,2002:str", "*", at)], at)
    origins = MappingNode("tag:yaml.org,2002:map", [(ScalarNode("tag:yaml.org,2002:str", "origins", at), every)], at)
    cors = MappingNode("tag:yaml.org,2002:map", [(ScalarNode("tag:yaml.org,2002:str", "cors", at), origins)], at)
    return SequenceNode(pipeline.tag, [*pipeline.value[:index], cors, *pipeline.value[index:]], at)


def _name_in(item: Node) -> str:
    """Return the name of the stage of a list entry; "" if it has none."""
    key = item.value[0][0] if isinstance(item, MappingNode) and item.value else item
    return _split_id(key.value)[0] if isinstance(key, ScalarNode) else ""


def _read_entry(reader: Reader, item: Node, registry: Registry) -> Entry | None:
    key: Node = item
    value: Node | None = None
    if isinstance(item, MappingNode):
        pairs = list(reader.pairs(item))
        if len(pairs) != 1:
            reader.mistake(item, "each entry of the pipeline must be one stage: `- name: {settings}`")
            return None
        _, key, value = pairs[0]
    if not isinstance(key, ScalarNode):
        reader.mistake(item, "each entry of the pipeline must be a stage's name, or `name: {settings}`")
        return None
    name, given_id = _split_id(key.value)
    if isinstance(value, ScalarNode) and value.value == OFF:
        reader.mistake(value, "`off` is for a team's `change:`; here, remove the line")
        return None
    try:
        cls = registry.find(name)
    except UnknownStage as exc:
        reader.mistake(key, str(exc))
        return None
    stage_id = given_id or (name.rpartition(":")[2] if ":" in name else name)
    if not _ID.fullmatch(stage_id) or stage_id in (INHERIT, OFF):
        reader.mistake(key, f"{stage_id!r} is not a valid stage id: use letters, digits, . _ : and -")
        return None
    before = len(reader.mistakes)
    settings = {} if value is None else _settings(reader, value, cls, stage_id)
    return Entry(stage_id, name, key, cls, settings, valid=len(reader.mistakes) == before)


def _split_id(text: str) -> tuple[str, str | None]:
    name, found, given_id = text.partition(" as ")
    return name.strip(), given_id.strip() if found else None


def _settings(reader: Reader, node: Node, cls: type[Stage], stage_id: str) -> dict[str, tuple[Node, Node]]:
    """Return the nodes of a stage's settings by name; a value without a name is the first setting."""
    known = settings_of(cls)
    if isinstance(node, MappingNode):
        given: dict[str, tuple[Node, Node]] = {}
        for name, key, value in reader.pairs(node):
            if name in known:
                given[name] = (key, value)
            elif known:
                reader.mistake(key, f"stage {stage_id!r} has no setting {name!r}{did_you_mean(name, known)}")
            else:
                reader.mistake(key, f"stage {stage_id!r} takes no settings, so remove {name!r}")
        return given
    if reader.blank(node):
        return {}
    if not known:
        reader.mistake(node, f"stage {stage_id!r} takes no settings")
        return {}
    return {next(iter(known)): (node, node)}


def apply_changes(reader: Reader, node: Node, entries: Sequence[Entry], *, complete: bool) -> list[Entry]:
    """Apply a team's `change:` mapping: replace single settings, or remove a stage with `off`.

    A stage is reported as missing only from a `complete` pipeline.
    """
    if not isinstance(node, MappingNode):
        reader.mistake(node, "change must be a mapping: stage: {settings}, or stage: off")
        return list(entries)
    result = {entry.id: entry for entry in entries}
    for stage_id, key, value in reader.pairs(node):
        entry = result.get(stage_id)
        if entry is None:
            if complete:
                reader.mistake(
                    key, f"this pipeline has no stage {stage_id!r} to change{did_you_mean(stage_id, result)}"
                )
        elif isinstance(value, ScalarNode) and value.value == OFF:
            del result[stage_id]
        elif isinstance(value, ScalarNode) and value.value in ("false", "no", "none", "null", "~", "", "disabled"):
            reader.mistake(value, f"to remove the stage {stage_id!r}, write `off`")
        else:
            before = len(reader.mistakes)
            settings = {**entry.settings, **_settings(reader, value, entry.cls, stage_id)}
            valid = entry.valid and len(reader.mistakes) == before
            result[stage_id] = replace(entry, settings=settings, valid=valid)
    return list(result.values())


def build_stages(reader: Reader, entries: Sequence[Entry]) -> list[tuple[Entry, Stage]]:
    """Build the stages; those with wrong settings are left out, and their mistakes noted."""
    built: list[tuple[Entry, Stage]] = []
    for entry in entries:
        stage = fill_from(reader, entry.node, entry.cls, entry.settings, f"stage {entry.id!r}")
        if stage is not FAILED:
            # A stage may be a frozen dataclass; the core sets the id all the same.
            object.__setattr__(stage, "id", entry.id)
            built.append((entry, stage))
    return built


def check_stage(reader: Reader, entry: Entry, stage: Stage, services: Services) -> None:
    """Let a stage check its settings; each finding is noted at the setting that it names."""
    if not entry.valid:
        return  # a finding might only be a consequence of a known mistake
    try:
        for path, message in stage.check(services):
            reader.mistake(_node_at(entry, path), f"stage {entry.id!r}: {message}")
    except (Exception, SystemExit) as exc:
        reader.mistake(entry.node, f"stage {entry.id!r} raised an exception in `check`: {type(exc).__name__}: {exc}")


def names_of(reader: Reader, entry: Entry, stage: Stage, which: str) -> tuple[str, ...]:
    """Return the names that a stage declares: `which` is `needs`, `provides` or `above`."""
    try:
        names = getattr(stage, which)
        return (names,) if isinstance(names, str) else tuple(names)
    except Exception as exc:
        reader.mistake(entry.node, f"stage {entry.id!r} has an invalid `{which}`: {type(exc).__name__}: {exc}")
        return ()


def targets_of(reader: Reader, entry: Entry, stage: Stage) -> tuple[Target, ...]:
    """Return the targets that a stage declares: where it may send requests."""
    try:
        targets: tuple[Any, ...] = tuple(stage.targets)
        for each in targets:
            if not isinstance(each, Target):
                raise TypeError(f"{type(each).__name__} is not a Target")
        return targets
    except Exception as exc:
        reader.mistake(entry.node, f"stage {entry.id!r} has invalid `targets`: {type(exc).__name__}: {exc}")
        return ()


def _node_at(entry: Entry, path: Sequence[str | int]) -> Node:
    if not path or str(path[0]) not in entry.settings:
        return entry.node
    node = entry.settings[str(path[0])][1]
    for step in path[1:]:
        if isinstance(node, MappingNode):
            node = next((value for key, value in node.value if key.value == step), node)
        elif isinstance(node, SequenceNode) and isinstance(step, int) and 0 <= step < len(node.value):
            node = node.value[step]
    return node
