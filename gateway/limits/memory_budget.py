"""The bytes that requests hold: one budget for the process, and a share of it for each caller.

The budget of memory covers every byte that is kept because of a request: bodies, forms, fragments of WebSocket
messages, responses that a stage reads whole, decoded JSON. The budget of the disk covers long forms and batch files.
Bytes that only pass through are bounded where they pass.
"""

from __future__ import annotations

from gateway.errors import ApiError
from gateway.settings import Limits

__all__ = ("BUDGETS", "UNCOUNTED", "BudgetExhausted", "Budgets", "Hold", "MemoryBudget")

_DEFAULT_MEMORY = Limits().memory
"""The default of `limits: memory`, in bytes."""
UNCOUNTED = 64 * 1024
"""Bodies and responses of up to this many bytes are not counted: nearly all are, and to count them would cost more."""
# The part of a budget that one caller may hold.
_SHARE = 4
# The disk has room for this many forms of the longest that `limits: form` allows.
_FORMS = 8
_DEFAULT_FORM = 256 * 1024 * 1024


class BudgetExhausted(ApiError):
    """There is no room: 503 for the moment, 413 if one request needs more than its caller may ever hold."""


class MemoryBudget:
    """Counts the bytes held by all requests, and by each caller. Never more than `limit`."""

    def __init__(self, limit: int, kind: str = "memory") -> None:
        self.limit = limit
        self.kind = kind
        """What the bytes take, in the words of errors: `memory` or `disk`."""
        self.held = 0
        self.most_held = 0
        """The most bytes that were held at once since the start."""
        self._callers: dict[str, int] = {}

    @property
    def share(self) -> int:
        """The most bytes that one caller may hold."""
        return self.limit // _SHARE

    def held_by(self, caller: str) -> int:
        """Return the bytes that a caller holds."""
        return self._callers.get(caller, 0)

    def take(self, caller: str, size: int) -> None:
        """Count `size` more bytes of a caller. Raises BudgetSpent above the caller's share or the whole budget."""
        mine = self._callers.get(caller, 0) + size
        if mine > self.share:
            raise _full(f"your requests hold as much of the gateway's {self.kind} as one caller may")
        if self.held + size > self.limit:
            raise _full(f"the gateway's {self.kind} for requests is full")
        self.held += size
        self.most_held = max(self.most_held, self.held)
        self._callers[caller] = mine

    def give_back(self, caller: str, size: int) -> None:
        """Count `size` bytes less."""
        self.held -= size
        left = self._callers[caller] - size
        if left:
            self._callers[caller] = left
        else:
            del self._callers[caller]


class Budgets:
    """What all requests of a process may hold, in memory and on disk; each worker process has its own."""

    def __init__(self, memory: int = _DEFAULT_MEMORY, form: int = _DEFAULT_FORM) -> None:
        self.memory = MemoryBudget(memory)
        self.disk = MemoryBudget(_FORMS * form, "disk")

    def use(self, memory: int, form: int) -> None:
        """Have other limits from now on: of memory, and of one form on disk. What is held already stays held."""
        self.memory.limit = memory
        self.disk.limit = _FORMS * form


BUDGETS = Budgets()
"""Those of this process."""


class Hold:
    """The bytes that one exchange holds of its caller's share."""

    __slots__ = ("_budget", "_caller", "size")

    def __init__(self, budget: MemoryBudget, caller: str) -> None:
        self._budget = budget
        self._caller = caller
        self.size = 0

    def grow(self, size: int) -> None:
        """Hold `size` more bytes. Raises BudgetSpent, and then holds what it held before."""
        if size:
            if self.size + size > self._budget.share:
                raise BudgetExhausted(
                    413,
                    f"this request needs more {self._budget.kind} than the {self._budget.share} bytes that one caller "
                    "may hold here; send less at once",
                    code="body_too_large",
                )
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


def _full(why: str) -> BudgetExhausted:
    return BudgetExhausted(503, f"{why}; try again in a moment", code="overloaded")
