"""Counters in this process: a dict."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from gateway.limits.token_bucket import NONE, Charge, Decision, Limit, Record

__all__ = ("MemoryCounters",)

# Above this many names, those under which nothing is used any more are forgotten; above the other, those under which
# the smallest part of their limit is: clients can make up names, of models for instance.
_NAMES, _MOST_NAMES = 10_000, 200_000


class MemoryCounters:
    """Counters of one process, which has no worker beside it."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._records: dict[str, Record] = {}
        self._rules: dict[str, Limit] = {}
        self._sweep_at = _NAMES

    async def take(self, charges: Sequence[Charge]) -> Decision:
        """Take all charges, or, where one has no room, none."""
        return self.take_now(charges)

    def take_now(self, charges: Sequence[Charge]) -> Decision:
        """Do what `take` does, at once."""
        now = self._now()
        known = self._records
        if len(charges) == 1:  # the usual limit of requests, at the least cost
            charge = charges[0]
            record = charge.rule.at(known.get(charge.name, NONE), now)
            level, since, inflow, born = record
            if level + charge.cost > charge.rule.most and charge.cost:
                if charge.name in known:
                    known[charge.name] = record  # steps that a clock that was set back begins anew, go on
                return Decision(charges, (record,), now, (0,), refused=not charge.shadow)
            known[charge.name] = record = (level + charge.cost, since, inflow + charge.cost, born)
            if self._rules.get(charge.name) is not charge.rule or len(known) > self._sweep_at:
                self._remember(charges, now)
            return Decision(charges, (record,), now)
        records: list[Record] = []
        over: list[int] = []
        refused = False
        for place, charge in enumerate(charges):
            rule = charge.rule
            record = rule.at(known.get(charge.name, NONE), now)
            if record[0] + charge.cost > rule.most and charge.cost:
                over.append(place)
                refused = refused or not charge.shadow
            records.append(record)
        if not refused:
            for place, charge in enumerate(charges):
                if place not in over:
                    known[charge.name] = records[place] = charge.rule.with_use(records[place], charge.cost)
                elif charge.name in known:
                    known[charge.name] = records[place]
            self._remember(charges, now)
        else:
            known.update(
                (charge.name, record) for charge, record in zip(charges, records, strict=True) if charge.name in known
            )
        return Decision(charges, records, now, over, refused)

    def settle(self, verdict: Decision, actual: Sequence[float | None]) -> None:
        """Let what was really used take the place of what was taken, charge by charge; None leaves one as it is."""
        if verdict.settled:
            return
        verdict.settled = True
        now = self._now()
        for place, (charge, used) in enumerate(zip(verdict.charges, actual, strict=True)):
            if used is not None and used != charge.cost and verdict.holds(place):
                name = charge.name
                # By the rule that counts now: a reload may have changed it. (The name may have been forgotten, too.)
                rule = self._rules.setdefault(name, charge.rule)
                record = rule.passed(self._records.get(name, NONE), now)
                self._records[name] = rule.settled(record, verdict.records[place], charge.cost, used)

    async def close(self) -> None:
        """Let go of nothing: there is nothing."""

    def _remember(self, charges: Sequence[Charge], now: float) -> None:
        """Keep the rules by which names are forgotten, and forget those under which nothing is used."""
        for charge in charges:
            self._rules[charge.name] = charge.rule
        if len(self._records) <= self._sweep_at:
            return
        parts = {
            name: self._rules[name].at(record, now)[0] / self._rules[name].size
            for name, record in self._records.items()
        }
        if len(parts) > _MOST_NAMES:
            least = sorted(parts, key=parts.__getitem__)[: len(parts) // 2]
            parts.update(dict.fromkeys(least, 0.0))
        for name, part in parts.items():
            if part <= 0:
                del self._records[name], self._rules[name]
        # If most are still in use, do not look at all of them for each newcomer.
        self._sweep_at = max(_NAMES, 2 * len(self._records))
