"""The memory that requests hold: one budget for the process, and a share of it for each caller.

It covers every byte that is kept because of a request: bodies, forms, fragments of WebSocket messages, responses
kept for a retry, text kept for counting. Bytes that only pass through are bounded where they pass.
"""

from __future__ import annotations

from gateway.errors import ApiError

__all__ = ("Hold", "MemoryBudget")

# The part of the budget that one caller may hold.
_SHARE = 4


class MemoryBudget:
    """Counts the bytes held by all requests, and by each caller. Never more than `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._callers: dict[str, int] = {}

    def held_by(self, caller: str) -> int:
        """Return the bytes that a caller holds."""
        return self._callers.get(caller, 0)

    def take(self, caller: str, size: int) -> None:
        """Count `size` more bytes of a caller. Raises ApiError 503 above the caller's share or the whole budget."""
        mine = self._callers.get(caller, 0) + size
        if mine > self.limit // _SHARE:
            raise _full("your requests hold as much of the gateway's memory as one caller may")
        if self.held + size > self.limit:
            raise _full("the gateway holds as many request bytes as it may")
        self.held += size
        self._callers[caller] = mine

    def give_back(self, caller: str, size: int) -> None:
        """Count `size` bytes less."""
        self.held -= size
        left = self._callers[caller] - size
        if left:
            self._callers[caller] = left
        else:
            del self._callers[caller]


class Hold:
    """The bytes that one exchange holds of its caller's share."""

    __slots__ = ("_budget", "_caller", "size")

    def __init__(self, budget: MemoryBudget, caller: str) -> None:
        self._budget = budget
        self._caller = caller
        self.size = 0

    def grow(self, size: int) -> None:
        """Hold `size` more bytes. Raises ApiError 503, and then holds what it held before."""
        if size:
            self._budget.take(self._caller, size)
            self.size += size

    def shrink(self, size: int) -> None:
        """Hold `size` bytes less."""
        if size:
            self.size -= size
            self._budget.give_back(self._caller, size)

    def release(self) -> None:
        """Hold nothing."""
        self.shrink(self.size)


def _full(why: str) -> ApiError:
    return ApiError(503, f"{why}; try again in a moment", code="overloaded", headers={"retry-after": "1"})
