"""How much of something may be used in a time, and what that makes of what was used: plain arithmetic.

There is no I/O here and no clock. What is counted under one name is a `Record`; a `Limit` says what becomes of it as
time passes, how much room there is, and how much of what was held may be given back. Every store of counters does
the same: that of this process, that which the workers of a machine share, and Redis (whose script says it in Lua).
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec

__all__ = ("NONE", "Charge", "Decision", "Limit", "Period", "Record")

Period: TypeAlias = Literal["minute", "day", "month", "at_once"]

# What was used in a minute comes back in steps of at most so many seconds, as Azure counts its own limits: between
# two steps a caller gets exactly its limit, however long its requests take to arrive.
STEP = 10.0
# For how many seconds at most a caller has to make up for what was used above its limit.
_OWED = 600.0
# What is held at once is thought to end within so many seconds, where nothing else tells.
_HELD = 86_400.0
# Of a step, so that seconds since the epoch, which doubles have to a quarter of a microsecond, still make it whole.
_ROUNDING = 1e-9
# Of a level, which a rate that is no whole number leaves a little above or below the number it means.
_LITTLE = 1e-6


# What was used under one name: (level, since, inflow, born). The level is what counts as used; `since` is when a
# minute's last step was, or when the day or month began; `inflow` is all that was added since `born`, so that how much
# of it has gone again is known. (A plain tuple: one is made for each request.)
Record: TypeAlias = tuple[float, float, float, float]

NONE: Record = (0.0, 0.0, 0.0, 0.0)


class Limit:
    """A limit: so much in a `period`.

    A minute's limit is a bucket: `burst` (the limit, if it is left out) may be used at once, and it comes back at the
    limit's rate. A day and a month are those of the calendar, in UTC. `at_once` counts what is held at one time.
    """

    __slots__ = (
        "_end",
        "_most_owed",
        "_start",
        "burst",
        "limit",
        "most",
        "per_step",
        "period",
        "size",
        "step",
        "terms",
    )

    def __init__(self, limit: int, period: Period, burst: int | None = None) -> None:
        self.limit = limit
        self.period = period
        self.burst = burst
        self.size = float(limit if burst is None else burst)
        self.most = self.size + _LITTLE
        """How much may be used at once, and the level above which there is no room."""
        rate = limit / 60
        self.step = min(STEP, self.size / rate)
        """Of a minute's limit, the seconds from one step to the next, and `per_step` what comes back in it."""
        self.per_step = self.step * rate
        self.terms = limit, period, burst
        """By which two rules are the same."""
        self._most_owed = self.most + _OWED * rate
        self._start = self._end = 0.0  # of the day or month at hand

    def __repr__(self) -> str:
        return f"Limit({self.limit}, {self.period!r}, {self.burst})"

    def at(self, record: Record, now: float) -> Record:
        """Return what becomes of a record by `now`, in seconds since the epoch, for whoever asks for room.

        What is owed for more than ten minutes is forgiven: a limit that was lowered must not keep its callers out for
        hours.
        """
        record = self.passed(record, now)
        if self.period == "minute" and record[0] > self._most_owed:
            return self._most_owed, record[1], record[2], record[3]
        return record

    def passed(self, record: Record, now: float) -> Record:
        """Return what becomes of a record as time passes."""
        level, since, inflow, born = record
        if self.period == "minute":
            if level <= 0:  # the first use begins the steps; what was held before has drained, and is not given back
                return 0.0, now, 0.0, now
            if now < since:  # a clock that was set back begins the steps anew
                return level, now, inflow, born
            steps = math.floor((now - since) / self.step + _ROUNDING)
            if not steps:
                return record
            level -= steps * self.per_step
            if level <= 0:
                return 0.0, now, 0.0, now
            return level, since + steps * self.step, inflow, born
        if self.period == "at_once":
            return record
        if not self._start <= now < self._end:
            self._start, self._end = calendar(self.period, now)
        return record if since >= self._start else (0.0, self._start, 0.0, self._start)

    def with_use(self, record: Record, amount: float) -> Record:
        """Return a record with more use."""
        level, since, inflow, born = record
        return level + amount, since, inflow + amount, born

    def settled(self, record: Record, held: Record, cost: float, actual: float) -> Record:
        """Return a record in which `actual` takes the place of a `cost`; `held` is how the record was behind it.

        What comes back is no more than is still counted: a reservation that has drained makes no room for others. It
        may be less, where others were settled before; never more. What was used beyond it counts as used now.
        """
        level, since, inflow, born = record
        if actual >= cost:
            return self.with_use(record, actual - cost)
        if held[3] != born:
            return record
        back = cost - actual
        if self.period == "minute":
            drained = inflow - level
            back = min(back, max(0.0, held[2] - drained))
        return max(0.0, level - back), since, inflow, born

    def left(self, record: Record) -> int:
        """Return how much may be used at once."""
        return max(0, math.floor(self.most - record[0]))

    def reset(self, record: Record, now: float) -> float:
        """Return the seconds until all of it may be used again."""
        if record[0] <= 0 or self.period == "at_once":
            return 0.0
        return self._until(record, record[0], now)

    def kept(self, record: Record, now: float) -> float:
        """Return for how many seconds a record says something, or longer, so that it costs nothing to know."""
        if record[0] <= 0:
            return 0.0
        if self.period == "minute":
            return (record[0] / self.per_step + 1) * self.step
        return _HELD if self.period == "at_once" else self._until(record, record[0], now)

    def wait(self, record: Record, cost: float, now: float) -> float:
        """Return the seconds until there is room for `cost`: infinity where there never is."""
        missing = record[0] + cost - self.size
        if missing <= _LITTLE:
            return 0.0
        if cost > self.size:
            return math.inf
        return 1.0 if self.period == "at_once" else self._until(record, missing, now)

    def _until(self, record: Record, amount: float, now: float) -> float:
        if self.period == "minute":
            steps = math.ceil(amount / self.per_step - _ROUNDING)
            return max(0.001, record[1] + steps * self.step - now)
        return max(0.001, calendar(self.period, now)[1] - now)


