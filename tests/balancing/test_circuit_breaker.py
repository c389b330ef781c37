"""How deployments are: when they rest, and when they are back."""

from __future__ import annotations

import pytest

from gateway.azure.resources import Deployment, Resource
from gateway.balancing.circuit_breaker import DeploymentHealth, Health, HealthEvent
from gateway.protocol.headers import Headers
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
        clock.now = east.rests_until
        assert east.is_available(clock.now)
        assert east.begin(clock.now)
        assert not east.is_available(clock.now)
        assert east.trying
        east.failed(clock.now, "connect", tried=east._try)
        east.end()
        assert east.available_in(clock.now) == rest
    clock.now = east.rests_until
    assert east.begin(clock.now)
    east.succeeded(clock.now, east._try)
    east.end()
    assert (east.failing, east.is_available(clock.now)) == (False, True)
    east.begin(clock.now)
    assert not east.trying
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
    east.failed(clock.now, "refused", certain=True)
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
    assert not east.trying
    east.cool_down(clock.now, 86_400, "rate_limited")
    assert east.available_in(clock.now) == 3600


def test_a_429_on_the_try_closes_it() -> None:
    """It is there again, if busy."""
    east, clock, _ = made(failures=1, rest=1)
    east.failed(clock.now, "connect")
    clock.now += 1
    assert east.begin(clock.now)
    east.cool_down(clock.now, 2, "rate_limited", tried=east._try)
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
        east.began(clock.now)
        east.failed(clock.now, "broken_off")
    east.began(clock.now)
    assert east.is_available(clock.now)
    east.failed(clock.now, "broken_off")
    assert not east.is_available(clock.now)
    clock.now += 1
    assert east.begin(clock.now)
    east.began(clock.now, east._try)
    assert east.is_available(clock.now)
    assert not east.failing


def test_what_azure_asked_for_outlasts_all_else() -> None:
    """A failed try, one that was left, a probe, the end of another rest, and news do not make its rest shorter."""
    east, clock, health = made(failures=1, rest=1)

    def failing() -> int:
        east.rests_until, east.failing, east.cautious = clock.now, True, True
        tried = east.begin(clock.now)
        assert tried
        return tried

    tried = failing()
    east.cool_down(clock.now, 60, "rate_limited")  # of a request that was asked before
    east.failed(clock.now, "connect", tried=tried)
    assert east.available_in(clock.now) == 60
    health.hear(HealthEvent(east.key))
    assert east.available_in(clock.now) == 60
    clock.now += 60
    tried = failing()
    health.hear(HealthEvent(east.key, 30, reason="rate_limited"))
    east.left(clock.now, tried)
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
    east.failed(clock.now, "connect", tried=old)
    east.left(clock.now, old)
    assert east.trying
    assert not east.is_available(clock.now)
    east.failed(clock.now, "connect", tried=new)
    assert east.available_in(clock.now) == 2


def test_a_slow_upload_tries_it_beside_others() -> None:
    """Its client may take any time: nobody waits for that one."""
    east, clock, _ = made(failures=1, rest=1)
    east.failed(clock.now, "connect")
    clock.now += 1
    slow = east.begin(clock.now, alone=False)
    assert east.is_available(clock.now)
    assert east.begin(clock.now) not in (0, slow)


def test_whoever_left_while_it_tried_lets_another_try() -> None:
    """Nobody knows how that would have gone."""
    east, clock, _ = made(failures=1, rest=1)
    east.failed(clock.now, "connect")
    clock.now += 1
    assert east.begin(clock.now)
    east.left(clock.now, 1)
    assert east.is_available(clock.now)
    assert east.failing


@pytest.mark.parametrize(
    ("fields", "room"),
    [
        ({"x-ratelimit-remaining-requests": "119", "x-ratelimit-limit-requests": "120"}, 119 / 120),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-limit-tokens": "1000"}, 0.0),
        ({"x-ratelimit-remaining-tokens": "-5", "x-ratelimit-limit-tokens": "1000"}, 0.0),
        ({"azure-openai-deployment-utilization": "93.5%"}, 0.065),
        ({"azure-openai-deployment-utilization": "110%"}, 0.0),
        ({"x-ratelimit-remaining-tokens": "many", "x-ratelimit-limit-tokens": "nan"}, None),
        ({"x-ratelimit-remaining-tokens": "inf"}, None),
        ({"x-ratelimit-limit-tokens": "100"}, None),
        ({}, None),
    ],
)
def test_room(fields: dict[str, str], room: float | None) -> None:
    """What is left of the quota that is used up most; what says nothing of it is no room, and no fullness."""
    east, clock, _ = made()
    east.observe(clock.now, Headers(fields).fields)
    if room is None:
        assert east.room_until <= clock.now
    else:
        assert east.room == pytest.approx(room, abs=1e-3)
        assert east.room_until > clock.now
        assert (east.away_until > clock.now) == (room == 0.0)
        assert east.is_available(clock.now)


