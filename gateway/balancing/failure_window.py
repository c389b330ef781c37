"""The sliding window of a circuit breaker: responses and failures of the last seconds, counted in ten parts."""

from __future__ import annotations

__all__ = ("FailureWindow",)

_PARTS = 10


class FailureWindow:
    """Counts of one deployment. Times are on the clock of `time.monotonic`."""

    __slots__ = ("_failures", "_part", "_responses", "advance_at")

    def __init__(self) -> None:
        self._responses = [0] * _PARTS
        self._failures = [0] * _PARTS
        self._part = 0
        self.advance_at = 0.0
        """When the current part ends and `advance` is due."""

    def advance(self, now: float, seconds: float, responses: int) -> None:
        """Add `responses` to the current part, then start the part of `now`; `seconds` is the length of the window."""
        self._responses[self._part] += responses
        part = seconds / _PARTS
        passed = int((now - self.advance_at) / part) + 1 if self.advance_at else _PARTS
        for _ in range(min(passed, _PARTS)):
            self._part = (self._part + 1) % _PARTS
            self._responses[self._part] = self._failures[self._part] = 0
        self.advance_at = now + part

    def add_failure(self) -> None:
        """Count a failure now."""
        self._failures[self._part] += 1

    def totals(self) -> tuple[int, int]:
        """Return the number of responses and of failures in the window."""
        return sum(self._responses), sum(self._failures)

    def clear(self) -> None:
        """Forget all counts."""
        self._responses, self._failures = [0] * _PARTS, [0] * _PARTS
