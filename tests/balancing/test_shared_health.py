"""Shared health of deployments through Redis: a real server, killed and started again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from gateway.azure.resources import Deployment, Resource
from gateway.balancing.circuit_breaker import DeploymentHealth
from gateway.balancing.health import Health
from gateway.balancing.shared_health import SharedHealth
from gateway.limits.redis_url import RedisUrl
from gateway.settings import HealthSettings
from tests.cluster import cluster, pool_yaml
from tests.conftest import CHAT, StartGateway, until
from tests.redis_server import RedisServer

pytestmark = pytest.mark.redis

EAST = Deployment(Resource("east", "https://east.invalid"), "gpt 4o")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[RedisServer]:
    """A Redis server of the test's own."""
    server = RedisServer(tmp_path / "redis")
    await server.start()
    yield server
    server.kill()


class Peer:
    """The health in one gateway."""

    def __init__(self, server: RedisServer) -> None:
        health = Health()
        health.use(HealthSettings(failures=1, rest=30), [EAST])
        self.east: DeploymentHealth = health.of(EAST)
        self.shared = SharedHealth(RedisUrl.parse(server.url), health)

    async def __aenter__(self) -> Peer:
        self.shared.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shared.stop()

    def left(self) -> float:
        return self.east.available_in(time.monotonic())


async def test_events_reach_all_gateways(server: RedisServer) -> None:
    """Within a second or two, with the time and the reason; a new gateway gets them as well."""
    async with Peer(server) as one, Peer(server) as other:
        one.east.failed(time.monotonic(), "broken_off")
        await until(lambda: other.left() > 0)
        assert 25 < other.left() <= 30
        assert (other.east.failing, other.east.reason) == (True, "broken_off")
        async with Peer(server) as late:
            await until(lambda: late.left() > 0)
            assert abs(late.left() - one.left()) < 1
        one.east.block_until(0.0)
        assert one.east.begin(time.monotonic())
        one.east.succeeded(time.monotonic(), one.east._trial)
        await until(lambda: other.left() == 0)
        assert not other.east.failing


async def test_an_unavailable_redis_does_no_harm(server: RedisServer) -> None:
    """Each gateway uses its own events. Those that still count are shared when Redis is back."""
    with structlog.testing.capture_logs() as events:
        async with Peer(server) as one, Peer(server) as other:
            one.east.cool_down(time.monotonic(), 4, "rate_limited")
            await until(lambda: other.left() > 0)
            server.kill()
            one.east.cool_down(time.monotonic(), 40, "rate_limited")
            await until(lambda: sum(event["event"] == "health_sharing_failed" for event in events) == 2)
            assert one.left() > 35
            assert other.left() <= 4
            await server.start()
            await until(lambda: other.left() > 30)
            await until(lambda: sum(event["event"] == "health_sharing_restored" for event in events) == 2)


async def test_foreign_values_in_redis_are_ignored(server: RedisServer) -> None:
    """In the hash, or instead of it."""
    server.command("HSET", "{gateway}:health", "east/gpt 4o https://east.invalid", "nonsense")
    server.command("HSET", "{gateway}:health", "x", "1 2 3")
    async with Peer(server) as one, Peer(server) as other:
        one.east.cool_down(time.monotonic(), 20, "rate_limited")
        await until(lambda: other.left() > 0)
        server.command("SET", "{gateway}:health", "text")
        one.east.cool_down(time.monotonic(), 50, "rate_limited")
        await asyncio.sleep(1.2)
        assert one.left() > 40


async def test_two_gateways(server: RedisServer, start_gateway: StartGateway) -> None:
    """A failure that one has seen costs the other no request; a reload continues to share."""
    async with cluster("east", "west") as regions:
        top = f"store: {server.url}\nhealth: {{failures: 1, rest: 30}}"
        gateways: list[Any] = [await start_gateway("", pool_yaml(regions, top=top)) for _ in range(2)]
        regions["east"].fault = "error"
        while not regions["east"].saw:
            async with gateways[0].post(json=CHAT, key=None) as answer:
                assert answer.status == 200
        rows = gateways[1].server.shared.health.all()
        await until(lambda: not rows[0].is_available(time.monotonic()))
        for _ in range(6):
            async with gateways[1].post(json=CHAT, key=None) as answer:
                assert answer.status == 200
        assert len(regions["east"].saw) == 1


def test_a_server_s_clock_that_steps_back_extends_nothing() -> None:
    """The time is the one of the event, at most."""
    health = Health()
    health.use(HealthSettings(), [EAST])
    shared = SharedHealth(RedisUrl.parse("redis://127.0.0.1:1"), health)
    shared._apply(1_000.0, health.of(EAST).key.encode(), b"1801000 1802000 other 0 rate_limited")
    assert health.of(EAST).available_in(time.monotonic()) <= 1.0
