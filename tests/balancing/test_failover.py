"""Many requests to a cluster in which one region after another fails, in every way that the fake Azure knows."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from tests.cluster import Fault, Region, cluster, pool_yaml, slow_tls
from tests.conftest import CHAT, Gateway, StartGateway, until

CLIENTS = 12
# Each fault in turn, in one region after another. Then one region is stopped for a while.
FAULTS: list[Fault] = [
    "limited", "limited_silently", "limited_in_words", "mute", "stalled", "broken", "error", "unavailable", "timeout",
    "error_in_stream", "stalled_late", "broken_late", "no_deployment",
]  # fmt: skip
PAUSE = 0.6
LATE = ("stalled_late", "broken_late", "error_late")
RETRIES, RESERVE = 0.2, 100
HEALTH = "{failures: 5, rest: 0.5, most_rest: 4, window: 5}"


@dataclass
class Received:
    """The response to one request."""

    number: int
    status: int = 0
    whole: bool = False
    body: bytes = b""
    complete: bool = False


@dataclass
class Run:
    """All requests, and when each region recovered."""

    gateway: Gateway
    regions: dict[str, Region]
    requests: int
    responses: list[Received] = field(default_factory=list)
    healed: list[tuple[Region, float]] = field(default_factory=list)

    async def one(self, session: aiohttp.ClientSession, number: int) -> None:
        """Send a request, which has its number in it."""
        received = Received(number)
        self.responses.append(received)
        body = {**CHAT, "stream": number % 3 == 0, "user": f"r{number}"}
        try:
            async with session.post(self.gateway.url + "/v1/chat/completions", json=body) as answer:
                received.status = answer.status
                async for chunk in answer.content.iter_any():
                    received.body += chunk
                received.whole = True
        except aiohttp.ClientError:
            pass
        received.complete = True

    async def clients(self, over: asyncio.Event) -> None:
        """Send requests, one after another in each client, until all were sent and the script is over."""
        numbers = itertools.count()

        async def client(session: aiohttp.ClientSession, index: int) -> None:
            pace = random.Random(index)
            while not over.is_set() or len(self.responses) < self.requests:
                await self.one(session, next(numbers))
                await asyncio.sleep(pace.uniform(0, 0.3) if not over.is_set() else 0)

        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            await asyncio.gather(*(client(session, index) for index in range(CLIENTS)))

    async def script(self, over: asyncio.Event, seconds: float, dead: float) -> None:
        """Make one region after another fail, for `seconds` and until some requests were affected."""
        turn = itertools.cycle(self.regions.values())
        for fault in FAULTS:
            region = next(turn)
            region.fault = fault
            await asyncio.sleep(seconds)
            await until(lambda region=region, fault=fault: any(each == fault for _, each, _ in region.saw))  # type: ignore[misc]
            self.heal(region)
            await asyncio.sleep(PAUSE)
        region = next(turn)
        # Wait for the responses to requests that it accepted: a request that is cut off is rightly sent again.
        region.fault = "unavailable"
        accepted = {json.loads(each.body)["user"] for _, fault, each in region.saw if fault is None}
        await until(lambda: all(each.complete for each in self.responses if f"r{each.number}" in accepted))
        await region.azure.stop()
        await asyncio.sleep(dead)
        await region.azure.start()
        self.heal(region)
        # Without a time limit: test_circuit_breaker and test_herd have a simulated clock.
        await until(lambda: all(self.is_back(*each) for each in self.healed))
        over.set()

    def is_back(self, region: Region, healed: float) -> bool:
        """Whether a region has had requests since it recovered."""
        return any(at >= healed and fault is None for at, fault, _ in reversed(region.saw))

    def heal(self, region: Region) -> None:
        region.fault = None
        self.healed.append((region, time.monotonic()))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("requests", "seconds", "dead"), [(2_500, 0.7, 4.0), pytest.param(10_000, 2.0, 30.0, marks=pytest.mark.nightly)]
)
async def test_requests_are_answered_while_one_region_after_another_fails(
    requests: int, seconds: float, dead: float, start_gateway: StartGateway
) -> None:
    """None fails, as a deployment was always available; none is sent again after its response started.

    Two more resources of the pool never respond: one has no address, the other never completes a TLS handshake.
    """
    async with cluster("east", "west", "north") as regions, slow_tls(3600) as port:
        lost = (
            '  unknown: {endpoint: "https://nowhere.invalid", api_key: k}\n'
            f'  slow: {{endpoint: "https://127.0.0.1:{port}", api_key: k, timeouts: {{connect: 0.4}}}}\n'
        )
        yaml = pool_yaml(
            regions,
            settings=f"{{retries: {RETRIES}, reserve: {RESERVE}, hold: 2}}",
            top=f"health: {HEALTH}",
            more="    - unknown/gpt-4o\n    - slow/gpt-4o",
        ).replace("resources:\n", f"resources:\n{lost}")
        yaml = yaml.replace("api_key: azure-key}", "api_key: azure-key, timeouts: {first_byte: 8, idle: 8}}")
        run = Run(await start_gateway("", yaml), regions, requests)
        over = asyncio.Event()
        await asyncio.gather(run.clients(over), run.script(over, seconds, dead))
        await run.gateway.idle()

    sent = attempts_of(run)
    assert len(run.responses) >= requests
    late = {number for number, faults in sent.items() if any(fault in LATE for fault in faults)}
    failed = [received for received in run.responses if received.number not in late and not is_answered(received)]
    assert not failed, failed[:5]
    for received in run.responses:
        if received.number in late and not is_answered(received):
            # Its response had started, and it ends as a broken stream.
            assert received.status == 200
            assert b'data: {"error"' in received.body
    twice = [faults for faults in sent.values() if any(fault in LATE or fault is None for fault in faults[:-1])]
    assert not twice, twice[:5]
    more = sum(len(event.get("attempts", [None])) - 1 for event in run.gateway.exchanges())
    assert more <= RETRIES * len(run.responses) + RESERVE
    assert more >= len(FAULTS)
    assert [each.in_flight for each in run.gateway.server.shared.health.all()] == [0] * 5


def is_answered(received: Received) -> bool:
    """Whether a response is complete and correct."""
    if received.status != 200 or not received.whole:
        return False
    if received.body.startswith(b"data:"):
        return received.body.endswith(b"data: [DONE]\n\n") and b'"error"' not in received.body
    return bool(json.loads(received.body)["choices"][0]["message"]["content"] == "Hello there!")


def attempts_of(run: Run) -> dict[int, list[Any]]:
    """Return each request's attempts that a region saw: its faults at the time, in order.

    A late fault of a plain request is none: it breaks the connection before the response starts.
    """
    seen = sorted(
        (at, str(json.loads(each.body)["user"]), fault, json.loads(each.body)["stream"])
        for region in run.regions.values()
        for at, fault, each in region.saw
    )
    sent: dict[int, list[Any]] = defaultdict(list)
    for _, user, fault, stream in seen:
        sent[int(user[1:])].append(f"{fault} before" if fault in LATE and not stream else fault)
    return sent
