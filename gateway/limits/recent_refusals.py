"""What was refused a moment ago is refused again without asking: a caller who insists costs no round trip."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from gateway.limits.token_bucket import Charge, Decision

__all__ = ("RecentRefusals",)

# For how many seconds at most: another gateway may have made room.
_STRETCH = 1.0
# Above this many, those that are over are forgotten.
_NAMES = 10_000


class _Refusal(msgspec.Struct):
    verdict: Decision
    cost: float
    since: float
    until: float


class RecentRefusals:
    """The refusals of the last second, by the name that had no room."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, _Refusal] = {}

    def __len__(self) -> int:
        return len(self._known)

    def of(self, charges: Sequence[Charge]) -> Decision | None:
        """Return the verdict on charges that need no question; None where they do."""
        if not self._known:
            return None
        for charge in charges:
            refusal = self._known.get(charge.name)
            if refusal is None or charge.shadow:
                continue
            now = self._clock()
            if now >= refusal.until:
                del self._known[charge.name]
                continue
            before = refusal.verdict
            # A smaller cost may find room, a limit may have been raised, and other names have other records.
            if charge.cost < refusal.cost or [each.name for each in charges] != [each.name for each in before.charges]:
                continue
            over = [
                place for place, each in enumerate(charges) if before.records[place][0] + each.cost > each.rule.most
            ]
            if any(charges[place] is charge for place in over):
                return Decision(charges, before.records, before.now + now - refusal.since, over, refused=True)
        return None

    def note(self, verdict: Decision) -> None:
        """Remember a refusal."""
        now = self._clock()
        for place in verdict.over:
            charge = verdict.charges[place]
            if charge.shadow:
                continue
            wait = min(_STRETCH, verdict.wait(place))
            self._known[charge.name] = _Refusal(verdict, charge.cost, now, now + wait)
        if len(self._known) > _NAMES:
            self._known = {name: each for name, each in self._known.items() if each.until > now}
            if len(self._known) > _NAMES:
                self._known.clear()

    def forget(self, name: str) -> None:
        """Ask again under a name: something was given back."""
        self._known.pop(name, None)
