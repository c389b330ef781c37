"""A timer that tolerates stalls of the event loop: a timeout counts the time in which this process could run."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

__all__ = ("StallTolerantTimer", "stall_tolerant_timeout")

# A timer that fires later than this, in seconds, was delayed by a stall, not by a busy loop.
_STALL = 0.02


class StallTolerantTimer:
    """Calls `expire` after some seconds in which the event loop ran.

    During a stall the loop may have been unable to send a request, or to read a reply that has arrived. The timer then
    extends the timeout once, by the length of the stall, at most by its own length.
    """

    def __init__(self, seconds: float, expire: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._expire = expire
        self._due = self._loop.time() + seconds
        self._timer = self._loop.call_at(self._due, self._first)

    def _first(self) -> None:
        delay = self._loop.time() - self._due
        if delay > _STALL:
            self._timer = self._loop.call_later(min(delay, self._seconds), self._expire)
        else:
            self._expire()

    def cancel(self) -> None:
        """Cancel the timer."""
        self._timer.cancel()


@contextlib.asynccontextmanager
async def stall_tolerant_timeout(seconds: float) -> AsyncIterator[None]:
    """Raise TimeoutError if the block takes longer."""
    async with asyncio.timeout(None) as limit:
        timer = StallTolerantTimer(seconds, lambda: limit.reschedule(asyncio.get_running_loop().time()))
        try:
            yield
        finally:
            timer.cancel()
