"""The admin listener: the operator's view of deployments."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.admin.listener import merge_reports
from gateway.config import load
from gateway.errors import ConfigError, StartError
from gateway.server import Server
from tests.cluster import cluster, pool_yaml
from tests.conftest import CHAT, Gateway, StartGateway, raw_request, write_files


async def look(gateway: Gateway, path: str = "/admin/resources", method: str = "GET") -> tuple[int, Any, Any]:
    """Send a request to the admin listener, and return the status, the JSON and the headers."""
    assert gateway.server.admin is not None
    url = f"http://{gateway.server.admin.address}{path}"
    async with gateway.session.request(method, url) as answer:
        return answer.status, await answer.json() if method != "HEAD" else None, answer.headers


async def test_what_is_known_of_each_deployment(start_gateway: StartGateway) -> None:
    """By resource, in the order of the configuration: state, reason, remaining cooldown, in flight, shares, counts."""
    async with cluster("east", "west") as regions:
        yaml = pool_yaml(regions, top="admin: 127.0.0.1:0\nhealth: {failures: 2, rest: 60}")
        yaml = yaml.replace("api_key: azure-key}", "api_key: azure-key, region: swedencentral}", 1)
        gateway = await start_gateway("", yaml)
        regions["east"].fault = "error"
        for _ in range(8):
            async with gateway.post(json=CHAT, key=None) as answer:
                assert answer.status == 200
        regions["west"].fault = "mute"
        waiting = asyncio.create_task(gateway.session.post(gateway.url + "/v1/chat/completions", json=CHAT))
        while not regions["west"].saw or regions["west"].saw[-1][1] != "mute":
            await asyncio.sleep(0.01)
        status, content, _ = await look(gateway)
        waiting.cancel()
        assert status == 200
        east, west = content["resources"]
        assert (east["name"], east["region"], west["region"]) == ("east", "swedencentral", None)
        (deployment,) = east["deployments"]
        assert 58 < deployment.pop("cool_down") <= 60
        assert deployment == {
            "deployment": "gpt-4o", "state": "open", "reason": "status_500", "in_flight": 0, "error_share": 1.0,
            "requests": 2, "failures_in_a_row": 2, "headroom": None,
            "counts": {"answered": 0, "status_500": 2},
        }  # fmt: skip
        (deployment,) = west["deployments"]
        assert (deployment["state"], deployment["in_flight"], deployment["counts"]) == ("available", 1, {"answered": 8})
        assert 0.9 < deployment["headroom"] < 1


async def test_it_can_only_be_looked_at(start_gateway: StartGateway) -> None:
    """Any other method or path is an error in OpenAI's shape; the clients' address does not serve it."""
    async with cluster("east") as regions:
        gateway = await start_gateway("", pool_yaml(regions, top="admin: 127.0.0.1:0"))
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            status, content, headers = await look(gateway, method=method)
            assert (status, content["error"]["code"], headers["allow"]) == (405, "method_not_allowed", "GET")
        status, content, _ = await look(gateway, "/v1/chat/completions")
        assert (status, content["error"]["code"]) == (404, "unknown_url")
        assert (await look(gateway, method="HEAD"))[0] == 200
        async with gateway.get("/admin/resources") as answer:
            assert answer.status == 404
        assert gateway.server.admin is not None
        assert gateway.server.admin.address is not None
        answered = await raw_request(gateway.server.admin.address.port, b"nonsense\r\n\r\n")
        assert answered.startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))


async def test_no_secret_is_shown(start_gateway: StartGateway) -> None:
    """Neither keys nor the paths of endpoints."""
    async with cluster("east") as regions:
        gateway = await start_gateway("", pool_yaml(regions, top="admin: 127.0.0.1:0"))
        assert gateway.server.admin is not None
        url = f"http://{gateway.server.admin.address}/admin/resources"
        async with gateway.session.get(url) as answer:
            text = await answer.text()
        assert "azure-key" not in text
        assert "http" not in text


async def test_a_unix_socket_will_do(start_gateway: StartGateway, tmp_path: Path) -> None:
    """And it is removed when the gateway has stopped."""
    path = tmp_path / "admin.sock"
    async with cluster("east") as regions:
        gateway = await start_gateway("", pool_yaml(regions, top=f"admin: unix:{path}"))
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session,
            session.get("http://x/admin/resources") as answer,
        ):
            assert answer.status == 200
        now = asyncio.Event()
        now.set()
        await gateway.server.stop(now=now)
        assert not path.exists()


async def test_an_address_that_cannot_be_had(tmp_path: Path, start_gateway: StartGateway) -> None:
    """A start error; an invalid address is a mistake in the configuration."""
    async with cluster("east") as regions:
        first = await start_gateway("", pool_yaml(regions, top="admin: 127.0.0.1:0"))
        assert first.server.admin is not None
        folder = tmp_path / "second"
        path = write_files(folder, {"gateway.yaml": pool_yaml(regions, top=f"admin: {first.server.admin.address}")})
        loaded = load(path, {})
        server = Server(loaded.teams, loaded.settings)
        with pytest.raises(StartError, match="cannot listen on"):
            await server.start()
        path.write_text(pool_yaml(regions, top="admin: nowhere"))
        with pytest.raises(ConfigError, match="admin: 'nowhere' is not HOST:PORT"):
            load(path, {})


def test_several_processes_are_one() -> None:
    """Counts are summed; for the rest, the worst value counts."""
    row = {
        "resource": "east", "deployment": "x", "region": None, "state": "available", "reason": None, "cool_down": 0.0,
        "in_flight": 2, "error_share": 0.0, "requests": 30, "failures_in_a_row": 0, "headroom": 0.5,
        "counts": {"answered": 30},
    }  # fmt: skip
    other = {
        **row, "state": "open", "reason": "connect", "cool_down": 3.0, "in_flight": 1, "error_share": 1.0,
        "requests": 10, "failures_in_a_row": 5, "headroom": None, "counts": {"connect": 10},
    }  # fmt: skip
    expected = {
        **row, "state": "open", "reason": "connect", "cool_down": 3.0, "in_flight": 3, "error_share": 0.25,
        "requests": 40, "failures_in_a_row": 5, "headroom": 0.5, "counts": {"answered": 30, "connect": 10},
    }  # fmt: skip
    assert merge_reports([[row], [other], []]) == [expected]
    assert merge_reports([[other], [row]]) == [{**expected, "counts": {"connect": 10, "answered": 30}}]
    assert row["counts"] == {"answered": 30}
