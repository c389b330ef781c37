"""Teams: the default team of `gateway.yaml`, and the team of each file that `teams` names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gateway.azure.resources import Resource, Target
from gateway.config.convert import did_you_mean, fill
from gateway.config.files import GatewayFile, TeamFile
from gateway.config.match import read_match
from gateway.config.nodes import NAME, MappingNode, Node, Reader, value_of
from gateway.config.pipeline import Entry, apply_changes, build_stages, check_stage, read_pipeline, targets_of
from gateway.config.pipeline_order import check_pipeline
from gateway.config.resources import UNKNOWN
from gateway.registry import Registry
from gateway.services import Services
from gateway.teams import Match, Team

__all__ = ("TeamBuilder",)


class TeamBuilder:
    """Builds the teams of one configuration.

    `main` and `root` are `gateway.yaml`, `inherited` is its pipeline, and `complete` is whether all stages of that
    are known. `common` has what the services of all stages share.
    """

    def __init__(
        self,
        reader: Reader,
        main: GatewayFile,
        root: MappingNode,
        inherited: Sequence[Entry],
        *,
        complete: bool,
        registry: Registry,
        with_identity: bool,
        common: Services,
    ) -> None:
        self._reader = reader
        self._main = main
        self._root = root
        self._inherited = inherited
        self._complete = complete
        self._registry = registry
        self._with_identity = with_identity
        self._common = common

    def default(self) -> Team:
        """Return the default team."""
        reader, root = self._reader, self._root
        match = read_match(reader, self._main.match, root, with_identity=self._with_identity)
        if match.path_prefix or match.host:
            reader.mistake(
                value_of(root, "match"),
                "the default team serves every request that no other team matches; its `match` takes only `keys` and "
                "`claims`",
            )
        return self._team("default", self._main, self._inherited, root, match, complete=self._complete)

    def from_file(self, file: Path) -> tuple[Team, MappingNode] | None:
        """Return the team of a file, and the file's root node; None if the file cannot be read."""
        reader = self._reader
        root = reader.read(file)
        if root is None:
            return None
        name = file.stem
        if not NAME.fullmatch(name) or name == "default":
            reader.mistake(root, f"{name!r} is not a valid team name; rename the file")
        team = fill(reader, root, TeamFile, "", lenient=True)
        entries = list(self._inherited)
        before = len(reader.mistakes)
        if team.pipeline is not None:
            entries = read_pipeline(reader, team.pipeline, self._registry, self._inherited)
        if team.change is not None:
            complete = self._complete and len(reader.mistakes) == before
            entries = apply_changes(reader, team.change, entries, complete=complete)
        complete = self._complete and len(reader.mistakes) == before
        match = read_match(reader, team.match, root, with_identity=self._with_identity)
        if match == Match() and (team.match is not None or value_of(root, "match") is root):
            reader.mistake(root, f"team {name!r} has no `match:`, so it would serve no request")
        return self._team(name, team, entries, root, match, complete=complete), root

    def _team(
        self,
        name: str,
        team: GatewayFile | TeamFile,
        entries: Sequence[Entry],
        root: MappingNode,
        match: Match,
        *,
        complete: bool,
    ) -> Team:
        reader, resources = self._reader, self._common.resources
        chosen = team.resource or self._main.resource
        resource = self._resource(chosen, value_of(root, "resource"), own=team.resource is not None)
        of_team = replace(
            self._common,
            team=name,
            resource=resource,
            keys={key.digest: key for key in match.keys},
            claims=match.claims,
        )
        services = {entry.id: replace(of_team, stage=entry.id) for entry in entries}
        built = build_stages(reader, entries)
        for entry, stage in built:
            check_stage(reader, entry, stage, services[entry.id])
        targets = tuple(target for entry, stage in built for target in targets_of(reader, entry, stage))
        names = {each.name for target in targets for each in target.resources if each is not None}
        if resource is not None:
            names.add(resource.name)
        reachable = {name: each for name, each in resources.items() if name in names}
        services = {key: replace(each, reachable=reachable) for key, each in services.items()}
        if complete and len(built) == len(entries):
            auth = team.auth or self._main.auth
            check_pipeline(reader, built, value_of(root, "pipeline"), resources, name, auth=auth)
        return Team(
            name=name,
            stages=[stage for _, stage in built],
            target=Target(resource=resource),
            targets=targets,
            match=match,
            services=services,
        )

    def _resource(self, name: str | None, node: Node, *, own: bool) -> Resource | None:
        """Return a team's resource; a missing one is reported in the file that names it."""
        resources = self._common.resources
        if name is None:
            return next(iter(resources.values())) if len(resources) == 1 else None
        if name not in resources and own:
            self._reader.mistake(node, f"there is no resource {name!r}{did_you_mean(name, resources)}")
        return resources.get(name, UNKNOWN)
