"""Background refresh of a fetched value: on a schedule and on demand, one fetch at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

__all__ = ("BackgroundRefresh",)


class BackgroundRefresh:
    """The fetches of one thing, such as the keys of an issuer or the token of an identity."""

    def __init__(self, fetch: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        """`fetch` stores its result or failure, and raises nothing. `name` is for the names of the tasks."""
        self._fetch = fetch
        self._name = name
        self._current: asyncio.Task[None] | None = None
        self._schedule: asyncio.Task[None] | None = None

    @property
    def in_progress(self) -> bool:
        """Whether a fetch is in progress."""
        return self._current is not None

    def start(self, schedule: Coroutine[Any, Any, None]) -> None:
        """Run the schedule, which calls `refresh`, in the background until `stop`."""
        self._schedule = asyncio.create_task(schedule, name=f"keep {self._name} fresh")

    async def stop(self) -> None:
        """Stop the schedule and the current fetch."""
        tasks = [task for task in (self._schedule, self._current) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def refresh(self) -> None:
        """Fetch, or wait for the current fetch. Cancelling one waiting caller does not cancel the fetch."""
        if self._current is None:
            self._current = asyncio.create_task(self._fetch(), name=f"fetch {self._name}")
            self._current.add_done_callback(self._done)
        await asyncio.wait((self._current,))

    def _done(self, task: asyncio.Task[None]) -> None:
        self._current = None
