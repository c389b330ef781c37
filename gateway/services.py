"""What the core offers to stages when they start: shared, and namespaced where it holds state."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Hashable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakValueDictionary, ref

import aiohttp

from gateway.azure.operations import BY_NAME
from gateway.balancing.health import Health
from gateway.dns_resolver import Resolver
from gateway.limits.counters import Counters
from gateway.limits.memory_counters import MemoryCounters
from gateway.limits.wait_queue import WaitQueue
from gateway.logs import get_logger
from gateway.usage.prices import Prices
from gateway.usage.tokenizer import load_encodings

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from gateway.auth.credentials import ListedKey
    from gateway.auth.oidc import Claims
    from gateway.azure.resources import Pool, Resource

__all__ = ("Services", "Shared")


class Shared:
    """What all stages of a gateway share: one HTTP session, one store, the counters."""

    def __init__(self, counters: Counters | None = None) -> None:
        self.counters = WaitQueue(counters or MemoryCounters())
        """Where limits are counted that no store is named for."""
        self.health = Health()
        """How the deployments of pools are."""
        self._elsewhere: WeakValueDictionary[Hashable, WaitQueue] = WeakValueDictionary()
        self._open: dict[
            int, tuple[Counters, ReferenceType[WaitQueue]]
        ] = {}  # those of `_elsewhere`, until they are closed
        self._session: aiohttp.ClientSession | None = None
        self._spaces: dict[tuple[str, str], dict[str, Any]] = {}

    def session(self) -> aiohttp.ClientSession:
        """Return the session, made when first asked for. Redirects and cookies are off by its users' care."""
        if self._session is None or self._session.closed:
            resolver = Resolver.of(asyncio.get_running_loop())
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(use_dns_cache=False, resolver=resolver),
                timeout=aiohttp.ClientTimeout(total=30),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    def space(self, team: str, stage: str) -> dict[str, Any]:
        """Return the state kept for one stage of one team; it outlives the stage's instance."""
        return self._spaces.setdefault((team, stage), {})

    def counters_at(self, place: Hashable, make: Callable[[], Counters]) -> WaitQueue:
        """Return the counters of a store; they are the same as long as one configuration after the other names it."""
        found = self._elsewhere.get(place)
        if found is None:
            counters = make()
            found = self._elsewhere[place] = WaitQueue(counters)
            self._open[id(counters)] = counters, ref(found)
        return found

    def keep(self, spaces: Collection[tuple[str, str]], fetched: Collection[str]) -> None:
        """Forget the state of all stages but these, and all tokens and keys but those of these names."""
        for space, state in list(self._spaces.items()):
            if space[0]:
                if space not in spaces:
                    del self._spaces[space]
                continue
            for name in [each for each in state if each not in fetched]:
                del state[name]

    async def close_unused(self) -> None:
        """Close the counters of stores that no configuration names any more."""
        for key, (counters, turns) in list(self._open.items()):
            if turns() is None:
                del self._open[key]
                await counters.close()

    async def close(self) -> None:
        """Close the session, and the counters."""
        elsewhere = [turns() or counters for counters, turns in self._open.values()]
        self._open.clear()
        await asyncio.gather(*(each.close() for each in (*elsewhere, self.counters)))
        if self._session is not None:
            await self._session.close()
            self._session = None


@dataclass(frozen=True)
class Services:
    """What a stage's `start` and `check` are given.

    `resources` are the configured Azure resources by name, `resource` the one this team uses where a deployment
    names none (None if there are several and none was chosen). `pools` are the configured pools by name. `reachable`,
    at `start`, are the resources that the stages of this team may send requests to. `keys` are the team's own, by
    digest, `claims` what it wants of a token (`request.identity.has(services.claims)`), and `teams` is how many teams
    there are. `deadline` is how many seconds everything before an answer's first byte may take. `prices` are the
    operator's. `clock` returns seconds that never go back, `now` seconds since the epoch. `store` keeps state that must
    outlive a reload: it is this stage's own, by team and id.
    """

    team: str
    stage: str
    resources: Mapping[str, Resource] = field(default_factory=dict)
    resource: Resource | None = None
    pools: Mapping[str, Pool] = field(default_factory=dict)
    keys: Mapping[str, ListedKey] = field(default_factory=dict)
    prices: Prices = field(default_factory=Prices)
    claims: Claims = field(default_factory=dict)
    teams: int = 1
    deadline: float = 600.0
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    shared: Shared = field(default_factory=Shared, repr=False)
    reachable: Mapping[str, Resource] = field(default_factory=dict)
    store_of_limits: WaitQueue | None = None

    @property
    def http(self) -> aiohttp.ClientSession:
        """A session for calling other services; never for Azure's answers to clients."""
        return self.shared.session()

    @property
    def counters(self) -> WaitQueue:
        """What limits are counted in: shared by all stages, and by all workers or gateways that it is meant for."""
        return self.store_of_limits or self.shared.counters

    @property
    def health(self) -> Health:
        """How the deployments of pools are, as far as this process knows: shared by all stages."""
        return self.shared.health

    async def prepare_tokens(self) -> None:
        """Get ready to count tokens, where that is installed: the first `expected_tokens` are counted then, too."""
        await asyncio.to_thread(load_encodings)

    @property
    def operations(self) -> Collection[str]:
        """The names of all operations, such as `chat.completions` and `files.list`."""
        return BY_NAME.keys()

    @property
    def logger(self) -> FilteringBoundLogger:
        """A structlog logger that names the team and the stage."""
        return get_logger().bind(team=self.team, stage=self.stage)

    @property
    def store(self) -> MutableMapping[str, Any]:
        """State under (team, stage id), shared by every instance of this stage in the process."""
        return self.shared.space(self.team, self.stage)
