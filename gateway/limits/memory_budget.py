"""The memory budget: `limits: memory` bounds the bytes that all requests hold, and the share of each caller.

The memory budget covers every byte that is kept for a request: bodies, forms, fragments of WebSocket messages,
responses that a stage reads whole, decoded JSON. The disk budget covers long forms and batch files. Bytes that only
pass through have other limits.
"""

from __future__ import annotations

from gateway.errors import ApiError
from gateway.settings import Limits

__all__ = ("BUDGETS", "UNCOUNTED", "BudgetExhausted", "Budgets", "Hold", "MemoryBudget")

_DEFAULT_MEMORY = Limits().memory
"""The default of `limits: memory`, in bytes."""
UNCOUNTED = 64 * 1024
"""Bodies and responses up to this size, in bytes, are not counted: nearly all are small, and counting costs more."""
# One caller can hold this fraction of a budget: 1 / _SHARE.
_SHARE = 4
# The disk budget, in forms of the maximum size (`limits: form`).
_FORMS = 8
_DEFAULT_FORM = 256 * 1024 * 1024


class BudgetExhausted(ApiError):
    """The budget has no room: 503, or 413 if a single request exceeds the share of a caller."""


class MemoryBudget:
    """Counts the bytes held by all requests, and by each caller. They never exceed `limit`."""

    def __init__(self, limit: int, kind: str = "memory") -> None:
        self.limit = limit
        self.kind = kind
        """`memory` or `disk`, for error messages."""
        self.held = 0
        self.most_held = 0
        """The peak of `held` since the start."""
        self._callers: dict[str, int] = {}

    @property
    def share(self) -> int:
        """Maximum number of bytes that one caller can hold."""
        return self.limit // _SHARE

    def held_by(self, caller: str) -> int:
        """Return the number of bytes that a caller holds."""
        return self._callers.get(caller, 0)

    def take(self, caller: str, size: int) -> None:
        """Count `size` more bytes of a caller. Raises BudgetExhausted above the caller's share or the whole budget."""
        total = self._callers.get(caller, 0) + size
        if total > self.share:
            raise _exhausted(f"your requests already use your share of the gateway's {self.kind}")
        if self.held + size > self.limit:
            raise _exhausted(f"the gateway's {self.kind} for requests is full")
        self.held += size
        self.most_held = max(self.most_held, self.held)
        self._callers[caller] = total

    def release(self, caller: str, size: int) -> None:
        """Count `size` fewer bytes of a caller."""
        self.held -= size
        left = self._callers[caller] - size
        if left:
            self._callers[caller] = left
        else:
            del self._callers[caller]


class Budgets:
    """The memory and disk budgets of a process; each worker process has its own."""

    def __init__(self, memory: int = _DEFAULT_MEMORY, form: int = _DEFAULT_FORM) -> None:
        self.memory = MemoryBudget(memory)
        self.disk = MemoryBudget(_FORMS * form, "disk")

    def use(self, memory: int, form: int) -> None:
        """Change the limits of memory, and of one form on disk. Bytes that are already held stay held."""
        self.memory.limit = memory
        self.disk.limit = _FORMS * form


BUDGETS = Budgets()
"""The budgets of this process."""


class Hold:
    """The bytes that one exchange holds."""

    __slots__ = ("_budget", "_caller", "size")

    def __init__(self, budget: MemoryBudget, caller: str) -> None:
        self._budget = budget
        self._caller = caller
        self.size = 0

    def grow(self, size: int) -> None:
        """Hold `size` more bytes. If it raises BudgetExhausted, nothing changes."""
        if size:
            if self.size + size > self._budget.share:
                raise BudgetExhausted(
                    413,
                    f"this request needs more than {self._budget.share} bytes of {self._budget.kind}, the gateway's "
                    "limit per caller; send a smaller request",
                    code="body_too_large",
                )
            self._budget.take(self._caller, size)
            self.size += size

    def shrink(self, size: int) -> None:
        """Hold `size` fewer bytes."""
        if size:
            self.size -= size
            self._budget.release(self._caller, size)

    def release(self) -> None:
        """Hold nothing."""
        self.shrink(self.size)


def _exhausted(reason: str) -> BudgetExhausted:
    return BudgetExhausted(503, f"{reason}; retry shortly", code="overloaded")
