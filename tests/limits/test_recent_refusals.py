"""Recent refusals are repeated without a round trip to the store."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from gateway.limits.memory_counters import MemoryCounters
from gateway.limits.recent_refusals import RecentRefusals
from gateway.limits.token_bucket import Charge, Decision, Limit

LIMIT = Limit(600, "minute", 10)


class Time:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Asker:
    """Takes from the counters if there is no recent refusal, and counts these takes."""

    def __init__(self) -> None:
        self.time = Time()
        self.refusals = RecentRefusals(self.time)
        self.counters = MemoryCounters(self.time)
        self.asked = 0

    def take(self, charges: Sequence[Charge]) -> Decision:
        known = self.refusals.find(charges)
        if known is not None:
            return known
        self.asked += 1
        decision = self.counters.take_now(charges)
        if decision.refused:
            self.refusals.add(decision)
        return decision


@pytest.fixture
def asker() -> Asker:
    """Counters with a limit of which one is left."""
    asker = Asker()
    assert not asker.take([Charge("a", LIMIT, 9)]).refused
    return asker


def test_a_repeated_request_is_refused_without_the_store(asker: Asker) -> None:
    """The same or a larger cost is refused until the wait is over, with the same decision as the store's."""
    first = asker.take([Charge("a", LIMIT, 2)])
    assert first.refused
    asker.time.now += 0.25
    for cost in (2, 3, 50):
        decision = asker.take([Charge("a", LIMIT, cost)])
        assert decision.refused
        assert list(decision.over) == [0]
        assert decision.retry_after(0) == Charge("a", LIMIT, cost).limit.retry_after(
            decision.records[0], cost, asker.time.now
        )
    assert decision.remaining(0) == first.remaining(0) == 1
    assert asker.asked == 2
    asker.time.now += 0.75
    assert asker.take([Charge("a", LIMIT, 2)]).refused is False
    assert asker.asked == 3


def test_it_lasts_a_second_at_most(asker: Asker) -> None:
    """The store is asked again after a second, even if the wait is longer: another gateway may have made room."""
    day = [Charge("day", Limit(1, "day"), 2)]
    for _ in range(10):
        asker.take(day)
    assert asker.asked == 2
    asker.time.now += 0.999
    asker.take(day)
    assert asker.asked == 2
    asker.time.now += 0.001
    asker.take(day)
    assert asker.asked == 3


def test_the_store_decides_if_there_may_be_room(asker: Asker) -> None:
    """A smaller cost, other names, a raised limit, a shadow charge, and a name whose use was given back."""
    asker.take([Charge("a", LIMIT, 2)])
    asked = asker.asked
    for charges in (
        [Charge("a", LIMIT, 1.5)],
        [Charge("a", LIMIT, 2), Charge("b", LIMIT)],
        [Charge("a", Limit(600, "minute", 100), 2)],
        [Charge("a", LIMIT, 2, shadow=True)],
        [Charge("b", LIMIT, 2)],
    ):
        asker.take(charges)
        asked += 1
        assert asker.asked == asked
    full = [Charge("a", LIMIT, 20)]
    asker.take(full)
    asker.take(full)
    asker.refusals.forget("a")
    assert asker.asked == asked + 1
    asker.take(full)
    assert asker.asked == asked + 2


def test_a_repeated_refusal_covers_all_charges(asker: Asker) -> None:
    """The decision covers all charges. Those with room have the records of the earlier refusal."""
    charges = [
        Charge("wide", Limit(100, "day"), 5),
        Charge("a", LIMIT, 2),
        Charge("shade", Limit(1, "day"), 2, shadow=True),
    ]
    first = asker.take(charges)
    again = asker.take(
        [Charge("wide", Limit(100, "day"), 5), Charge("a", LIMIT, 3), Charge("shade", Limit(1, "day"), 2, shadow=True)]
    )
    assert asker.asked == 2
    assert list(first.over) == list(again.over) == [1, 2]
    assert again.remaining(0) == first.remaining(0) == 100
    assert not any(again.was_taken(place) for place in range(3))


def test_the_number_of_refusals_is_bounded(asker: Asker) -> None:
    """Refusals under many different names do not fill the memory."""
    for place in range(25_000):
        asker.take([Charge(f"name{place}", Limit(1, "day"), 2)])
    assert len(asker.refusals) <= 10_000
