"""Services of the gateway for its stages: HTTP, counters, health, prices, and state of their own."""

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
    """Services that all stages of a process share: one HTTP session, the counters, the stages' state."""

    def __init__(self, counters: Counters | None = None) -> None:
        self.counters = WaitQueue(counters or MemoryCounters())
        """Counters of the limits without a `store:`."""
        self.health = Health()
        """Health of the deployments of pools."""
        self._stores: WeakValueDictionary[Hashable, WaitQueue] = WeakValueDictionary()
        # The counters in `_stores`, until they are closed.
        self._open: dict[int, tuple[Counters, ReferenceType[WaitQueue]]] = {}
        self._session: aiohttp.ClientSession | None = None
        self._state: dict[tuple[str, str], dict[str, Any]] = {}

    def session(self) -> aiohttp.ClientSession:
        """Return the session, created on first use. It has no cookies; its users switch redirects off."""
        if self._session is None or self._session.closed:
            resolver = Resolver.of(asyncio.get_running_loop())
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(use_dns_cache=False, resolver=resolver),
                timeout=aiohttp.ClientTimeout(total=30),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    def state_of(self, team: str, stage: str) -> dict[str, Any]:
        """Return the state of one stage of one team; it outlives the stage's instance."""
        return self._state.setdefault((team, stage), {})

    def counters_of(self, store: Hashable, make: Callable[[], Counters]) -> WaitQueue:
        """Return the counters of a store; they survive reloads while each configuration names the store."""
        queue = self._stores.get(store)
        if queue is None:
            counters = make()
            queue = self._stores[store] = WaitQueue(counters)
            self._open[id(counters)] = counters, ref(queue)
        return queue

    def keep(self, stages: Collection[tuple[str, str]], fetched: Collection[str]) -> None:
        """Drop the state of all stages but these (team, stage id), and all tokens and keys but those of these names."""
        for key, state in list(self._state.items()):
            if key[0]:
                if key not in stages:
                    del self._state[key]
                continue
            for name in [each for each in state if each not in fetched]:
                del state[name]

    async def close_unused(self) -> None:
        """Close the counters of stores that no configuration names anymore."""
        for key, (counters, queue) in list(self._open.items()):
            if queue() is None:
                del self._open[key]
                await counters.close()

    async def close(self) -> None:
        """Close the session, and the counters."""
        stores = [queue() or counters for counters, queue in self._open.values()]
        self._open.clear()
        await asyncio.gather(*(each.close() for each in (*stores, self.counters)))
        if self._session is not None:
            await self._session.close()
            self._session = None


@dataclass(frozen=True)
class Services:
    """The argument of a stage's `start` and `check`.

    `resources` are the configured Azure resources by name. `resource` is the team's default resource, None if there are
    several and the team chose none. `pools` are the configured pools by name. `reachable`, in `start`, are the
    resources to which the team's stages may send requests. `keys` are the team's own, by digest. `claims` are those
    that it requires of a token (`request.identity.has(services.claims)`). `team_count` is the number of teams.
    `first_byte_timeout` is the timeout, in seconds, for everything before a response's first byte. `prices` are the
    operator's. `clock` returns seconds that never go back, `now` seconds since the epoch. `store` keeps state that must
    outlive a reload; each stage of a team has its own.
    """

    team: str
    stage: str
    resources: Mapping[str, Resource] = field(default_factory=dict)
    resource: Resource | None = None
    pools: Mapping[str, Pool] = field(default_factory=dict)
    keys: Mapping[str, ListedKey] = field(default_factory=dict)
    prices: Prices = field(default_factory=Prices)
    claims: Claims = field(default_factory=dict)
    team_count: int = 1
    first_byte_timeout: float = 600.0
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    shared: Shared = field(default_factory=Shared, repr=False)
    reachable: Mapping[str, Resource] = field(default_factory=dict)
    limit_counters: WaitQueue | None = None

    @property
    def http(self) -> aiohttp.ClientSession:
        """An HTTP session for calls to other services; not for the requests of clients to Azure."""
        return self.shared.session()

    @property
    def counters(self) -> WaitQueue:
        """Counters of limits, shared by all stages, and by all workers, or all gateways with one `store:`."""
        return self.limit_counters or self.shared.counters

    @property
    def health(self) -> Health:
        """Health of pooled deployments, as seen by this process; shared by all stages."""
        return self.shared.health

    async def load_tokenizers(self) -> None:
        """Load the tokenizers, if installed, so that even the first `expected_tokens` are counted, not estimated."""
        await asyncio.to_thread(load_encodings)

    @property
    def operations(self) -> Collection[str]:
        """The names of all operations, such as `chat.completions` and `files.list`."""
        return BY_NAME.keys()

    @property
    def logger(self) -> FilteringBoundLogger:
        """A structlog logger with the team and the stage bound."""
        return get_logger().bind(team=self.team, stage=self.stage)

    @property
    def store(self) -> MutableMapping[str, Any]:
        """State under (team, stage id), shared by every instance of this stage in the process."""
        return self.shared.state_of(self.team, self.stage)
