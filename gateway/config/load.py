"""Loading a configuration: the two kinds of file become resources and teams, or a list of mistakes."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gateway.auth.credentials import ListedKey
from gateway.auth.oidc import Issuer, Issuers
from gateway.azure.resources import Pool, Resource, Target
from gateway.balancing.shared_health import SharedHealth
from gateway.config.convert import did_you_mean, fill
from gateway.config.files import GatewayFile, KeyFile, ListenFile, LogFile, MatchFile, TeamFile
from gateway.config.go_proxy import Imported, convert, is_go_proxy
from gateway.config.identity import has_issuers, read_claims, read_issuers
from gateway.config.nodes import NAME, MappingNode, Node, Reader, SequenceNode, value_of
from gateway.config.pipeline import (
    Entry,
    build,
    changed,
    check_order,
    check_stage,
    read_pipeline,
    targets_of,
    with_cors,
)
from gateway.config.pools import read_pools
from gateway.config.resources import UNKNOWN, read_resources
from gateway.config.sources import Sources
from gateway.config.store import counters_at, read_store
from gateway.errors import ConfigError, Mistake
from gateway.limits.redis_url import RedisUrl
from gateway.limits.wait_queue import WaitQueue
from gateway.registry import Registry
from gateway.services import Services, Shared
from gateway.settings import Listen, Network, Settings, Timeouts
from gateway.teams import Background, Match, Team, Teams
from gateway.usage.prices import Price, Prices

__all__ = (
    "Loaded",
    "end_of",
    "import_go_proxy",
    "load",
    "plugin_folders",
)

_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


@dataclass(frozen=True)
class Loaded:
    """A configuration that is ready to be served."""

    path: Path
    settings: Settings
    teams: Teams
    resources: Mapping[str, Resource]
    pools: Mapping[str, Pool]
    log: LogFile
    prices: Mapping[str, Price] = field(default_factory=dict)
    watch: bool = True
    """Whether a change of the files is a reload."""
    sources: Sources = field(default_factory=Sources)
    """What it was made of."""
    store: RedisUrl | None = None
    """The Redis in which limits are counted; None is this gateway alone."""
    differences: tuple[Mistake, ...] | None = None
    """None but for a file of the Go proxy's: what it does not mean here, or means otherwise."""


def load(
    path: Path,
    env: Mapping[str, str] | None = None,
    shared: Shared | None = None,
    *,
    cors: bool = False,
    sources: Sources | None = None,
) -> Loaded:
    """Load `gateway.yaml` and the teams' files. Raises ConfigError with every mistake there is.

    A file of the Go proxy's is read as what `import_go_proxy` makes of it. With `cors`, a pipeline of `gateway.yaml`
    that lists no stage `cors` gets one. What is read is noted in `sources`, also where this raises.
    """
    reader = Reader(env=os.environ if env is None else env, sources=Sources() if sources is None else sources)
    root = reader.read(path)
    differences = None
    if root is not None and is_go_proxy(root):
        imported = convert(reader, root)
        root, differences = imported.root, tuple(imported.notes)
    if root is None:
        raise ConfigError(reader.mistakes)
    return replace(_Loader(reader, path, shared or Shared()).load(root, cors=cors), differences=differences)


def import_go_proxy(path: Path) -> Imported:
    """Convert a configuration file of the Go proxy's. Raises ConfigError where the result could not be loaded."""
    reader = Reader()
    root = reader.read(path)
    if root is not None and not is_go_proxy(root):
        reader.mistake(root, "this is no configuration of azure-openai-proxy: it has no `deployment_config`")
    if root is None or reader.mistakes:
        raise ConfigError(reader.mistakes)
    imported = convert(reader, root, importing=True)
    reader.env = imported.keys
    _Loader(reader, path, Shared()).load(imported.root)
    return imported


def plugin_folders(path: Path) -> list[Path]:
    """Return the folders of `plugins_path` in a `gateway.yaml`, whatever else may be wrong with it."""
    reader = Reader()
    root = reader.read(path)
    if root is None:
        return []
    listed = _listed(fill(reader, root, GatewayFile, "", lenient=True).plugins_path)
    return [folder for name in listed if (folder := _folder(path.parent, name)) is not None]


