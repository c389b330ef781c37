"""What is fetched again and again in the background, and now and then by whoever needs it: one fetch at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

__all__ = ("BackgroundRefresh",)


class BackgroundRefresh:
    """The fetches of one thing, such as an issuer's keys or an identity's token."""

    def __init__(self, fetch: Callable[[], Coroutine[Any, Any, None]], what: str) -> None:
        """`fetch` notes what it has found, and what it has not; it raises nothing. `what` is for its tasks' names."""
        self._fetch = fetch
        self._what = what
        self._flight: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def under_way(self) -> bool:
        """Whether there is a fetch to wait for."""
        return self._flight is not None

    def start(self, keep_fresh: Coroutine[Any, Any, None]) -> None:
        """Run what says when to fetch, in the background, until `stop`."""
        self._keeper = asyncio.create_task(keep_fresh, name=f"keep {self._what} fresh")

    async def stop(self) -> None:
        """Fetch nothing any more."""
        tasks = [task for task in (self._keeper, self._flight) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def refresh(self) -> None:
        """Fetch, or wait for the fetch under way; one that gives up waiting does not end it for the others."""
        if self._flight is None:
            self._flight = asyncio.create_task(self._fetch(), name=f"fetch {self._what}")
            self._flight.add_done_callback(self._landed)
        await asyncio.wait((self._flight,))

    def _landed(self, flight: asyncio.Task[None]) -> None:
        self._flight = None
