"""How deployments are: when they rest, and when they are back."""

from __future__ import annotations

from gateway.azure.resources import Deployment, Resource
from gateway.balancing.circuit_breaker import CircuitState, DeploymentHealth, HealthEvent
from gateway.balancing.health import Health
from gateway.settings import HealthSettings

EAST = Deployment(Resource("east", "https://east.invalid", region="eastus"), "gpt-4o")


class Clock:
    """A clock that stands until it is moved."""

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
    """One success in between begins the row anew."""
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


def test_a_share_of_failures_opens_it() -> None:
    """If they were enough requests, and of the last window: what was long ago does not count."""
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


def test_one_request_tries_it_and_its_success_closes_it() -> None:
    """While that one is under way, nobody else may; rests double while the tries fail, up to a bound."""
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
    assert east.available_in(clock.now) == 1  # as at first


def test_what_was_asked_before_it_rested_changes_nothing() -> None:
    """Neither late failures make the rest longer, nor do late answers end it."""
    east, clock, _ = made(failures=1, rest=4)
    east.failed(clock.now, "connect")
    clock.now += 1
    east.failed(clock.now, "connect")
    east.succeeded(clock.now)
    assert east.available_in(clock.now) == 3


def test_what_is_certain_is_enough_once() -> None:
    """A wrong key, or a deployment that is not there: it rests as long as it may."""
    east, clock, _ = made(failures=5, most_rest=30)
    east.failed(clock.now, "refused", permanent=True)
    assert east.available_in(clock.now) == 30


def test_a_429_is_no_failure() -> None:
    """It rests for as long as Azure asks, an hour at most, and is no circuit that opens."""
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


def test_a_429_on_the_try_closes_it() -> None:
    """It is there again, if busy."""
    east, clock, _ = made(failures=1, rest=1)
    east.failed(clock.now, "connect")
    clock.now += 1
    assert east.begin(clock.now)
    east.cool_down(clock.now, 2, "rate_limited", trial=east._trial)
    assert not east.failing
    assert east.available_in(clock.now) == 2


def test_a_try_that_takes_for_ever_keeps_nobody_out_for_ever() -> None:
    """Another request may try it after some seconds."""
    east, clock, _ = made(failures=1, rest=1, most_rest=20)
    east.failed(clock.now, "connect")
    clock.now += 1
    assert east.begin(clock.now)
    assert not east.is_available(clock.now)
    clock.now += 5
    assert east.begin(clock.now)


def test_what_does_not_count_is_only_told() -> None:
    """A failure that may be the request's own fault: neither in a row nor in the share."""
    east, clock, health = made(failures=2, least=2)
    for _ in range(10):
        east.failed(clock.now, "status_500", counts=False)
    assert east.is_available(clock.now)
    assert health.report()[0]["counts"] == {"answered": 0, "status_500": 10}


def test_a_stream_that_has_begun_closes_the_circuit_and_ends_no_row_of_failures() -> None:
    """Only at its end is it known whether it was an answer."""
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


def test_what_azure_asked_for_outlasts_all_else() -> None:
    """A failed try, one that was left, a probe, the end of another rest, and news do not make its rest shorter."""
    east, clock, health = made(failures=1, rest=1)

    def failing() -> int:
        east.block_until(clock.now)
        east.state = CircuitState.OPEN
        tried = east.begin(clock.now)
        assert tried
        return tried

    tried = failing()
    east.cool_down(clock.now, 60, "rate_limited")  # of a request that was asked before
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


def test_of_two_tries_the_older_one_says_nothing_of_the_newer() -> None:
    """It was given up; its failure is one, and does not let a third begin."""
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


def test_a_slow_upload_tries_it_beside_others() -> None:
    """Its client may take any time: nobody waits for that one."""
    east, clock, _ = made(failures=1, rest=1)
    east.failed(clock.now, "connect")
    clock.now += 1
    slow = east.begin(clock.now, exclusive=False)
    assert east.is_available(clock.now)
    assert east.begin(clock.now) not in (0, slow)


def test_whoever_left_while_it_tried_lets_another_try() -> None:
    """Nobody knows how that would have gone."""
    east, clock, _ = made(failures=1, rest=1)
    east.failed(clock.now, "connect")
    clock.now += 1
    assert east.begin(clock.now)
    east.abandoned(clock.now, 1)
    assert east.is_available(clock.now)
    assert east.failing


def test_probes() -> None:
    """They let a request try it as soon as nothing is wrong, and not before; one that is well is left as it is."""
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
    assert east.available_in(clock.now) == 4  # which Azure has asked for
    clock.now += 4
    assert east.begin(clock.now)
