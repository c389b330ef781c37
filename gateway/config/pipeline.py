"""A team's pipeline: the list in YAML, what the team inherits and changes, and the stages made of it.

Teams are merged here, once, as nodes: a mistake in a changed setting is reported where it was written.
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

__all__ = ("Entry", "build", "changed", "check_order", "read_pipeline", "targets_of", "with_cors")

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]*")
INHERIT = "inherit"
OFF = "off"


@dataclass(frozen=True)
class Entry:
    """One stage of a pipeline, not yet made: where its name stands, and the nodes of its settings."""

    id: str
    name: str
    node: Node
    cls: type[Stage]
    settings: dict[str, tuple[Node, Node]]
    sound: bool = True
    """Whether every setting is one that the stage has."""


def read_pipeline(reader: Reader, node: Node, registry: Registry, inherited: Sequence[Entry] | None) -> list[Entry]:
    """Read a `pipeline:` list; `inherit` in it stands for the pipeline of the file that lists the team."""
    if not isinstance(node, SequenceNode):
        reader.mistake(node, "pipeline must be a list of stages")
        return []
    entries: list[Entry] = []
    taken = False
    for item in node.value:
        if isinstance(item, ScalarNode) and item.value == INHERIT:
            if inherited is None:
                reader.mistake(item, "there is nothing to inherit here; `inherit` is for a team's file")
            elif taken:
                reader.mistake(item, "`inherit` stands here twice")
            else:
                entries.extend(inherited)
            taken = True
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
                f"the pipeline has a stage {entry.id!r} already; "
                + (f"to change that one, write change: {{{entry.id}: ...}}; " if of_parent else "")
                + f"to have a second one, give it an id of its own: {entry.name} as another_id",
            )
        seen.setdefault(entry.id, entry)
    return list(seen.values())


def with_cors(pipeline: Node) -> Node:
    """Return a `pipeline:` that lists `cors` for every page there is, where it lists none.

    Behind `access_log`, which then tells of preflights too, and above all that could ask them for a key.
    """
    if not isinstance(pipeline, SequenceNode):
        return pipeline  # a mistake, reported where it is read
    names = [_name_in(item) for item in pipeline.value]
    if "cors" in names:
        return pipeline
    at, place = pipeline.start_mark, 1 if names[:1] == ["access_log"] else 0
    every = SequenceNode("tag:yaml.org,2002:seq", [ScalarNode("tag:yaml.org,2002:str", "*", at)], at)
    origins = MappingNode("tag:yaml.org,2002:map", [(ScalarNode("tag:yaml.org,2002:str", "origins", at), every)], at)
    cors = MappingNode("tag:yaml.org,2002:map", [(ScalarNode("tag:yaml.org,2002:str", "cors", at), origins)], at)
    return SequenceNode(pipeline.tag, [*pipeline.value[:place], cors, *pipeline.value[place:]], at)


def _name_in(item: Node) -> str:
    """Return the name of the stage that an entry of the list is of; "" where that cannot be told."""
    key = item.value[0][0] if isinstance(item, MappingNode) and item.value else item
    return _split_id(key.value)[0] if isinstance(key, ScalarNode) else ""


def _read_entry(reader: Reader, item: Node, registry: Registry) -> Entry | None:
    key: Node = item
    value: Node | None = None
    if isinstance(item, MappingNode):
        pairs = list(reader.pairs(item))
        if len(pairs) != 1:
            reader.mistake(item, "one entry of the pipeline is one stage: `- name: {settings}`")
            return None
        _, key, value = pairs[0]
    if not isinstance(key, ScalarNode):
        reader.mistake(item, "an entry of the pipeline is a stage's name, or `name: {settings}`")
        return None
    name, given_id = _split_id(key.value)
    if isinstance(value, ScalarNode) and value.value == OFF:
        reader.mistake(value, "`off` belongs in a team's `change:`; here, leave the line out")
        return None
    try:
        cls = registry.find(name)
    except UnknownStage as exc:
        reader.mistake(key, str(exc))
        return None
    stage_id = given_id or (name.rpartition(":")[2] if ":" in name else name)
    if not _ID.fullmatch(stage_id) or stage_id in (INHERIT, OFF):
        reader.mistake(key, f"{stage_id!r} cannot be the id of a stage: letters, digits, _ . : -")
        return None
    before = len(reader.mistakes)
    settings = {} if value is None else _settings(reader, value, cls, stage_id)
    return Entry(stage_id, name, key, cls, settings, sound=len(reader.mistakes) == before)


def _split_id(text: str) -> tuple[str, str | None]:
    name, found, given_id = text.partition(" as ")
    return name.strip(), given_id.strip() if found else None


def _settings(reader: Reader, node: Node, cls: type[Stage], stage_id: str) -> dict[str, tuple[Node, Node]]:
    """Return the nodes of a stage's settings by name; a value of its own is the first setting."""
    known = settings_of(cls)
    if isinstance(node, MappingNode):
        given: dict[str, tuple[Node, Node]] = {}
        for name, key, value in reader.pairs(node):
            if name in known:
                given[name] = (key, value)
            elif known:
                reader.mistake(key, f"stage {stage_id!r} has no setting {name!r}{did_you_mean(name, known)}")
            else:
                reader.mistake(key, f"stage {stage_id!r} has no settings, so no {name!r}")
        return given
    if reader.blank(node):
        return {}
    if not known:
        reader.mistake(node, f"stage {stage_id!r} has no settings")
        return {}
    return {next(iter(known)): (node, node)}


