"""Listening sockets, opened or inherited: they exist before any server, and several processes may share them."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

from gateway.errors import StartError
from gateway.settings import Listen

__all__ = ("Listener",)

_BACKLOG = 1024


class Listener:
    """Listening sockets. `address` is their address for clients: with the real port, even if port 0 is configured."""

    def __init__(
        self, sockets: Sequence[socket.socket], address: Listen, file: tuple[int, int, int] | None = None
    ) -> None:
        self.sockets = tuple(sockets)
        self.address = address
        self._file = file

    @classmethod
    def open(cls, listen: Listen) -> Listener:
        """Listen on every address of a host name. Raises StartError if one cannot be used."""
        try:
            if listen.unix is not None:
                sock = _open_unix(listen.unix, listen.mode)
                return cls([sock], listen, _identity(listen.unix))
            sockets = _open_tcp(listen.host, listen.port)
        except OSError as exc:
            raise StartError(f"cannot listen on {listen}: {exc.strerror or exc}") from None
        return cls(sockets, Listen(listen.host, sockets[0].getsockname()[1]))

    @classmethod
    def inherited(cls, descriptors: Sequence[int]) -> Listener:
        """Take over listening sockets. Raises StartError if one does not listen."""
        sockets = []
        for descriptor in descriptors:
            try:
                sock = socket.socket(fileno=descriptor)
                listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            except OSError as exc:
                raise StartError(f"descriptor {descriptor} is not a socket: {exc.strerror}") from None
            if not listening or sock.type != socket.SOCK_STREAM:
                sock.close()
                raise StartError(f"the socket passed in as descriptor {descriptor} does not listen")
            sock.set_inheritable(False)  # child processes of a stage must not keep it open
            sockets.append(sock)
        name = sockets[0].getsockname()
        if sockets[0].family == socket.AF_UNIX:
            return cls(sockets, Listen(unix=name))
        return cls(sockets, Listen(name[0], name[1]))

    def close(self) -> None:
        """Close this process's descriptors; other processes with the same sockets continue to listen."""
        for sock in self.sockets:
            sock.close()

    def remove(self) -> None:
        """Remove the file of a Unix socket that this process opened, unless another process has replaced it."""
        if self._file is not None and self.address.unix is not None and _identity(self.address.unix) == self._file:
            Path(self.address.unix).unlink()
        self._file = None


def _open_tcp(host: str, port: int) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    try:
        for family, kind, protocol, _, address in dict.fromkeys(infos):
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError as exc:
                missing = exc
                continue
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if port == 0 and len(sockets) > 1:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])  # noqa: PLW2901 -- one port for all
            try:
                sock.bind(address)
            except OSError as exc:
                if exc.errno != errno.EADDRNOTAVAIL:
                    raise
                # `localhost` may have an IPv6 address although IPv6 is disabled on this machine.
                missing = exc
                sockets.pop().close()
                continue
            sock.listen(_BACKLOG)
        if not sockets:
            raise missing or OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _open_unix(name: str, mode: int) -> socket.socket:
    _clear_socket(name)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Linux creates the file with the socket's mode minus the umask, so it is never more open than configured.
        # On other systems, no client can connect before `listen`.
        with contextlib.suppress(OSError):
            os.fchmod(sock.fileno(), mode)
        sock.bind(name)
        os.chmod(name, mode)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _identity(name: str) -> tuple[int, int, int] | None:
    """Return the identity of a socket's file, which differs from a later file of the same name; None without one."""
    try:
        status = os.stat(name)
    except FileNotFoundError:
        return None
    # Inodes are reused. The mtime of a socket's file is its creation time.
    return (status.st_dev, status.st_ino, status.st_mtime_ns) if stat.S_ISSOCK(status.st_mode) else None


def _clear_socket(name: str) -> None:
    """Remove a socket that an earlier run left. Raises OSError if another process still accepts on it."""
    if _identity(name) is None:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1)
        try:
            with contextlib.suppress(TimeoutError):  # a full backlog: a process listens, but is busy
                sock.connect(name)
        except (ConnectionError, FileNotFoundError):
            Path(name).unlink(missing_ok=True)
            return
    raise OSError(errno.EADDRINUSE, "another process listens on this socket")
