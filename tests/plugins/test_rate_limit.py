"""`rate_limit`: requests, tokens, money and concurrent requests."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from structlog.testing import capture_logs

from gateway import ApiError, CountersUnavailable, Decision, Price, Response
from gateway.limits.memory_counters import MemoryCounters
from gateway.services import Services, Shared
from gateway.testing import FakeAzure, Seen, Sent, running
from plugins.auth_passthrough import AuthPassthrough
from plugins.model_map import ModelMap
from plugins.rate_limit import LimitSettings, RateLimit, duration
from tests.chunks import event
from tests.conftest import CHAT, StartGateway


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def shown(sent: Sent) -> tuple[str | None, ...]:
    return tuple(sent.headers.get(f"x-ratelimit-{what}-requests") for what in ("limit", "remaining", "reset"))


async def test_limit_and_headers() -> None:
    """Every response has the remaining requests; above the limit it is a 429 with Retry-After."""
    clock = Clock()
    async with running(RateLimit(requests_per_minute=2, per="team"), now=clock) as run:
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


async def test_burst_is_the_maximum_number_of_requests_at_once() -> None:
    """The bucket refills at the rate of the limit, never above the burst."""
    clock = Clock()
    async with running(RateLimit(requests_per_minute=60, burst=2, per="team"), now=clock) as run:
        for _ in range(3):
            assert [(await run.post()).status for _ in range(3)] == [200, 200, 429]
            clock.now += 1000
        assert [(await run.post()).status for _ in range(3)] == [200, 200, 429]
        clock.now += 2
        assert [(await run.post()).status for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize(("limit", "burst"), [(100, None), (600, 50), (7, 3), (1, None), (60, 1)])
async def test_never_more_than_burst_and_rate_allow(limit: int, burst: int | None) -> None:
    """In any interval: at most the burst plus the rate times the interval; and in the long run all of it."""
    clock = Clock()
    admitted: list[float] = []
    async with running(RateLimit(requests_per_minute=limit, burst=burst, per="team"), now=clock) as run:
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


async def test_callers_are_counted_separately() -> None:
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
    """A slot is taken until the exchange is over, and released however it ends."""
    release = asyncio.Event()

    async def slow(request: object) -> Response:
        await release.wait()
        return Response()

    async with running(RateLimit(in_flight=2, per="team"), response=slow) as run:
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
        run.respond_with(RuntimeError("broken"))
        for _ in range(5):
            assert (await run.post()).status == 500


async def test_two_limits_show_the_one_with_least_room() -> None:
    """The headers show the limit with the least room."""
    tight, wide = RateLimit(requests_per_minute=3, per="team"), RateLimit(requests_per_minute=100, per="team")
    tight.id, wide.id = "tight", "wide"
    for stages in ((tight, wide), (wide, tight)):
        async with running(*stages) as run:
            assert shown(await run.post())[:2] == ("3", "2")


async def test_azure_s_own_headers_are_replaced() -> None:
    """Azure's remaining requests are not those of this caller."""
    answer = Response(200, b"", {"x-ratelimit-remaining-requests": "119", "x-ratelimit-limit-tokens": "5"})
    async with running(RateLimit(requests_per_minute=10, per="team"), response=answer) as run:
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


@pytest.mark.parametrize(
    ("stage", "words"),
    [(RateLimit(), "no limit is set"), (RateLimit(in_flight=1, burst=2), "requests_per_minute")],
)
def test_settings_without_effect_are_mistakes(stage: RateLimit, words: str) -> None:
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


# -- tokens, money, several limits ---------------------------------------------------------------------

USED = b'{"choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":%d}}'
TOKENS = {"max_tokens": 100}


def used(prompt: int, answer: int) -> Response:
    return Response(200, USED % (prompt, answer), {"content-type": "application/json"})


def tokens_left(sent: Sent) -> int:
    return int(sent.headers.get("x-ratelimit-remaining-tokens") or -1)