def calendar(period: Period, now: float) -> tuple[float, float]:
    """Return the beginning and the end of the day or month, in UTC, in which `now` is."""
    if period == "day":
        start = now - now % 86_400
        return start, start + 86_400
    first = datetime.datetime.fromtimestamp(now, datetime.UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    after = (first + datetime.timedelta(days=32)).replace(day=1)
    return first.timestamp(), after.timestamp()


class Charge:
    """A use of `cost` under a `name`, by a rule. In the `shadow` it is counted where there is room, and never refused.

    Costs are whole numbers: of requests, of tokens, of millionths of a currency's unit. Nothing always has room.
    """

    __slots__ = ("cost", "name", "rule", "shadow")

    def __init__(self, name: str, rule: Limit, cost: float = 1.0, *, shadow: bool = False) -> None:
        self.name = name
        self.rule = rule
        self.cost = cost
        self.shadow = shadow

    def __repr__(self) -> str:
        return f"<Charge {self.name} {self.cost:g}>"


class Decision(msgspec.Struct):
    """What became of charges that were to be taken together.

    `records` are theirs behind it, in their order, at `now`. `over` are the places of those without room: where one
    of them is not in the shadow, all are `refused` and nothing was taken. `settled` is set by the store, which settles
    once.
    """

    charges: Sequence[Charge]
    records: Sequence[Record]
    now: float
    over: Sequence[int] = ()
    refused: bool = False
    settled: bool = False

    def holds(self, place: int) -> bool:
        """Whether the charge at a place was taken."""
        return not self.refused and place not in self.over

    def left(self, place: int) -> int:
        """Return how much of a charge's limit is left."""
        return self.charges[place].rule.left(self.records[place])

    def reset(self, place: int) -> float:
        """Return the seconds until all of a charge's limit may be used again."""
        return self.charges[place].rule.reset(self.records[place], self.now)

    def wait(self, place: int) -> float:
        """Return the seconds until there is room for a charge; infinity where there never is."""
        charge = self.charges[place]
        return charge.rule.wait(self.records[place], charge.cost, self.now)

    def fullest(self) -> tuple[str, float]:
        """Return the name, of those for which there is no room, for which to wait longest, and the seconds."""
        places = [place for place in self.over if not self.charges[place].shadow]
        seconds, place = max((self.wait(place), place) for place in places)
        return self.charges[place].name, seconds
