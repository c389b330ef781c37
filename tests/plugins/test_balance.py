"""`balance`: a deployment of the pool serves the request, and another one if that one fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from gateway.balancing.circuit_state import CLOSED
from gateway.config import load
from gateway.errors import ConfigError
from gateway.limits.memory_budget import BUDGETS
from tests.cluster import Fault, Region, closed_port, cluster, pool_yaml, slow_tls
from tests.conftest import CHAT, Gateway, StartGateway, until, write_files

STREAM = {**CHAT, "stream": True}


@pytest.fixture
async def regions() -> AsyncIterator[dict[str, Region]]:
    """Three regions without faults."""
    async with cluster("east", "west", "north") as running:
        yield running


async def ask(gateway: Gateway, body: Any = CHAT, **more: Any) -> tuple[int, Any, Mapping[str, str]]:
    """Send one request, and return the status, the body and the headers of its answer."""
    async with gateway.post(json=body, key=None, **more) as answer:
        text = await answer.text()
        try:
            content = json.loads(text)
        except ValueError:
            content = text
        return answer.status, content, answer.headers


def counted(regions: dict[str, Region]) -> dict[str, int]:
    """Return how many requests each region saw."""
    return {name: len(region.saw) for name, region in regions.items()}


def row(gateway: Gateway, name: str) -> Any:
    """Return the health of a region's deployment."""
    rows = gateway.server.shared.health.all()
    return next(each for each in rows if each.deployment.resource.name == name)


def end_rest(gateway: Gateway, name: str) -> None:
    """End a deployment's unavailability now, so that no test depends on a short one."""
    resting = row(gateway, name)
    assert resting.blocked_until > asyncio.get_running_loop().time()
    resting._cooldown_until = asyncio.get_running_loop().time()
    resting.block_until(resting._cooldown_until)


# -- selection -----------------------------------------------------------------------------------------


