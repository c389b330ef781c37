"""Being late, by the time for which this process could do something about it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

__all__ = ("LateTimer", "within")

# Seconds by which a timer is late where the loop stood still, and is not only busy.
_BEHIND = 0.02


class LateTimer:
    """Calls `expire` after some seconds in which the loop ran.

    Where the loop stood still meanwhile, it may have been kept from asking, or from reading an answer that is there: as
    much time again is given then, once, and not more than it was.
    """

    def __init__(self, seconds: float, expire: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._expire = expire
        self._due = self._loop.time() + seconds
        self._timer = self._loop.call_at(self._due, self._first)

    def _first(self) -> None:
        behind = self._loop.time() - self._due
        if behind > _BEHIND:
            self._timer = self._loop.call_later(min(behind, self._seconds), self._expire)
        else:
            self._expire()

    def cancel(self) -> None:
        """Call nothing."""
        self._timer.cancel()


@contextlib.asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """Raise TimeoutError where something takes longer."""
    async with asyncio.timeout(None) as limit:
        timer = LateTimer(seconds, lambda: limit.reschedule(asyncio.get_running_loop().time()))
        try:
            yield
        finally:
            timer.cancel()
