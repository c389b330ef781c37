"""Counters in the memory of this process: a dict."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from gateway.limits.token_bucket import EMPTY, Charge, Decision, Limit, Record

__all__ = ("MemoryCounters",)

# Clients can invent names, for example of models. Above the first number of names, drop those without any use; above
# the second, drop the half with the smallest use in relation to their limit.
_SWEEP_ABOVE, _MAX_NAMES = 10_000, 200_000


class MemoryCounters:
    """Counters of a gateway with a single process."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._records: dict[str, Record] = {}
        self._limits: dict[str, Limit] = {}
        self._sweep_at = _SWEEP_ABOVE

    async def take(self, charges: Sequence[Charge]) -> Decision:
        """Take all charges, or none if one has no room."""
        return self.take_now(charges)

    def take_now(self, charges: Sequence[Charge]) -> Decision:
        """Do the same as `take`, without a coroutine."""
        now = self._now()
        known = self._records
        if len(charges) == 1:  # the usual limit of requests, at the lowest cost
            charge = charges[0]
            record = charge.limit.current(known.get(charge.name, EMPTY), now)
            level, since, inflow, born = record
            if level + charge.cost > charge.limit.max_level and charge.cost:
                if charge.name in known:
                    known[charge.name] = record  # keeps an interval that was restarted after the clock was set back
                return Decision(charges, (record,), now, (0,), refused=not charge.shadow)
            known[charge.name] = record = (level + charge.cost, since, inflow + charge.cost, born)
            if self._limits.get(charge.name) is not charge.limit or len(known) > self._sweep_at:
                self._remember(charges, now)
            return Decision(charges, (record,), now)
        records: list[Record] = []
        over: list[int] = []
        refused = False
        for index, charge in enumerate(charges):
            limit = charge.limit
            record = limit.current(known.get(charge.name, EMPTY), now)
            if record[0] + charge.cost > limit.max_level and charge.cost:
                over.append(index)
                refused = refused or not charge.shadow
            records.append(record)
        if not refused:
            for index, charge in enumerate(charges):
                if index not in over:
                    known[charge.name] = records[index] = charge.limit.add(records[index], charge.cost)
                elif charge.name in known:
                    known[charge.name] = records[index]
            self._remember(charges, now)
        else:
            known.update(
                (charge.name, record) for charge, record in zip(charges, records, strict=True) if charge.name in known
            )
        return Decision(charges, records, now, over, refused)

    def settle(self, decision: Decision, actual: Sequence[float | None]) -> None:
        """Replace the cost of each charge with its actual use. None leaves a charge unchanged."""
        if decision.settled:
            return
        decision.settled = True
        now = self._now()
        for index, (charge, used) in enumerate(zip(decision.charges, actual, strict=True)):
            if used is not None and used != charge.cost and decision.was_taken(index):
                name = charge.name
                # With the current limit: a reload may have changed it. (The name may have been dropped, too.)
                limit = self._limits.setdefault(name, charge.limit)
                record = limit.refill(self._records.get(name, EMPTY), now)
                self._records[name] = limit.settle(record, decision.records[index], charge.cost, used)

    async def close(self) -> None:
        """Do nothing: there is nothing to release."""

    def _remember(self, charges: Sequence[Charge], now: float) -> None:
        """Remember the limits of these names, and drop names without use if there are many."""
        for charge in charges:
            self._limits[charge.name] = charge.limit
        if len(self._records) <= self._sweep_at:
            return
        shares = {
            name: self._limits[name].current(record, now)[0] / self._limits[name].capacity
            for name, record in self._records.items()
        }
        if len(shares) > _MAX_NAMES:
            least = sorted(shares, key=shares.__getitem__)[: len(shares) // 2]
            shares.update(dict.fromkeys(least, 0.0))
        for name, share in shares.items():
            if share <= 0:
                del self._records[name], self._limits[name]
        # If most are still in use, do not sweep again for each new name.
        self._sweep_at = max(_SWEEP_ABOVE, 2 * len(self._records))
