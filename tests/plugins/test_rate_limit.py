"""`rate_limit`: requests per minute with burst, and requests in flight."""

from __future__ import annotations

import asyncio

import pytest

from gateway import Response
from gateway.services import Services
from gateway.testing import FakeAzure, Sent, running
from plugins.auth_passthrough import AuthPassthrough
from plugins.rate_limit import CALLERS, RateLimit, duration
from tests.conftest import CHAT, StartGateway


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def shown(sent: Sent) -> tuple[str | None, ...]:
    return tuple(sent.headers.get(f"x-ratelimit-{what}-requests") for what in ("limit", "remaining", "reset"))


async def test_limit_and_headers() -> None:
    """Every answer says what is left; the one too many is a 429 that says when to come again."""
    clock = Clock()
    async with running(RateLimit(requests_per_minute=2, per="team"), clock=clock) as run:
        assert shown(await run.post()) == ("2", "1", "30s")
        assert shown(await run.post()) == ("2", "0", "1m0s")
        sent = await run.post()
        assert sent.status == 429
        assert shown(sent) == ("2", "0", "1m0s")
        error = sent.json()["error"]
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        assert (sent.headers.get("retry-after"), sent.headers.get("retry-after-ms")) == ("30", "30000")
        assert sent.reached is None
        clock.now += 29.9
        assert (await run.post()).status == 429
        clock.now += 0.2
        assert (await run.post()).status == 200
        assert (await run.post()).status == 429


async def test_burst_is_how_many_may_come_at_once() -> None:
    """What was used comes back at the rate of the limit, never above the burst."""
    clock = Clock()
    async with running(RateLimit(requests_per_minute=60, burst=2, per="team"), clock=clock) as run:
        for _ in range(3):
            assert [(await run.post()).status for _ in range(3)] == [200, 200, 429]
            clock.now += 1000
        assert [(await run.post()).status for _ in range(3)] == [200, 200, 429]
        clock.now += 2
        assert [(await run.post()).status for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize(("limit", "burst"), [(100, None), (600, 50), (7, 3), (1, None), (60, 1)])
async def test_never_more_than_burst_and_rate_allow(limit: int, burst: int | None) -> None:
    """In any stretch of time: at most the burst, and the rate times the stretch; and in the long run all of it."""
    clock = Clock()
    admitted: list[float] = []
    async with running(RateLimit(requests_per_minute=limit, burst=burst, per="team"), clock=clock) as run:
        for _ in range(1200):
            if (await run.post()).status == 200:
                admitted.append(clock.now)
            clock.now += 0.25
    size = burst or limit
    for first in range(0, len(admitted), 7):
        for last in range(first, len(admitted), 5):
            stretch = admitted[last] - admitted[first]
            assert last - first + 1 <= size + stretch * limit / 60 + 1e-6
    asked = min(1200, size + 300 * limit / 60)
    assert len(admitted) >= asked * 0.9 - size


async def test_callers_are_counted_apart() -> None:
    """By key, by address, or together as a team."""
    stages = AuthPassthrough(), RateLimit(requests_per_minute=1)
    async with running(*stages) as run:
        for key in ("a", "b"):
            assert (await run.post(headers={"api-key": key})).status == 200
            assert (await run.post(headers={"api-key": key})).status == 429
    async with running(RateLimit(requests_per_minute=1, per="client")) as run:
        assert [(await run.post(client=ip)).status for ip in ("1.1.1.1", "1.1.1.1", "2.2.2.2")] == [200, 429, 200]
    async with running(RateLimit(requests_per_minute=1, per="team")) as run:
        assert [(await run.post(client=ip)).status for ip in ("1.1.1.1", "2.2.2.2")] == [200, 429]
    assert RateLimit(requests_per_minute=1).needs == ("caller",)
    assert RateLimit(requests_per_minute=1, per="team").needs == ()


async def test_in_flight() -> None:
    """A slot is taken until the exchange is over, and given back however it ends."""
    release = asyncio.Event()

    async def slow(request: object) -> Response:
        await release.wait()
        return Response()

    async with running(RateLimit(in_flight=2, per="team"), answer=slow) as run:
        tasks = [asyncio.create_task(run.post()) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        sent = await run.post()
        assert sent.status == 429
        assert sent.headers.get("retry-after") == "1"
        release.set()
        assert [(await task).status for task in tasks] == [200, 200]
        for _ in range(5):
            assert (await run.post()).status == 200
        run.answers(RuntimeError("broken"))
        for _ in range(5):
            assert (await run.post()).status == 500


async def test_two_limits_show_the_one_with_least_room() -> None:
    """A burst limit beside a slow one: the client is told of the tighter."""
    tight, wide = RateLimit(requests_per_minute=3, per="team"), RateLimit(requests_per_minute=100, per="team")
    tight.id, wide.id = "tight", "wide"
    for stages in ((tight, wide), (wide, tight)):
        async with running(*stages) as run:
            assert shown(await run.post())[:2] == ("3", "2")


async def test_azure_s_own_headers_are_replaced() -> None:
    """What Azure says of its own limits is not what this caller has left."""
    answer = Response(200, b"", {"x-ratelimit-remaining-requests": "119", "x-ratelimit-limit-tokens": "5"})
    async with running(RateLimit(requests_per_minute=10, per="team"), answer=answer) as run:
        sent = await run.post()
    assert sent.headers.getall("x-ratelimit-remaining-requests") == ["9"]
    assert sent.headers.get("x-ratelimit-limit-tokens") == "5"


async def test_1000_at_once_against_100_admit_exactly_100(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Through real sockets, however long they take to arrive."""
    yaml = """
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline: [auth_passthrough, rate_limit: {requests_per_minute: 100}, model_map, api_version]
"""
    gateway = await start_gateway(azure.endpoint, yaml)

    async def one() -> int:
        async with gateway.post(json=CHAT) as answer:
            status: int = answer.status
            return status

    statuses = await asyncio.gather(*(one() for _ in range(1000)))
    assert (statuses.count(200), statuses.count(429)) == (100, 900)
    assert len(azure.requests) == 100


async def test_callers_with_full_allowance_are_forgotten() -> None:
    """Memory does not grow with every key that was ever tried."""
    clock = Clock()
    stage = RateLimit(requests_per_minute=60, per="client")
    async with running(stage, clock=clock) as run:
        for number in range(CALLERS):
            await run.post(client=str(number))
        clock.now += 100
        await run.post(client="another")
        await run.post(client="and one more")
        assert len(stage._buckets) < 10


@pytest.mark.parametrize(
    ("stage", "words"),
    [(RateLimit(), "nothing to limit"), (RateLimit(in_flight=1, burst=2), "requests_per_minute")],
)
def test_settings_that_say_nothing_are_mistakes(stage: RateLimit, words: str) -> None:
    """Found when the configuration is loaded."""
    assert any(words in message for _, message in stage.check(Services("t", "s")))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.012, "12ms"), (0.0121, "13ms"), (1, "1s"), (1.5, "1.5s"), (59.95, "59.95s"), (60, "1m0s"),
     (360, "6m0s"), (3599.5, "1h0m0s"), (3600, "1h0m0s"), (7322, "2h2m2s")],
)  # fmt: skip
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    """`12ms`, `1.5s`, `6m0s`: Go's way, which the SDKs' users know."""
    assert text == duration(seconds)
