"""The order of a pipeline: each stage needs what stages above it provide, and Azure needs what all provide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.azure.resources import Resource
from gateway.config.nodes import Node, Reader
from gateway.config.pipeline import Entry, names_of
from gateway.config.resources import UNKNOWN
from gateway.stage import Stage

__all__ = ("check_order", "check_pipeline")


def check_pipeline(
    reader: Reader,
    stages: Sequence[tuple[Entry, Stage]],
    node: Node,
    resources: Mapping[str, Resource],
    team: str,
    *,
    auth: str,
) -> None:
    """Note what a team's complete pipeline lacks: an order that works, a stage `balance`, authentication."""
    if not resources:
        reader.mistake(node, "there are no `resources:`; name at least one Azure endpoint")
        return
    with_credential = [each for each in resources.values() if each.has_credential]
    unknown = UNKNOWN in resources.values()
    configured = ["credential"] if len(with_credential) == len(resources) or unknown else []
    if unknown or all(each.api_version is not None for each in resources.values()):
        configured.append("api_version")
    provided = check_order(reader, stages, ("credential", "deployment", "api_version"), node, configured=configured)
    if "pool" in provided and "choice" not in provided:
        reader.mistake(
            node, "models are mapped to pools, but no stage selects a deployment from a pool; list `balance`"
        )
    if with_credential and "caller" not in provided and auth != "none":
        reader.mistake(
            node,
            f"team {team!r} would let anyone spend the stored key of {with_credential[0].name!r}; list a stage that "
            "authenticates clients, or write `auth: none` if this is intended",
        )


def check_order(
    reader: Reader,
    stages: Sequence[tuple[Entry, Stage]],
    azure_needs: Sequence[str],
    end: Node,
    configured: Sequence[str] = (),
) -> set[str]:
    """Note each stage that needs what no stage above it provides, or that is below one that it must be above.

    A lack of what Azure needs is noted at `end`. `configured` is what resources provide. Returns what the whole
    pipeline provides.
    """
    declared = [
        (entry, names_of(reader, entry, stage, "needs"), names_of(reader, entry, stage, "provides"))
        for entry, stage in stages
    ]
    providers = {name: entry.id for entry, _, provides in declared for name in provides}
    provided = set(configured)
    seen: dict[str, str] = {}
    for index, ((entry, needs, provides), (_, stage)) in enumerate(zip(declared, stages, strict=True)):
        # Check only the first stage of each class: a further one is deliberate. If a stage further down also
        # provides the name, the provider above is deliberate, too.
        first = all(type(other) is not type(stage) for _, other in stages[:index])
        below = {name for _, _, names in declared[index + 1 :] for name in names}
        for name in names_of(reader, entry, stage, "must_precede") if first else ():
            if name in seen and name not in below:
                reader.mistake(entry.node, f"stage {entry.id!r} must be above {seen[name]!r}, which provides {name!r}")
        seen.update(dict.fromkeys(provides, entry.id))
        for name in needs:
            if name not in provided:
                reader.mistake(entry.node, f"stage {entry.id!r} needs {name!r}, {_advice(name, providers)}")
        provided.update(provides)
    for name in azure_needs:
        if name not in provided:
            reader.mistake(end, f"a request to Azure needs {name!r}, {_advice(name, providers)}")
    return provided


def _advice(name: str, providers: dict[str, str]) -> str:
    if name in providers:
        return f"which {providers[name]!r} provides further down; move that stage up"
    usual = {
        "caller": "the stage auth_keys or auth_passthrough",
        "credential": "the stage auth_passthrough, or an `api_key` or a `credential` for each resource",
        "deployment": "the stage model_map",
        "api_version": "the stage api_version",
    }
    return f"which no stage of this pipeline provides; add {usual.get(name, 'a stage that does')}"
