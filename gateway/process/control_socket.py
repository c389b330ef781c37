"""The control socket: how `gateway reload` reaches the running gateway. It is an abstract socket with one command.

An abstract name (Linux has them) is no file: nothing remains after a crash, and a read-only file system is enough. The
name is derived from the configuration's path alone, so root finds it no matter which user the gateway runs as.

Any local user can take the name first. So both sides check the user at the other end, which the kernel reports
(SO_PEERCRED). The gateway obeys root and its own user. A client that is not root trusts only its own user. Root trusts
root, the owner of the configuration file, and the account `gateway`: only root makes accounts, and systemd's
`DynamicUser=` gives the user of gateway.service this name. Root must name any other user.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import pwd
import socket
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from gateway.errors import GatewayError
from gateway.logs import get_logger

__all__ = ("GatewayNotRunning", "ReloadReport", "listen", "request_reload")

_COMMAND = b"reload\n"
# Timeouts, in seconds: for a client to send its command or take the report, and for the report to arrive.
_CLIENT_TIMEOUT, _REPORT_TIMEOUT = 5.0, 300.0
# Maximum number of simultaneous clients.
_MAX_CLIENTS = 16
# Maximum size of a report, in bytes: enough for a line per changed setting of some thousand teams.
_MAX_REPORT = 16 * 1024 * 1024
# Interval, in seconds, between attempts to take a name that another process has.
_RETRY_INTERVAL = 30.0
# The account that root trusts by default.
_ACCOUNT = "gateway"


class ReloadReport(msgspec.Struct, frozen=True):
    """The result of a reload: `mistakes` if it failed, `same` if nothing has changed, else the `changes`.

    `notes` are changes that need a restart.
    """

    mistakes: list[str] = []
    same: bool = False
    changes: list[str] = []
    notes: list[str] = []


class GatewayNotRunning(GatewayError):
    """No gateway could be asked; the message has the reason."""


def _name(config: Path) -> str:
    """Return the socket's name; the leading zero byte makes it abstract."""
    digest = hashlib.sha256(os.path.abspath(config).encode(errors="surrogateescape")).hexdigest()
    return f"\0azure-openai-gateway.process.reload.{digest[:32]}"


def _peer(sock: socket.socket) -> tuple[int, int]:
    """Return the process and the user at the other end, as the kernel reports them (unix(7), SO_PEERCRED)."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, user, _ = struct.unpack("3i", credentials)
    return pid, user


def _user(sock: socket.socket) -> int:
    return _peer(sock)[1]


def _name_of(user: int) -> str:
    """Return a user's name, or its number if it has no name."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def _trusted_users(config: Path) -> set[int]:
    """Return the users that root trusts."""
    users = {0}
    with contextlib.suppress(OSError):
        users.add(os.stat(config).st_uid)
    with contextlib.suppress(KeyError):
        users.add(pwd.getpwnam(_ACCOUNT).pw_uid)
    return users


def _check_user(sock: socket.socket, config: Path, user: str | None) -> None:
    """Check the user at the other end. Raises GatewayNotRunning for a user that is not trusted."""
    peer, me = _user(sock), os.geteuid()
    if me != 0:
        if peer != me:
            raise GatewayNotRunning(
                "a gateway with this configuration runs here as another user; run this command as that user or as root"
            )
        return
    if user is None:
        if peer not in _trusted_users(config):
            name = _name_of(peer)
            raise GatewayNotRunning(
                f"a process of the user {name} serves this configuration. Any local user can pose as a gateway, "
                f"and {name} is neither root, nor {_ACCOUNT}, nor the owner of the file. "
                f"If your gateway runs as {name}: gateway reload --user {name}"
            )
        return
    try:
        expected = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise GatewayNotRunning(f"--user: there is no user {user!r} here") from None
    if peer != expected:
        raise GatewayNotRunning(f"a process of the user {_name_of(peer)} serves this configuration, not one of {user}")


