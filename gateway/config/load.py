"""Loading a configuration: `gateway.yaml` and the teams' files become resources and teams, or a list of mistakes.

Each concept has its reader in a file of its own; this one calls them in order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gateway.auth.oidc import Issuer, Issuers
from gateway.azure.resources import Pool, Resource
from gateway.config.addresses import read_listen, read_trusted_proxies
from gateway.config.background import background_work
from gateway.config.convert import fill
from gateway.config.files import GatewayFile, LogFile
from gateway.config.go_proxy import Imported, convert, is_go_proxy
from gateway.config.identity import has_issuers, read_issuers
from gateway.config.match import check_unique
from gateway.config.nodes import MappingNode, Reader, value_of
from gateway.config.paths import as_list, existing_folder, find_files, read_plugin_folder, read_team_files
from gateway.config.pipeline import Entry, read_pipeline, with_cors
from gateway.config.pools import read_pools
from gateway.config.resources import read_resources
from gateway.config.sources import Sources
from gateway.config.store import counters_of, read_store
from gateway.config.teams import TeamBuilder
from gateway.errors import ConfigError, Mistake
from gateway.limits.redis_url import RedisUrl
from gateway.registry import Registry
from gateway.services import Services, Shared
from gateway.settings import Settings
from gateway.teams import Teams
from gateway.usage.prices import Price, Prices

__all__ = (
    "Loaded",
    "import_go_proxy",
    "load",
    "plugin_folders",
)


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
    """Whether a change of the files triggers a reload."""
    sources: Sources = field(default_factory=Sources)
    """The files that were read."""
    store: RedisUrl | None = None
    """The Redis in which limits are counted; None counts in this gateway alone."""
    differences: tuple[Mistake, ...] | None = None
    """For a file of the Go proxy: the settings that have another meaning here, or none. Else None."""


def load(
    path: Path,
    env: Mapping[str, str] | None = None,
    shared: Shared | None = None,
    *,
    cors: bool = False,
    sources: Sources | None = None,
) -> Loaded:
    """Load `gateway.yaml` and the teams' files. Raises ConfigError with every mistake.

    A file of the Go proxy is converted first, as `import_go_proxy` does. With `cors`, the pipeline of `gateway.yaml`
    gets a stage `cors` if it has none. The files are recorded in `sources`, even if this raises.
    """
    reader = Reader(env=os.environ if env is None else env, sources=Sources() if sources is None else sources)
    root = reader.read(path)
    differences = None
    if root is not None and is_go_proxy(root):
        imported = convert(reader, root)
        root, differences = imported.root, tuple(imported.notes)
    if root is None:
        raise ConfigError(reader.mistakes)
    return replace(_load(reader, path, root, shared or Shared(), cors=cors), differences=differences)


def import_go_proxy(path: Path) -> Imported:
    """Convert a configuration file of the Go proxy. Raises ConfigError if the result could not be loaded."""
    reader = Reader()
    root = reader.read(path)
    if root is not None and not is_go_proxy(root):
        reader.mistake(root, "this is not a configuration of azure-openai-proxy: it has no `deployment_config`")
    if root is None or reader.mistakes:
        raise ConfigError(reader.mistakes)
    imported = convert(reader, root, importing=True)
    reader.env = imported.keys
    _load(reader, path, imported.root, Shared())
    return imported


def plugin_folders(path: Path) -> list[Path]:
    """Return the folders of `plugins_path` in a `gateway.yaml`, even if it has mistakes."""
    reader = Reader()
    root = reader.read(path)
    if root is None:
        return []
    names = as_list(fill(reader, root, GatewayFile, "", lenient=True).plugins_path)
    return [folder for name in names if (folder := existing_folder(path.parent, name)) is not None]


def _load(reader: Reader, path: Path, root: MappingNode, shared: Shared, *, cors: bool = False) -> Loaded:
    main = fill(reader, root, GatewayFile, "", lenient=True)
    listen = read_listen(reader, main.listen, "listen", root)
    admin = None if main.admin is None else read_listen(reader, main.admin, "admin", root)
    registry = _read_registry(reader, path.parent, main, root)
    resources = read_resources(reader, main.resources, shared)
    pools = read_pools(reader, main.pools, resources)
    proxies = read_trusted_proxies(reader, main.trusted_proxies, root)
    store = read_store(reader, main.store, value_of(root, "store"), path.parent)
    counters = counters_of(shared, store)
    issuers = read_issuers(reader, main.identity, root)
    before = len(reader.mistakes)
    entries = _read_main_pipeline(reader, main, root, registry, cors=cors)
    complete = len(reader.mistakes) == before  # else a check of the order would report consequences
    files = read_team_files(reader, path, main.teams, root)
    builder = TeamBuilder(
        reader,
        main,
        root,
        entries,
        complete=complete,
        registry=registry,
        with_identity=has_issuers(reader, main.identity, root),
        common=Services(
            team="",
            stage="",
            resources=resources,
            pools=pools,
            prices=_read_prices(main, root),
            team_count=1 + len(files),
            first_byte_timeout=main.timeouts.first_byte,
            shared=shared,
            limit_counters=counters,
        ),
    )
    default = builder.default()
    teams = [team for file in files if (team := builder.from_file(file)) is not None]
    check_unique(reader, [(default, root), *teams])
    if reader.mistakes:
        raise ConfigError(reader.mistakes)
    return Loaded(
        path=path,
        settings=Settings(listen, main.timeouts, main.limits, main.health, admin, proxies),
        teams=Teams(
            default,
            [team for team, _ in teams],
            shared,
            _make_issuers(issuers, shared),
            background_work(resources.values(), store, shared, with_pools=bool(pools)),
            pools.values(),
            resources.values(),
        ),
        resources=resources,
        pools=pools,
        log=main.log,
        store=store,
        prices=main.prices,
        watch=main.watch,
        sources=reader.sources,
    )


def _read_registry(reader: Reader, base: Path, main: GatewayFile, root: MappingNode) -> Registry:
    folders = [read_plugin_folder(reader, base, name, root) for name in as_list(main.plugins_path)]
    for folder in folders:
        # A missing stage may be added later, so the names are watched; the code is not.
        find_files(reader, folder / "*.py", "plugins_path", root)
    return Registry(folders)


def _read_main_pipeline(
    reader: Reader, main: GatewayFile, root: MappingNode, registry: Registry, *, cors: bool
) -> list[Entry]:
    if main.pipeline is None:
        reader.mistake(root, "there is no `pipeline:`; list the stages that requests pass through")
        return []
    pipeline: Any = main.pipeline  # a node
    return read_pipeline(reader, with_cors(pipeline) if cors else pipeline, registry, None)


def _read_prices(main: GatewayFile, root: MappingNode) -> Prices:
    """Return the prices; if all of them are invalid, a price for every model, so that no model is reported too."""
    return Prices(main.prices or ({} if value_of(root, "prices") is root else {"*": Price(0)}))


def _make_issuers(issuers: Sequence[Issuer], shared: Shared) -> Issuers | None:
    if not issuers:
        return None
    return Issuers(issuers, shared.session, cache=shared.state_of("", "identity"))