async def test_requests_one_after_another_are_shared_evenly(
    start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """Even if two are never in flight at once; the log names the deployment that responded."""
    gateway = await start_gateway("", pool_yaml(regions))
    for _ in range(12):
        assert (await ask(gateway))[0] == 200
    assert counted(regions) == {"east": 4, "west": 4, "north": 4}
    await until(lambda: len(gateway.exchanges()) == 12)
    served = Counter(f"{event['resource']}/{event['deployment']}" for event in gateway.exchanges())
    assert served == {"east/gpt-4o": 4, "west/gpt-4o": 4, "north/gpt-4o": 4}
    assert not any("attempts" in event for event in gateway.exchanges())


async def test_weights_are_shares(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """With 2:1:1, half of the requests go to the first deployment."""
    yaml = pool_yaml(regions).replace("- east/gpt-4o", "- {deployment: east/gpt-4o, weight: 2}")
    gateway = await start_gateway("", yaml)
    for _ in range(20):
        await ask(gateway)
    assert counted(regions) == {"east": 10, "west": 5, "north": 5}


async def test_the_first_priority_gets_all_requests_while_it_is_available(
    start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """The next priority gets requests only meanwhile."""
    yaml = pool_yaml(regions).replace("- west/gpt-4o", "- {deployment: west/gpt-4o, priority: 2}")
    yaml = yaml.replace("- north/gpt-4o", "- {deployment: north/gpt-4o, priority: 2}")
    gateway = await start_gateway("", yaml)
    for _ in range(3):
        await ask(gateway)
    assert counted(regions) == {"east": 3, "west": 0, "north": 0}
    regions["east"].fault, regions["east"].rest = "limited", 60
    for _ in range(4):
        assert (await ask(gateway))[0] == 200
    assert counted(regions) == {"east": 4, "west": 2, "north": 2}
    regions["east"].fault = None
    end_rest(gateway, "east")
    await ask(gateway)
    assert counted(regions) == {"east": 5, "west": 2, "north": 2}


async def test_requests_in_flight_count(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """A deployment that does not respond gets few more requests, until the others have as many in flight."""
    regions["east"].fault = "mute"
    gateway = await start_gateway("", pool_yaml(regions))
    waiting = [asyncio.create_task(ask(gateway)) for _ in range(20)]
    await until(lambda: sum(counted(regions).values()) == 20)
    for each in waiting:
        each.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert 5 <= len(regions["east"].saw) <= 8
    held: list[Any] = [asyncio.create_task(ask(gateway)) for _ in range(3)]
    await until(lambda: row(gateway, "east").in_flight)
    before = len(regions["east"].saw)
    for _ in range(3):
        held.append(asyncio.create_task(ask(gateway)))
        await asyncio.sleep(0.02)
    for _ in range(12):
        asked = asyncio.create_task(ask(gateway))
        held.append(asked)
        await asyncio.sleep(0.02)
    assert len(regions["east"].saw) - before <= 2
    for each in held:
        each.cancel()
    await asyncio.gather(*held, return_exceptions=True)


async def test_the_same_seed_makes_the_same_choices(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """So that tests of a configuration are repeatable."""
    orders = []
    for _ in range(2):
        gateway = await start_gateway("", pool_yaml(regions, settings="{seed: 7}"))
        for _ in range(6):
            await ask(gateway)
        await gateway.idle()
        orders.append([event["resource"] for event in gateway.exchanges()])
    assert orders[0] == orders[1]


@pytest.mark.parametrize("name", ["prompt_cache_key", "user", "safety_identifier"])
async def test_affinity_sends_similar_requests_to_one_deployment(
    name: str, start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """Its prompt cache helps then. While it is unavailable, all go to one other deployment, and come back."""
    gateway = await start_gateway("", pool_yaml(regions, settings=f"{{affinity: [{name}]}}"))
    for _ in range(6):
        await ask(gateway, {**CHAT, name: "alike"})
    home = next(name for name, count in counted(regions).items() if count)
    assert counted(regions)[home] == 6
    regions[home].fault, regions[home].rest = "limited", 60
    for _ in range(3):
        assert (await ask(gateway, {**CHAT, name: "alike"}))[0] == 200
    elsewhere = [len(region.saw) for each, region in regions.items() if each != home]
    assert sorted(elsewhere) == [0, 3]
    used = set()
    regions[home].fault = None
    end_rest(gateway, home)
    for number in range(24):
        await ask(gateway, {**CHAT, name: f"other {number}"})
        used = {each for each, region in regions.items() if len(region.saw) > 3}
    assert used == {"east", "west", "north"}


async def test_affinity_by_caller(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """With `caller`, requests with one key go together; requests without a caller are distributed."""
    yaml = pool_yaml(regions, settings="{affinity: [prompt_cache_key, caller]}").replace(
        "  - model_map:", "  - auth_passthrough\n  - model_map:"
    )
    gateway = await start_gateway("", yaml)
    for _ in range(6):
        async with gateway.post(key="azure-key") as answer:
            assert answer.status == 200
    assert sorted(counted(regions).values()) == [0, 0, 6]


async def test_a_deployment_without_headroom_is_the_last_resort(
    start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """The quota that Azure reports counts before the first 429."""
    gateway = await start_gateway("", pool_yaml(regions))
    for name in ("east", "west"):
        health = next(each for each in gateway.server.shared.health.all() if each.deployment.resource.name == name)
        health.avoid_until = float("inf")
    for _ in range(3):
        await ask(gateway)
    assert counted(regions) == {"east": 0, "west": 0, "north": 3}
    regions["north"].fault = "error"
    assert (await ask(gateway))[0] == 200


# -- failover -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["plain", "stream"])
@pytest.mark.parametrize(
    "fault",
    ["limited", "limited_silently", "limited_in_words", "error", "unavailable", "timeout", "broken", "wrong_key",
     "no_deployment", "mute", "stalled", "error_in_stream"],
)  # fmt: skip
async def test_another_deployment_responds(
    fault: Fault, body: Any, start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """Whatever is wrong with the first one, if no byte of the response has gone to the client."""
    yaml = pool_yaml(regions).replace("api_key: azure-key}", "api_key: azure-key, timeouts: {first_byte: 0.3}}")
    for name in ("west", "north"):
        yaml = yaml.replace(f"- {name}/gpt-4o", f"- {{deployment: {name}/gpt-4o, priority: 2}}")
    gateway = await start_gateway("", yaml)
    regions["east"].fault = fault
    status, content, _ = await ask(gateway, body)
    assert status == 200
    assert "Hello" in json.dumps(content)
    assert sum(counted(regions).values()) == 2
    await until(lambda: gateway.exchanges())
    attempts = gateway.exchanges()[0]["attempts"]
    assert [each["deployment"].partition("/")[0] for each in attempts][:1] == ["east"]
    assert len(attempts) == 2
    assert attempts[0]["reason"]
    assert attempts[1]["status"] == 200


async def test_an_unreachable_region_fails_no_request(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """Refused connections, unknown names, and a TLS handshake that does not start."""
    async with slow_tls(30) as port:
        lost = {
            "refused": f"http://127.0.0.1:{closed_port()}",
            "unknown": "http://nowhere.invalid",
            "slow": f"https://127.0.0.1:{port}",
        }
        resources = "\n".join(
            f'  {name}: {{endpoint: "{url}", api_key: k, timeouts: {{connect: 0.3}}}}' for name, url in lost.items()
        )
        yaml = pool_yaml(regions, more="\n".join(f"    - {name}/gpt-4o" for name in lost))
        gateway = await start_gateway("", yaml.replace("resources:\n", f"resources:\n{resources}\n"))
        answers = await asyncio.gather(*(ask(gateway) for _ in range(30)))
        assert Counter(status for status, _, _ in answers) == {200: 30}
        await until(lambda: len(gateway.exchanges()) == 30)
        reasons = {each.get("reason") for event in gateway.exchanges() for each in event.get("attempts", ())}
        assert {"connect", "dns", "connect_timeout"} <= reasons


@pytest.mark.parametrize("fault", ["broken_late", "error_late", "stalled_late"])
async def test_no_retry_after_the_first_byte_of_a_response(
    fault: Fault, start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """A reset, an error, or the idle timeout breaks a stream that has started; it ends with an `error` event."""
    for region in regions.values():
        region.fault = fault
    yaml = pool_yaml(regions).replace("  - sse_newline", "  - stream_errors\n  - sse_newline")
    gateway = await start_gateway("", yaml, timeouts={"idle": 0.3})
    received = b""
    async with gateway.post(json=STREAM, key=None) as answer:
        assert answer.status == 200
        with contextlib.suppress(Exception):
            async for chunk in answer.content.iter_any():
                received += chunk
    assert b"word" in received
    assert b'data: {"error"' in received
    assert sum(counted(regions).values()) == 1
    await until(lambda: gateway.exchanges())
    rows = gateway.server.shared.health.all()
    assert sum(each.counts["broken_off"] for each in rows) == 1
    assert sum(each.report(0)["counts"]["answered"] for each in rows) == 0


async def test_a_request_that_is_not_idempotent_is_not_retried_if_it_may_have_been_processed(
    start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """A stored chat, or a response: not after a 500, but after a 429, because Azure did not process it."""
    yaml = pool_yaml(regions).replace("2024-10-21", "v1")
    gateway = await start_gateway("", yaml)
    for region in regions.values():
        region.fault = "error"
    for path, body in (("/v1/chat/completions", {**CHAT, "store": True}), ("/v1/responses", {"model": "gpt-4o"})):
        before = sum(counted(regions).values())
        assert (await ask(gateway, body, path=path))[0] == 500
        assert sum(counted(regions).values()) == before + 1
    before = sum(counted(regions).values())
    assert (await ask(gateway, {"model": "gpt-4o", "store": False}, path="/v1/responses"))[0] == 500
    assert sum(counted(regions).values()) > before + 1
    await asyncio.sleep(0)
    for region in regions.values():
        region.fault = "limited"
        region.saw.clear()
    for each in gateway.server.shared.health.all():
        each.blocked_until, each.state, each.failures = 0.0, CLOSED, 0
    assert (await ask(gateway, {"model": "gpt-4o"}, path="/v1/responses"))[0] == 429
    assert sum(counted(regions).values()) >= 3


async def test_an_abuse_penalty_is_not_retried(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """Azure penalizes callers that continue, so the client gets the 429 at once."""
    for region in regions.values():
        region.fault = "penalty"
    gateway = await start_gateway("", pool_yaml(regions))
    assert (await ask(gateway))[0] == 429
    assert sum(counted(regions).values()) == 1


async def test_an_error_of_the_client_is_not_retried(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """An invalid request, or an invalid key of the client's own."""
    gateway = await start_gateway("", pool_yaml(regions))
    status, _, _ = await ask(gateway, {"model": "gpt-4o", "stream": "yes", "messages": 5}, headers={"x": "y"})
    assert status in (200, 400)
    yaml = pool_yaml(regions).replace("  - model_map:", "  - auth_passthrough\n  - model_map:")
    gateway = await start_gateway("", yaml)
    before = sum(counted(regions).values())
    async with gateway.post(key="not-the-key") as answer:
        assert answer.status == 401
    assert sum(counted(regions).values()) == before + 1


async def test_all_fail(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """The client gets the most useful error, with the soonest time to retry; the log has each attempt."""
    regions["east"].fault, regions["west"].fault, regions["north"].fault = "error", "limited", "broken"
    regions["west"].rest = 20
    gateway = await start_gateway("", pool_yaml(regions, settings="{wait: 0}"))
    status, content, headers = await ask(gateway)
    assert status == 429
    assert content["error"]["code"] == "rate_limit_exceeded"
    assert int(headers["retry-after"]) <= 20
    assert int(headers["retry-after-ms"]) <= 20_000
    warning = next(event for event in gateway.events if event["event"] == "pool_failed")
    assert warning["pool"] == "chat"
    assert len(warning["attempts"]) == 3
    assert {each["deployment"].split("/")[0] for each in warning["attempts"]} == {"east", "west", "north"}
    assert {each["reason"] for each in warning["attempts"]} == {"status_500", "rate_limited", "broken_off"}


async def test_all_are_unavailable(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """No request is sent, and the client learns when the first deployment is available, and why."""
    for region in regions.values():
        region.fault, region.rest = "limited", 30
    gateway = await start_gateway("", pool_yaml(regions))
    assert (await ask(gateway))[0] == 429
    before = counted(regions)
    status, content, headers = await ask(gateway)
    assert (status, content["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 28 <= int(headers["retry-after"]) <= 30
    assert counted(regions) == before


async def test_a_request_waits_for_a_deployment_that_is_available_soon(
    start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """Instead of an error, but for `wait` at most."""
    for region in regions.values():
        region.fault, region.rest = "limited", 0.4
    gateway = await start_gateway("", pool_yaml(regions, settings="{wait: 2}"))
    asked = asyncio.create_task(ask(gateway))
    await until(lambda: all(region.saw for region in regions.values()))
    for region in regions.values():
        region.fault = None
    status, _, _ = await asked
    assert status == 200


async def test_the_deadline_limits_attempts_and_waits(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """All together: the last attempt has the time that is left."""
    for region in regions.values():
        region.fault = "mute"
    yaml = pool_yaml(regions, settings="{deadline: 1.5}").replace(
        "api_key: azure-key}", "api_key: azure-key, timeouts: {first_byte: 1}}"
    )
    gateway = await start_gateway("", yaml)
    for body in (CHAT, STREAM):
        before = sum(counted(regions).values())
        status, content, _ = await ask(gateway, body)
        assert (status, content["error"]["code"]) == (504, "upstream_timeout")
        assert sum(counted(regions).values()) - before == 2


async def test_the_retry_budget_limits_retries(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """However many requests fail at once: `reserve`, and the share `retries` of all requests."""
    for region in regions.values():
        region.fault = "error"
    yaml = pool_yaml(
        regions, settings="{retries: 0.1, reserve: 5, wait: 0}", top="health: {failures: 1000, least: 100000}"
    )
    gateway = await start_gateway("", yaml)
    answers = await asyncio.gather(*(ask(gateway) for _ in range(100)))
    assert {status for status, _, _ in answers} == {500}
    assert sum(counted(regions).values()) <= 100 + 5 + 10
    assert sum(counted(regions).values()) >= 100 + 5


async def test_the_retry_budget_is_for_requests_that_may_have_been_processed(
    start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """A 429 needs no budget: requests spill over from full provisioned throughput."""
    yaml = pool_yaml(regions, settings="{retries: 0, reserve: 0}")
    for name in ("west", "north"):
        yaml = yaml.replace(f"- {name}/gpt-4o", f"- {{deployment: {name}/gpt-4o, priority: 2}}")
    gateway = await start_gateway("", yaml)
    regions["east"].fault, regions["east"].rest = "limited", 0.02
    for _ in range(30):
        assert (await ask(gateway))[0] == 200
        await asyncio.sleep(0.03)
    assert len(regions["east"].saw) > 3


async def test_without_a_reserve_the_share_of_retries_counts(
    start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """With a share of 1, each request may be sent once more."""
    yaml = pool_yaml(regions, settings="{retries: 1, reserve: 0}", top="health: {failures: 1000, least: 100000}")
    gateway = await start_gateway("", yaml)
    regions["east"].fault = "error"
    for _ in range(12):
        assert (await ask(gateway))[0] == 200


async def test_attempts_limits_the_attempts(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """With 1, there is no retry."""
    for region in regions.values():
        region.fault = "error"
    gateway = await start_gateway("", pool_yaml(regions, settings="{attempts: 1}"))
    assert (await ask(gateway))[0] == 500
    assert sum(counted(regions).values()) == 1


async def test_backoff_if_every_deployment_has_failed(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """There is a pause before the first one gets the request again."""
    for region in regions.values():
        region.fault = "error"
    gateway = await start_gateway("", pool_yaml(regions))
    assert (await ask(gateway))[0] == 500
    times = sorted(at for region in regions.values() for at, _, _ in region.saw)
    assert len(times) == 5
    assert times[3] - times[2] > 0.2


async def test_a_body_larger_than_keep_is_sent_once(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """Unless the connection failed, because no byte of it was read then."""
    for region in regions.values():
        region.fault = "error"
    yaml = pool_yaml(regions, settings="{keep: 1000}").replace('gpt-4o: "pool', 'whisper: "pool')
    gateway = await start_gateway("", yaml)

    def form() -> Any:
        import aiohttp

        data = aiohttp.FormData()
        data.add_field("model", "whisper")
        data.add_field("file", b"x" * 300_000, filename="a.mp3")
        return data

    async with gateway.session.post(gateway.url + "/v1/audio/transcriptions", data=form()) as answer:
        assert answer.status == 500
    assert sum(counted(regions).values()) == 1
    lost = f'  lost: {{endpoint: "http://127.0.0.1:{closed_port()}", api_key: k}}\n'
    yaml = yaml.replace("resources:\n", f"resources:\n{lost}").replace("  chat:\n", "  chat:\n    - lost/gpt-4o\n")
    yaml = yaml.replace("- lost/gpt-4o", "- {deployment: lost/gpt-4o, priority: 1}")
    for name, region in regions.items():
        yaml = yaml.replace(f"- {name}/gpt-4o", f"- {{deployment: {name}/gpt-4o, priority: 2}}")
        region.fault = None
    gateway = await start_gateway("", yaml)
    async with gateway.session.post(gateway.url + "/v1/audio/transcriptions", data=form()) as answer:
        assert answer.status == 200
    bodies = [seen.body for region in regions.values() for _, fault, seen in region.saw if fault is None]
    assert [body.count(b"x" * 300_000) for body in bodies] == [1]


# -- health --------------------------------------------------------------------------------------------


async def test_the_circuit_breaker_opens_and_closes(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """Open after failures in a row; half-open, with one trial request; closed after its success."""
    gateway = await start_gateway("", pool_yaml(regions, top="health: {failures: 3, rest: 60}"))
    regions["east"].fault = "error"
    for _ in range(30):
        assert (await ask(gateway))[0] == 200
    assert len(regions["east"].saw) == 3
    regions["east"].fault = "mute"
    end_rest(gateway, "east")
    waiting = [asyncio.create_task(ask(gateway)) for _ in range(12)]
    await until(lambda: len(regions["east"].saw) == 4)
    await asyncio.sleep(0.1)
    assert len(regions["east"].saw) == 4
    for each in waiting:
        each.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await gateway.idle()
    regions["east"].fault = None
    for _ in range(9):
        assert (await ask(gateway))[0] == 200
    assert len(regions["east"].saw) >= 6


async def test_a_trial_that_its_client_abandons_is_repeated(
    start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """By the next request."""
    only = {"east": regions["east"]}
    gateway = await start_gateway("", pool_yaml(only, settings="{wait: 0}", top="health: {failures: 1, rest: 60}"))
    regions["east"].fault = "error"
    assert (await ask(gateway))[0] == 500
    regions["east"].fault = "mute"
    end_rest(gateway, "east")
    asked = asyncio.create_task(ask(gateway))
    await until(lambda: len(regions["east"].saw) == 2)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    await gateway.idle()
    regions["east"].fault = None
    assert (await ask(gateway))[0] == 200


def respond(region: Region, status: int, code: str = "x", message: str = "m", **headers: str) -> None:
    """Make a region send this response from now on."""

    async def answer(seen: Any, request: web.BaseRequest) -> web.StreamResponse:
        region.saw.append((0.0, "error", seen))
        body = {"error": {"code": code, "message": message}}
        return web.json_response(body, status=status, headers={k.replace("_", "-"): v for k, v in headers.items()})

    region.azure.respond = answer


@pytest.mark.parametrize("status", [429, 503])
async def test_a_cooldown_of_0_is_not_0(status: int, start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """A deployment that fails fast with `Retry-After: 0` does not get every request first."""
    gateway = await start_gateway("", pool_yaml(regions, settings="{reserve: 5, retries: 0}"))
    respond(regions["east"], status, retry_after="0")
    for _ in range(60):
        assert (await ask(gateway))[0] == 200
    assert len(regions["east"].saw) <= 10


async def test_a_request_that_fails_everywhere_does_not_open_every_circuit(
    start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """It may be the cause, so its failures count as one. An error that the API blames on the client counts as none."""
    gateway = await start_gateway("", pool_yaml(regions, settings="{wait: 0}", top="health: {failures: 3}"))
    for region in regions.values():
        region.fault = "error"
    assert (await ask(gateway))[0] == 500
    assert [row(gateway, name).failures for name in regions] in ([1, 0, 0], [0, 1, 0], [0, 0, 1])

    async def failed(seen: Any, request: web.BaseRequest) -> web.StreamResponse:
        event = {"type": "response.failed", "response": {"error": {"code": "invalid_prompt", "message": "no"}}}
        return web.Response(body=f"data: {json.dumps(event)}\n\n".encode(), content_type="text/event-stream")

    gateway = await start_gateway("", pool_yaml(regions).replace("2024-10-21", "v1"))
    for region in regions.values():
        region.azure.respond = failed
    total = sum(len(region.azure.requests) for region in regions.values())
    body = {"model": "gpt-4o", "input": "x", "stream": True, "store": False}
    assert (await ask(gateway, body, path="/v1/responses"))[0] == 200
    assert sum(len(region.azure.requests) for region in regions.values()) == total + 1


async def test_a_403_may_be_about_one_request(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """It is retried elsewhere, and the deployment stays available: only many of them open the circuit."""
    gateway = await start_gateway("", pool_yaml(regions))
    for region in regions.values():
        respond(region, 403, "PermissionDenied")
    status, content, _ = await ask(gateway)
    assert status == 502  # a 401 or 403 would blame the client's key
    assert "Azure rejected the gateway's credential for this model" in content["error"]["message"]
    assert all(row(gateway, name).is_available(asyncio.get_running_loop().time()) for name in regions)


async def test_the_time_of_earlier_attempts_is_not_a_deployment_s_fault(
    start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """A timeout is no failure if the attempt had only the rest of the deadline."""
    two = {name: regions[name] for name in ("east", "west")}
    yaml = pool_yaml(two, settings="{deadline: 0.6}", top="health: {failures: 1, rest: 30}")
    yaml = yaml.replace("- west/gpt-4o", "- {deployment: west/gpt-4o, priority: 2}")
    gateway = await start_gateway("", yaml)
    regions["east"].fault = "mute"

    async def slow(seen: Any, request: web.BaseRequest) -> None:
        await asyncio.sleep(0.4)

    regions["west"].azure.respond = slow
    assert (await ask(gateway))[0] == 504
    assert not row(gateway, "west").failing
    assert row(gateway, "east").failing
    assert (await ask(gateway))[0] == 200


async def test_a_stream_that_does_not_start_within_silence_is_retried(
    start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """Streams start soon. Other responses may take until the deadline, or the resource's timeout."""
    yaml = pool_yaml(regions, settings="{silence: 0.3, deadline: 1.2}")
    for name in ("west", "north"):
        yaml = yaml.replace(f"- {name}/gpt-4o", f"- {{deployment: {name}/gpt-4o, priority: 2}}")
    gateway = await start_gateway("", yaml)
    for fault in ("mute", "stalled"):
        regions["east"].fault = fault
        assert (await ask(gateway, STREAM))[0] == 200
    before = counted(regions)
    assert (await ask(gateway, {**STREAM, "store": True}))[0] == 504  # it is not idempotent
    assert counted(regions)["west"] == before["west"]

    async def slow(seen: Any, request: web.BaseRequest) -> None:
        await asyncio.sleep(0.8)

    regions["east"].azure.respond = slow
    assert (await ask(gateway))[0] == 200


async def test_a_slow_client_is_not_a_deployment_s_fault(
    start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """The timeout for the first byte starts after the upload. A slow upload does not exclude other trials."""
    only = {"east": regions["east"]}
    yaml = pool_yaml(only, settings="{wait: 0, keep: 10}", top="health: {failures: 1, rest: 60}")
    yaml = yaml.replace("api_key: azure-key}", "api_key: azure-key, timeouts: {first_byte: 0.3}}")
    yaml = yaml.replace('gpt-4o: "pool', 'whisper: "pool:chat", gpt-4o: "pool')
    gateway = await start_gateway("", yaml)
    sent = asyncio.Event()

    async def trickle() -> AsyncIterator[bytes]:
        part = b'--b\r\ncontent-disposition: form-data; name="%b"\r\n\r\n%b\r\n'
        yield part % (b"model", b"whisper")
        for _ in range(4):
            await asyncio.sleep(0.15)
            yield part % (b"prompt", b"x")
            sent.set()
        yield b"--b--\r\n"

    async def upload() -> int:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        url = gateway.url + "/v1/audio/transcriptions"
        async with gateway.session.post(url, data=trickle(), headers=headers) as answer:
            return answer.status

    assert await upload() == 200
    assert not row(gateway, "east").failing
    regions["east"].fault = "error"
    assert (await ask(gateway))[0] == 500
    regions["east"].fault = None
    end_rest(gateway, "east")
    sent.clear()
    slow = asyncio.create_task(upload())
    await sent.wait()
    assert (await ask(gateway))[0] == 200
    assert await slow == 200


async def test_uploads_alone_close_the_circuit(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """Requests whose bodies are not kept are trials as well, without excluding others."""
    two = {name: regions[name] for name in ("east", "west")}
    yaml = pool_yaml(two, settings="{keep: 10}", top="health: {failures: 2, rest: 60}")
    yaml = yaml.replace("- west/gpt-4o", "- {deployment: west/gpt-4o, priority: 2}")
    gateway = await start_gateway("", yaml.replace('gpt-4o: "pool', 'whisper: "pool'))

    async def upload() -> int:
        data = aiohttp.FormData()
        data.add_field("model", "whisper")
        data.add_field("file", b"x" * 300_000, filename="a.mp3")
        async with gateway.session.post(gateway.url + "/v1/audio/transcriptions", data=data) as answer:
            return answer.status

    regions["east"].fault = "error"
    assert [await upload() for _ in range(3)] == [500, 500, 200]
    regions["east"].fault = None
    end_rest(gateway, "east")
    assert await upload() == 200
    assert not row(gateway, "east").failing


async def test_a_slow_error_body_delays_no_request(
    start_gateway: StartGateway, regions: dict[str, Region], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read for some seconds, and not until the deadline."""
    monkeypatch.setattr("gateway.balancing.attempts._ERROR_TIMEOUT", 0.3)
    yaml = pool_yaml(regions, settings="{deadline: 600}").replace("  - openai_errors\n", "")
    for name in ("west", "north"):
        yaml = yaml.replace(f"- {name}/gpt-4o", f"- {{deployment: {name}/gpt-4o, priority: 2}}")
    gateway = await start_gateway("", yaml)

    async def drip(seen: Any, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(status=429, headers={"content-type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.1)

    regions["east"].azure.respond = drip
    status, _, _ = await ask(gateway)
    assert status in (200, 429)


async def test_the_deadline_includes_the_stages_below(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """However many requests a stage below sends; and a stage above may set an earlier one."""
    yaml = pool_yaml(regions, settings="{deadline: 1, attempts: 1}").replace(
        "  - api_version", "  - embeddings_split: 1\n  - api_version"
    )
    gateway = await start_gateway("", yaml.replace('gpt-4o: "pool', 'embed: "pool').replace("/gpt-4o", "/embed"))

    async def slow(seen: Any, request: web.BaseRequest) -> None:
        await asyncio.sleep(0.4)

    for region in regions.values():
        region.azure.respond = slow
    status, _, _ = await ask(gateway, {"model": "embed", "input": list("abcdefgh")}, path="/v1/embeddings")
    assert status == 504
    assert sum(counted(regions).values()) < 8
    above = (
        "import time\nfrom gateway import Stage\n\n\nclass Hurry(Stage):\n"
        "    async def __call__(self, request, call_next):\n"
        "        request.first_byte_deadline = time.monotonic() + 0.2\n"
        "        return await call_next(request)\n"
    )
    yaml = pool_yaml(regions, top="plugins_path: mine").replace("  - balance", "  - hurry\n  - balance")
    gateway = await start_gateway("", yaml, {"mine/hurry.py": above})
    assert (await ask(gateway))[0] == 504


async def test_a_failed_part_keeps_the_usage_of_other_parts(
    start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """And a failed part is no failure of the deployments that served the others."""
    yaml = pool_yaml(regions).replace("  - balance", "  - embeddings_split: 1\n  - balance")
    lost = f'  lost: {{endpoint: "http://127.0.0.1:{closed_port()}", api_key: k}}\n'
    yaml = yaml.replace("resources:\n", f"resources:\n{lost}").replace("  chat:\n", "  chat:\n    - lost/embed\n")
    gateway = await start_gateway("", yaml.replace('gpt-4o: "pool', 'embed: "pool').replace("/gpt-4o", "/embed"))
    body = {"model": "embed", "input": list("abcdef")}
    status, content, _ = await ask(gateway, body, path="/v1/embeddings")
    assert (status, content["usage"]["prompt_tokens"]) == (200, 6)
    await gateway.idle()
    assert gateway.exchanges()[0]["input_tokens"] == 6


async def test_kept_bodies_count_against_the_caller_s_memory(
    start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """A body above the caller's share is sent once; all memory is released afterwards."""
    yaml = pool_yaml(regions, top="limits: {memory: 3000000}").replace('gpt-4o: "pool', 'whisper: "pool')
    gateway = await start_gateway("", yaml)
    for region in regions.values():
        region.fault = "error"

    async def upload(size: int) -> int:
        before = sum(counted(regions).values())
        data = aiohttp.FormData()
        data.add_field("model", "whisper")
        data.add_field("file", b"x" * size, filename="a.mp3")
        async with gateway.session.post(gateway.url + "/v1/audio/transcriptions", data=data) as answer:
            assert answer.status == 500
        return sum(counted(regions).values()) - before

    assert await upload(400_000) == 5
    await gateway.idle()
    assert BUDGETS.memory.held == 0
    assert BUDGETS.memory.most_held > 400_000
    for each in gateway.server.shared.health.all():
        each.blocked_until, each.state, each.failures = 0.0, CLOSED, 0
    assert await upload(800_000) == 1


async def test_an_error_of_the_gateway_or_the_client_is_no_success(
    start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """It neither closes a circuit nor ends a row of failures."""
    only = {"east": regions["east"]}
    yaml = pool_yaml(only, settings="{wait: 0}", top="health: {failures: 2, rest: 60}")
    yaml = yaml.replace("  - model_map:", "  - auth_passthrough\n  - model_map:")
    gateway = await start_gateway("", yaml.replace('gpt-4o: "pool', 'sora: "pool:chat", gpt-4o: "pool'))
    regions["east"].fault = "error"
    for key, status in (("azure-key", 500), ("wrong", 401), ("azure-key", 500)):
        regions["east"].fault = "error" if status == 500 else None
        async with gateway.post(key=key) as answer:
            assert answer.status == status
    assert row(gateway, "east").failing
    end_rest(gateway, "east")
    seen = len(regions["east"].saw)
    async with gateway.post("/v1/videos", {"model": "sora", "prompt": "x"}, key="azure-key") as answer:
        assert answer.status == 404  # not in this api-version
    assert len(regions["east"].saw) == seen
    assert row(gateway, "east").failing
    assert row(gateway, "east").is_available(asyncio.get_running_loop().time())


async def test_a_pinned_request_does_not_change_an_open_circuit(
    start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """It is sent all the same, but not as the trial."""
    yaml = pool_yaml(regions, top="health: {failures: 1, rest: 30}").replace("2024-10-21", "v1")
    gateway = await start_gateway("", yaml.replace("  - balance", "  - resource_ids\n  - balance"))
    _, first, _ = await ask(gateway, {"model": "gpt-4o", "input": "hi"}, path="/v1/responses")
    home = next(name for name, region in regions.items() if region.saw)
    more = {"model": "gpt-4o", "input": "and", "previous_response_id": first["id"]}
    regions[home].fault = "error"
    assert (await ask(gateway, more, path="/v1/responses"))[0] == 500
    blocked_until = row(gateway, home).blocked_until
    regions[home].fault = "mute"
    asked = asyncio.create_task(ask(gateway, more, path="/v1/responses"))
    await until(lambda: regions[home].saw[-1][1] == "mute")
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    await gateway.idle()
    assert row(gateway, home).blocked_until == blocked_until


async def test_a_request_waits_for_the_trial(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """Even if another deployment is unavailable for longer than the request would wait."""
    two = {name: regions[name] for name in ("east", "west")}
    gateway = await start_gateway("", pool_yaml(two, settings="{wait: 30}", top="health: {failures: 1, rest: 50}"))
    regions["east"].fault, regions["west"].fault, regions["west"].rest = "error", "limited", 60
    await ask(gateway)

    async def slow(seen: Any, request: web.BaseRequest) -> None:
        await asyncio.sleep(0.4)

    regions["east"].azure.respond = slow
    end_rest(gateway, "east")
    answers = await asyncio.gather(*(ask(gateway) for _ in range(3)))
    assert [status for status, _, _ in answers] == [200, 200, 200]


async def test_wait_limits_all_waits_of_a_request(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """However often it is sent in between."""
    for region in regions.values():
        region.fault, region.rest = "limited", 0.2
    gateway = await start_gateway("", pool_yaml(regions, settings="{wait: 0.5, attempts: 50}"))
    assert (await ask(gateway))[0] == 429
    assert (
        sum(counted(regions).values()) <= 3 * 4
    )  # at first, and after 0.2 and 0.4 s; 50 if the limit were for each wait


async def test_streams_that_break_open_the_circuit(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """Although each response had started."""
    gateway = await start_gateway("", pool_yaml(regions, top="health: {failures: 4, share: 1, rest: 30}"))
    regions["east"].fault = "broken_late"
    for _ in range(40):
        with contextlib.suppress(aiohttp.ClientError):
            await ask(gateway, STREAM)
    assert row(gateway, "east").failing
    assert len(regions["east"].saw) == 4


async def test_a_stream_with_a_content_length_is_inspected(
    start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """Like any other: it is kept back for `hold` seconds at most, and an error in it is retried."""
    yaml = pool_yaml(regions)
    for name in ("west", "north"):
        yaml = yaml.replace(f"- {name}/gpt-4o", f"- {{deployment: {name}/gpt-4o, priority: 2}}")

    async def whole(seen: Any, request: web.BaseRequest) -> web.StreamResponse:
        error = {"error": {"code": "429", "message": "Try again in 9 seconds."}}
        return web.Response(body=f"data: {json.dumps(error)}\n\n".encode(), content_type="text/event-stream")

    gateway = await start_gateway("", yaml)
    regions["east"].azure.respond = whole
    status, content, _ = await ask(gateway, STREAM)
    assert status == 200
    assert "Hello" in content


@pytest.mark.parametrize("status", [400, 500])
async def test_a_large_error_is_forwarded(status: int, start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """Of the only deployment, or of the last one."""
    only = {"east": regions["east"]}
    yaml = pool_yaml(only, settings="{attempts: 1}").replace("  - openai_errors\n", "")
    gateway = await start_gateway("", yaml)
    respond(regions["east"], status, message="m" * 2_000_000)
    _, content, _ = await ask(gateway)
    assert len(content["error"]["message"]) == 2_000_000


async def test_failed_attempts_have_no_usage(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """The tokens in the log and in the limits are those of the deployment that responded."""
    for fault in ("error_in_stream", "stalled", "broken"):
        yaml = pool_yaml(regions).replace("api_key: azure-key}", "api_key: azure-key, timeouts: {first_byte: 0.3}}")
        for name in ("west", "north"):
            yaml = yaml.replace(f"- {name}/gpt-4o", f"- {{deployment: {name}/gpt-4o, priority: 2}}")
        gateway = await start_gateway("", yaml)
        regions["east"].fault = fault
        prompt = [{"role": "user", "content": "word " * 400}]
        asked = {**STREAM, "messages": prompt, "stream_options": {"include_usage": True}}
        assert (await ask(gateway, asked))[0] == 200
        await gateway.idle()
        assert gateway.exchanges()[0]["input_tokens"] == 9


async def test_each_attempt_starts_with_the_original_request(
    start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """Whatever a stage below changes, even in the object that a stage above has decoded."""
    stages = {
        "mine/above.py": (
            "from gateway import Stage\n\n\nclass Above(Stage):\n    async def __call__(self, request, call_next):\n"
            "        body = await request.json()\n        request.set_json({**body, 'user': 'above'})\n"
            "        await request.json()\n        return await call_next(request)\n"
        ),
        "mine/below.py": (
            "from gateway import Stage\n\n\nclass Below(Stage):\n    async def __call__(self, request, call_next):\n"
            "        body = await request.json()\n"
            "        body['messages'].insert(0, {'role': 'system', 'content': 's'})\n"
            "        request.set_json(body)\n        request.headers.add('x-below', 'b')\n"
            "        return await call_next(request)\n"
        ),
    }
    yaml = pool_yaml(regions, top="plugins_path: mine").replace("  - balance: {}", "  - above\n  - balance\n  - below")
    gateway = await start_gateway("", yaml, stages)
    for region in regions.values():
        region.fault = "error"
    assert (await ask(gateway))[0] == 500
    sent = [seen for region in regions.values() for _, _, seen in region.saw]
    assert len(sent) == 5
    assert [[each["role"] for each in seen.json()["messages"]] for seen in sent] == [["system", "user"]] * 5
    assert [seen.json()["user"] for seen in sent] == ["above"] * 5
    assert [seen.headers.getall("x-below") for seen in sent] == [["b"]] * 5


async def test_a_failed_reload_changes_nothing(
    start_gateway: StartGateway, regions: dict[str, Region], tmp_path: Path
) -> None:
    """Neither the retry budget, nor the report for operators."""
    gateway = await start_gateway("", pool_yaml(regions, settings="{reserve: 50}"))
    yaml = pool_yaml(regions, settings="{reserve: 0, retries: 0}", more="    - east/another")
    loaded = load(write_files(tmp_path / "next", {"gateway.yaml": yaml}), {}, gateway.server.shared)
    generation = await gateway.server.prepare(loaded.teams, loaded.settings)
    await gateway.server.discard(generation)
    assert [str(each.deployment) for each in gateway.server.shared.health.all()] == [
        f"{name}/gpt-4o" for name in regions
    ]
    regions["east"].fault = "error"
    for _ in range(12):
        assert (await ask(gateway))[0] == 200


async def test_nothing_is_in_flight_at_the_end(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """After responses, failures, and clients that disconnected."""
    gateway = await start_gateway("", pool_yaml(regions))
    regions["east"].fault, regions["west"].fault = "error", "broken_late"
    asked = [asyncio.create_task(ask(gateway, body)) for body in (CHAT, STREAM) * 20]
    await asyncio.sleep(0.05)
    for each in asked[::3]:
        each.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    await gateway.idle()
    assert [each.in_flight for each in gateway.server.shared.health.all()] == [0, 0, 0]
    assert not any(each.half_open for each in gateway.server.shared.health.all())


# -- with other stages ---------------------------------------------------------------------------------


async def test_a_resource_may_have_its_own_api_version(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """Each attempt uses the version of its resource."""
    yaml = pool_yaml(regions, settings="{seed: 1}")
    yaml = yaml.replace("api_key: azure-key}", "api_key: azure-key, api_version: v1}", 1)
    gateway = await start_gateway("", yaml)
    for _ in range(6):
        assert (await ask(gateway))[0] == 200
    paths = {name: {seen.path for _, _, seen in region.saw} for name, region in regions.items()}
    assert paths["east"] == {"/openai/v1/chat/completions"}
    assert paths["west"] == {"/openai/deployments/gpt-4o/chat/completions"}
    bodies = [seen.json()["model"] for _, _, seen in regions["east"].saw]
    assert set(bodies) == {"gpt-4o"}


async def test_ids_lead_back_to_their_resource(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """A request that refers to an object goes only to the resource that stores it."""
    yaml = pool_yaml(regions).replace("2024-10-21", "v1").replace("  - balance", "  - resource_ids\n  - balance")
    gateway = await start_gateway("", yaml)
    status, first, _ = await ask(gateway, {"model": "gpt-4o", "input": "hi"}, path="/v1/responses")
    assert status == 200
    home = next(name for name, region in regions.items() if region.saw)
    for _ in range(5):
        more = {"model": "gpt-4o", "input": "and", "previous_response_id": first["id"]}
        assert (await ask(gateway, more, path="/v1/responses"))[0] == 200
    assert counted(regions)[home] == 6
    regions[home].fault = "limited"
    assert (await ask(gateway, more, path="/v1/responses"))[0] == 429
    assert sum(counted(regions).values()) == 7


async def test_models_of_a_batch_go_to_one_resource(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """Its lines name the pool's deployment in that resource."""
    import aiohttp

    yaml = pool_yaml(regions).replace("auth: none", "auth: none\nresource: west")
    yaml = yaml.replace("- west/gpt-4o", "- west/gpt-4o-west")
    gateway = await start_gateway("", yaml)
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": CHAT}
    data = aiohttp.FormData()
    data.add_field("purpose", "batch")
    data.add_field("file", json.dumps(line).encode(), filename="lines.jsonl")
    async with gateway.session.post(gateway.url + "/v1/files", data=data) as answer:
        assert answer.status == 200
    assert counted(regions) == {"east": 0, "west": 1, "north": 0}
    assert b'"model":"gpt-4o-west"' in regions["west"].saw[0][2].body.replace(b" ", b"")


async def test_a_failed_websocket_handshake_is_retried(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """It is sent to another deployment."""
    yaml = pool_yaml(regions).replace("2024-10-21", "2025-04-01-preview")
    gateway = await start_gateway("", yaml)
    regions["east"].fault = regions["west"].fault = "error"
    async with gateway.session.ws_connect(gateway.url + "/v1/realtime?model=gpt-4o") as socket:
        assert (await socket.receive_json())["type"] == "session.created"


async def test_a_model_without_a_pool_is_not_retried(start_gateway: StartGateway, regions: dict[str, Region]) -> None:
    """It has one deployment, whose errors go to the client."""
    yaml = pool_yaml(regions).replace('gpt-4o: "pool:chat"', "gpt-4o: west/gpt-4o")
    gateway = await start_gateway("", yaml)
    regions["west"].fault = "error"
    assert (await ask(gateway))[0] == 500
    assert counted(regions) == {"east": 0, "west": 1, "north": 0}


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("  - balance: {}\n", "", "list `balance`"),
        ('"pool:chat"', '"pool:chatt"', "there is no pool 'chatt'; there is chat"),
        (
            "  - balance: {}\n  - api_version: 2024-10-21\n",
            "  - api_version: 2024-10-21\n  - balance\n",
            "must be above",
        ),
        ("  - balance: {}\n", "  - balance: {}\n  - resource_ids\n", "'resource_ids' must be above 'balance'"),
    ],
)
async def test_a_wrong_order_of_stages_is_a_configuration_error(
    old: str, new: str, found: str, start_gateway: StartGateway, regions: dict[str, Region]
) -> None:
    """With its position, as all errors."""
    assert old in pool_yaml(regions)
    with pytest.raises(ConfigError, match=found):
        await start_gateway("", pool_yaml(regions).replace(old, new))
