"""Health of all deployments: events between processes, reloads, and the report for operators."""

from __future__ import annotations

from gateway.azure.resources import Deployment, Resource
from gateway.balancing.circuit_breaker import HealthEvent
from gateway.settings import HealthSettings
from tests.balancing.test_circuit_breaker import EAST, made


def test_what_others_are_told_and_hear() -> None:
    """A rest, and its end; what is heard is not told again, and shortens nothing that is known here."""
    east, clock, health = made(failures=1, rest=2)
    told: list[HealthEvent] = []
    health.listeners.append(told.append)
    east.failed(clock.now, "connect")
    assert told == [HealthEvent(east.key, 2, failing=True, reason="connect")]
    assert health.events() == told
    west, there, other = made(rest=2)
    heard: list[HealthEvent] = []
    other.listeners.append(heard.append)
    other.apply(told[0])
    assert (west.available_in(there.now), west.failing, west.reason) == (2, True, "connect")
    other.apply(HealthEvent(east.key, 1, failing=True, reason="dns"))
    assert west.available_in(there.now) == 2
    clock.now += 2
    east.begin(clock.now)
    east.succeeded(clock.now, east._trial)
    other.apply(told[1])
    assert (west.is_available(there.now), west.failing) == (True, False)
    other.apply(HealthEvent("nobody/knows it", 5))
    assert heard == []


def test_small_steps_are_not_told() -> None:
    """A hundred requests that meet the same 429 are one piece of news."""
    east, clock, health = made()
    told: list[HealthEvent] = []
    health.listeners.append(told.append)
    for _ in range(100):
        east.cool_down(clock.now, 10, "rate_limited")
        clock.now += 0.001
    assert len(told) == 1


def test_a_reload_keeps_what_is_known_of_what_stays() -> None:
    """One that moved to another endpoint is another; one that is gone is told of no more."""
    east, clock, health = made()
    east.cool_down(clock.now, 9, "rate_limited")
    moved = Deployment(Resource("east", "https://elsewhere.invalid"), "gpt-4o")
    health.use(HealthSettings(), [EAST, moved])
    assert health.of(EAST) is east
    assert health.of(moved).is_available(clock.now)
    health.use(HealthSettings(), [moved])
    assert [each.deployment for each in health.all()] == [moved]


def test_the_report() -> None:
    """What the operator sees: the states of a circuit, and why."""
    east, clock, health = made(failures=1, rest=2)
    assert health.report()[0]["state"] == "available"
    east.begin(clock.now)
    east.succeeded(clock.now)
    east.failed(clock.now, "connect")
    assert health.report() == [
        {
            "resource": "east", "deployment": "gpt-4o", "region": "eastus", "state": "open", "reason": "connect",
            "cool_down": 2.0, "in_flight": 1, "error_share": 0.5, "requests": 2, "failures_in_a_row": 1,
            "headroom": None, "counts": {"answered": 1, "connect": 1},
        }
    ]  # fmt: skip
    clock.now += 2
    assert health.report()[0]["state"] == "half_open"
    east.begin(clock.now)
    east.succeeded(clock.now, east._trial)
    east.cool_down(clock.now, 3, "rate_limited")
    assert (health.report()[0]["state"], health.report()[0]["reason"]) == ("cooling_down", "rate_limited")