async def estimate(**fields: Any) -> int:
    """Return the number of tokens that is reserved for a request."""
    async with running(RateLimit(tokens_per_day=10**9, per="team")) as run:
        return 10**9 - tokens_left(await run.post({**CHAT, **fields}))


async def test_tokens_are_taken_before_and_settled_after() -> None:
    """The request reserves what it can use; the actual usage replaces it, or nothing if it failed."""
    most = await estimate(**TOKENS)
    assert 100 < most < 140
    async with running(RateLimit(tokens_per_minute=1000, per="team"), response=used(10, 20), now=Clock()) as run:
        assert tokens_left(await run.post({**CHAT, **TOKENS})) == 1000 - most
        assert tokens_left(await run.post({**CHAT, **TOKENS})) == 1000 - 30 - most
        run.respond_with(ApiError(502, "down"))
        assert tokens_left(await run.post({**CHAT, **TOKENS})) == 1000 - 60 - most
        run.respond_with(Response.json({"error": {}}, 400))
        assert tokens_left(await run.post({**CHAT, **TOKENS})) == 1000 - 60 - most
        run.respond_with(used(10, 300))
        await run.post({**CHAT, **TOKENS})
        assert tokens_left(await run.post({**CHAT, **TOKENS})) == 1000 - 60 - 310 - most


async def test_reserved_output_tokens() -> None:
    """`max_tokens` for each choice; without it `answer_tokens`; embeddings have no output."""
    plain = await estimate(max_tokens=1)
    assert await estimate(max_completion_tokens=50, n=3) - plain == pytest.approx(149, abs=12)
    assert await estimate() - plain == pytest.approx(999, abs=12)
    async with running(RateLimit(tokens_per_day=10**6, per="team", answer_tokens=7)) as run:
        sent = await run.post(CHAT)
        assert 10**6 - tokens_left(sent) - plain == pytest.approx(6, abs=12)
        sent = await run.send("POST", "/embeddings", json={"model": "e", "input": "hello"})
        before = tokens_left(sent)
        assert 10**6 - before < 10
        # Unknown usage reserves more than nothing, so that it is refused if nothing is left.
        sent = await run.send("POST", "/images/generations", json={"model": "d", "prompt": "a cat"})
        assert before - tokens_left(sent) == 8


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/images/generations"), ("POST", "/audio/speech"), ("POST", "/threads/t/runs")]
)
async def test_operations_with_tokens_are_refused_if_none_are_left(method: str, path: str) -> None:
    """Even if its usage is not known in advance; an operation without tokens passes."""
    stage = RateLimit(tokens_per_day=5000, per="team", untold="allow")
    async with running(stage, response=used(4000, 4000)) as run:
        assert [(await run.send(method, path, json={"model": "m"})).status for _ in range(3)] == [200, 429, 429]
        assert (await run.send("GET", "/files")).status == 200


async def test_a_background_response_has_used_its_maximum() -> None:
    """Azure responds before it does the work, and never reports the usage."""
    answer = Response.json({"id": "resp_1", "status": "queued", "usage": None, "output": []})
    bodies = [b'"background":true,"max_output_tokens":4000', b'"backgroun\\u0064":true', b'"background": true']
    for more in bodies:  # 4096 where it asks for no less
        body = b'{"model":"m","input":"x",' + more + b"}"
        async with running(RateLimit(tokens_per_day=5000, per="team"), response=answer) as run:
            assert [(await run.send("POST", "/responses", body=body)).status for _ in range(2)] == [200, 429]


async def test_a_token_limit_that_is_reached() -> None:
    """A 429 of type `tokens` with the number of tokens that are left, and Retry-After."""
    async with running(RateLimit(tokens_per_minute=600, per="team"), response=used(0, 500), now=Clock()) as run:
        await run.post({**CHAT, "max_tokens": 500})
        sent = await run.post({**CHAT, "max_tokens": 300})
    error = sent.json()["error"]
    assert (sent.status, error["type"], error["code"]) == (429, "tokens", "rate_limit_exceeded")
    assert "but 100 are left of the 600 per minute for this team" in error["message"]
    assert error["message"].endswith("or retry in 30s")
    assert sent.headers.get("x-ratelimit-limit-tokens") == "600"
    assert sent.headers.get("x-ratelimit-remaining-tokens") == "100"
    assert sent.headers.get("x-ratelimit-reset-tokens") == "50s"
    assert sent.headers.get("retry-after") == "30"


