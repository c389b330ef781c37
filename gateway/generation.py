"""Generations: the configuration that a running server uses, and earlier ones until their last exchange has ended."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from gateway.settings import Settings
from gateway.teams import Teams
from gateway.upstream import Upstream

__all__ = ("Generation", "Generations")

# Delay, in seconds, from the end of a generation to the garbage collection that frees its objects: several reloads in a
# row are one collection.
_COLLECT_DELAY = 1.0


@dataclass(eq=False, slots=True)
class Generation:
    """One configuration of a running server: each exchange reads it once, and a reload replaces it as a whole."""

    teams: Teams
    settings: Settings
    running: int = 0
    """The number of running exchanges: after a reload, the stages stop when the last one has ended."""


class Generations:
    """The current generation, those that are prepared, and old ones with running exchanges."""

    def __init__(self, teams: Teams, settings: Settings, upstream: Upstream) -> None:
        self.current = Generation(teams, settings)
        self._upstream = upstream
        self._shared = teams.shared
        self._old: set[Generation] = set()  # replaced, but not stopped yet
        self._prepared: set[Generation] = set()  # neither current nor discarded yet
        self._collection: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def prepare(self, teams: Teams, settings: Settings) -> Generation:
        """Start the stages of a new configuration. Raises StartError if one fails; then all of them are stopped."""
        generation = Generation(teams, settings)
        self._prepared.add(generation)
        try:
            await teams.start(self._upstream)
        except BaseException:
            self._prepared.discard(generation)
            raise
        return generation

    async def discard(self, generation: Generation) -> None:
        """Stop a prepared generation."""
        self._prepared.discard(generation)
        await generation.teams.stop()
        self._release_unused()

    def replace(self, generation: Generation) -> Generation:
        """Make a prepared generation the current one; returns the old one, for `retire_unused`."""
        self._prepared.discard(generation)
        old, self.current = self.current, generation
        self._old.add(old)
        return old

    def retire_unused(self, old: Generation) -> None:
        """Stop the stages of an old generation after its last exchange, unless the server stops them anyway."""
        if old.running or self._stopping:
            return
        self._old.discard(old)
        self._start(self._stop_old(old))

    def begin_stop(self) -> None:
        """Retire no further generation: `stop` stops all of them."""
        self._stopping = True

    async def stop(self) -> None:
        """Stop the stages of all generations, after `begin_stop`."""
        if self._tasks:
            await asyncio.wait(list(self._tasks))
        for generation in (*self._old, self.current):
            await generation.teams.stop()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stop_old(self, old: Generation) -> None:
        await old.teams.stop()
        self._release_unused()
        # With the gateway's thresholds, the collector would leave cycles of the old generation, such as a stage with a
        # table of its own methods, for hours. Objects from the start are frozen, so the collection is short.
        if self._collection is None:
            self._collection = asyncio.get_running_loop().call_later(_COLLECT_DELAY, self._collect)

    def _release_unused(self) -> None:
        """Release connections and shared state that only ended generations name."""
        if self._stopping:
            return
        teams = [each.teams for each in (self.current, *self._old, *self._prepared)]
        self._upstream.keep(resource for each in teams for resource in each.resources)
        self._shared.keep(
            set().union(*(each.stage_keys for each in teams)), set().union(*(each.fetched for each in teams))
        )

    def _collect(self) -> None:
        self._collection = None
        gc.collect()
        self._start(self._shared.close_unused())
