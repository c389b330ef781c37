"""systemd's two protocols: readiness notification, and socket activation."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.errors import StartError
from gateway.process.systemd import Notifier, listen_fds
from gateway.testing import FakeAzure
from tests.cli.test_cli import CLEAN
from tests.conftest import CHAT, KEY

# Does what systemd does between fork and exec: the socket becomes descriptor 3, and the variables name the process.
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv[2], LISTEN_FDNAMES="gateway.socket")
os.execv(sys.executable, [sys.executable, "-m", "gateway", "serve", *sys.argv[3:]])
"""


class Manager:
    """The service manager's end of $NOTIFY_SOCKET."""

    def __init__(self, name: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + name[1:] if name.startswith("@") else name)
        self._socket.setblocking(False)
        self.name = name

    async def hear(self) -> str:
        async with asyncio.timeout(30):
            return (await asyncio.get_running_loop().sock_recv(self._socket, 4096)).decode()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: Any, tmp_path: Path) -> Iterator[Manager]:
    """A service manager that listens on a path, or on an abstract name."""
    manager = Manager(str(tmp_path / "notify") if request.param == "path" else f"@gateway-test-{os.getpid()}")
    yield manager
    manager.close()


async def test_notifications(manager: Manager) -> None:
    """The three states as systemd reads them; a reload with its start time."""
    environment = {"NOTIFY_SOCKET": manager.name, "OTHER": "1"}
    notify = Notifier(environment)
    assert environment == {"OTHER": "1"}
    notify.ready()
    notify.stopping()
    before = time.monotonic_ns() // 1000
    notify.reloading()
    assert [await manager.hear() for _ in range(2)] == ["READY=1", "STOPPING=1"]
    reloading, at = (await manager.hear()).split("\nMONOTONIC_USEC=")
    assert reloading == "RELOADING=1"
    assert before <= int(at) <= time.monotonic_ns() // 1000


def test_without_a_manager_nothing_happens(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And a failed notification is only a warning."""
    Notifier({}).ready()
    assert capfd.readouterr().err == ""
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()
    # The log was set up before capfd; what counts is that nothing was raised.


def test_sockets_meant_for_this_process_are_taken() -> None:
    """Those of a parent are not; the variables are removed in either case."""
    mine = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", "OTHER": "1"}
    assert listen_fds(mine) == [3]
    assert mine == {"OTHER": "1"}
    for others in ({"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_PID": str(os.getpid())}, {}):
        assert listen_fds(others) == []
        assert others == {}


@pytest.mark.parametrize("count", ["2", "many"])
def test_more_than_one_socket_is_a_clear_error(count: str) -> None:
    """The message names the setting to change."""
    with pytest.raises(StartError, match=f"LISTEN_FDS={count}: the gateway takes one socket; .*ListenStream="):
        listen_fds({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count})


async def activated(sock: socket.socket, *arguments: str, count: str = "1", **env: str) -> asyncio.subprocess.Process:
    """Start `gateway serve` as systemd would, with a socket."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", ACTIVATE, str(sock.fileno()), count, *arguments,
        env={**CLEAN, **env}, pass_fds=[sock.fileno()], stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
@pytest.mark.parametrize("workers", ["1", "2"])
async def test_socket_activation_and_readiness(
    workers: str, family: socket.AddressFamily, azure: FakeAzure, tmp_path: Path
) -> None:
    """A client that connects early gets a response; READY=1 when it serves, STOPPING=1 when it drains."""
    path = tmp_path / "s"
    manager = Manager(str(tmp_path / "notify"))
    with socket.socket(family) as sock:
        sock.bind(str(path) if family == socket.AF_UNIX else ("127.0.0.1", 0))
        sock.listen()
        connector = aiohttp.UnixConnector(str(path)) if family == socket.AF_UNIX else aiohttp.TCPConnector()
        host = "x" if family == socket.AF_UNIX else f"127.0.0.1:{sock.getsockname()[1]}"
        async with aiohttp.ClientSession(connector=connector) as session:
            early = asyncio.create_task(
                session.post(f"http://{host}/v1/chat/completions", json=CHAT, headers={"api-key": KEY})
            )
            process = await activated(
                sock, "--workers", workers, AZURE_OPENAI_ENDPOINT=azure.endpoint, NOTIFY_SOCKET=manager.name
            )
            try:
                assert await manager.hear() == "READY=1"
                async with asyncio.timeout(30):
                    assert (await early).status == 200
                process.send_signal(signal.SIGTERM)
                assert await manager.hear() == "STOPPING=1"
                async with asyncio.timeout(30):
                    assert await process.wait() == 0
            finally:
                if process.returncode is None:
                    process.kill()
                manager.close()
                assert process.stderr is not None
                events = [json.loads(line) for line in (await process.stderr.read()).splitlines()]
        expected = f"unix:{path}" if family == socket.AF_UNIX else host
        assert {event["address"] for event in events if event["event"] == "listening"} == {expected}
        sock.getsockname()  # still the manager's
    assert path.exists() == (family == socket.AF_UNIX), "the socket's file is the manager's"


@pytest.mark.slow
async def test_two_sockets_do_not_start(azure: FakeAzure) -> None:
    """Status 1, one line."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        process = await activated(sock, count="2", AZURE_OPENAI_ENDPOINT=azure.endpoint)
        assert process.stderr is not None
        text = await process.stderr.read()
        assert await process.wait() == 1
    assert text.startswith(b"gateway: LISTEN_FDS=2: ")
    assert len(text.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_rolling_restart_is_a_reload(workers: str, azure: FakeAzure, tmp_path: Path) -> None:
    """RELOADING=1, then READY=1, so that `systemctl reload` ends when the new workers serve. One worker has none."""
    manager = Manager(str(tmp_path / "notify"))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "serve", "--workers", workers, "--listen", "127.0.0.1:0",
        env={**CLEAN, "AZURE_OPENAI_ENDPOINT": azure.endpoint, "NOTIFY_SOCKET": manager.name},
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        heard = [await manager.hear()]
        process.send_signal(signal.SIGUSR2)
        if workers == "2":
            heard += [await manager.hear() for _ in range(2)]
        else:
            assert process.stderr is not None
            async with asyncio.timeout(30):
                while b"rolling restart needs --workers 2" not in await process.stderr.readline():
                    pass
        process.send_signal(signal.SIGTERM)
        heard.append(await manager.hear())
        async with asyncio.timeout(30):
            await process.communicate()
        assert process.returncode == 0
    finally:
        if process.returncode is None:
            process.kill()
        manager.close()
    said = [text.partition("\n")[0] for text in heard]
    assert said == ["READY=1", *(["RELOADING=1", "READY=1"] if workers == "2" else []), "STOPPING=1"]