async def test_a_request_that_can_never_pass() -> None:
    """The error says what to change, and that a retry does not help."""
    for burst, limit in ((None, 100), (100, 10_000)):
        async with running(RateLimit(tokens_per_minute=limit, token_burst=burst, per="team")) as run:
            sent = await run.post({**CHAT, "max_tokens": 200})
        assert sent.status == 429
        assert "shorten the prompt or lower max_tokens" in sent.json()["error"]["message"]
        assert sent.headers.get("x-should-retry") == "false"
        assert "retry-after" not in sent.headers


PRICES = {"gpt-4o*": Price(input=2.5, output=10.0, cached_input=1.25), "dall-e": Price(input=0, request=0.04)}


async def test_a_limit_of_money() -> None:
    """In the prices' currency, estimated before and settled after; a model without a price is refused."""
    stage = RateLimit(spend_per_day=0.01, per="team", limits=[LimitSettings(spend_per_month=1.0, per="key")])
    async with running(stage, response=used(1000, 500), prices=PRICES, now=Clock()) as run:
        # 1000 x 2.5 + 500 x 10 millionths: three quarters of the day's hundredth
        assert (await run.post({**CHAT, "max_tokens": 500})).status == 200
        sent = await run.post({**CHAT, "max_tokens": 500})
        assert sent.status == 429
        error = sent.json()["error"]
        assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
        assert "can cost up to 0.005013, but 0.0025 is left of the 0.01 per day for this team" in error["message"]
        assert (await run.post({**CHAT, "max_tokens": 100})).status == 200
        assert (await run.post({**CHAT, "model": "o3"})).json()["error"]["code"] == "model_without_price"
        assert (await run.send("GET", "/files")).status == 200


async def test_another_spelling_is_no_other_price_and_no_other_limit() -> None:
    """Azure ignores case, and dots can be left out; the deployment counts."""
    prices = {"gpt-4o": Price(input=100.0), "*": Price(input=0.0)}
    for model in ("gpt-4o", "GPT-4o", "gpt-4.o"):
        stage = RateLimit(spend_per_day=0.10, per="team")
        async with running(ModelMap(), stage, response=used(1000, 0), prices=prices, now=Clock()) as run:
            statuses = [(await run.post({**CHAT, "model": model, "max_tokens": 1})).status for _ in range(2)]
        assert statuses == [200, 429], model
    stages = ModelMap({"gpt-4o*": "one"}), RateLimit(requests_per_day=2, per=["team", "model"])
    async with running(*stages) as run:
        models = [f"gpt-4o-{number}" for number in range(3)]
        assert [(await run.post({**CHAT, "model": model})).status for model in models] == [200, 200, 429]


async def test_a_cheap_name_does_not_make_a_deployment_cheap() -> None:
    """The price is the higher one of the model's name and the deployment's."""
    prices = {"gpt-4o": Price(input=100.0), "cheap": Price(input=0.0)}
    stages = ModelMap(default="gpt-4o"), RateLimit(spend_per_day=0.10, per="team")
    async with running(*stages, response=used(1000, 0), prices=prices, now=Clock()) as run:
        body = {**CHAT, "model": "cheap", "max_tokens": 1}
        assert [(await run.post(body)).status for _ in range(2)] == [200, 429]


async def test_a_shadow_needs_no_price() -> None:
    """A shadow limit refuses nothing."""
    stage = RateLimit(spend_per_day=0.10, per="team", shadow=True)
    async with running(stage, prices=PRICES) as run:
        assert (await run.post({**CHAT, "model": "o3"})).status == 200


