"""File descriptors: their exhaustion is distinguished from every other failure, and is temporary."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import glob
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from gateway.azure.resources import Resource, Tls
from gateway.config import load
from gateway.config.sources import Sources
from gateway.errors import ApiError, ConfigError, UpstreamError
from gateway.process import file_watch as watch
from gateway.testing import FakeAzure
from gateway.transport import connection_pool as connector
from gateway.transport import file_descriptors as descriptors
from gateway.transport.connection_pool import Destination
from tests.cluster import cluster, pool_yaml
from tests.conftest import CHAT, StartGateway, write_files

NONE = OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.fixture
def exhausted() -> Iterator[None]:
    """Take every descriptor of this process."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    try:
        while True:
            try:
                taken.append(os.dup(0))
            except OSError:
                break
        yield
    finally:
        for each in taken:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def raised(cause: BaseException) -> UpstreamError:
    """Return an error that was raised because of another."""
    try:
        try:
            raise cause
        except BaseException:
            raise UpstreamError("could not connect") from None
    except UpstreamError as exc:
        return exc


def test_a_lack_is_known_by_what_led_to_an_error() -> None:
    """However the error is wrapped; other errors do not count while descriptors are left."""
    assert descriptors.caused_by_exhaustion(NONE)
    assert descriptors.caused_by_exhaustion(raised(NONE))
    assert descriptors.caused_by_exhaustion(raised(OSError(errno.ENFILE, "x")))
    assert not descriptors.caused_by_exhaustion(raised(ConnectionRefusedError(errno.ECONNREFUSED, "x")))
    assert not descriptors.caused_by_exhaustion(raised(socket.gaierror(socket.EAI_AGAIN, "x")))
    assert not descriptors.caused_by_exhaustion(ValueError("x"))
    assert not descriptors.caused_by_exhaustion(None)


def test_a_look_up_that_could_open_nothing_is_a_lack(exhausted: None) -> None:
    """The error says only that the lookup failed, so the gateway checks whether a file can be opened."""
    assert descriptors.caused_by_exhaustion(raised(socket.gaierror(socket.EAI_AGAIN, "x")))
    assert not descriptors.caused_by_exhaustion(ValueError("x"))


def test_clients_leave_room_for_what_else_there_is() -> None:
    """Each may need a connection to Azure; some are reserved for files, and one client is always accepted."""
    assert descriptors.client_capacity(65_536) == 32_752
    assert descriptors.client_capacity(64) == 16
    assert descriptors.client_capacity(8) == 1


