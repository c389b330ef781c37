"""Fair scheduler: runs the bulk work of many connections in bounded steps, round robin.

The event loop handles all bytes of one connection before it looks at the next. A connection that brings thousands of
chunks, frames or events at once would block all others. Such a connection pauses reading, keeps the unparsed bytes, and
does its work in steps: the scheduler runs one step in each turn of the loop, one connection after another. A
connection that has bulk work alone gets two.

Small reads, which are nearly all, are handled at once and never come here.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Protocol
from weakref import WeakKeyDictionary

__all__ = ("MOST_UNITS", "SMALL", "STEP", "FairScheduler", "ScheduledWork")

SMALL = 4 * 1024
"""Reads of up to this many bytes are handled at once."""
STEP = 16 * 1024
"""Maximum number of bytes that one step handles."""
MOST_UNITS = 64
"""Maximum number of chunks, frames or events that one step handles."""
# Bytes of larger reads that may be handled at once in one turn of the loop, for all connections together.
_ALLOWANCE = 64 * 1024


class ScheduledWork(Protocol):
    """A connection with unparsed bytes."""

    def step(self) -> bool:
        """Handle at most `STEP` bytes and `MOST_UNITS` units; return whether there is more to do now. Never raises."""


class FairScheduler:
    """Shares the turns of one event loop among the connections with bulk work."""

    __slots__ = ("_allowance_left", "_loop", "_scheduled", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: OrderedDict[ScheduledWork, None] = OrderedDict()
        self._scheduled = False
        self._allowance_left = _ALLOWANCE

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> FairScheduler:
        """Return the scheduler of a loop: there is one for each."""
        found = _schedulers.get(loop)
        if found is None:
            found = _schedulers[loop] = cls(loop)
        return found

    def may_handle(self, size: int) -> bool:
        """Whether a read of `size` bytes may be handled at once, in this turn; else `add` its connection."""
        if size <= SMALL:
            return True
        if not self._scheduled:
            self._schedule()
        left = self._allowance_left
        self._allowance_left = left - size
        return size <= STEP and left >= size

    def add(self, work: ScheduledWork) -> None:
        """Run the steps of `work` from the next turn on, until it is done."""
        self._waiting[work] = None
        if not self._scheduled:
            self._schedule()

    async def turn(self) -> None:
        """Wait for a turn: a task with bulk work does this between two pieces of it."""
        turn = _Turn(self._loop.create_future())
        self.add(turn)
        try:
            await turn.reached
        finally:
            self.remove(turn)

    def remove(self, work: ScheduledWork) -> None:
        """Run no more steps of `work` until it is added again."""
        self._waiting.pop(work, None)

    def _schedule(self) -> None:
        self._scheduled = True
        self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._scheduled = False
        self._allowance_left = _ALLOWANCE
        try:
            waiting = self._waiting
            # A single connection takes two steps: a turn costs as much as the work of some events.
            for _ in range(2 if len(waiting) == 1 else 1):
                if not waiting:
                    break
                work, _ = waiting.popitem(last=False)
                if work.step():
                    waiting[work] = None
        finally:
            if self._waiting and not self._scheduled:
                self._schedule()


class _Turn:
    """The next piece of a task's work."""

    __slots__ = ("reached",)

    def __init__(self, reached: asyncio.Future[None]) -> None:
        self.reached = reached

    def step(self) -> bool:
        """Resume the task."""
        if not self.reached.done():
            self.reached.set_result(None)
        return False


_schedulers: WeakKeyDictionary[asyncio.AbstractEventLoop, FairScheduler] = WeakKeyDictionary()
