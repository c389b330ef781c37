"""The control socket of `gateway reload`: who may use it, which peers are trusted, and a name that is taken."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import pwd
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gateway import logs
from gateway.cli import main
from gateway.process import control_socket as control
from gateway.process.control_socket import GatewayNotRunning, ReloadReport
from tests.conftest import until

STRANGER = 54321


@contextlib.contextmanager
def squatter(path: Path, answer: bytes = b"{}") -> Iterator[None]:
    """Take the name of a configuration's socket, and reply to each client."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(control._name(path))
        sock.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = sock.accept()
                    with client, contextlib.suppress(OSError):
                        client.recv(100)
                        client.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        sock.shutdown(socket.SHUT_RDWR)
        thread.join()


@contextlib.asynccontextmanager
async def listening(path: Path) -> AsyncIterator[None]:
    async def reload() -> ReloadReport:
        return ReloadReport(changes=["mine"])

    task = asyncio.create_task(control.listen(path, reload))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait((task,))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "gateway.yaml").write_text("")
    return tmp_path / "gateway.yaml"


@pytest.mark.parametrize(
    ("me", "answering", "owner", "account", "user", "refused"),
    [
        (0, 0, 0, None, None, None),
        (0, STRANGER, STRANGER, None, None, None),
        (0, STRANGER, 0, STRANGER, None, None),
        (0, STRANGER, 0, None, str(STRANGER), None),
        (0, STRANGER, 0, None, None, rf"any local user can pose as a gateway.*gateway reload --user {STRANGER}"),
        (0, STRANGER, 0, 7, None, "any local user can pose"),
        (0, STRANGER, STRANGER, STRANGER, "7", f"a process of the user {STRANGER} serves .*, not one of 7"),
        (0, STRANGER, 0, None, "no-such-user", "there is no user 'no-such-user' here"),
        (7, 7, 0, None, None, None),
        (7, STRANGER, 0, None, None, "as another user"),
        (7, 0, 0, None, None, "as another user"),
    ],
)
def test_trusted_users(
    me: int, answering: int, owner: int, account: int | None, user: str | None, refused: str | None, path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Root trusts root, the file's owner, the account `gateway` and a named user; other users trust only themselves."""
    monkeypatch.setattr(os, "geteuid", lambda: me)
    monkeypatch.setattr(control, "_user", lambda sock: answering)
    status = os.stat(path)
    known = os.stat_result((*status[:4], owner, *status[5:10]))
    monkeypatch.setattr(os, "stat", lambda name: known)

    def getpwnam(name: str) -> pwd.struct_passwd:
        if name != "gateway" or account is None:
            raise KeyError(name)
        return pwd.struct_passwd((name, "x", account, account, "", "/", ""))

    monkeypatch.setattr(pwd, "getpwnam", getpwnam)
    with squatter(path, b'{"changes": ["yes"]}'):
        if refused is None:
            assert control.request_reload(path, user).changes == ["yes"]
        else:
            with pytest.raises(GatewayNotRunning, match=f"(?i){refused}"):
                control.request_reload(path, user)


def test_root_must_name_another_user(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`gateway reload` prints the command, exits with status 1 and sends nothing; with `--user` it asks."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(control, "_user", lambda sock: STRANGER)
    monkeypatch.setattr(control, "_trusted_users", lambda config: {0})
    with squatter(path, b'{"changes": ["one \\u001b[2J"]}'):
        assert main(["reload", "--config", str(path)]) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert f"gateway reload --user {STRANGER}" in printed.err
        assert main(["reload", "--config", str(path), "--user", str(STRANGER)]) == 0
        assert capsys.readouterr().out == "'one \\x1b[2J'\n"


def test_a_report_has_a_maximum_size(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an invalid report is an error."""
    monkeypatch.setattr(control, "_MAX_REPORT", 100_000)
    with squatter(path, b" " * 200_000), pytest.raises(GatewayNotRunning, match="too large"):
        control.request_reload(path)
    with squatter(path, b"hello"), pytest.raises(GatewayNotRunning, match="ended before the reload was complete"):
        control.request_reload(path)


@pytest.mark.parametrize(
    ("user", "said"), [(os.geteuid(), "another gateway with the same configuration"), (STRANGER, "can pose as this")]
)
async def test_a_taken_name_is_logged_and_tried_again(
    user: int, said: str, path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The log names the process and its user, once; when the name is free again, the gateway takes it."""
    logs.configure("info", "json", sys.stderr)
    monkeypatch.setattr(control, "_RETRY_INTERVAL", 0.02)
    monkeypatch.setattr(control, "_peer", lambda sock: (4711, user))
    events: list[dict[str, str]] = []

    def logged(part: str) -> bool:
        events.extend(json.loads(line) for line in capfd.readouterr().err.splitlines())
        return any(part in each["event"] for each in events)

    with squatter(path):
        async with listening(path):
            await until(lambda: logged("reload_socket_unavailable"))
            await asyncio.sleep(0.1)
    events_before = [each for each in events if each["event"] == "reload_socket_unavailable"]
    assert len(events_before) == 1
    assert "process 4711" in events_before[0]["reason"]
    assert said in events_before[0]["reason"]
    monkeypatch.setattr(control, "_peer", lambda sock: (os.getpid(), os.geteuid()))
    events.clear()
    with contextlib.ExitStack() as taken:
        taken.enter_context(squatter(path))
        async with listening(path):
            await until(lambda: logged("reload_socket_unavailable"))
            taken.close()
            await until(lambda: logged("reload_socket_available"))
            assert (await asyncio.to_thread(control.request_reload, path)).changes == ["mine"]


async def test_a_lack_of_descriptors_passes(
    path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """At first no socket is available: the gateway tries again."""
    logs.configure("info", "json", sys.stderr)
    monkeypatch.setattr(control, "_RETRY_INTERVAL", 0.02)
    original, left = control._listening, 3

    def listening_late(config: Path) -> socket.socket:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return original(config)

    monkeypatch.setattr(control, "_listening", listening_late)
    async with listening(path):
        await until(lambda: left < 0)
        assert (await asyncio.to_thread(control.request_reload, path)).changes == ["mine"]
    assert capfd.readouterr().err.count("Too many open files") == 1
