"""Selection: which deployment of a pool a request goes to."""

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
                Resource("abcdefgh"[index], f"https://{index}.invalid"), "x", (priorities or (1,) * 9)[index], weight
            )
            for index, weight in enumerate(weights)
        ),
    )


def names(selector: Selector, times: int) -> list[str]:
    """Return the picks of requests that do not overlap."""
    picked = [selector.pick(NOW) for _ in range(times)]
    return [each.name for each in picked if each is not None]


@given(st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0, 10.0]), min_size=1, max_size=6), st.integers(0, 1000))
def test_shares_are_by_weight(weights: list[float], seed: int) -> None:
    """For any number of requests, each deployment's count is within 2 of its exact share."""
    selector = Selector(pool(*weights), Health(), seed)
    counts = Counter(names(selector, 200))
    for candidate in selector.all:
        assert abs(counts[candidate.name] - 200 * candidate.weight / sum(weights)) <= 2


@given(st.lists(st.sampled_from([1.0, 2.0, 5.0]), min_size=2, max_size=5), st.lists(st.integers(0, 4), max_size=80))
def test_the_least_loaded_for_its_weight_is_picked(weights: list[float], ends: list[int]) -> None:
    """No other has fewer requests in flight for its weight, except for one stride of either."""
    health = Health()
    selector = Selector(pool(*weights), health, 1)
    running: list[int] = []
    for end in ends:
        picked = selector.pick(NOW)
        assert picked is not None
        load = picked.health.in_flight * picked.stride
        assert all(
            load <= each.health.in_flight * each.stride + each.stride + picked.stride + 1e-9 for each in selector.all
        )
        picked.health.begin(NOW)
        running.append(selector.all.index(picked))
        if end and running:
            selector.all[running.pop(end % len(running))].health.end()


@pytest.mark.parametrize("rate", [0.2, 1.0, 4.0])
def test_shares_are_by_weight_if_few_run_at_once(rate: float) -> None:
    """An idle deployment gets no more than its share: the smallest would reach its quota."""
    selector = Selector(pool(5, 1, 0.5), Health(), 1)
    random = Random(7)
    ends: list[tuple[float, int]] = []
    counts = [0, 0, 0]
    time = 0.0
    for _ in range(5000):
        time += random.expovariate(rate)
        while ends and ends[0][0] <= time:
            selector.all[heapq.heappop(ends)[1]].health.end()
        picked = selector.pick(NOW)
        assert picked is not None
        picked.health.begin(NOW)
        index = selector.all.index(picked)
        counts[index] += 1
        heapq.heappush(ends, (time + random.expovariate(1.0), index))
    for count, share in zip(counts, (5 / 6.5, 1 / 6.5, 0.5 / 6.5), strict=True):
        assert abs(count / 5000 - share) < 0.05


def test_the_same_seed_makes_the_same_order() -> None:
    """Another one makes another. Without one, processes start with different deployments."""
    made = pool(1, 1, 1, 1)
    assert names(Selector(made, Health(), 3), 20) == names(Selector(made, Health(), 3), 20)
    firsts = {names(Selector(made, Health(), seed), 1)[0] for seed in range(40)}
    assert firsts == {"a/x", "b/x", "c/x", "d/x"}
    assert len({names(Selector(made, Health()), 1)[0] for _ in range(100)}) > 1


def test_an_unavailable_deployment_does_not_catch_up() -> None:
    """It gets its share from then on, and no more."""
    health = Health()
    selector = Selector(pool(1, 1), health, 1)
    selector.all[0].health.block_until(NOW + 5)
    assert names(selector, 50) == ["b/x"] * 50
    selector.all[0].health.block_until(0.0)
    assert 9 <= Counter(names(selector, 20))["a/x"] <= 11


