"""A slow and exact model of limits: every use is remembered, and drains away in the order in which it came."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass, field
from fractions import Fraction

from gateway.limits.token_bucket import Charge, Limit


@dataclass
class Use:
    """One use: what of it still counts."""

    left: Fraction
    charge: Charge
    period: object = None


@dataclass
class Name:
    """What was used under one name."""

    uses: list[Use] = field(default_factory=list)
    since: Fraction = Fraction(0)
    period: object = None

    @property
    def level(self) -> Fraction:
        return sum((use.left for use in self.uses), Fraction(0))


class Model:
    """The model: `take` and `settle` as stores have them, at times that are given."""

    def __init__(self) -> None:
        self.names: dict[str, Name] = {}

    def _at(self, charge: Charge, now: Fraction) -> Name:
        """Let time pass under a name."""
        name, rule = self.names.setdefault(charge.name, Name()), charge.rule
        if rule.period in ("day", "month"):
            day = datetime.datetime.fromtimestamp(float(now), datetime.UTC)
            period = (day.year, day.month, day.day if rule.period == "day" else 0)
            if period != name.period:
                name.uses, name.period = [], period
        elif rule.period == "minute":
            step, amount = step_of(rule)
            if not name.level:
                name.since = now
            while name.level and now - name.since >= step:
                name.since += step
                self._drain(name, amount)
            if not name.level:
                name.since = now
        return name

    def _forgive(self, charge: Charge, name: Name) -> None:
        """Nobody has to make up for more than ten minutes."""
        most = Fraction(charge.rule.most) + 10 * charge.rule.limit
        if charge.rule.period == "minute" and name.level > most:
            self._drain(name, name.level - most)

    @staticmethod
    def _drain(name: Name, amount: Fraction) -> None:
        for use in name.uses:
            gone = min(use.left, amount)
            use.left -= gone
            amount -= gone
        name.uses = [use for use in name.uses if use.left]

    def take(self, charges: list[Charge], now: Fraction) -> tuple[list[int], list[Use | None]]:
        """Return the places without room, and what was taken for each charge."""
        names = [self._at(charge, now) for charge in charges]
        for charge, name in zip(charges, names, strict=True):
            self._forgive(charge, name)
        over = [
            place
            for place, (charge, name) in enumerate(zip(charges, names, strict=True))
            if charge.cost and name.level + Fraction(charge.cost) > Fraction(charge.rule.most)
        ]
        if any(not charges[place].shadow for place in over):
            return over, [None] * len(charges)
        held: list[Use | None] = []
        for place, (charge, name) in enumerate(zip(charges, names, strict=True)):
            use = None if place in over else Use(Fraction(charge.cost), charge, name.period)
            if use is not None:
                name.uses.append(use)
            held.append(use)
        return over, held

    def settle(self, held: list[Use | None], actual: list[float | None], now: Fraction) -> None:
        """Let what was really used take the place of what was taken."""
        for use, used in zip(held, actual, strict=True):
            if use is None or used is None:
                continue
            name = self._at(use.charge, now)
            more = Fraction(used) - Fraction(use.charge.cost)
            if more > 0:
                name.uses.append(Use(more, use.charge, name.period))
            elif any(each is use for each in name.uses):
                use.left -= min(use.left, -more)
                name.uses = [each for each in name.uses if each.left]

    def level(self, charge: Charge, now: Fraction) -> Fraction:
        """Return what counts as used under a charge's name."""
        name = self._at(charge, now)
        self._forgive(charge, name)
        return name.level


def step_of(rule: Limit) -> tuple[Fraction, Fraction]:
    """Return the seconds of a step, and what drains in it."""
    rate = Fraction(rule.limit, 60)
    step = min(Fraction(10), Fraction(rule.size) / rate)
    return step, step * rate


def close_to(level: float, exact: Fraction) -> bool:
    """Whether a double is as near as doubles get."""
    return math.isclose(level, float(exact), rel_tol=1e-9, abs_tol=1e-6)