class _Loader:
    """One configuration while it is being read."""

    def __init__(self, reader: Reader, path: Path, shared: Shared) -> None:
        self.reader = reader
        self.path = path
        self.shared = shared
        self.folder = path.parent
        self.resources: dict[str, Resource] = {}
        self.pools: dict[str, Pool] = {}
        self.teams = 1
        self.deadline = Timeouts().first_byte
        self.prices = Prices()
        self.counters: WaitQueue | None = None
        self.whole = True
        self.with_identity = False

    def load(self, root: MappingNode, *, cors: bool = False) -> Loaded:
        reader = self.reader
        main = fill(reader, root, GatewayFile, "", lenient=True)
        self.deadline = main.timeouts.first_byte
        listen = self._listen(main.listen, "listen", root)
        admin = None if main.admin is None else self._listen(main.admin, "admin", root)
        self.prices = Prices(main.prices or ({} if value_of(root, "prices") is root else {"*": Price(0)}))
        folders = [self._plugins(folder, root) for folder in _listed(main.plugins_path)]
        for folder in folders:
            self._find(folder / "*.py", "plugins_path", root)  # a stage that was missing may come; its code is not read
        registry = Registry(folders)
        self.resources = read_resources(reader, main.resources, self.shared)
        self.pools = read_pools(reader, main.pools, self.resources)
        proxies = self._proxies(main.trusted_proxies, root)
        store = read_store(reader, main.store, value_of(root, "store"), self.folder)
        self.counters = counters_at(self.shared, store)
        issuers = read_issuers(reader, main.identity, root)
        self.with_identity = has_issuers(reader, main.identity, root)
        before = len(reader.mistakes)
        if main.pipeline is None:
            reader.mistake(root, "there is no `pipeline:`; list the stages that requests go through")
            entries: list[Entry] = []
        else:
            pipeline = main.pipeline
            entries = read_pipeline(reader, with_cors(pipeline) if cors else pipeline, registry, None)
        # The order says something only of a pipeline whose stages are all known.
        self.whole = len(reader.mistakes) == before
        files = self._team_files(main.teams, root)
        self.teams = 1 + len(files)
        match = self._match(main.match, root)
        if match.path_prefix or match.host:
            reader.mistake(
                value_of(root, "match"),
                "the default team has every request that is no other team's; its `match` has only `keys` and `claims`",
            )
        default = self._team("default", main, entries, root, main, match, self.whole)
        teams = [team for file in files if (team := self._team_file(file, main, entries, registry)) is not None]
        self._check_matches([(default, root), *teams])
        if reader.mistakes:
            raise ConfigError(reader.mistakes)
        return Loaded(
            path=self.path,
            settings=Settings(listen, main.timeouts, main.limits, main.health, admin, proxies),
            teams=Teams(
                default,
                [team for team, _ in teams],
                self.shared,
                self._issuers(issuers),
                self._background(store),
                self.pools.values(),
                self.resources.values(),
            ),
            resources=self.resources,
            pools=self.pools,
            log=main.log,
            store=store,
            prices=main.prices,
            watch=main.watch,
            sources=reader.sources,
        )

    # -- the parts of gateway.yaml ---------------------------------------------------------------------

    def _listen(self, given: ListenFile, name: str, root: MappingNode) -> Listen:
        node = value_of(root, name)
        where = node if isinstance(node, MappingNode) else root
        try:
            listen = Listen.parse(given.address)
        except ValueError as exc:
            self.reader.mistake(node if where is root else value_of(where, "address"), f"{name}: {exc}")
            return Listen()
        if given.mode is None:
            return listen
        if listen.unix is None:
            self.reader.mistake(value_of(where, "mode"), f"{name}: only a unix socket has a mode")
        return replace(listen, mode=int(given.mode, 8))

    def _find(self, pattern: Path, name: str, root: MappingNode) -> list[Path]:
        try:
            return self.reader.sources.find(pattern)
        except OSError as exc:
            self.reader.mistake(value_of(root, name), f"{name}: cannot look for {pattern}: {exc.strerror}")
            return []

    def _plugins(self, folder: str, root: MappingNode) -> Path:
        path = _folder(self.folder, folder)
        if path is None:
            self.reader.mistake(value_of(root, "plugins_path"), f"plugins_path: there is no folder {folder}")
        return path or self.folder

    def _proxies(self, given: str | list[str], root: MappingNode) -> tuple[Network, ...]:
        networks: list[Network] = []
        for text in _listed(given):
            try:
                networks.append(ipaddress.ip_network(text, strict=False))
            except ValueError:
                self.reader.mistake(
                    value_of(root, "trusted_proxies"), f"trusted_proxies: {text!r} is no address and no network"
                )
        return tuple(networks)

    def _issuers(self, issuers: Sequence[Issuer]) -> Issuers | None:
        if not issuers:
            return None
        return Issuers(issuers, self.shared.session, kept=self.shared.state_of("", "identity"))

    def _background(self, store: RedisUrl | None) -> list[Background]:
        """Return what is done beside requests: fetching tokens, and sharing what is known of deployments."""
        tokens = {id(each.tokens): each.tokens for each in self.resources.values() if each.tokens is not None}
        background: list[Background] = list(tokens.values())
        if store is not None and self.pools:
            background.append(SharedHealth(store, self.shared.health))
        return background

    # -- teams -----------------------------------------------------------------------------------------

    def _team_files(self, patterns: str | list[str], root: MappingNode) -> list[Path]:
        files: list[Path] = []
        for pattern in _listed(patterns):
            path = self.folder / pattern
            found = self._find(path, "teams", root)
            files += found
            if not found and not any(sign in pattern for sign in "*?["):
                self.reader.mistake(value_of(root, "teams"), f"teams: there is no file {pattern}")
            elif not found and (problem := _nothing_found(path)):
                self.reader.mistake(value_of(root, "teams"), f"teams: {pattern} finds nothing; {problem}")
        return [file for file in dict.fromkeys(files) if file.resolve() != self.path.resolve()]

    def _team_file(
        self, file: Path, main: GatewayFile, inherited: Sequence[Entry], registry: Registry
    ) -> tuple[Team, MappingNode] | None:
        reader = self.reader
        root = reader.read(file)
        if root is None:
            return None
        name = file.stem
        if not NAME.fullmatch(name) or name == "default":
            reader.mistake(root, f"{name!r} cannot be a team's name; rename the file")
        team = fill(reader, root, TeamFile, "", lenient=True)
        entries = list(inherited)
        before = len(reader.mistakes)
        if team.pipeline is not None:
            entries = read_pipeline(reader, team.pipeline, registry, inherited)
        if team.change is not None:
            entries = changed(reader, team.change, entries, whole=self.whole and len(reader.mistakes) == before)
        whole = self.whole and len(reader.mistakes) == before
        match = self._match(team.match, root)
        if match == Match() and (team.match is not None or value_of(root, "match") is root):
            reader.mistake(root, f"team {name!r} has no `match:`, so no request would be its own")
        return self._team(name, team, entries, root, main, match, whole), root

    def _match(self, match: MatchFile | None, root: MappingNode) -> Match:
        if match is None:
            # Of what is wrong it is not said as well that it is missing.
            return Match() if value_of(root, "match") is root else Match(keys=(ListedKey("unknown"),))
        node = value_of(root, "match")
        prefixes = [text.rstrip("/") for text in _listed(match.path_prefix)]
        hosts = [text.lower() for text in _listed(match.host)]
        keys = [match.keys] if isinstance(match.keys, KeyFile) else match.keys or []
        for prefix in prefixes:
            if not _PREFIX.fullmatch(prefix) or {"v1", "openai", ".", ".."} & set(prefix.split("/")):
                self.reader.mistake(
                    value_of(node, "path_prefix"),
                    f"path_prefix {prefix!r} must be a plain path without /v1 and /openai, such as /research",
                )
        for host in hosts:
            if not _HOST.fullmatch(host):
                self.reader.mistake(value_of(node, "host"), f"{host!r} is not a host name; leave scheme and port out")
        places = _each_node(value_of(node, "keys"))
        listed = [self._key(key, place) for key, place in zip(keys, places, strict=False)]
        claims = read_claims(self.reader, match.claims, node, with_identity=self.with_identity)
        return Match(tuple(prefixes), tuple(hosts), tuple(listed), claims)

    def _key(self, key: KeyFile, node: Node) -> ListedKey:
        digest = key.digest.lower()
        if not _DIGEST.fullmatch(digest):
            self.reader.mistake(
                value_of(node, "digest"),
                "a key is written as its digest, sha256: and 64 hexadecimal digits; never as itself",
            )
        times: dict[str, float] = {}
        for name, text in (("created", key.created), ("expires", key.expires)):
            try:
                times |= {name: end_of(text)} if text is not None else {}
            except ValueError as exc:
                self.reader.mistake(value_of(node, name), f"{name} {exc}")
        models = None if key.models is None else tuple(_listed(key.models))
        return ListedKey(digest, key.label, times.get("expires"), key.disabled, models)

    def _team(
        self,
        name: str,
        team: GatewayFile | TeamFile,
        entries: Sequence[Entry],
        root: MappingNode,
        main: GatewayFile,
        match: Match,
        whole: bool,
    ) -> Team:
        reader = self.reader
        chosen = team.resource or main.resource
        resource = self._resource(chosen, value_of(root, "resource"), own=team.resource is not None)
        place = value_of(root, "pipeline")
        services = {
            entry.id: Services(
                team=name,
                stage=entry.id,
                resources=self.resources,
                resource=resource,
                pools=self.pools,
                keys={key.digest: key for key in match.keys},
                prices=self.prices,
                claims=match.claims,
                team_count=self.teams,
                first_byte_timeout=self.deadline,
                shared=self.shared,
                limit_counters=self.counters,
            )
            for entry in entries
        }
        made = build(reader, entries)
        for entry, stage in made:
            check_stage(reader, entry, stage, services[entry.id])
        targets = tuple(target for entry, stage in made for target in targets_of(reader, entry, stage))
        names = {each.name for target in targets for each in target.resources if each is not None}
        if resource is not None:
            names.add(resource.name)
        reachable = {name: each for name, each in self.resources.items() if name in names}
        services = {key: replace(each, reachable=reachable) for key, each in services.items()}
        if whole and len(made) == len(entries):
            self._check_order(made, place, resource, (team.auth or main.auth) == "none", name)
        return Team(
            name=name,
            stages=[stage for _, stage in made],
            target=Target(resource=resource),
            targets=targets,
            match=match,
            services=services,
        )

    def _resource(self, name: str | None, place: Node, *, own: bool) -> Resource | None:
        """Return a team's resource; one that is not there is reported where it was named."""
        if name is None:
            return next(iter(self.resources.values())) if len(self.resources) == 1 else None
        if name not in self.resources and own:
            self.reader.mistake(place, f"there is no resource {name!r}{did_you_mean(name, self.resources)}")
        return self.resources.get(name, UNKNOWN)

    def _check_order(self, made: Any, place: Node, resource: Resource | None, open_to_all: bool, name: str) -> None:
        if not self.resources:
            self.reader.mistake(place, "there are no `resources:`; name at least one Azure endpoint")
            return
        stored = [each for each in self.resources.values() if each.has_credential]
        unknown = UNKNOWN in self.resources.values()
        have = ["credential"] if len(stored) == len(self.resources) or unknown else []
        if unknown or all(each.api_version is not None for each in self.resources.values()):
            have.append("api_version")
        provided = check_order(
            self.reader,
            made,
            ("credential", "deployment", "api_version"),
            place,
            have=have,
        )
        if "pool" in provided and "choice" not in provided:
            self.reader.mistake(
                place, "models are mapped to pools, and no stage picks one of a pool's deployments: list `balance`"
            )
        if stored and "caller" not in provided and not open_to_all:
            self.reader.mistake(
                place,
                f"team {name!r} would let anyone spend the stored key of {stored[0].name!r}: list a stage that "
                "authenticates, or write `auth: none` if that is meant",
            )

    def _check_matches(self, teams: Sequence[tuple[Team, MappingNode]]) -> None:
        for what in ("path_prefix", "host", "keys"):
            seen: dict[str, str] = {}
            for team, root in teams:
                values = getattr(team.match, what)
                for value in [key.digest for key in values] if what == "keys" else values:
                    if value in seen:
                        shown = "a key" if what == "keys" else f"{what} {value!r}"
                        self.reader.mistake(
                            value_of(value_of(root, "match"), what),
                            f"{shown} belongs to team {seen[value]!r} already",
                        )
                    seen.setdefault(value, team.name)
        names: dict[str, str] = {}
        for team, root in teams:
            if team.name in names:
                self.reader.mistake(root, f"there is a team {team.name!r} already, in {names[team.name]}")
            names.setdefault(team.name, root.start_mark.name)


