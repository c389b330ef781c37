"""A cache of recent refusals: a caller that retries at once is refused without a round trip to the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from gateway.limits.token_bucket import Charge, Decision

__all__ = ("RecentRefusals",)

# Maximum age of an entry, in seconds: another gateway may have made room.
_MAX_AGE = 1.0
# Above this number of names, drop the expired ones.
_MAX_NAMES = 10_000


class _Refusal(msgspec.Struct):
    decision: Decision
    cost: float
    since: float
    until: float


class RecentRefusals:
    """The refusals of the last second, by the name without room."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._refusals: dict[str, _Refusal] = {}

    def __len__(self) -> int:
        return len(self._refusals)

    def find(self, charges: Sequence[Charge]) -> Decision | None:
        """Return the refusal of these charges. Returns None if the store must decide."""
        if not self._refusals:
            return None
        for charge in charges:
            refusal = self._refusals.get(charge.name)
            if refusal is None or charge.shadow:
                continue
            now = self._clock()
            if now >= refusal.until:
                del self._refusals[charge.name]
                continue
            cached = refusal.decision
            # A smaller cost may find room, a limit may have been raised, and other names have other records.
            if charge.cost < refusal.cost or [each.name for each in charges] != [each.name for each in cached.charges]:
                continue
            over = [
                index
                for index, each in enumerate(charges)
                if cached.records[index][0] + each.cost > each.limit.max_level
            ]
            if any(charges[index] is charge for index in over):
                return Decision(charges, cached.records, cached.now + now - refusal.since, over, refused=True)
        return None

    def add(self, decision: Decision) -> None:
        """Remember a refusal."""
        now = self._clock()
        for index in decision.over:
            charge = decision.charges[index]
            if charge.shadow:
                continue
            wait = min(_MAX_AGE, decision.retry_after(index))
            self._refusals[charge.name] = _Refusal(decision, charge.cost, now, now + wait)
        if len(self._refusals) > _MAX_NAMES:
            self._refusals = {name: each for name, each in self._refusals.items() if each.until > now}
            if len(self._refusals) > _MAX_NAMES:
                self._refusals.clear()

    def forget(self, name: str) -> None:
        """Drop a name: some of its use was given back, and there may be room."""
        self._refusals.pop(name, None)