@pytest.mark.parametrize(
    ("method", "path", "limit"),
    [
        ("POST", "/batches", {"tokens_per_day": 5}),
        ("POST", "/threads/t/runs", {"spend_per_day": 5.0}),
        ("POST", "/realtime/client_secrets", {"tokens_per_day": 5}),
        ("POST", "/fine_tuning/jobs", {"tokens_per_minute": 5}),
        ("WS", "/responses", {"spend_per_month": 5.0}),
    ],
)
async def test_unreported_operations_do_not_bypass_the_limits(method: str, path: str, limit: dict[str, Any]) -> None:
    """It is refused if tokens or money are limited; with other limits, shadow limits, or `untold: allow` it passes."""
    body = {"model": "gpt-4o"}
    async with running(RateLimit(**limit, per="team"), prices=PRICES) as run:
        sent = await run.send(method, path, json=body)
        assert (sent.status, sent.json()["error"]["code"]) == (403, "not_countable")
    stages = [RateLimit(requests_per_day=5, per="team"), RateLimit(**limit, per="team", shadow=True)]
    if method != "WS":
        stages.append(
            RateLimit(**{name: 10 * value * 1000 for name, value in limit.items()}, per="team", untold="allow")
        )
    for stage in stages:
        async with running(stage, prices=PRICES, response=Response(200)) as run:
            assert (await run.send(method, path, json=body)).status == 200


async def test_requests_can_have_a_price() -> None:
    """Also if no tokens are reported; not if they failed."""
    stage = RateLimit(spend_per_day=0.10, per="team")
    async with running(stage, response=Response.json({"data": []}), prices=PRICES, now=Clock()) as run:

        async def draw() -> int:
            sent = await run.send("POST", "/images/generations", json={"model": "dall-e", "prompt": "a cat"})
            return sent.status

        assert [await draw() for _ in range(3)] == [200, 200, 429]
    async with running(stage, response=Response.json({"error": {}}, 500), prices=PRICES, now=Clock()) as run:
        assert [await draw() for _ in range(4)] == [500] * 4


async def test_several_limits_apply_together() -> None:
    """Also per pair; a refused request takes nothing from any limit."""
    stage = RateLimit(
        requests_per_minute=100,
        per="team",
        limits=[
            LimitSettings(requests_per_day=4, per=["key", "model"]),
            LimitSettings(requests_per_minute=3, per="model"),
        ],
    )
    async with running(AuthPassthrough(), stage, now=Clock()) as run:

        async def ask(key: str, model: str) -> int:
            return (await run.post({**CHAT, "model": model}, headers={"api-key": key})).status

        assert [await ask("a", "m") for _ in range(4)] == [200, 200, 200, 429]
        assert await ask("b", "m") == 429  # the three requests of the model are used by all callers together
        assert [await ask("b", "n") for _ in range(3)] == [200] * 3
        assert [await ask("b", "M") for _ in range(2)] == [429] * 2  # case does not matter
        sent = await run.send("GET", "/files", headers={"api-key": "c"})
        assert (sent.status, shown(sent)[:2]) == (200, ("100", "93"))


async def test_a_shadow_refuses_nothing() -> None:
    """It counts and logs the requests that it would refuse; clients see nothing of it."""
    stage = RateLimit(limits=[LimitSettings(requests_per_minute=1, per="team", shadow=True)])
    async with running(stage, now=Clock()) as run:
        first = await run.post()
        second = await run.post()
    assert (first.status, second.status) == (200, 200)
    assert shown(second) == (None, None, None)
    assert "shadow_refused" not in first.outcome.counts
    assert second.outcome.counts["shadow_refused"] == 1
    assert second.reached is not None
    assert second.reached.notes["shadow_refused"] == ["RateLimit: requests_per_minute 1 per team"]


async def test_a_shadow_limit_next_to_a_real_one() -> None:
    """Both count separately."""
    stage = RateLimit(
        requests_per_minute=3, per="team", limits=[LimitSettings(requests_per_minute=1, per="team", shadow=True)]
    )
    async with running(stage, now=Clock()) as run:
        sents = [await run.post() for _ in range(4)]
    assert [each.status for each in sents] == [200, 200, 200, 429]
    # (A request that is refused anyway does not count for the shadow limit.)
    assert [each.outcome.counts.get("shadow_refused", 0) for each in sents] == [0, 1, 1, 0]