async def test_a_client_is_told_that_the_gateway_is_overloaded(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503 with Retry-After, and a log event; no deployment of a pool counts as failing, and no other is tried."""
    async with cluster("east", "west") as regions:
        gateway = await start_gateway("", pool_yaml(regions))

        async def connect(destination: Destination, *args: object) -> object:
            raise aiohttp.ClientConnectorError(destination.connection_key, NONE) from NONE

        monkeypatch.setattr(gateway.server.upstream._connections._connector, "connect", connect)
        for _ in range(10):
            async with gateway.post(json=CHAT) as answer:
                assert answer.status == 503
                assert int(answer.headers["retry-after"]) >= 1
                error = (await answer.json())["error"]
                assert error["code"] == "overloaded"
                assert "Azure" not in error["message"]
        monkeypatch.undo()
        rows = gateway.server.shared.health.report()
        assert {row["state"] for row in rows} == {"available"}
        assert all(row["counts"] == {"answered": 0} or not sum(row["counts"].values()) for row in rows)
        (event,) = [each for each in gateway.events if each["event"] == "file_descriptors_exhausted"]
        assert event["limit"] == descriptors.descriptor_limit()
        assert {each["error"] for each in gateway.events if each["event"] == "exchange"} == {"overloaded"}
        async with gateway.post(json=CHAT) as answer:
            assert answer.status == 200


STAGE = """
import errno
from gateway import Stage

class Opens(Stage):
    "Opens a file."
    async def __call__(self, request, call_next):
        raise OSError(errno.EMFILE, "Too many open files")
"""


async def test_a_stage_that_can_open_nothing_is_no_bug_of_its_own(
    start_gateway: StartGateway, azure: FakeAzure
) -> None:
    """The client gets the same error, and the log names the stage."""
    yaml = """
plugins_path: mine
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline: [opens, auth_passthrough, {model_map: {unmapped: own_name}}, api_version: 2024-10-21]
"""
    gateway = await start_gateway(azure.endpoint, yaml, {"mine/opens.py": STAGE})
    async with gateway.post(json=CHAT) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "overloaded")
        assert "retry-after" in answer.headers
    assert [each["stage"] for each in gateway.events if each["event"] == "stage_failed"] == ["opens"]


def test_tls_files_that_cannot_be_opened_for_now(exhausted: None, tmp_path: Path) -> None:
    """They are not reported as invalid files."""
    resource_ = Resource("east", "https://x.openai.azure.com", tls=Tls(ca=tmp_path / "ca.pem"))
    with pytest.raises(ApiError) as caught:
        connector._own_context(resource_)
    assert caught.value.code == "overloaded"


async def test_files_that_cannot_be_looked_at_are_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a folder cannot be opened, its files do not count as deleted: nothing is reloaded, and the watch continues."""
    path = write_files(
        tmp_path,
        {
            "gateway.yaml": "teams: teams/*.yaml\nauth: none\nresources: {a: {endpoint: https://a.example}}\n"
            "pipeline: [auth_passthrough, model_map, api_version]\n",
            "teams/b.yaml": "match: {path_prefix: /b}\n",
        },
    )
    sources = Sources()
    assert len(load(path, {}, sources=sources).teams.all) == 2
    listdir, looks = os.listdir, 0

    def no_descriptor(folder: str) -> list[str]:
        nonlocal looks
        looks += 1
        if looks <= 3:
            raise NONE
        if looks == 4:
            (tmp_path / "teams" / "c.yaml").write_text("match: {path_prefix: /c}\n")
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", no_descriptor)
    monkeypatch.setattr(watch, "_INTERVAL", 0.01)
    await watch.wait_for_change(sources)
    assert looks > 4
    looks = 0
    with pytest.raises(ConfigError, match=r"teams: cannot search for .*Too many open files"):
        load(path, {})


@pytest.mark.parametrize("pattern", ["*.yaml", "t*/*.yaml", "t?ams/b.yaml", "teams/b.yaml", "no/*.yaml", ".*", "[x"])
def test_patterns_find_what_glob_finds(pattern: str, tmp_path: Path) -> None:
    """Sorted; hidden files only if the pattern begins with a dot."""
    write_files(tmp_path, {"a.yaml": "", "teams/b.yaml": "", "teams/c.yaml": "", ".hidden": "", ".d.yaml": ""})
    assert list(map(str, Sources().find(tmp_path / pattern))) == sorted(glob.glob(str(tmp_path / pattern)))


async def test_clients_are_refused_before_descriptors_run_out(
    start_gateway: StartGateway, azure: FakeAzure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 503 and Retry-After; if even that may take the last one, the connection is closed immediately."""
    monkeypatch.setattr("gateway.transport.http_server.descriptor_limit", lambda: 36)  # enough for 2
    gateway = await start_gateway(azure.endpoint)
    host, port = gateway.server.address.host, gateway.server.address.port
    opened = []
    for count in range(1, 7):
        opened.append(await asyncio.open_connection(host, port))
        await asyncio.sleep(0.05)
        assert gateway.server._http is not None
        assert gateway.server._http._open <= 4 + (count > 4)
    for reader, writer in opened[2:4]:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 503 " in head.splitlines()[0]
        writer.close()
    for reader, writer in opened[4:]:
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
    for _, writer in opened[:2]:
        writer.close()
