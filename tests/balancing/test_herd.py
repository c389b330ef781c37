"""Many requests that wait for one deployment: they wake a few at a time. The time is simulated, and so exact."""

from __future__ import annotations

import asyncio
import logging
import selectors
from collections import deque
from typing import Any

import pytest
import structlog

from gateway import Request, Response
from gateway.auth.credentials import Credential
from gateway.azure.operations import find_operation
from gateway.azure.resources import Deployment, Pool, Resource, Target
from gateway.balancing.health import Health
from gateway.balancing.retries import Retrier
from gateway.balancing.retry_budget import RetryBudget, RetryLimits
from gateway.body.request_body import Body
from gateway.exchange import Exchange
from gateway.logs import get_logger
from gateway.protocol.headers import Headers
from gateway.settings import HealthSettings


class _Jumping(selectors.DefaultSelector):
    """Waits for nothing: the time that it should take is over at once."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout:
            self.now += timeout
        return super().select(0)


class Azure:
    """A deployment that answers `allowed` requests in each second, after `takes` seconds, and refuses the others."""

    def __init__(self, allowed: int, takes: float) -> None:
        self.allowed, self.takes = allowed, takes
        self.answered: deque[float] = deque()
        self.refused: list[float] = []
        self.asked: list[float] = []

    async def __call__(self, _: Request) -> Response:
        now = asyncio.get_running_loop().time()
        self.asked.append(now)
        while self.answered and self.answered[0] <= now - 1:
            self.answered.popleft()
        if len(self.answered) >= self.allowed:
            self.refused.append(now)
            await asyncio.sleep(0.005)
            return Response(429, b"{}", Headers({"retry-after": "1"}))
        self.answered.append(now)
        await asyncio.sleep(self.takes)
        return Response(200, b"{}", Headers({"content-type": "application/json"}))


def simulated(
    monkeypatch: pytest.MonkeyPatch, azure: Azure, requests: int, *, wait: float, seed: int
) -> tuple[list[int], float]:
    """Send requests at once through one pool; return the statuses of their answers, and how many seconds passed."""
    selector = _Jumping()
    loop = asyncio.SelectorEventLoop(selector)
    monkeypatch.setattr(loop, "time", lambda: selector.now)
    for module in ("attempts", "retries"):
        monkeypatch.setattr(f"gateway.balancing.{module}.monotonic", lambda: selector.now)
    health = Health(lambda: selector.now)
    deployment = Deployment(Resource("east", "https://east.invalid", credential=Credential("k")), "m")
    health.use(HealthSettings(), [deployment])
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    limits = RetryLimits(600, wait=wait)
    balancer = Retrier(Pool("p", (deployment,)), health, RetryBudget(100), limits, get_logger(), seed)

    async def one() -> int:
        exchange = Exchange()
        body = Body(b'{"model":"m","messages":[]}')
        request = Request(
            id="r", operation=find_operation("POST", "/chat/completions"), method="POST", path="/chat/completions",
            headers=Headers(), body=body, team="t", target=Target(), exchange=exchange,
        )  # fmt: skip
        response = await balancer.send(request, azure)
        exchange.finish()
        return response.status

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*(one() for _ in range(requests)))

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        began = selector.now
        return runner.run(all_of_them()), selector.now - began


@pytest.mark.parametrize(("takes", "answered"), [(0.01, 45), (3.0, 35)])
@pytest.mark.parametrize("seed", range(5))
def test_a_rest_that_a_hundred_wait_out(
    takes: float, answered: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten are allowed in a second: nearly all of them are used, and few are refused after those that came at once."""
    azure = Azure(10, takes)
    statuses, _ = simulated(monkeypatch, azure, 100, wait=5, seed=seed)
    at_once = [each for each in azure.refused if each == azure.asked[0]]
    assert len(at_once) == 90, "nothing was known of it then"
    assert len(azure.refused) - len(at_once) <= 12, "in four rests; 260 if all that wait woke at once"
    assert statuses.count(200) >= answered, "of fifty; a round begins slowly where only time tells what is accepted"


def test_one_that_has_room_again_is_used_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for all, a hundred have their answers within a second after the rest, without another refusal."""

    class Recovers(Azure):
        async def __call__(self, request: Request) -> Response:
            response = await super().__call__(request)
            self.allowed = 1000
            return response

    azure = Recovers(10, 0.01)
    statuses, seconds = simulated(monkeypatch, azure, 100, wait=5, seed=1)
    assert statuses == [200] * 100
    assert len(azure.refused) == 90
    assert seconds < 2


def test_the_same_seed_wakes_them_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """And another one otherwise."""
    asked = []
    for seed in (1, 1, 2):
        azure = Azure(10, 0.01)
        simulated(monkeypatch, azure, 50, wait=5, seed=seed)
        asked.append(azure.asked)
    assert asked[0] == asked[1] != asked[2]


def test_requests_that_may_not_wait_are_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have one chance, and take it."""
    azure = Azure(1, 0.01)
    statuses, _ = simulated(monkeypatch, azure, 20, wait=0, seed=1)
    assert len(azure.asked) == 20
    assert statuses.count(200) == 1
