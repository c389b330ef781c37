"""A reload frees what the configuration no longer names: memory after many reloads is as after one."""

from __future__ import annotations

import contextlib
import gc
import ssl
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import trustme

from gateway import generation as generation_module
from gateway.auth.entra_tokens import EntraTokens
from gateway.auth.jwks import IssuerKeys
from gateway.azure.resources import Pool, Resource, Tls
from gateway.balancing.circuit_breaker import DeploymentHealth
from gateway.generation import Generation
from gateway.limits.memory_counters import MemoryCounters
from gateway.limits.redis_counters import RedisCounters
from gateway.limits.wait_queue import WaitQueue
from gateway.services import Services, Shared
from gateway.stage import Stage
from gateway.teams import Team, Teams
from gateway.testing import FakeAzure
from gateway.transport.connection_pool import Destination
from gateway.transport.upstream_connection import UpstreamConnection
from tests.conftest import CHAT, StartGateway, until
from tests.process.test_reload import FILES, Running, Start, start

__all__ = ("start",)  # the fixture

KINDS = (
    Destination, DeploymentHealth, EntraTokens, Generation, IssuerKeys, Pool, RedisCounters, Resource, Services, Stage,
    Team, Teams, Tls, WaitQueue, UpstreamConnection, ssl.SSLContext,
)  # fmt: skip
# A number stands for what changes; of the others each reload changes one kind of thing alone.
PARTS = {
    "keys": ("api_key: k0", "api_key: k{}"),
    "endpoints": ("https://east0.example", "https://east{}.example"),
    "tls": ("ca: ca0.pem", "ca: ca{}.pem"),
    "teams": ("teams: [teams/t0.yaml]", "teams: [teams/t{}.yaml]"),
    "stages": ("mark: first", "mark: mark-{}"),
    "pools": ("pools: {p0:", "pools: {{p{}:"),
    "identity": ("issuer: http://127.0.0.1:1/0", "issuer: http://127.0.0.1:1/{}"),
    "credential": ("client_id: c0", "client_id: c{}"),
    "store": ("prefix: s0", "prefix: s{}"),
}
YAML = """
plugins_path: mine
teams: [teams/t0.yaml]
store: {redis: "redis://127.0.0.1:1", prefix: s0}
identity: {issuer: http://127.0.0.1:1/0, audience: a}
resource: azure
resources:
  azure: {endpoint: "${ENDPOINT}", api_key: k0}
  east: {endpoint: "https://east0.example", api_key: k}
  west: {endpoint: "https://west.example", api_key: k, tls: {ca: ca0.pem}}
  north: {endpoint: "https://north.example", credential: {kind: managed_identity, client_id: c0}}
pools: {p0: [azure/gpt-4o, east/gpt-4o]}
pipeline:
  - access_log
  - mark: first
  - auth_passthrough
  - rate_limit: {requests_per_minute: 1000000}
  - model_map: {unmapped: own_name_without_dots}
  - balance
  - api_version: 2024-10-21
"""
RELOADS = 3


@pytest.fixture(autouse=True)
def only_new_objects() -> None:
    """Hide the objects of other tests, which would slow the counting down to seconds."""
    gc.collect()
    gc.freeze()


def living() -> Counter[str]:
    """Return the number of objects of each kind."""
    gc.collect()
    return Counter(
        next(kind.__name__ for kind in KINDS if isinstance(each, kind))
        for each in gc.get_objects()
        if isinstance(each, KINDS)
    )


def use(running: Running) -> None:
    """Look up the destination of every resource, as a request does."""
    server = running.gateway.server
    for resource in server.teams.resources:
        server.upstream._connections.destination(resource)