def test_room_without_a_limit_is_of_the_most_that_was_left() -> None:
    """And it is looked at ten times a second at most, and believed for some seconds."""
    east, clock, _ = made()
    east.succeeded(clock.now, 0, Headers({"x-ratelimit-remaining-tokens": "800"}).fields)
    assert east.room == 1.0
    east.succeeded(clock.now, 0, Headers({"x-ratelimit-remaining-tokens": "1"}).fields)
    assert east.room == 1.0
    clock.now += 0.2
    east.succeeded(clock.now, 0, Headers({"x-ratelimit-remaining-tokens": "200"}).fields)
    assert east.room == 0.25
    assert east.room_until == pytest.approx(clock.now + 5)


def test_what_others_are_told_and_hear() -> None:
    """A rest, and its end; what is heard is not told again, and shortens nothing that is known here."""
    east, clock, health = made(failures=1, rest=2)
    told: list[HealthEvent] = []
    health.told.append(told.append)
    east.failed(clock.now, "connect")
    assert told == [HealthEvent(east.key, 2, failing=True, reason="connect")]
    assert health.news() == told
    west, there, other = made(rest=2)
    heard: list[HealthEvent] = []
    other.told.append(heard.append)
    other.hear(told[0])
    assert (west.available_in(there.now), west.failing, west.reason) == (2, True, "connect")
    other.hear(HealthEvent(east.key, 1, failing=True, reason="dns"))
    assert west.available_in(there.now) == 2
    clock.now += 2
    east.begin(clock.now)
    east.succeeded(clock.now, east._try)
    other.hear(told[1])
    assert (west.is_available(there.now), west.failing) == (True, False)
    other.hear(HealthEvent("nobody/knows it", 5))
    assert heard == []


def test_small_steps_are_not_told() -> None:
    """A hundred requests that meet the same 429 are one piece of news."""
    east, clock, health = made()
    told: list[HealthEvent] = []
    health.told.append(told.append)
    for _ in range(100):
        east.cool_down(clock.now, 10, "rate_limited")
        clock.now += 0.001
    assert len(told) == 1


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
    east.succeeded(clock.now, east._try)
    east.cool_down(clock.now, 3, "rate_limited")
    assert (health.report()[0]["state"], health.report()[0]["reason"]) == ("cooling_down", "rate_limited")


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
        assert east.holds_back(clock.now)
        assert (east.report(clock.now)["state"], east.report(clock.now)["cool_down"]) == ("available", 0)
        assert health.news() == []
        for _ in range(count):
            east.began(clock.now, -1)


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
                east.began(clock.now, -1)
    for _ in range(8):
        east.cool_down(clock.now, 1, "rate_limited", tried=-1)
    assert east.available_in(clock.now) == 1
    clock.now += 1
    counts = []
    for _ in range(6):
        counts.append(sent(east, clock.now))
        for _ in range(counts[-1]):
            east.began(clock.now, -1)
    assert counts == [1, 2, 4, 5, 6, 7]


def test_a_slow_start_ends_when_nothing_is_refused() -> None:
    """After ten seconds all may go, and nothing is asked of a request any more."""
    east, clock, _ = made()
    east.cool_down(clock.now, 1, "rate_limited")
    clock.now += 11
    east.begin(clock.now)
    assert not east.cautious
    assert east.is_available(clock.now)


def test_a_deployment_that_was_tried_and_is_back_is_not_overrun() -> None:
    """What waited for a circuit to close follows in a slow start, also where another process has closed it."""
    for heard in (False, True):
        east, clock, health = made(failures=1, rest=1)
        east.failed(clock.now, "connect")
        clock.now += 1
        if heard:
            health.hear(HealthEvent(east.key))
        else:
            east.succeeded(clock.now, east.begin(clock.now))
        assert not east.failing
        assert [sent(east, clock.now), east.holds_back(clock.now)] == [1, True]


def test_a_rest_that_another_process_told_of_ends_in_a_slow_start_too() -> None:
    """All of them would begin at once."""
    east, clock, health = made()
    health.hear(HealthEvent(east.key, 2, reason="rate_limited"))
    clock.now += 2
    assert sent(east, clock.now) == 1


def test_being_held_back_leaves_what_is_known_of_its_room() -> None:
    """One that is full stays the last that is taken, while it is held back and after."""
    east, clock, _ = made()
    east.cool_down(clock.now, 1, "rate_limited")
    clock.now += 1
    full = Headers({"x-ratelimit-remaining-requests": "0", "x-ratelimit-limit-requests": "10"})
    east.observe(clock.now, full.fields)
    until = east.away_until
    assert until > clock.now + 1
    assert sent(east, clock.now) == 1
    assert east.away_until == until
    east.began(clock.now, -1)
    assert (east.away_until, east.is_available(clock.now)) == (until, True)