def changed(reader: Reader, node: Node, entries: Sequence[Entry], *, whole: bool) -> list[Entry]:
    """Apply a team's `change:` mapping: settings replaced one by one, or a stage removed with `off`.

    Only of a `whole` pipeline can it be said that it lacks a stage.
    """
    if not isinstance(node, MappingNode):
        reader.mistake(node, "change must be a mapping: stage: {settings}, or stage: off")
        return list(entries)
    result = {entry.id: entry for entry in entries}
    for stage_id, key, value in reader.pairs(node):
        entry = result.get(stage_id)
        if entry is None:
            if whole:
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
            sound = entry.sound and len(reader.mistakes) == before
            result[stage_id] = replace(entry, settings=settings, sound=sound)
    return list(result.values())


def build(reader: Reader, entries: Sequence[Entry]) -> list[tuple[Entry, Stage]]:
    """Make the stages; those whose settings are wrong are left out, the mistakes noted."""
    made: list[tuple[Entry, Stage]] = []
    for entry in entries:
        stage = fill_from(reader, entry.node, entry.cls, entry.settings, f"stage {entry.id!r}")
        if stage is not FAILED:
            # Past a frozen dataclass's own guard: the id is the core's.
            object.__setattr__(stage, "id", entry.id)
            made.append((entry, stage))
    return made


def check_stage(reader: Reader, entry: Entry, stage: Stage, services: Services) -> None:
    """Let a stage check its own settings; its findings are placed at the settings that they name."""
    if not entry.sound:
        return  # what it would find may follow from what was found already
    try:
        for path, message in stage.check(services):
            reader.mistake(_place(entry, path), f"stage {entry.id!r}: {message}")
    except (Exception, SystemExit) as exc:
        reader.mistake(entry.node, f"stage {entry.id!r} failed to check itself: {type(exc).__name__}: {exc}")


def names_of(reader: Reader, entry: Entry, stage: Stage, which: str) -> tuple[str, ...]:
    """Return what a stage needs, provides or stands above, as it says itself."""
    try:
        names = getattr(stage, which)
        return (names,) if isinstance(names, str) else tuple(names)
    except Exception as exc:
        what = "must stand above" if which == "must_precede" else which
        reader.mistake(entry.node, f"stage {entry.id!r} cannot tell what it {what}: {type(exc).__name__}: {exc}")
        return ()


def targets_of(reader: Reader, entry: Entry, stage: Stage) -> tuple[Target, ...]:
    """Return where a stage may send requests, as it says itself."""
    try:
        targets: tuple[Any, ...] = tuple(stage.targets)
        for each in targets:
            if not isinstance(each, Target):
                raise TypeError(f"it names a {type(each).__name__}, not a Target")
        return targets
    except Exception as exc:
        reader.mistake(
            entry.node, f"stage {entry.id!r} cannot tell where it sends requests: {type(exc).__name__}: {exc}"
        )
        return ()


def _place(entry: Entry, path: Sequence[str | int]) -> Node:
    if not path or str(path[0]) not in entry.settings:
        return entry.node
    node = entry.settings[str(path[0])][1]
    for step in path[1:]:
        if isinstance(node, MappingNode):
            node = next((value for key, value in node.value if key.value == step), node)
        elif isinstance(node, SequenceNode) and isinstance(step, int) and 0 <= step < len(node.value):
            node = node.value[step]
    return node


def check_order(
    reader: Reader,
    made: Sequence[tuple[Entry, Stage]],
    end_needs: Sequence[str],
    end: Node,
    have: Sequence[str] = (),
) -> set[str]:
    """Note each stage that needs what no stage above it provides, or stands below one that it must stand above.

    `end` stands for what Azure needs. Returns what the whole pipeline provides.
    """
    says = [
        (entry, names_of(reader, entry, stage, "needs"), names_of(reader, entry, stage, "provides"))
        for entry, stage in made
    ]
    providers = {name: entry.id for entry, _, provides in says for name in provides}
    provided = set(have)
    seen: dict[str, str] = {}
    for place, ((entry, needs, provides), (_, stage)) in enumerate(zip(says, made, strict=True)):
        # A second one of its kind is somebody's own idea, and so is a second one of those that it stands above.
        first = all(type(other) is not type(stage) for _, other in made[:place])
        below = {name for _, _, names in says[place + 1 :] for name in names}
        for name in names_of(reader, entry, stage, "must_precede") if first else ():
            if name in seen and name not in below:
                reader.mistake(
                    entry.node, f"stage {entry.id!r} must stand above {seen[name]!r}, which provides {name!r}"
                )
        seen.update(dict.fromkeys(provides, entry.id))
        for name in needs:
            if name not in provided:
                reader.mistake(entry.node, f"stage {entry.id!r} needs {name!r}, {_advice(name, providers)}")
        provided.update(provides)
    for name in end_needs:
        if name not in provided:
            reader.mistake(end, f"a request to Azure needs {name!r}, {_advice(name, providers)}")
    return provided


def _advice(name: str, providers: dict[str, str]) -> str:
    if name in providers:
        return f"which {providers[name]!r} provides further down; move it above"
    usual = {
        "caller": "the stage auth_keys, or auth_passthrough",
        "credential": "the stage auth_passthrough, or an `api_key` or a `credential` of each resource",
        "deployment": "the stage model_map",
        "api_version": "the stage api_version",
    }
    return f"which no stage of this pipeline provides; {usual.get(name, 'one that does')} would"
