"""The circuit breaker: when a deployment is unavailable, and when it is available again."""

from __future__ import annotations

from gateway.azure.resources import Deployment, Resource
from gateway.balancing.circuit_breaker import DeploymentHealth, HealthEvent
from gateway.balancing.circuit_state import CircuitState
from gateway.balancing.health import Health
from gateway.settings import HealthSettings

EAST = Deployment(Resource("east", "https://east.invalid", region="eastus"), "gpt-4o")


class Clock:
    """A clock that moves only by assignment."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def made(**settings: float) -> tuple[DeploymentHealth, Clock, Health]:
    """Return one deployment's health under these settings."""
    clock = Clock()
    health = Health(clock)
    health.use(HealthSettings(**settings), [EAST])  # type: ignore[arg-type] # numbers of either kind
    return health.of(EAST), clock, health


def test_failures_in_a_row_open_the_circuit() -> None:
    """A success in between resets the count."""
    east, clock, _ = made(failures=3, rest=2)
    for _ in range(2):
        east.failed(clock.now, "broken_off")
    east.succeeded(clock.now)
    for _ in range(2):
        east.failed(clock.now, "broken_off")
    assert east.is_available(clock.now)
    east.failed(clock.now, "timeout")
    assert not east.is_available(clock.now)
    assert east.available_in(clock.now) == 2
    assert (east.failing, east.reason) == (True, "timeout")


def test_a_share_of_failures_opens_the_circuit() -> None:
    """With enough requests in the window; older ones do not count."""
    east, clock, _ = made(failures=1000, share=0.5, least=10, window=10)
    for _ in range(100):
        east.succeeded(clock.now)
    clock.now += 11
    for _ in range(4):
        east.failed(clock.now, "status_500")
        east.succeeded(clock.now)
        clock.now += 0.5
    east.failed(clock.now, "status_500")
    assert east.is_available(clock.now)
    east.failed(clock.now, "status_500")
    assert not east.is_available(clock.now)


def test_the_success_of_a_trial_closes_the_circuit() -> None:
    """There is one trial at a time; failed trials double the time until the next, up to a maximum."""
    east, clock, _ = made(failures=1, rest=1, most_rest=3)
    east.begin(clock.now)
    east.failed(clock.now, "connect")
    east.end()
    for rest in (2, 3, 3):
        clock.now = east.blocked_until
        assert east.is_available(clock.now)
        assert east.begin(clock.now)
        assert not east.is_available(clock.now)
        assert east.half_open
        east.failed(clock.now, "connect", trial=east._trial)
        east.end()
        assert east.available_in(clock.now) == rest
    clock.now = east.blocked_until
    assert east.begin(clock.now)
    east.succeeded(clock.now, east._trial)
    east.end()
    assert (east.failing, east.is_available(clock.now)) == (False, True)
    east.begin(clock.now)
    assert not east.half_open
    east.failed(clock.now, "connect")
    assert east.available_in(clock.now) == 1  # as at the first time


def test_requests_from_before_the_circuit_opened_change_nothing() -> None:
    """Late failures do not extend the time, and late responses do not end it."""
    east, clock, _ = made(failures=1, rest=4)
    east.failed(clock.now, "connect")
    clock.now += 1
    east.failed(clock.now, "connect")
    east.succeeded(clock.now)
    assert east.available_in(clock.now) == 3


def test_one_permanent_failure_opens_the_circuit() -> None:
    """A wrong key, or a missing deployment: for `most_rest`."""
    east, clock, _ = made(failures=5, most_rest=30)
    east.failed(clock.now, "refused", permanent=True)
    assert east.available_in(clock.now) == 30


def test_a_429_is_no_failure() -> None:
    """It starts a cooldown for as long as Azure asks, an hour at most, and does not open the circuit."""
    east, clock, _ = made(failures=1)
    east.cool_down(clock.now, 7, "rate_limited")
    east.cool_down(clock.now, 2, "rate_limited")
    assert east.available_in(clock.now) == 7
    clock.now += 7
    assert east.is_available(clock.now)
    east.begin(clock.now)
    assert not east.half_open
    east.cool_down(clock.now, 86_400, "rate_limited")
    assert east.available_in(clock.now) == 3600


def test_a_429_on_the_trial_closes_the_circuit() -> None:
    """The deployment is reachable, but busy."""
    east, clock, _ = made(failures=1, rest=1)
    east.failed(clock.now, "connect")
    clock.now += 1
    assert east.begin(clock.now)
    east.cool_down(clock.now, 2, "rate_limited", trial=east._trial)
    assert not east.failing
    assert east.available_in(clock.now) == 2


