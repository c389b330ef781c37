"""A connection's deadline: one timer for head, response, stream and keep-alive timeouts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

__all__ = ("Deadline",)


class Deadline:
    """One deadline at a time, which moves with every request and every piece of a stream.

    Postponing it costs no new timer: the running timer goes off at its old time, and is then set to the new one.
    """

    __slots__ = ("_due", "_expire", "_loop", "_remaining", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due = math.inf
        self._remaining = math.inf  # seconds, while it is paused
        self._expire: Callable[[], None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def set(self, seconds: float, expire: Callable[[], None]) -> None:
        """Call `expire` in `seconds`. Replaces the current deadline."""
        self._expire = expire
        self._due = due = self._loop.time() + seconds
        if self._timer is None:
            self._timer = self._loop.call_at(due, self._check)
        elif self._timer.when() > due:
            self._timer.cancel()
            self._timer = self._loop.call_at(due, self._check)

    def is_set(self) -> bool:
        """Whether a deadline is set and not paused."""
        return self._due != math.inf

    def clear(self) -> None:
        """Remove the deadline; its timer may still run."""
        self._due = self._remaining = math.inf

    def pause(self) -> None:
        """Pause until `resume`. A call of `set` or `clear` in between replaces the paused deadline."""
        self._remaining = self._due - self._loop.time()
        self._due = math.inf

    def resume(self) -> None:
        """Continue a paused deadline with the time that remained."""
        if self._due == math.inf and self._remaining < math.inf and self._expire is not None:
            self.set(self._remaining, self._expire)
        self._remaining = math.inf

    def stop(self) -> None:
        """Remove the deadline and its timer."""
        self._due = self._remaining = math.inf
        self._expire = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        if self._due == math.inf:
            return
        if self._loop.time() < self._due:
            self._timer = self._loop.call_at(self._due, self._check)
            return
        self._due = math.inf
        expire, self._expire = self._expire, None
        if expire is not None:
            expire()
