"""Slow start: after a cooldown or a successful trial, few requests are sent first."""

from __future__ import annotations

from gateway.balancing.circuit_breaker import DeploymentHealth, HealthEvent
from gateway.balancing.circuit_state import CLOSED
from gateway.protocol.headers import Headers
from tests.balancing.test_circuit_breaker import made


def sent(east: DeploymentHealth, now: float) -> int:
    """Send as many requests as it allows now; return how many."""
    count = 0
    while east.is_available(now):
        assert count < 1000, "nothing holds them back"
        east.begin(now)
        count += 1
    return count


def test_the_window_doubles() -> None:
    """One, two, four, eight requests. A throttled deployment is not reported as unavailable."""
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


def test_a_request_without_a_quick_429_is_accepted() -> None:
    """A response may take a minute, a 429 takes milliseconds: the window does not wait for responses."""
    east, clock, _ = made()
    east.cool_down(clock.now, 1, "rate_limited")
    clock.now += 1
    for count in (1, 2, 4, 8):
        assert sent(east, clock.now) == count
        clock.now += east.available_in(clock.now)


def test_a_429_halves_the_threshold() -> None:
    """The first 429 of many counts; from half of the window on, the next slow start grows by 1 in each round."""
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


def test_a_slow_start_ends_without_a_429() -> None:
    """After ten seconds the circuit is closed."""
    east, clock, _ = made()
    east.cool_down(clock.now, 1, "rate_limited")
    clock.now += 11
    east.begin(clock.now)
    assert east.state is CLOSED
    assert east.is_available(clock.now)


def test_a_closed_circuit_starts_slowly() -> None:
    """Also if another process closed it."""
    for by_another_process in (False, True):
        east, clock, health = made(failures=1, rest=1)
        east.failed(clock.now, "connect")
        clock.now += 1
        if by_another_process:
            health.apply(HealthEvent(east.key))
        else:
            east.succeeded(clock.now, east.begin(clock.now))
        assert not east.failing
        assert [sent(east, clock.now), east.is_throttled(clock.now)] == [1, True]


def test_a_cooldown_of_another_process_ends_in_a_slow_start() -> None:
    """All processes would start at once."""
    east, clock, health = made()
    health.apply(HealthEvent(east.key, 2, reason="rate_limited"))
    clock.now += 2
    assert sent(east, clock.now) == 1


def test_throttling_keeps_the_headroom() -> None:
    """A deployment with a full quota stays the last resort, while it is throttled and after."""
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
