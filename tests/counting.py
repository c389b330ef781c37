"""A slow and exact model of limits: it remembers every use; uses drain in the order of their arrival."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass, field
from fractions import Fraction

from gateway.limits.token_bucket import Charge, Limit


@dataclass
class Use:
    """One use: `left` is the amount that still counts."""

    left: Fraction
    charge: Charge
    period: object = None


@dataclass
class Name:
    """The uses of one name."""

    uses: list[Use] = field(default_factory=list)
    since: Fraction = Fraction(0)
    period: object = None

    @property
    def level(self) -> Fraction:
        return sum((use.left for use in self.uses), Fraction(0))


class Model:
    """The model: `take` and `settle` of stores, at given times."""

    def __init__(self) -> None:
        self.names: dict[str, Name] = {}

    def _at(self, charge: Charge, now: Fraction) -> Name:
        """Return a name after time has passed."""
        name, limit = self.names.setdefault(charge.name, Name()), charge.limit
        if limit.period in ("day", "month"):
            day = datetime.datetime.fromtimestamp(float(now), datetime.UTC)
            period = (day.year, day.month, day.day if limit.period == "day" else 0)
            if period != name.period:
                name.uses, name.period = [], period
        elif limit.period == "minute":
            step, amount = step_of(limit)
            if not name.level:
                name.since = now
            while name.level and now - name.since >= step:
                name.since += step
                self._drain(name, amount)
            if not name.level:
                name.since = now
        return name

    def _forgive(self, charge: Charge, name: Name) -> None:
        """A debt of more than ten minutes is forgiven."""
        most = Fraction(charge.limit.max_level) + 10 * charge.limit.amount
        if charge.limit.period == "minute" and name.level > most:
            self._drain(name, name.level - most)

    @staticmethod
    def _drain(name: Name, amount: Fraction) -> None:
        for use in name.uses:
            gone = min(use.left, amount)
            use.left -= gone
            amount -= gone
        name.uses = [use for use in name.uses if use.left]

    def take(self, charges: list[Charge], now: Fraction) -> tuple[list[int], list[Use | None]]:
        """Return the indexes of the charges without room, and the use taken for each charge."""
        names = [self._at(charge, now) for charge in charges]
        for charge, name in zip(charges, names, strict=True):
            self._forgive(charge, name)
        over = [
            place
            for place, (charge, name) in enumerate(zip(charges, names, strict=True))
            if charge.cost and name.level + Fraction(charge.cost) > Fraction(charge.limit.max_level)
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
        """Replace the amounts that were taken with the amounts that were used."""
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
        """Return the level of a charge's name."""
        name = self._at(charge, now)
        self._forgive(charge, name)
        return name.level


def step_of(limit: Limit) -> tuple[Fraction, Fraction]:
    """Return the seconds of a step, and the amount that drains in it."""
    rate = Fraction(limit.amount, 60)
    step = min(Fraction(10), Fraction(limit.capacity) / rate)
    return step, step * rate


def close_to(level: float, exact: Fraction) -> bool:
    """Whether a float equals an exact value, within rounding errors."""
    return math.isclose(level, float(exact), rel_tol=1e-9, abs_tol=1e-6)