async def test_the_time_that_a_request_waited_is_noted() -> None:
    """The log event separates it from the time of Azure."""
    async with running(RateLimit(requests_per_minute=600, burst=1, per="team", wait=5)) as run:
        sents = [await run.post() for _ in range(2)]
    assert [each.status for each in sents] == [200, 200]
    assert sents[0].reached is not None
    assert sents[1].reached is not None
    assert "waited_ms" not in sents[0].reached.notes
    waited = sents[1].reached.notes["waited_ms"]
    assert isinstance(waited, float)
    assert waited > 0


async def test_a_stage_with_only_shadow_limits() -> None:
    """The simple form can be a shadow limit, too."""
    async with running(RateLimit(requests_per_minute=1, per="team", shadow=True), now=Clock()) as run:
        assert [(await run.post()).status for _ in range(3)] == [200] * 3


class Unavailable(MemoryCounters):
    """Counters that are unavailable."""

    async def take(self, charges: object) -> Decision:
        raise CountersUnavailable("unavailable")


@pytest.mark.parametrize(("on_error", "status"), [("open", 200), ("closed", 503)])
async def test_while_the_store_is_unavailable(on_error: Any, status: int) -> None:
    """Requests pass uncounted, or are refused."""
    stage = RateLimit(requests_per_minute=1, per="team", on_error=on_error)
    azure_s = {"x-ratelimit-remaining-requests": "119", "x-ratelimit-limit-tokens": "5", "x-other": "1"}
    with capture_logs() as events:
        async with running(stage, shared=Shared(Unavailable()), response=Response(200, b"", azure_s)) as run:
            sent = await run.post()
    assert sent.status == status
    assert not any(name.startswith("x-ratelimit") for name, _ in sent.headers)
    (told,) = [each["consequence"] for each in events if "consequence" in each]
    assert told == ("requests pass uncounted" if status == 200 else "requests are refused with 503")
    if status == 503:
        assert sent.json()["error"]["code"] == "limits_unavailable"
        assert sent.headers.get("retry-after") == "1"
    else:
        assert sent.outcome.counts["unlimited"] == 1


async def test_a_request_can_wait_for_room() -> None:
    """Until another request is complete, or for `wait` seconds; then it is refused."""
    release = asyncio.Event()

    async def slow(request: object) -> Response:
        await release.wait()
        return Response()

    async with running(RateLimit(in_flight=1, per="team", wait=1), response=slow) as run:
        first = asyncio.create_task(run.post())
        await asyncio.sleep(0)
        assert (await run.post()).status == 429
        second = asyncio.create_task(run.post())
        await asyncio.sleep(0.05)
        release.set()
        assert [(await task).status for task in (first, second)] == [200, 200]


