"""Slow start: after a cooldown or a successful trial, few requests are sent first."""

from __future__ import annotations

from gateway.balancing.circuit_breaker import CLOSED, DeploymentHealth, HealthEvent
from gateway.protocol.headers import Headers
from tests.balancing.test_circuit_breaker import made


def sent(east: DeploymentHealth, now: float) -> int:
    """Send as many requests as it allows now; returns how many."""
    count = 0
    while east.is_available(now):
        assert count < 1000, "nothing holds them back"
        east.begin(now)
        count += 1
    return count


def test_after_a_rest_few_go_first_and_more_with_each_that_is_accepted() -> None:
    """A slow start: one, two, four, eight. Those that are held back are not told that it rests."""
    east, clock, health = made()
    east.cool_down(clock.now, 1, "rate_limited")
    clock.now += 1
    for count in (1, 2, 4, 8):
        assert sent(east, clock.now) == count
        assert east.is_throttled(clock.now)
        assert (east.report(clock.now)["state"], east.report(clock.now)["cool_down"]) == ("available", 0)
        assert health.events() == []
        for _ in range(count):
            east.response_started(clock.now, -1)


def test_what_is_not_refused_soon_was_accepted() -> None:
    """An answer may take a minute; a refusal takes milliseconds: the others do not wait for answers."""
    east, clock, _ = made()
    east.cool_down(clock.now, 1, "rate_limited")
    clock.now += 1
    for count in (1, 2, 4, 8):
        assert sent(east, clock.now) == count
        clock.now += east.available_in(clock.now)


def test_a_refusal_halves_where_the_window_grows_slowly() -> None:
    """Of many that come together the first refusal counts; the next slow start overshoots by little."""
    east, clock, _ = made()
    east.cool_down(clock.now, 1, "rate_limited")
    clock.now += 1
    for count in (1, 2, 4, 8):
        assert sent(east, clock.now) == count
        if count < 8:
            for _ in range(count):
                east.response_started(clock.now, -1)
    for _ in range(8):
        east.cool_down(clock.now, 1, "rate_limited", trial=-1)
    assert east.available_in(clock.now) == 1
    clock.now += 1
    counts = []
    for _ in range(6):
        counts.append(sent(east, clock.now))
        for _ in range(counts[-1]):
            east.response_started(clock.now, -1)
    assert counts == [1, 2, 4, 5, 6, 7]


def test_a_slow_start_ends_when_nothing_is_refused() -> None:
    """After ten seconds all may go, and nothing is asked of a request any more."""
    east, clock, _ = made()
    east.cool_down(clock.now, 1, "rate_limited")
    clock.now += 11
    east.begin(clock.now)
    assert east.state is CLOSED
    assert east.is_available(clock.now)


def test_a_deployment_that_was_tried_and_is_back_is_not_overrun() -> None:
    """What waited for a circuit to close follows in a slow start, also where another process has closed it."""
    for heard in (False, True):
        east, clock, health = made(failures=1, rest=1)
        east.failed(clock.now, "connect")
        clock.now += 1
        if heard:
            health.apply(HealthEvent(east.key))
        else:
            east.succeeded(clock.now, east.begin(clock.now))
        assert not east.failing
        assert [sent(east, clock.now), east.is_throttled(clock.now)] == [1, True]


def test_a_rest_that_another_process_told_of_ends_in_a_slow_start_too() -> None:
    """All of them would begin at once."""
    east, clock, health = made()
    health.apply(HealthEvent(east.key, 2, reason="rate_limited"))
    clock.now += 2
    assert sent(east, clock.now) == 1


def test_being_held_back_leaves_what_is_known_of_its_room() -> None:
    """One that is full stays the last that is taken, while it is held back and after."""
    east, clock, _ = made()
    east.cool_down(clock.now, 1, "rate_limited")
    clock.now += 1
    full = Headers({"x-ratelimit-remaining-requests": "0", "x-ratelimit-limit-requests": "10"})
    east.observe(clock.now, full.fields)
    until = east.avoid_until
    assert until > clock.now + 1
    assert sent(east, clock.now) == 1
    assert east.avoid_until == until
    east.response_started(clock.now, -1)
    assert (east.avoid_until, east.is_available(clock.now)) == (until, True)
