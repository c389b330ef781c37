"""Counters in Redis: a real `redis-server`, killed, paused and started again under load."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.counters import Charge, CountersUnavailable, MemoryCounters, Rule, Verdict
from gateway.counters.place import RedisPlace
from gateway.counters.redis import SCRIPT, RedisCounters
from gateway.counters.rules import Period, calendar
from tests.redis_server import RedisServer

pytestmark = pytest.mark.redis

# The script's clock, as tests set it: the server's is not theirs to turn.
_CLOCK = """    local time = redis.call('TIME')
    return tonumber(time[1]) + tonumber(time[2]) / 1000000
"""
TURNED = SCRIPT.replace(_CLOCK, "    return (struct.unpack('<d', redis.call('GET', 'clock')))\n")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[RedisServer]:
    """A Redis server of the test's own."""
    server = RedisServer(tmp_path / "redis")
    await server.start()
    yield server
    server.kill()


@pytest.fixture
async def open_counters() -> AsyncIterator[Callable[..., RedisCounters]]:
    """Return a function that makes counters in a server; they are closed behind the test."""
    made: list[RedisCounters] = []

    def make(server: RedisServer | str, timeout: float = 5.0, **more: Any) -> RedisCounters:
        url = server if isinstance(server, str) else server.url
        own = {name: more.pop(name) for name in ("script", "patience") if name in more}
        counters = RedisCounters(RedisPlace.parse(url, timeout=timeout, **more), **own)
        made.append(counters)
        return counters

    yield make
    for counters in made:
        await counters.close()


OpenCounters = Callable[..., RedisCounters]


class Clock:
    """A clock that tests turn, for counters in memory and in Redis."""

    def __init__(self, server: RedisServer, now: float) -> None:
        from redis import Redis

        self._redis = Redis(port=server.port)
        self.set(now)

    def set(self, now: float) -> None:
        self.now = now
        self._redis.set("clock", struct.pack("<d", now))

    def __call__(self) -> float:
        return self.now

    def close(self) -> None:
        self._redis.close()


@pytest.fixture
def clock(server: RedisServer) -> Iterator[Clock]:
    clock = Clock(server, 1_700_000_000.25)
    yield clock
    clock.close()


def told(verdict: Verdict) -> tuple[Any, ...]:
    """Return what a verdict says; what is held at once has only its level in common."""
    records = [
        record[:1] if charge.rule.period == "at_once" else record
        for charge, record in zip(verdict.charges, verdict.records, strict=True)
    ]
    return (records, verdict.now, tuple(verdict.over), verdict.refused)


async def settled(counters: RedisCounters) -> None:
    """Wait until everything that was settled is."""
    async with asyncio.timeout(5):
        while counters._settles or not counters._idle:
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("seed", range(8))
async def test_the_script_counts_as_the_rules_do(
    server: RedisServer, open_counters: OpenCounters, clock: Clock, seed: int
) -> None:
    """The same takes, settlements and times have the same verdicts and the same records, to the last bit."""
    rng = random.Random(seed)
    memory, counters = MemoryCounters(clock), open_counters(server, script=TURNED)
    rules = {
        "bucket": Rule(600, "minute", 30),
        "wide": Rule(100_000, "minute"),
        "odd": Rule(7, "minute", 3),
        "day": Rule(500, "day"),
        "month": Rule(2_000, "month"),
        "at-once": Rule(6, "at_once"),
    }
    held: list[tuple[Verdict, Verdict]] = []
    for _ in range(250):
        if rng.random() < 0.5:
            clock.set(clock.now + rng.choice([0, 0.001, rng.random(), 7.5, 60 * rng.random(), 40_000 * rng.random()]))
        if held and rng.random() < 0.45:
            theirs, ours = held.pop(rng.randrange(len(held)))
            actual: list[float | None] = [
                rng.choice([None, charge.cost, 0, float(rng.randrange(0, int(2 * charge.cost) + 1))])
                for charge in theirs.charges
            ]
            memory.settle(theirs, actual)
            counters.settle(ours, actual)
            await settled(counters)
            continue
        names = rng.sample(sorted(rules), rng.randrange(1, 4))
        charges = [
            Charge(
                f"{name}-{rng.randrange(2)}",
                rules[name],
                float(rng.randrange(1, 40_000) if name == "wide" else rng.randrange(1, 8)),
                shadow=rng.random() < 0.2,
            )
            for name in names
        ]
        counters._refusals._known.clear()  # the clock was turned behind their back
        theirs, ours = await memory.take(charges), await counters.take(charges)
        assert told(ours) == told(theirs)
        held.append((theirs, ours))
