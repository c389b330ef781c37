"""Many requests that wait for one deployment wake up a few at a time. The time is simulated, and so exact."""

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


class _SimulatedSelector(selectors.DefaultSelector):
    """A selector that moves the clock instead of waiting."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout:
            self.now += timeout
        return super().select(0)


class Azure:
    """A deployment that serves `allowed` requests per second, in `takes` seconds each, and refuses the others."""

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
    """Send requests at once through one pool; return the statuses of the responses, and the seconds that passed."""
    selector = _SimulatedSelector()
    loop = asyncio.SelectorEventLoop(selector)
    monkeypatch.setattr(loop, "time", lambda: selector.now)
    for module in ("attempts", "retries"):
        monkeypatch.setattr(f"gateway.balancing.{module}.monotonic", lambda: selector.now)
    health = Health(lambda: selector.now)
    deployment = Deployment(Resource("east", "https://east.invalid", credential=Credential("k")), "m")
    health.use(HealthSettings(), [deployment])
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    limits = RetryLimits(600, wait=wait)
    retrier = Retrier(Pool("p", (deployment,)), health, RetryBudget(100), limits, get_logger(), seed)

    async def one() -> int:
        exchange = Exchange()
        body = Body(b'{"model":"m","messages":[]}')
        request = Request(
            id="r", operation=find_operation("POST", "/chat/completions"), method="POST", path="/chat/completions",
            headers=Headers(), body=body, team="t", target=Target(), exchange=exchange,
        )  # fmt: skip
        response = await retrier.send(request, azure)
        exchange.finish()
        return response.status

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*(one() for _ in range(requests)))

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        began = selector.now
        return runner.run(all_of_them()), selector.now - began


@pytest.mark.parametrize(("takes", "answered"), [(0.01, 45), (3.0, 35)])
@pytest.mark.parametrize("seed", range(5))
def test_a_hundred_requests_wait_for_the_end_of_a_cooldown(
    takes: float, answered: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 10 per second nearly all of the quota is used, and few requests after the first ones get a 429."""
    azure = Azure(10, takes)
    statuses, _ = simulated(monkeypatch, azure, 100, wait=5, seed=seed)
    at_once = [each for each in azure.refused if each == azure.asked[0]]
    assert len(at_once) == 90, "nothing was known of it then"
    assert len(azure.refused) - len(at_once) <= 12, "in four rests; 260 if all that wait woke at once"
    assert statuses.count(200) >= answered, "of fifty; a round begins slowly where only time tells what is accepted"


def test_a_deployment_with_headroom_is_used_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred requests have their responses within a second after the cooldown, without another 429."""

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


def test_the_same_seed_wakes_them_at_the_same_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """And another one at others."""
    asked = []
    for seed in (1, 1, 2):
        azure = Azure(10, 0.01)
        simulated(monkeypatch, azure, 50, wait=5, seed=seed)
        asked.append(azure.asked)
    assert asked[0] == asked[1] != asked[2]


def test_requests_that_must_not_wait_are_not_throttled(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are sent at once, although the slow start's window is full."""
    azure = Azure(1, 0.01)
    statuses, _ = simulated(monkeypatch, azure, 20, wait=0, seed=1)
    assert len(azure.asked) == 20
    assert statuses.count(200) == 1
