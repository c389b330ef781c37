"""Listening sockets: opened on an address, or inherited."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from gateway.errors import StartError
from gateway.settings import Listen
from gateway.transport.listener import Listener


def connect(listener: Listener) -> None:
    for sock in listener.sockets:
        with socket.socket(sock.family) as client:
            client.settimeout(5)
            client.connect(sock.getsockname())


def test_tcp_listens_on_every_address_of_a_name_with_one_port() -> None:
    """`localhost` may have two addresses; the port chosen for 0 is the same for both."""
    listener = Listener.open(Listen("localhost", 0))
    connect(listener)
    assert {sock.getsockname()[1] for sock in listener.sockets} == {listener.address.port}
    assert listener.address.port > 0
    listener.close()
    Listener.open(listener.address).close()  # a released address can be used again


def test_an_address_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    """With the system's reason; so is a path on which another process listens."""
    path = str(tmp_path / "s")
    listeners = [Listener.open(Listen("127.0.0.1", 0)), Listener.open(Listen(unix=path))]
    for listen in (
        listeners[0].address,
        Listen("192.0.2.1", 80),
        Listen("no.such.name.invalid", 80),
        Listen(unix=path),
    ):
        with pytest.raises(StartError, match=r"cannot listen on .+: \w+") as caught:
            Listener.open(listen)
        assert str(listen) in str(caught.value)
    connect(listeners[1])
    for listener in listeners:
        listener.close()
        listener.remove()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
@pytest.mark.parametrize("mode", [0o660, 0o666, 0o600])
def test_a_unix_socket_is_never_more_open_than_its_mode(
    mode: int, umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither when its file is created nor when it listens; in the end it has exactly this mode."""
    path = tmp_path / "s"
    seen: list[int] = []
    chmod, before = os.chmod, os.umask(umask)

    def watched(name: str, to: int) -> None:
        seen.append(stat.S_IMODE(path.stat().st_mode))
        chmod(name, to)
        with socket.socket(socket.AF_UNIX) as early, pytest.raises(ConnectionRefusedError):
            early.connect(name)

    monkeypatch.setattr(os, "chmod", watched)
    try:
        listener = Listener.open(Listen(unix=str(path), mode=mode))
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert [each & ~mode for each in seen] == [0]
        connect(listener)
        listener.close()
        listener.remove()
    finally:
        os.umask(before)


def test_a_unix_socket_is_for_user_and_group_and_its_file_goes_with_its_owner(tmp_path: Path) -> None:
    """A leftover file is replaced; closing alone keeps the file, and another process's file is not removed."""
    path = tmp_path / "s"
    left = Listener.open(Listen(unix=str(path)))
    left.close()
    assert stat.S_ISSOCK(path.stat().st_mode)
    listener = Listener.open(Listen(unix=str(path)))
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    left.remove()
    connect(listener)
    listener.close()
    listener.remove()
    assert not path.exists()


def test_inherited_sockets_know_their_address_and_leave_the_file_alone(tmp_path: Path) -> None:
    """They belong to another process; a child process of a stage does not inherit them again."""
    path = tmp_path / "s"
    for listen in (Listen("127.0.0.1", 0), Listen("::1", 0), Listen(unix=str(path))):
        opened = Listener.open(listen)
        descriptors = [os.dup(sock.fileno()) for sock in opened.sockets]
        os.set_inheritable(descriptors[0], True)
        inherited = Listener.inherited(descriptors)
        assert inherited.address == opened.address
        assert not inherited.sockets[0].get_inheritable()
        opened.close()
        connect(inherited)
        inherited.close()
        inherited.remove()
    assert path.exists()


def test_what_does_not_listen_is_not_taken_over(tmp_path: Path) -> None:
    """A file, a socket that is not listening, datagrams."""
    (tmp_path / "f").write_text("")
    with (tmp_path / "f").open() as file, pytest.raises(StartError, match="is not a socket"):
        Listener.inherited([file.fileno()])
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as sock:
            sock.bind(("127.0.0.1", 0))
            with pytest.raises(StartError, match="does not listen"):
                Listener.inherited([os.dup(sock.fileno())])
