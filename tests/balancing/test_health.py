"""Health of all deployments: events between processes, reloads, and the report for operators."""

from __future__ import annotations

from gateway.azure.resources import Deployment, Resource
from gateway.balancing.circuit_breaker import HealthEvent
from gateway.settings import HealthSettings
from tests.balancing.test_circuit_breaker import EAST, made


def test_events_between_processes() -> None:
    """A circuit opens, and closes. A received event is not sent on, and shortens nothing."""
    east, clock, health = made(failures=1, rest=2)
    published: list[HealthEvent] = []
    health.listeners.append(published.append)
    east.failed(clock.now, "connect")
    assert published == [HealthEvent(east.key, 2, failing=True, reason="connect")]
    assert health.events() == published
    west, there, other = made(rest=2)
    forwarded: list[HealthEvent] = []
    other.listeners.append(forwarded.append)
    other.apply(published[0])
    assert (west.available_in(there.now), west.failing, west.reason) == (2, True, "connect")
    other.apply(HealthEvent(east.key, 1, failing=True, reason="dns"))
    assert west.available_in(there.now) == 2
    clock.now += 2
    east.begin(clock.now)
    east.succeeded(clock.now, east._trial)
    other.apply(published[1])
    assert (west.is_available(there.now), west.failing) == (True, False)
    other.apply(HealthEvent("unknown/deployment", 5))
    assert forwarded == []


def test_small_changes_are_not_published() -> None:
    """A hundred requests with the same 429 are one event."""
    east, clock, health = made()
    published: list[HealthEvent] = []
    health.listeners.append(published.append)
    for _ in range(100):
        east.cool_down(clock.now, 10, "rate_limited")
        clock.now += 0.001
    assert len(published) == 1


def test_a_reload_keeps_the_health_of_deployments_that_stay() -> None:
    """A new endpoint makes a new deployment; a removed one is not reported."""
    east, clock, health = made()
    east.cool_down(clock.now, 9, "rate_limited")
    moved = Deployment(Resource("east", "https://elsewhere.invalid"), "gpt-4o")
    health.use(HealthSettings(), [EAST, moved])
    assert health.of(EAST) is east
    assert health.of(moved).is_available(clock.now)
    health.use(HealthSettings(), [moved])
    assert [each.deployment for each in health.all()] == [moved]


def test_the_report() -> None:
    """The states of the circuit breaker, and the reasons."""
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
