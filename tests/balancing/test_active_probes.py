"""Active probes: the gateway itself tests deployments whose circuit is open."""

from __future__ import annotations

import asyncio

import pytest

from tests.cluster import closed_port, cluster, pool_yaml
from tests.conftest import CHAT, StartGateway, until

HEALTH = "health: {failures: 1, rest: 0.2, most_rest: 60, probe: 0.1}"


@pytest.mark.parametrize("version", ["2024-10-21", "v1"])
async def test_no_request_is_a_trial_while_probes_fail(version: str, start_gateway: StartGateway) -> None:
    """Soon after a successful probe a request is the trial, and closes the circuit."""
    async with cluster("east", "west") as regions:
        yaml = pool_yaml(regions, top=HEALTH)
        yaml = yaml.replace("api_key: azure-key}", f"api_key: azure-key, api_version: {version}}}", 1)
        gateway = await start_gateway("", yaml)
        east = regions["east"]
        east.fault = "unavailable"

        def asked(path: str) -> int:
            return sum(path in seen.path for _, _, seen in east.saw)

        while not asked("chat"):
            async with gateway.post(json=CHAT, key=None) as answer:
                assert answer.status == 200
        await until(lambda: asked("/models") >= 3)
        for _ in range(10):
            async with gateway.post(json=CHAT, key=None) as answer:
                assert answer.status == 200
        assert asked("chat") == 1
        assert "attempts" not in gateway.exchanges()[-1]
        east.fault = None
        health = gateway.server.shared.health.all()[0]
        await until(lambda: health.is_available(asyncio.get_running_loop().time()))
        while health.failing:
            async with gateway.post(json=CHAT, key=None) as answer:
                assert answer.status == 200
        assert asked("chat") == 2
        probes = [seen for _, _, seen in east.saw if "/models" in seen.path]
        assert {seen.method for seen in probes} == {"GET"}
        assert {seen.headers.get("api-key") for seen in probes} == {"azure-key"}


async def test_failed_probes(start_gateway: StartGateway) -> None:
    """A refused connection, and a refused key: the reason is reported, and the circuit stays open."""
    async with cluster("east") as regions:
        lost = f'  lost: {{endpoint: "http://127.0.0.1:{closed_port()}", api_key: k}}\n'
        yaml = pool_yaml(regions, top=HEALTH, more="    - lost/gpt-4o").replace("resources:\n", f"resources:\n{lost}")
        gateway = await start_gateway("", yaml)
        regions["east"].fault = "wrong_key"
        async with gateway.post(json=CHAT, key=None) as answer:
            assert answer.status in (401, 502)
        rows = {each.deployment.resource.name: each for each in gateway.server.shared.health.all()}
        await until(lambda: (rows["lost"].reason, rows["east"].reason) == ("connect", "refused"))
        before = rows["lost"].blocked_until
        await until(lambda: rows["lost"].blocked_until > before)


async def test_no_probe_without_the_setting(start_gateway: StartGateway) -> None:
    """And none of a closed circuit."""
    async with cluster("east") as regions:
        gateway = await start_gateway("", pool_yaml(regions, top="health: {failures: 1, probe: 0.05}"))
        await asyncio.sleep(0.3)
        assert regions["east"].saw == []
        gateway = await start_gateway("", pool_yaml(regions, top="health: {failures: 1, rest: 60}"))
        regions["east"].fault = "error"
        async with gateway.post(json=CHAT, key=None) as answer:
            assert answer.status == 500
        seen = len(regions["east"].saw)
        await asyncio.sleep(0.3)
        assert len(regions["east"].saw) == seen
