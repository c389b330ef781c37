"""How `gateway reload` reaches the running gateway: a socket with an abstract name, which takes no other order.

Such a name (Linux has them) is no file: nothing is left behind, and a read-only file system will do. It is made of the
configuration's path alone, so that root finds it, whatever user the gateway runs as.

Any local user can take the name first. So both sides check the user at the other end, which the kernel tells
(SO_PEERCRED). The gateway obeys root and its own user. Who is not root believes only its own user. Root believes root,
the owner of the configuration file, and the account `gateway`: only root makes accounts, and systemd's `DynamicUser=`
gives the user of gateway.service this name. Root has to name any other user.
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

__all__ = ("GatewayNotRunning", "ReloadReport", "ask", "listen")

_ORDER = b"reload\n"
# How long, in seconds, a client may take to say what it wants, and waits for what becomes of it.
_PATIENCE, _CLIENT_PATIENCE = 5.0, 300.0
# How many may ask at once.
_MOST = 16
# The largest report that is read, in bytes: a line for each changed setting of some thousand teams.
_LARGEST = 16 * 1024 * 1024
# How often, in seconds, a name that is taken is tried again.
_TRY_AGAIN = 30.0
# The account that root believes without being told.
_ACCOUNT = "gateway"


class ReloadReport(msgspec.Struct, frozen=True):
    """What became of a reload: why it failed, or that nothing had changed, or what is different now.

    `notes` are changes that need a restart.
    """

    mistakes: list[str] = []
    same: bool = False
    changes: list[str] = []
    notes: list[str] = []


class GatewayNotRunning(GatewayError):
    """No gateway could be asked; the message says why."""


def _name(config: Path) -> str:
    """Return the socket's name; the leading zero byte makes it abstract."""
    digest = hashlib.sha256(os.path.abspath(config).encode(errors="surrogateescape")).hexdigest()
    return f"\0azure-openai-gateway.process.reload.{digest[:32]}"


def _peer(sock: socket.socket) -> tuple[int, int]:
    """Return the process and the user at the other end, as the kernel knows them (unix(7), SO_PEERCRED)."""
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


def _believed(config: Path) -> set[int]:
    """Return the users whose answers root believes."""
    users = {0}
    with contextlib.suppress(OSError):
        users.add(os.stat(config).st_uid)
    with contextlib.suppress(KeyError):
        users.add(pwd.getpwnam(_ACCOUNT).pw_uid)
    return users


def _check_user(sock: socket.socket, config: Path, user: str | None) -> None:
    """Check who would answer. Raises NobodyThere if that is no user to believe."""
    answering, me = _user(sock), os.geteuid()
    if me != 0:
        if answering != me:
            raise GatewayNotRunning(
                "a gateway with this configuration runs here as another user; run this command as that user, or as root"
            )
        return
    if user is None:
        if answering not in _believed(config):
            name = _name_of(answering)
            raise GatewayNotRunning(
                f"a process of the user {name} answers for this configuration. Any local user can pose as a gateway, "
                f"and {name} is neither root, nor {_ACCOUNT}, nor the owner of the file. "
                f"If the gateway does run as {name}: gateway reload --user {name}"
            )
        return
    try:
        expected = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise GatewayNotRunning(f"--user: there is no user {user!r} here") from None
    if answering != expected:
        raise GatewayNotRunning(
            f"a process of the user {_name_of(answering)} answers for this configuration, and not {user}"
        )


async def listen(config: Path, reload: Callable[[], Awaitable[ReloadReport]]) -> None:
    """Let `gateway reload` ask, until cancelled. On other systems than Linux, nobody can.

    While the name is taken, or no socket can be had, this is tried again and again.
    """
    if sys.platform != "linux":
        return
    log = get_logger().bind(pid=os.getpid())
    told = False
    while True:
        try:
            with _listening(config) as sock:
                if told:
                    log.info("`gateway reload` can reach this gateway again")
                    told = False
                await _accept(sock, reload)
        except OSError as exc:
            if not told:
                log.warning(
                    "`gateway reload` cannot reach this gateway; send SIGHUP",
                    reason=_holder(config) if exc.errno == errno.EADDRINUSE else exc.strerror,
                )
                told = True
        await asyncio.sleep(_TRY_AGAIN)


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
    """Return who has the name."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            sock.connect(_name(config))
            pid, user = _peer(sock)
    except OSError:
        return "another process has the name of its socket"
    who = f"process {pid} of the user {_name_of(user)} has the name of its socket"
    if user in (0, os.geteuid()):
        return f"{who}: another gateway with the same configuration?"
    return f"{who}, and can pose as this gateway; end that process"


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
            if len(tasks) >= _MOST:
                client.close()
                continue
            task = loop.create_task(_answer(client, reload))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    finally:
        for task in tasks:
            task.cancel()


async def _answer(client: socket.socket, reload: Callable[[], Awaitable[ReloadReport]]) -> None:
    loop = asyncio.get_running_loop()
    with client:
        client.setblocking(False)
        try:
            if _user(client) not in (0, os.geteuid()):
                return  # (anybody can come, and is waited for by nobody; `ask` has looked who it would ask)
            async with asyncio.timeout(_PATIENCE):
                order = await loop.sock_recv(client, len(_ORDER))
            if order != _ORDER:
                return
            report = await reload()
            async with asyncio.timeout(_PATIENCE):
                await loop.sock_sendall(client, msgspec.json.encode(report))
        except (OSError, TimeoutError):
            return  # it has left


def ask(config: Path, user: str | None = None) -> ReloadReport:
    """Ask the gateway that runs with this configuration for a reload, and wait for it.

    `user` is the name or number of the user that it runs as, where root asks and does not believe any. Raises
    NobodyThere.
    """
    if sys.platform != "linux":
        raise GatewayNotRunning("`gateway reload` needs Linux; send the gateway SIGHUP instead")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_CLIENT_PATIENCE)
        try:
            sock.connect(_name(config))
        except OSError:
            raise GatewayNotRunning(f"no gateway with the configuration {os.path.abspath(config)} runs here") from None
        _check_user(sock, config, user)
        try:
            sock.sendall(_ORDER)
            return msgspec.json.decode(_whole(sock), type=ReloadReport)
        except TimeoutError:
            raise GatewayNotRunning(f"the gateway did not answer within {_CLIENT_PATIENCE:g} s") from None
        except (OSError, msgspec.MsgspecError):
            raise GatewayNotRunning("the gateway ended before it had reloaded") from None


def _whole(sock: socket.socket) -> bytes:
    """Return all that the other end says. Raises TimeoutError; NobodyThere if that is too much."""
    end = time.monotonic() + _CLIENT_PATIENCE
    answer = bytearray()
    while more := sock.recv(65536):
        answer += more
        if len(answer) > _LARGEST:
            raise GatewayNotRunning("the answer is too large to be a gateway's")
        if (left := end - time.monotonic()) <= 0:
            raise TimeoutError
        sock.settimeout(left)
    return bytes(answer)
