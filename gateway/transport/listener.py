"""Listening sockets, opened or inherited: they are there before any server is, and may be shared by several."""

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
    """Sockets that listen. `address` is where clients find them: with the true port where 0 was asked for."""

    def __init__(
        self, sockets: Sequence[socket.socket], address: Listen, file: tuple[int, int, int] | None = None
    ) -> None:
        self.sockets = tuple(sockets)
        self.address = address
        self._file = file

    @classmethod
    def open(cls, listen: Listen) -> Listener:
        """Listen on an address: on all that its name has. Raises StartError where it cannot be had."""
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
        """Take over sockets that listen already. Raises StartError where one of them does not."""
        sockets = []
        for descriptor in descriptors:
            try:
                sock = socket.socket(fileno=descriptor)
                listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            except OSError as exc:
                raise StartError(f"descriptor {descriptor} is not a socket: {exc.strerror}") from None
            if not listening or sock.type != socket.SOCK_STREAM:
                sock.close()
                raise StartError(f"the socket that was passed in as descriptor {descriptor} does not listen")
            sock.set_inheritable(False)  # a stage's own child processes must not keep it open
            sockets.append(sock)
        name = sockets[0].getsockname()
        if sockets[0].family == socket.AF_UNIX:
            return cls(sockets, Listen(unix=name))
        return cls(sockets, Listen(name[0], name[1]))

    def close(self) -> None:
        """Close this process's descriptors; a process that shares the sockets goes on listening."""
        for sock in self.sockets:
            sock.close()

    def remove(self) -> None:
        """Remove the file of a unix socket that was opened here, unless it is another's by now."""
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
                # `localhost` has an address of a family that this machine may have switched off.
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
        # Linux makes the file with the socket's own mode, less the umask, so it is never more open than it will be.
        # Elsewhere nobody can connect before `listen`.
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
    """Return what tells a socket's file from another of the same name; None where there is none."""
    try:
        status = os.stat(name)
    except FileNotFoundError:
        return None
    # An inode is soon used again; the time of the last change of the content is, for a socket, that of its making.
    return (status.st_dev, status.st_ino, status.st_mtime_ns) if stat.S_ISSOCK(status.st_mode) else None


def _clear_socket(name: str) -> None:
    """Remove a socket that an earlier run left behind. Raises OSError where somebody still answers on it."""
    if _identity(name) is None:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1)
        try:
            with contextlib.suppress(TimeoutError):  # a full backlog: somebody is there, if busy
                sock.connect(name)
        except (ConnectionError, FileNotFoundError):
            Path(name).unlink(missing_ok=True)
            return
    raise OSError(errno.EADDRINUSE, "another process answers on this socket")