async def listen(config: Path, reload: Callable[[], Awaitable[ReloadReport]]) -> None:
    """Serve `gateway reload`, until cancelled. Only Linux has abstract sockets; elsewhere this does nothing.

    While another process has the name, or no socket is available, it tries again at intervals.
    """
    if sys.platform != "linux":
        return
    log = get_logger().bind(pid=os.getpid())
    unavailable = False
    while True:
        try:
            with _listening(config) as sock:
                if unavailable:
                    log.info("reload_socket_available")
                    unavailable = False
                await _accept(sock, reload)
        except OSError as exc:
            if not unavailable:
                log.warning(
                    "reload_socket_unavailable",
                    reason=_holder(config) if exc.errno == errno.EADDRINUSE else exc.strerror,
                    advice="`gateway reload` cannot reach this gateway; send SIGHUP instead",
                )
                unavailable = True
        await asyncio.sleep(_RETRY_INTERVAL)


def _listening(config: Path) -> socket.socket:
    """Return a socket that listens on the name. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.bind(_name(config))
        sock.listen(8)
    except BaseException:
        sock.close()
        raise
    return sock


def _holder(config: Path) -> str:
    """Return a description of the process that has the name."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            sock.connect(_name(config))
            pid, user = _peer(sock)
    except OSError:
        return "another process has the name of its socket"
    holder = f"process {pid} of the user {_name_of(user)} has the name of its socket"
    if user in (0, os.geteuid()):
        return f"{holder}: another gateway with the same configuration?"
    return f"{holder}, and can pose as this gateway; end that process"


async def _accept(sock: socket.socket, reload: Callable[[], Awaitable[ReloadReport]]) -> None:
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()
    try:
        while True:
            try:
                client, _ = await loop.sock_accept(sock)
            except OSError:  # no descriptor is left
                await asyncio.sleep(1)
                continue
            if len(tasks) >= _MAX_CLIENTS:
                client.close()
                continue
            task = loop.create_task(_handle(client, reload))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    finally:
        for task in tasks:
            task.cancel()


async def _handle(client: socket.socket, reload: Callable[[], Awaitable[ReloadReport]]) -> None:
    loop = asyncio.get_running_loop()
    with client:
        client.setblocking(False)
        try:
            if _user(client) not in (0, os.geteuid()):
                return  # (any user can connect; `request_reload` has checked the user of this side)
            async with asyncio.timeout(_CLIENT_TIMEOUT):
                command = await loop.sock_recv(client, len(_COMMAND))
            if command != _COMMAND:
                return
            report = await reload()
            async with asyncio.timeout(_CLIENT_TIMEOUT):
                await loop.sock_sendall(client, msgspec.json.encode(report))
        except (OSError, TimeoutError):
            return  # the client has disconnected


def request_reload(config: Path, user: str | None = None) -> ReloadReport:
    """Ask the gateway that runs with this configuration for a reload, and wait for its report.

    `user` is the name or number of the user that it runs as; root needs it for a user that it does not trust. Raises
    GatewayNotRunning.
    """
    if sys.platform != "linux":
        raise GatewayNotRunning("`gateway reload` needs Linux; send the gateway SIGHUP instead")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_REPORT_TIMEOUT)
        try:
            sock.connect(_name(config))
        except OSError:
            raise GatewayNotRunning(f"no gateway with the configuration {os.path.abspath(config)} runs here") from None
        _check_user(sock, config, user)
        try:
            sock.sendall(_COMMAND)
            return msgspec.json.decode(_read_report(sock), type=ReloadReport)
        except TimeoutError:
            raise GatewayNotRunning(f"the gateway did not report within {_REPORT_TIMEOUT:g} s") from None
        except (OSError, msgspec.MsgspecError):
            raise GatewayNotRunning("the gateway ended before the reload was complete") from None


def _read_report(sock: socket.socket) -> bytes:
    """Read to the end. Raises TimeoutError; GatewayNotRunning if the report is too large."""
    end = time.monotonic() + _REPORT_TIMEOUT
    report = bytearray()
    while more := sock.recv(65536):
        report += more
        if len(report) > _MAX_REPORT:
            raise GatewayNotRunning("the report is too large to come from a gateway")
        if (left := end - time.monotonic()) <= 0:
            raise TimeoutError
        sock.settimeout(left)
    return bytes(report)
