"""How long a connection may wait for what it waits for now."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

__all__ = ("Deadline",)


class Deadline:
    """One deadline at a time, which moves with every request and every piece of a stream.

    Moving it back costs no timer: the one that runs is left alone, and looks again when it goes off.
    """

    __slots__ = ("_due", "_expire", "_left", "_loop", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due = math.inf
        self._left = math.inf  # seconds, while it is paused
        self._expire: Callable[[], None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def set(self, seconds: float, expire: Callable[[], None]) -> None:
        """Call `expire` in `seconds`, instead of what was to be called."""
        self._expire = expire
        self._due = due = self._loop.time() + seconds
        if self._timer is None:
            self._timer = self._loop.call_at(due, self._look)
        elif self._timer.when() > due:
            self._timer.cancel()
            self._timer = self._loop.call_at(due, self._look)

    def is_set(self) -> bool:
        """Whether there is one."""
        return self._due != math.inf

    def clear(self) -> None:
        """Have no deadline."""
        self._due = self._left = math.inf

    def pause(self) -> None:
        """Stop the clock until `resume`; a deadline that is set or cleared meanwhile is another one."""
        self._left = self._due - self._loop.time()
        self._due = math.inf

    def resume(self) -> None:
        """Let the clock of a deadline that was paused go on."""
        if self._due == math.inf and self._left < math.inf and self._expire is not None:
            self.set(self._left, self._expire)
        self._left = math.inf

    def stop(self) -> None:
        """Have none any more, and no timer."""
        self._due = self._left = math.inf
        self._expire = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._due == math.inf:
            return
        if self._loop.time() < self._due:
            self._timer = self._loop.call_at(self._due, self._look)
            return
        self._due = math.inf
        expire, self._expire = self._expire, None
        if expire is not None:
            expire()
