"""The arithmetic of token buckets, through the counters of one process."""

from __future__ import annotations

import pytest

from gateway.limits.memory_counters import MemoryCounters
from gateway.limits.token_bucket import Charge, Limit


class Time:
    now = 1_700_000_000.25

    def __call__(self) -> float:
        return self.now


def test_a_reservation_under_a_dropped_name_gives_nothing_back() -> None:
    """The first use creates a record: earlier reservations under the name have drained."""
    time = Time()
    counters = MemoryCounters(time)
    limit = Limit(600, "minute")
    early = counters.take_now([Charge("a", limit, 300)])
    counters._records.clear()  # as if the name was dropped
    time.now += 60
    counters.take_now([Charge("a", limit, 300)])
    counters.settle(early, [0.0])
    assert counters.take_now([Charge("a", limit, 300)]).remaining(0) == 0
    assert counters.take_now([Charge("a", limit, 1)]).refused


@pytest.mark.parametrize("amount", [131, 1_451, 2_986, 100_000])
def test_the_remaining_amount_can_be_taken(amount: int) -> None:
    """Also if the amount of a refill is fractional, and independent of the times of the takes."""
    time = Time()
    counters = MemoryCounters(time)
    limit = Limit(amount, "minute")
    counters.take_now([Charge("a", limit, amount)])
    for _ in range(5):
        time.now += 10
        left = counters.take_now([Charge("a", limit, 2 * amount)]).remaining(0)
        decision = counters.take_now([Charge("a", limit, left)])
        assert not decision.refused
        assert counters.take_now([Charge("a", limit, 1)]).refused
        counters.settle(decision, [0.0])
