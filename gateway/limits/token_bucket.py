"""Token buckets and quotas as plain arithmetic: `Limit.refill`, the room that is left, and the settlement of a use.

There is no I/O here and no clock. A `Record` holds the use under one name; a `Limit` refills it over time, and says how
much room there is and how much of a reservation can be given back. Every store of counters does the same: the one of
this process, the one that the workers of a machine share, and Redis (whose script repeats it in Lua).
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec

__all__ = ("EMPTY", "Charge", "Decision", "Limit", "Period", "Record")

Period: TypeAlias = Literal["minute", "day", "month", "at_once"]

# Longest interval between two refills of a per-minute limit, in seconds. Azure refills its own limits in steps, too:
# between two steps a caller gets exactly its limit, however long its requests take to arrive.
MAX_REFILL_INTERVAL = 10.0
# A use above the limit is a debt of the caller. Maximum debt, in seconds of refill.
_MAX_DEBT = 600.0
# Assumed longest duration of a use that is counted `at_once`, in seconds.
_MAX_DURATION = 86_400.0
# Tolerance, in intervals: doubles hold seconds since the epoch to a quarter of a microsecond.
_INTERVAL_TOLERANCE = 1e-9
# Tolerance of a level: with a fractional rate it is slightly above or below the number it means.
_LEVEL_TOLERANCE = 1e-6


# The use under one name: (level, since, inflow, born). `level` counts as used now. `since` is the last refill of a
# per-minute limit, or the start of the day or month. `inflow` is everything added since `born`: inflow minus level has
# been refilled since. (A plain tuple: each request makes one.)
Record: TypeAlias = tuple[float, float, float, float]

EMPTY: Record = (0.0, 0.0, 0.0, 0.0)


class Limit:
    """A limit: an `amount` per `period`.

    A limit per minute is a token bucket: `burst` (default: the amount) can be used at once, and it refills at the rate
    of the amount. Days and months are those of the calendar, in UTC. `at_once` limits concurrent use.
    """

    __slots__ = (
        "_end",
        "_max_level_with_debt",
        "_start",
        "amount",
        "burst",
        "capacity",
        "max_level",
        "period",
        "refill_amount",
        "refill_interval",
        "terms",
    )

    def __init__(self, amount: int, period: Period, burst: int | None = None) -> None:
        self.amount = amount
        self.period = period
        self.burst = burst
        self.capacity = float(amount if burst is None else burst)
        """The most that can be used at once."""
        self.max_level = self.capacity + _LEVEL_TOLERANCE
        """Above this level there is no room."""
        rate = amount / 60
        self.refill_interval = min(MAX_REFILL_INTERVAL, self.capacity / rate)
        """Seconds between two refills of a limit per minute."""
        self.refill_amount = self.refill_interval * rate
        """The amount of each refill."""
        self.terms = amount, period, burst
        """Equal limits have equal terms."""
        self._max_level_with_debt = self.max_level + _MAX_DEBT * rate
        self._start = self._end = 0.0  # of the current day or month

    def __repr__(self) -> str:
        return f"Limit({self.amount}, {self.period!r}, {self.burst})"

    def current(self, record: Record, now: float) -> Record:
        """Return a record as it counts at `now` (seconds since the epoch) for a new request: refilled, debt capped.

        A debt of more than ten minutes is forgiven: after a limit is lowered, its callers must not wait for hours.
        """
        record = self.refill(record, now)
        if self.period == "minute" and record[0] > self._max_level_with_debt:
            return self._max_level_with_debt, record[1], record[2], record[3]
        return record

    def refill(self, record: Record, now: float) -> Record:
        """Refill the bucket: return the record after the time up to `now`. A new day or month starts empty."""
        level, since, inflow, born = record
        if self.period == "minute":
            if level <= 0:  # the first use starts the intervals; older reservations have drained and return nothing
                return 0.0, now, 0.0, now
            if now < since:  # the clock was set back: restart the interval
                return level, now, inflow, born
            intervals = math.floor((now - since) / self.refill_interval + _INTERVAL_TOLERANCE)
            if not intervals:
                return record
            level -= intervals * self.refill_amount
            if level <= 0:
                return 0.0, now, 0.0, now
            return level, since + intervals * self.refill_interval, inflow, born
        if self.period == "at_once":
            return record
        if not self._start <= now < self._end:
            self._start, self._end = calendar_period(self.period, now)
        return record if since >= self._start else (0.0, self._start, 0.0, self._start)

    def add(self, record: Record, amount: float) -> Record:
        """Return a record with more use."""
        level, since, inflow, born = record
        return level + amount, since, inflow + amount, born

    def settle(self, record: Record, reserved: Record, cost: float, actual: float) -> Record:
        """Return a record with the `actual` use instead of the reserved `cost`.

        `reserved` is the record right after the reservation. Only what still counts is given back: a reservation that
        has drained makes no room for others. If others settled first it can be less, never more. Use above the
        reservation counts as used now.
        """
        level, since, inflow, born = record
        if actual >= cost:
            return self.add(record, actual - cost)
        if reserved[3] != born:
            return record
        back = cost - actual
        if self.period == "minute":
            drained = inflow - level
            back = min(back, max(0.0, reserved[2] - drained))
        return max(0.0, level - back), since, inflow, born

    def remaining(self, record: Record) -> int:
        """Return how much can be used at once."""
        return max(0, math.floor(self.max_level - record[0]))

    def reset(self, record: Record, now: float) -> float:
        """Return the seconds until the whole limit can be used again."""
        if record[0] <= 0 or self.period == "at_once":
            return 0.0
        return self._seconds_until(record, record[0], now)

    def lifetime(self, record: Record, now: float) -> float:
        """Return the seconds for which a record must be kept, at least."""
        if record[0] <= 0:
            return 0.0
        if self.period == "minute":
            return (record[0] / self.refill_amount + 1) * self.refill_interval
        return _MAX_DURATION if self.period == "at_once" else self._seconds_until(record, record[0], now)

    def retry_after(self, record: Record, cost: float, now: float) -> float:
        """Return the seconds until there is room for `cost`; infinity if there never is."""
        missing = record[0] + cost - self.capacity
        if missing <= _LEVEL_TOLERANCE:
            return 0.0
        if cost > self.capacity:
            return math.inf
        return 1.0 if self.period == "at_once" else self._seconds_until(record, missing, now)

    def _seconds_until(self, record: Record, amount: float, now: float) -> float:
        """Return the seconds until `amount` has been refilled."""
        if self.period == "minute":
            intervals = math.ceil(amount / self.refill_amount - _INTERVAL_TOLERANCE)
            return max(0.001, record[1] + intervals * self.refill_interval - now)
        return max(0.001, calendar_period(self.period, now)[1] - now)


def calendar_period(period: Period, now: float) -> tuple[float, float]:
    """Return the start and the end of the current day or month, in UTC."""
    if period == "day":
        start = now - now % 86_400
        return start, start + 86_400
    first = datetime.datetime.fromtimestamp(now, datetime.UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    after = (first + datetime.timedelta(days=32)).replace(day=1)
    return first.timestamp(), after.timestamp()


class Charge:
    """A use of `cost` under a `name`, against a `limit`. A `shadow` charge counts if there is room, and never refuses.

    Costs are whole numbers: of requests, of tokens, of millionths of the currency unit. A cost of 0 always has room.
    """

    __slots__ = ("cost", "limit", "name", "shadow")

    def __init__(self, name: str, limit: Limit, cost: float = 1.0, *, shadow: bool = False) -> None:
        self.name = name
        self.limit = limit
        self.cost = cost
        self.shadow = shadow

    def __repr__(self) -> str:
        return f"<Charge {self.name} {self.cost:g}>"


class Decision(msgspec.Struct):
    """The result of taking charges together.

    `records` has the record of each charge, in the order of `charges`, at `now`. `over` has the indexes of the charges
    without room: unless all of them are shadow charges, the whole take is `refused` and takes nothing. The store sets
    `settled`, and settles only once.
    """

    charges: Sequence[Charge]
    records: Sequence[Record]
    now: float
    over: Sequence[int] = ()
    refused: bool = False
    settled: bool = False

    def was_taken(self, index: int) -> bool:
        """Whether this charge was taken."""
        return not self.refused and index not in self.over

    def remaining(self, index: int) -> int:
        """Return how much is left of this charge's limit."""
        return self.charges[index].limit.remaining(self.records[index])

    def reset(self, index: int) -> float:
        """Return the seconds until the whole limit of this charge can be used again."""
        return self.charges[index].limit.reset(self.records[index], self.now)

    def retry_after(self, index: int) -> float:
        """Return the seconds until there is room for this charge; infinity if there never is."""
        charge = self.charges[index]
        return charge.limit.retry_after(self.records[index], charge.cost, self.now)

    def longest_wait(self) -> tuple[str, float]:
        """Return the name, among those without room, with the longest wait for room, and that wait in seconds."""
        indexes = [index for index in self.over if not self.charges[index].shadow]
        seconds, index = max((self.retry_after(index), index) for index in indexes)
        return self.charges[index].name, seconds