def test_a_trial_without_a_result_is_replaced() -> None:
    """By another request, after some seconds."""
    east, clock, _ = made(failures=1, rest=1, most_rest=20)
    east.failed(clock.now, "connect")
    clock.now += 1
    assert east.begin(clock.now)
    assert not east.is_available(clock.now)
    clock.now += 5
    assert east.begin(clock.now)


def test_a_failure_that_does_not_count_is_only_reported() -> None:
    """The request itself may be its cause: it counts neither in a row nor in the share."""
    east, clock, health = made(failures=2, least=2)
    for _ in range(10):
        east.failed(clock.now, "status_500", counts=False)
    assert east.is_available(clock.now)
    assert health.report()[0]["counts"] == {"answered": 0, "status_500": 10}


def test_the_start_of_a_stream_closes_the_circuit_and_ends_no_row_of_failures() -> None:
    """Only its end shows whether it was a success."""
    east, clock, _ = made(failures=3, rest=1)
    for _ in range(2):
        east.response_started(clock.now)
        east.failed(clock.now, "broken_off")
    east.response_started(clock.now)
    assert east.is_available(clock.now)
    east.failed(clock.now, "broken_off")
    assert not east.is_available(clock.now)
    clock.now += 1
    assert east.begin(clock.now)
    east.response_started(clock.now, east._trial)
    assert east.is_available(clock.now)
    assert not east.failing


def test_nothing_shortens_a_cooldown() -> None:
    """Neither a failed or abandoned trial, a probe, a closed circuit, nor events of other processes."""
    east, clock, health = made(failures=1, rest=1)

    def failing() -> int:
        east.block_until(clock.now)
        east.state = CircuitState.OPEN
        tried = east.begin(clock.now)
        assert tried
        return tried

    tried = failing()
    east.cool_down(clock.now, 60, "rate_limited")  # of an earlier request
    east.failed(clock.now, "connect", trial=tried)
    assert east.available_in(clock.now) == 60
    health.apply(HealthEvent(east.key))
    assert east.available_in(clock.now) == 60
    clock.now += 60
    tried = failing()
    health.apply(HealthEvent(east.key, 30, reason="rate_limited"))
    east.abandoned(clock.now, tried)
    assert east.available_in(clock.now) == 30
    east.probed(clock.now, None, 5)
    assert east.available_in(clock.now) == 30
    east.succeeded(clock.now, tried)
    assert east.available_in(clock.now) == 30


def test_of_two_trials_the_newer_one_counts() -> None:
    """A failure of the replaced one does not let a third begin."""
    east, clock, _ = made(failures=1, rest=1, most_rest=20)
    east.failed(clock.now, "connect")
    clock.now += 1
    old = east.begin(clock.now)
    clock.now += 5
    new = east.begin(clock.now)
    assert old != new
    east.failed(clock.now, "connect", trial=old)
    east.abandoned(clock.now, old)
    assert east.half_open
    assert not east.is_available(clock.now)
    east.failed(clock.now, "connect", trial=new)
    assert east.available_in(clock.now) == 2


def test_a_slow_upload_is_not_an_exclusive_trial() -> None:
    """Its client may take any time, so another request may be a trial meanwhile."""
    east, clock, _ = made(failures=1, rest=1)
    east.failed(clock.now, "connect")
    clock.now += 1
    slow = east.begin(clock.now, exclusive=False)
    assert east.is_available(clock.now)
    assert east.begin(clock.now) not in (0, slow)


def test_an_abandoned_trial_lets_another_request_be_the_trial() -> None:
    """Its result is unknown."""
    east, clock, _ = made(failures=1, rest=1)
    east.failed(clock.now, "connect")
    clock.now += 1
    assert east.begin(clock.now)
    east.abandoned(clock.now, 1)
    assert east.is_available(clock.now)
    assert east.failing


def test_probes_decide_when_a_trial_begins() -> None:
    """At once if nothing is wrong, and not before; a closed circuit stays closed."""
    east, clock, _ = made(failures=1, rest=2)
    east.probed(clock.now, "connect", 5)
    assert east.is_available(clock.now)
    east.failed(clock.now, "connect")
    clock.now += 1.5
    east.probed(clock.now, "dns", 5)
    assert (east.available_in(clock.now), east.reason) == (5, "dns")
    east.probed(clock.now, None, 5)
    assert east.is_available(clock.now)
    east.cool_down(clock.now, 4, "rate_limited")
    east.probed(clock.now, None, 5)
    assert east.available_in(clock.now) == 4  # as Azure asked
    clock.now += 4
    assert east.begin(clock.now)
