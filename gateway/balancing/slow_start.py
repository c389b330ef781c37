"""Slow start of a deployment that becomes available again: few requests first, more as they are accepted.

The window is the number of requests that may be sent and not accepted yet. It starts at 1 and doubles in each round,
up to half of its size at the last 429. From there it grows by 1 in each round, as in TCP (RFC 5681).
"""

from __future__ import annotations

import math
from collections import deque

__all__ = ("SlowStart",)

# A 429 arrives sooner than this, in seconds, so a request that has none by then counts as accepted.
_ACCEPTED_AFTER = 0.15
# Duration of a slow start without a 429, in seconds.
_DURATION = 10.0


class SlowStart:
    """The congestion window of one deployment. Times are on the clock of `time.monotonic`."""

    __slots__ = ("_ends_at", "_threshold", "_unaccepted", "_window")

    def __init__(self) -> None:
        self._window = 1.0
        self._threshold = math.inf  # from here on the window grows by 1 in each round
        self._unaccepted: deque[float] = deque()  # the send times of requests that are not accepted yet
        self._ends_at = 0.0

    def start(self, at: float) -> None:
        """Start with a window of 1 request at time `at`."""
        self._window = 1.0
        self._unaccepted.clear()
        self._ends_at = at + _DURATION

    def is_over(self, now: float) -> bool:
        """Whether the slow start has ended."""
        return now >= self._ends_at

    def finish(self) -> None:
        """Forget the window and its threshold."""
        self._threshold = math.inf
        self._unaccepted.clear()

    def interrupt(self) -> None:
        """Forget the requests in the window, and keep its threshold."""
        self._unaccepted.clear()

    def send(self, now: float) -> float | None:
        """Count a request; if the window is full now, return the time at which its oldest request is accepted."""
        unaccepted = self._unaccepted
        while unaccepted and unaccepted[0] + _ACCEPTED_AFTER <= now:
            self._grow()
        unaccepted.append(now)
        return unaccepted[0] + _ACCEPTED_AFTER if len(unaccepted) >= self._window else None

    def accept(self) -> bool:
        """Count an accepted request; return whether one was waited for and the window is not full now."""
        if not self._unaccepted:
            return False
        self._grow()
        return len(self._unaccepted) < self._window

    def refuse(self) -> None:
        """Count a 429: the next slow start grows fast only up to half of this window."""
        self._threshold = max(1.0, self._window / 2)

    def _grow(self) -> None:
        self._unaccepted.popleft()
        self._window += 1 if self._window < self._threshold else 1 / self._window
