"""Which deployment of a pool a request goes to."""

from __future__ import annotations

import heapq
from collections import Counter
from contextlib import ExitStack
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.azure.resources import Deployment, Pool, Resource
from gateway.balancing.health import Health
from gateway.balancing.selection import Selector
from gateway.protocol.headers import Headers

NOW = 1000.0


def pool(*weights: float, priorities: tuple[int, ...] = ()) -> Pool:
    """Return a pool of deployments `a/x`, `b/x`, ... with these weights."""
    return Pool(
        "chat",
        tuple(
            Deployment(
                Resource("abcdefgh"[place], f"https://{place}.invalid"), "x", (priorities or (1,) * 9)[place], weight
            )
            for place, weight in enumerate(weights)
        ),
    )


def names(selector: Selector, times: int) -> list[str]:
    """Return who is chosen, one after another, each done at once."""
    picked = [selector.pick(NOW) for _ in range(times)]
    return [each.name for each in picked if each is not None]


@given(st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0, 10.0]), min_size=1, max_size=6), st.integers(0, 1000))
def test_shares_are_by_weight(weights: list[float], seed: int) -> None:
    """Of any number of requests, each deployment's count is within two of its exact share."""
    selector = Selector(pool(*weights), Health(), seed)
    counts = Counter(names(selector, 200))
    for choice in selector.all:
        assert abs(counts[choice.name] - 200 * choice.weight / sum(weights)) <= 2


@given(st.lists(st.sampled_from([1.0, 2.0, 5.0]), min_size=2, max_size=5), st.lists(st.integers(0, 4), max_size=80))
def test_the_least_loaded_for_its_weight_is_chosen(weights: list[float], ends: list[int]) -> None:
    """However requests begin and end: nobody else has less in flight for its weight, but for a turn of either."""
    health = Health()
    selector = Selector(pool(*weights), health, 1)
    running: list[int] = []
    for end in ends:
        chosen = selector.pick(NOW)
        assert chosen is not None
        load = chosen.health.in_flight * chosen.stride
        assert all(
            load <= each.health.in_flight * each.stride + each.stride + chosen.stride + 1e-9 for each in selector.all
        )
        chosen.health.begin(NOW)
        running.append(selector.all.index(chosen))
        if end and running:
            selector.all[running.pop(end % len(running))].health.end()


@pytest.mark.parametrize("rate", [0.2, 1.0, 4.0])
def test_shares_are_by_weight_where_few_run_at_once(rate: float) -> None:
    """Nobody gets more for having nothing in flight just now: the smallest would hit its quota."""
    selector = Selector(pool(5, 1, 0.5), Health(), 1)
    random = Random(7)
    ends: list[tuple[float, int]] = []
    counts = [0, 0, 0]
    time = 0.0
    for _ in range(5000):
        time += random.expovariate(rate)
        while ends and ends[0][0] <= time:
            selector.all[heapq.heappop(ends)[1]].health.end()
        chosen = selector.pick(NOW)
        assert chosen is not None
        chosen.health.begin(NOW)
        place = selector.all.index(chosen)
        counts[place] += 1
        heapq.heappush(ends, (time + random.expovariate(1.0), place))
    for count, share in zip(counts, (5 / 6.5, 1 / 6.5, 0.5 / 6.5), strict=True):
        assert abs(count / 5000 - share) < 0.05


def test_the_same_seed_is_the_same_order_and_another_another() -> None:
    """And with none, processes do not begin with the same one."""
    made = pool(1, 1, 1, 1)
    assert names(Selector(made, Health(), 3), 20) == names(Selector(made, Health(), 3), 20)
    firsts = {names(Selector(made, Health(), seed), 1)[0] for seed in range(40)}
    assert firsts == {"a/x", "b/x", "c/x", "d/x"}
    assert len({names(Selector(made, Health()), 1)[0] for _ in range(100)}) > 1


def test_one_that_rested_does_not_make_up_for_it() -> None:
    """It gets its share from now on, and no flood."""
    health = Health()
    selector = Selector(pool(1, 1), health, 1)
    selector.all[0].health.block_until(NOW + 5)
    assert names(selector, 50) == ["b/x"] * 50
    selector.all[0].health.block_until(0.0)
    assert 9 <= Counter(names(selector, 20))["a/x"] <= 11


def test_priorities() -> None:
    """The next priority is for when nobody of the one before is available, was not tried, and has room."""
    health = Health()
    selector = Selector(pool(1, 1, 1, priorities=(1, 2, 2)), health, 1)
    first, second, third = selector.all
    assert set(names(selector, 10)) == {"a/x"}
    assert selector.pick(NOW, (first,)) in (second, third)
    first.health.block_until(float("inf"))
    assert set(names(selector, 10)) == {"b/x", "c/x"}
    first.health.block_until(0.0)
    first.health.avoid_until = NOW + 1  # it has no room left
    assert set(names(selector, 10)) == {"b/x", "c/x"}
    for each in (second, third):
        each.health.block_until(NOW + 1)
    assert set(names(selector, 3)) == {"a/x"}
    first.health.block_until(NOW + 2)
    assert selector.pick(NOW) is None
    assert selector.available_in(NOW) == 1.0