async def test_counters_have_names(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Counters per key belong to a team; counters per model are shared by all teams."""
    yaml = """
resources: {azure: {endpoint: "${ENDPOINT}"}}
teams: teams/*.yaml
pipeline:
  - auth_passthrough
  - model_map
  - rate_limit: {requests_per_minute: 2, limits: [{requests_per_day: 5, per: model}]}
  - api_version
"""
    files = {f"teams/{name}.yaml": f"match: {{path_prefix: /{name}}}\n" for name in "ab"}
    gateway = await start_gateway(azure.endpoint, yaml, files)

    async def ask(path: str) -> int:
        async with gateway.post(f"{path}/v1/chat/completions") as answer:
            status: int = answer.status
            return status

    assert [await ask("/a") for _ in range(3)] == [200, 200, 429]
    assert [await ask("/b") for _ in range(3)] == [200, 200, 429]
    assert [await ask("") for _ in range(2)] == [200, 429]


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (RateLimit(requests_per_minute=1, limits=[LimitSettings()]), "sets no limit"),
        (RateLimit(limits=[LimitSettings(tokens_per_day=1, token_burst=5)]), "tokens_per_minute"),
        (RateLimit(limits=[LimitSettings(in_flight=1, per=[])]), "per is empty"),
        (RateLimit(spend_per_day=1.0), "prices"),
        (RateLimit(in_flight=1, limits=[LimitSettings(in_flight=2)]), "already"),
        (
            RateLimit(
                limits=[
                    LimitSettings(in_flight=1, per=["team", "key"]),
                    LimitSettings(in_flight=2, per=["key", "team"]),
                ]
            ),
            "already",
        ),
    ],
)
def test_invalid_limits_are_mistakes(stage: RateLimit, words: str) -> None:
    """Reported for their entry."""
    assert any(words in message for _, message in stage.check(Services("t", "s")))


class Settled(MemoryCounters):
    """Counters that record the settlements."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []
        self._decisions: list[Decision] = []  # keeps them alive, so that all ids differ

    def settle(self, decision: Decision, actual: Any) -> None:
        self._decisions.append(decision)
        self.calls.append(id(decision))
        super().settle(decision, actual)


async def test_1000_concurrent_requests_never_exceed_a_token_limit(start_gateway: StartGateway) -> None:
    """Through real sockets, with streams that end, break off and are abandoned: together within the limit.

    The bound: what was used beyond the estimates of the requests that ran. Here no answer is longer than its
    `max_tokens`, and so there is nothing beyond it.
    """
    answers = itertools.count()

    async def answer(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        number = next(answers)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(3):
            await response.write(event({"choices": [{"delta": {"content": " word"}}], "usage": None}))
        if number % 3 == 0:
            assert request.transport is not None
            request.transport.abort()
        elif number % 3 == 1:
            usage = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
            await response.write(event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
        return response

    yaml = """
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline: [access_log, auth_passthrough, rate_limit: {tokens_per_day: 3000, per: team}, model_map, api_version]
"""
    async with FakeAzure(respond=answer) as azure:
        gateway = await start_gateway(azure.endpoint, yaml)
        settled = Settled()
        gateway.server.shared.counters.store = settled

        async def one(number: int) -> None:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                body = {**CHAT, "stream": True, "max_tokens": 20}
                async with gateway.post(json=body, timeout=aiohttp.ClientTimeout(total=30)) as answer:
                    if number % 5:
                        await answer.read()
                    else:
                        await answer.content.readany()

        await asyncio.gather(*[one(number) for number in range(1000)])
        await gateway.idle()
        events = gateway.exchanges()
        assert len(events) == 1000
        total = sum(each.get("input_tokens", 0) + each.get("output_tokens", 0) for each in events)
        admitted = [each for each in events if each["status"] == 200]
        assert 60 < len(admitted) < 1000
        # Each admitted request is settled once.
        assert (len(settled.calls), len(set(settled.calls))) == (len(admitted), len(admitted))
        assert total <= 3000
        # And with its actual usage: exactly the rest is left.
        async with gateway.post(json={**CHAT, "max_tokens": 1}) as answer_:
            left = int(answer_.headers["x-ratelimit-remaining-tokens"])
            assert 3000 - total - left < 30
            assert left <= 3000 - total


async def test_a_stream_has_the_remaining_tokens(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """In its headers, instead of Azure's; the usage for the settlement is hidden from the client."""
    yaml = """
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline:
  - auth_passthrough
  - rate_limit: {requests_per_minute: 10, tokens_per_minute: 1000}
  - model_map
  - api_version
  - sse_newline
"""
    gateway = await start_gateway(azure.endpoint, yaml)
    for left in (1000, 1000 - 12):
        async with gateway.post(json={**CHAT, "stream": True, "max_tokens": 100}) as answer:
            assert 100 < left - int(answer.headers["x-ratelimit-remaining-tokens"]) < 140
            assert answer.headers["x-ratelimit-limit-requests"] == "10"
            assert b"usage" not in await answer.read()
        await gateway.idle()