def test_priorities() -> None:
    """The next priority is used if no deployment of the previous one is available, untried, and has headroom."""
    health = Health()
    selector = Selector(pool(1, 1, 1, priorities=(1, 2, 2)), health, 1)
    first, second, third = selector.all
    assert set(names(selector, 10)) == {"a/x"}
    assert selector.pick(NOW, (first,)) in (second, third)
    first.health.block_until(float("inf"))
    assert set(names(selector, 10)) == {"b/x", "c/x"}
    first.health.block_until(0.0)
    first.health.avoid_until = NOW + 1  # its quota is used up
    assert set(names(selector, 10)) == {"b/x", "c/x"}
    for each in (second, third):
        each.health.block_until(NOW + 1)
    assert set(names(selector, 3)) == {"a/x"}
    first.health.block_until(NOW + 2)
    assert selector.pick(NOW) is None
    assert selector.available_in(NOW) == 1.0


def test_headroom_is_weight() -> None:
    """Half the quota left is half the weight; utilisation of provisioned throughput counts the same."""
    health = Health()
    selector = Selector(pool(1, 1), health, 1)
    fields = Headers({"x-ratelimit-remaining-tokens": "250", "x-ratelimit-limit-tokens": "1000"}).fields
    selector.all[0].health.observe(NOW, fields)
    selector.all[1].health.observe(NOW, Headers({"azure-openai-deployment-utilization": "50.0%"}).fields)
    assert (selector.all[0].health.headroom, selector.all[1].health.headroom) == (0.25, 0.5)
    for _ in range(6):
        candidate = selector.pick(NOW)
        assert candidate is not None
        candidate.health.begin(NOW)
    assert [each.health.in_flight for each in selector.all] == [2, 4]


@pytest.mark.parametrize("left", ["0", "1", "20"])
def test_a_deployment_with_new_headroom_gets_its_share_at_once(left: str) -> None:
    """When Azure reports it, or when the last report expires: quotas are renewed each minute."""
    for reported in (True, False):
        selector = Selector(pool(1, 1), Health(), 1)
        one = selector.all[0].health
        headers = {"x-ratelimit-limit-tokens": "1000", "x-ratelimit-remaining-tokens": left}
        one.observe(NOW, Headers(headers).fields)
        later = NOW + (4.9 if reported and one.headroom > 0.001 else 5.1)
        assert any(selector.pick(later) is selector.all[0] for _ in range(3000))
        if reported:
            one.observe(later, Headers({**headers, "x-ratelimit-remaining-tokens": "1000"}).fields)
        else:
            later += 5
        counts = Counter(picked.name for _ in range(20) if (picked := selector.pick(later)))
        assert 9 <= counts["a/x"] <= 11


@given(st.lists(st.sampled_from([1.0, 2.0, 4.0]), min_size=2, max_size=6), st.binary(min_size=1, max_size=8))
def test_a_key_has_one_deployment(weights: list[float], key: bytes) -> None:
    """The same with every seed; while it is unavailable, only its own keys move to another."""
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
    """A deployment with three times the weight has three times as many keys."""
    selector = Selector(pool(1, 3), Health(), 1)
    homes = Counter(candidate.name for number in range(4000) if (candidate := selector.pick(NOW, (), b"%d" % number)))
    assert 0.7 < homes["b/x"] / 4000 < 0.8


def test_jitter() -> None:
    """The more requests wait, the wider it spreads them; it is repeatable, and never above the maximum."""
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


def test_a_throttled_deployment_is_found_for_a_request_that_must_not_wait() -> None:
    """One in a cooldown is not."""
    selector = Selector(pool(1.0, 1.0), Health(), 1)
    one, other = selector.all
    for each in (one, other):
        each.health.cool_down(NOW, 1, "rate_limited")
    other.health.cool_down(NOW, 10, "rate_limited")
    one.health.begin(NOW + 1)
    assert selector.pick(NOW + 1) is None
    assert selector.pick_throttled(NOW + 1, ()) is one
    assert selector.pick_throttled(NOW + 1, (one,)) is None