@pytest.mark.parametrize("part", [*(pytest.param(each, marks=pytest.mark.slow) for each in PARTS), "all"])
async def test_memory_after_many_reloads_is_as_after_one(
    part: str, start_gateway: StartGateway, azure: FakeAzure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every kind of change: objects of each kind of a configuration are counted."""
    monkeypatch.setattr(generation_module, "_COLLECT_DELAY", 0.0)
    ca = trustme.CA().cert_pem.bytes().decode()
    files = {**FILES} | {f"ca{number}.pem": f"{ca}# {number}\n" for number in range(RELOADS + 1)}
    files |= {f"teams/t{number}.yaml": f"match: {{path_prefix: /t{number}}}\n" for number in range(RELOADS + 1)}
    env = {"ENDPOINT": azure.endpoint, "IDENTITY_ENDPOINT": "http://127.0.0.1:1", "IDENTITY_HEADER": "h"}
    gateway = await start_gateway(azure.endpoint, YAML, files, env=env)
    running = Running(gateway, tmp_path / "gateway.yaml", env)
    after: list[Counter[str]] = []

    def settled() -> bool:
        generations = gateway.server.generations
        return not generations._old and not generations._tasks and generations._collection is None

    for number in range(1, RELOADS + 1):
        use(running)
        await running.name(json=CHAT)
        changes = [PARTS[each] for each in (PARTS if part == "all" else [part])]
        report = await running.reload(*((old, new.format(number)) for old, new in changes), yaml=YAML)
        assert report.changes, report
        use(running)
        await running.name(json=CHAT)
        await until(settled, 20)
        after.append(living())
    # One more of a kind may be another test's, in a thread that still runs: a leak is one for each reload.
    with contextlib.suppress(TimeoutError):
        await until(lambda: not grown(after[0]), 20)
    assert not grown(after[0])
    assert after[0]["Teams"] == 1
    assert len(gateway.server.shared._state) <= 12


def grown(before: Counter[str]) -> Counter[str]:
    """Return the kinds with at least two more objects than before."""
    return Counter({kind: count for kind, count in (living() - before).items() if count > 1})


async def test_state_is_kept_while_a_configuration_has_its_stage(start: Start) -> None:
    """The current one, one with running exchanges, or a prepared one; then the state is released."""
    running = await start()
    server = running.gateway.server
    space = server.shared.state_of("soon", "mark")
    services = {"mark": Services("soon", "mark", shared=server.shared)}
    soon = Team("soon", [Stage()], server.teams.default.target, services=services)
    soon.stages[0].id = "mark"
    prepared = await server.prepare(Teams(soon, shared=server.shared), server.settings)
    server.generations._release_unused()
    assert server.shared.state_of("soon", "mark") is space
    await server.discard(prepared)
    assert server.shared.state_of("soon", "mark") is not space
    kept = server.shared.state_of("default", "mark")
    server.generations._release_unused()
    assert server.shared.state_of("default", "mark") is kept


async def test_counters_are_closed_when_no_configuration_names_their_store() -> None:
    """Not earlier: stages that still use them hold them."""
    shared, closed = Shared(), []

    class Counted(MemoryCounters):
        async def close(self) -> None:
            closed.append(self)

    first: WaitQueue | None = shared.counters_of("a", Counted)
    assert shared.counters_of("a", Counted) is first
    await shared.close_unused()
    assert closed == []
    del first
    gc.collect()
    await shared.close_unused()
    assert len(closed) == 1
    second: Any = shared.counters_of("a", Counted)
    await shared.close()
    assert len(closed) == 2
    assert second.store is closed[1]


async def test_a_connection_in_use_is_closed_when_its_destination_is_forgotten(start: Start, azure: FakeAzure) -> None:
    """After its exchange: the stream completes. The next request gets a new destination."""
    azure.words, azure.delay = ["x"] * 10, 0.05
    running = await start()
    await running.name(json=CHAT)
    upstream = running.gateway.server.upstream
    (destination,) = upstream._connections._destinations.values()
    (wire,) = destination.idle
    async with running.gateway.post(json={**CHAT, "stream": True}) as answer:
        assert destination.idle == []
        upstream.keep([])
        assert (await answer.text()).rstrip().endswith("data: [DONE]")
    await until(lambda: not wire.is_connected())
    assert destination.idle == []
    await running.name(json=CHAT)
    (other,) = upstream._connections._destinations.values()
    assert other is not destination
    (idle,) = other.idle
    upstream.keep([])
    await until(lambda: not idle.is_connected())