def _folder(base: Path, name: str) -> Path | None:
    """Return a folder named from `base`; None where there is none, or where the name can be none's."""
    try:
        path = (base / name).resolve()
        return path if path.is_dir() else None
    except (OSError, ValueError):
        return None


def _nothing_found(pattern: Path) -> str | None:
    """Return why a pattern of teams' files may find nothing, or None where its folder is simply empty."""
    folder = pattern.parent
    if any(sign in str(folder) for sign in "*?["):
        return None
    try:
        there = sorted(each.name for each in folder.iterdir() if each.suffix in (".yaml", ".yml"))
    except OSError:
        return f"there is no folder {folder.name}"
    return f"there is {', '.join(there)}" if there else None


def _each_node(node: Node) -> list[Node]:
    return node.value if isinstance(node, SequenceNode) else [node]


def end_of(text: str) -> float:
    """Return the end of a day (`2027-01-31`) or a moment (`2027-01-31T18:00:00Z`), in seconds since the epoch.

    Both are in UTC where they do not say else. Raises ValueError.
    """
    try:
        moment = datetime.datetime.fromisoformat(text)
        if len(text) == len("2027-01-31"):
            moment += datetime.timedelta(days=1)
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=datetime.UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(f"must be a day (2027-01-31) or a moment (2027-01-31T18:00:00Z), not {text!r}") from None


def _listed(value: str | Sequence[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)
