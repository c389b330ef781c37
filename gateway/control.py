"""How `gateway reload` reaches the gateway that runs: a socket with an abstract name, which takes no other order.

Such a name (Linux has them) is no file: nothing is left behind, and a file system that cannot be written to will do. It
is made of the configuration's path alone, so that root finds it, whoever the gateway runs as. Whoever is neither root
nor the gateway's own user is refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from gateway.errors import GatewayError
from gateway.logs import get_logger

__all__ = ("NobodyThere", "Report", "ask", "listen")

_ORDER = b"reload\n"
# How long, in seconds, a client may take to say what it wants, and waits for what becomes of it.
_PATIENCE, _CLIENT_PATIENCE = 5.0, 300.0
# How many may ask at once.
_MOST = 16


class Report(msgspec.Struct, frozen=True):
    """What became of a reload: why it failed, or that nothing had changed, or what is different now.

    `notes` are changes that need a restart.
    """

    mistakes: list[str] = []
    same: bool = False
    changes: list[str] = []
    notes: list[str] = []


class NobodyThere(GatewayError):
    """No gateway could be asked; the message says why."""


def _name(config: Path) -> str:
    """Return the socket's name; the leading zero byte makes it abstract."""
    digest = hashlib.sha256(os.path.abspath(config).encode(errors="surrogateescape")).hexdigest()
    return f"\0azure-openai-gateway.reload.{digest[:32]}"


def _user(sock: socket.socket) -> int:
    """Return the user at the other end, as the system knows it."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


async def listen(config: Path, reload: Callable[[], Awaitable[Report]]) -> None:
    """Let `gateway reload` ask, until cancelled. Elsewhere than on Linux, or where the name is taken, nobody can."""
    if sys.platform != "linux":
        return
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.bind(_name(config))
            sock.listen(8)
        except OSError as exc:
            get_logger().warning(
                "`gateway reload` cannot reach this gateway; send SIGHUP",
                reason=f"another gateway with the same configuration runs here: {exc.strerror}",
                pid=os.getpid(),
            )
            return
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


async def _answer(client: socket.socket, reload: Callable[[], Awaitable[Report]]) -> None:
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


def ask(config: Path) -> Report:
    """Ask the gateway that runs with this configuration for a reload, and wait for it. Raises NobodyThere."""
    if sys.platform != "linux":
        raise NobodyThere("`gateway reload` needs Linux; send the gateway SIGHUP instead")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_CLIENT_PATIENCE)
        try:
            sock.connect(_name(config))
        except OSError:
            raise NobodyThere(f"no gateway with the configuration {os.path.abspath(config)} runs here") from None
        if os.geteuid() not in (0, _user(sock)):
            raise NobodyThere(
                "a gateway with this configuration runs here as another user; ask as that one, or as root"
            )
        try:
            sock.sendall(_ORDER)
            answer = b""
            while more := sock.recv(65536):
                answer += more
            return msgspec.json.decode(answer, type=Report)
        except TimeoutError:
            raise NobodyThere(f"the gateway did not answer within {_CLIENT_PATIENCE:g} s") from None
        except (OSError, msgspec.MsgspecError):
            raise NobodyThere("the gateway ended before it had reloaded") from None