def test_room_is_weight() -> None:
    """Half the quota left is half the weight; utilisation of provisioned throughput counts the same."""
    health = Health()
    selector = Selector(pool(1, 1), health, 1)
    fields = Headers({"x-ratelimit-remaining-tokens": "250", "x-ratelimit-limit-tokens": "1000"}).fields
    selector.all[0].health.observe(NOW, fields)
    selector.all[1].health.observe(NOW, Headers({"azure-openai-deployment-utilization": "50.0%"}).fields)
    assert (selector.all[0].health.headroom, selector.all[1].health.headroom) == (0.25, 0.5)
    for _ in range(6):
        choice = selector.pick(NOW)
        assert choice is not None
        choice.health.begin(NOW)
    assert [each.health.in_flight for each in selector.all] == [2, 4]


@pytest.mark.parametrize("left", ["0", "1", "20"])
def test_one_whose_room_is_back_gets_its_share_at_once(left: str) -> None:
    """Once Azure says so, or has said nothing for as long as it is believed: a quota is new each minute."""
    for told in (True, False):
        selector = Selector(pool(1, 1), Health(), 1)
        one = selector.all[0].health
        room = {"x-ratelimit-limit-tokens": "1000", "x-ratelimit-remaining-tokens": left}
        one.observe(NOW, Headers(room).fields)
        later = NOW + (4.9 if told and one.headroom > 0.001 else 5.1)
        assert any(selector.pick(later) is selector.all[0] for _ in range(3000))
        if told:
            one.observe(later, Headers({**room, "x-ratelimit-remaining-tokens": "1000"}).fields)
        else:
            later += 5
        counts = Counter(chosen.name for _ in range(20) if (chosen := selector.pick(later)))
        assert 9 <= counts["a/x"] <= 11


@given(st.lists(st.sampled_from([1.0, 2.0, 4.0]), min_size=2, max_size=6), st.binary(min_size=1, max_size=8))
def test_a_key_has_a_home(weights: list[float], key: bytes) -> None:
    """It is the same under every seed; where the home rests, it is another, and only for its own keys."""
    one, other = Selector(pool(*weights), Health(), 1), Selector(pool(*weights), Health(), 2)
    home, same = one.pick(NOW, (), key), other.pick(NOW, (), key)
    assert home is not None
    assert same is not None
    assert home.name == same.name
    away = next(each for each in one.all if each is not home)
    away.health.block_until(NOW + 1)
    assert one.pick(NOW, (), key) is home
    home.health.block_until(NOW + 1)
    moved = one.pick(NOW, (), key)
    assert moved is not home


def test_keys_are_shared_by_weight() -> None:
    """A deployment of three times the weight is the home of three times as many."""
    selector = Selector(pool(1, 3), Health(), 1)
    homes = Counter(choice.name for number in range(4000) if (choice := selector.pick(NOW, (), b"%d" % number)))
    assert 0.7 < homes["b/x"] / 4000 < 0.8


def test_those_that_wait_wake_apart() -> None:
    """The more there are the further apart, under one seed always the same; never later than they can wait."""
    one, other = (Selector(pool(1.0), Health(), 7) for _ in range(2))
    assert [one.jitter(5), other.jitter(5)] == [0, 0], "nobody waits"
    with ExitStack() as waiting:
        for selector in (one, other):
            for _ in range(100):
                waiting.enter_context(selector.waiting())
        drawn = [one.jitter(5) for _ in range(1000)]
        assert drawn == [other.jitter(5) for _ in range(1000)]
        assert max(Counter(int(each / 0.05) for each in drawn).values()) < 150, "of 1000 in tenths of half a second"
        assert all(each <= 0.05 for each in (one.jitter(0.1) for _ in range(100)))
    assert one.jitter(5) == 0


def test_one_that_is_held_back_is_found_for_those_that_cannot_wait() -> None:
    """One that rests is not."""
    selector = Selector(pool(1.0, 1.0), Health(), 1)
    one, other = selector.all
    for each in (one, other):
        each.health.cool_down(NOW, 1, "rate_limited")
    other.health.cool_down(NOW, 10, "rate_limited")
    one.health.begin(NOW + 1)
    assert selector.pick(NOW + 1) is None
    assert selector.pick_throttled(NOW + 1, ()) is one
    assert selector.pick_throttled(NOW + 1, (one,)) is None
