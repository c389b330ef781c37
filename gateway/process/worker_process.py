"""The supervisor's side of one worker: starting its process, sending orders, receiving messages, killing it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from gateway.balancing.circuit_breaker import HealthEvent
from gateway.process.reload import WatchedState
from gateway.process.worker import WorkerInheritance
from gateway.process.worker_messages import HEALTH_EVENT, LEAVING, READY, WorkerMessage
from gateway.settings import Listen
from gateway.transport.listener import Listener

__all__ = ("STOP_TIMEOUT", "WorkerProcess", "worker_command")

# Timeout, in seconds, for a worker to obey an order to exit at once, or to commit a reload.
STOP_TIMEOUT = 10.0
# Maximum length of a message, in bytes: `ready` names every file of the configuration.
_MAX_MESSAGE = 1 << 26


def worker_command(config: Path | None, *, cors: bool = False, listen: Listen | None = None) -> list[str]:
    """Return the command that starts a worker, without `--handover`."""
    # -m looks for modules in the working directory first. If this process does not, its workers must not.
    here = sys.path[0] in ("", os.getcwd())
    command = [sys.executable, *(() if here else ("-P",)), "-m", "gateway", "serve", *(("--cors",) if cors else ())]
    if listen is not None:
        command += ["--listen", str(listen)]  # it inherits the sockets; this overrides `listen:` in what it reports
    return command if config is None else [*command, "--config", str(config)]


class WorkerProcess:
    """One worker process, and the supervisor's end of its channel."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self.state: WatchedState | None = None
        """The state of its configuration, once it serves."""
        self.health_report: list[dict[str, Any]] | None = None
        """The last report on the health of deployments."""
        self.on_health_event: Callable[[HealthEvent], None] | None = None
        """Called with each health event for the other workers."""
        self._reader = reader
        self._writer = writer
        self._receiving: asyncio.Task[None] | None = None  # from when it serves until it leaves
        self._replies: dict[tuple[str, int], asyncio.Future[WorkerMessage | None]] = {}

    @classmethod
    async def start(
        cls, command: Sequence[str], listener: Listener, table: int, counts: int, index: int
    ) -> WorkerProcess:
        """Start a process. Raises OSError or RuntimeError if the system has none, or no thread to wait for it."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                sockets = tuple(sock.fileno() for sock in listener.sockets)
                inheritance = WorkerInheritance(sockets, table, counts, index, theirs.fileno())
                process = await asyncio.create_subprocess_exec(
                    *command,
                    "--handover",
                    str(inheritance),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=inheritance.descriptors,
                )
        except BaseException:
            ours.close()
            raise
        return cls(process, *await asyncio.open_unix_connection(sock=ours, limit=_MAX_MESSAGE))

    async def wait_ready(self, seconds: float) -> str | None:
        """Wait until it serves, and return None; else return the reason. One that reports nothing in time is killed."""
        try:
            async with asyncio.timeout(seconds):
                message = await self._receive()
                if message is not None and message.kind == READY:
                    self.state = message.state
                    self._receiving = asyncio.create_task(self._receive_all())
                    return None
                await self.process.wait()
        except TimeoutError:
            self.kill()
            return f"a worker was not ready after {seconds:g} s"
        reason = message.reason if message is not None else None
        return reason or f"a worker exited before it was ready: {self.exit_reason}"

    async def _receive(self) -> WorkerMessage | None:
        """Return the next message; None at the end."""
        try:
            message: WorkerMessage = msgspec.json.decode(await self._reader.readline(), type=WorkerMessage)
        except (ConnectionError, ValueError):
            return None
        return message

    async def _receive_all(self) -> None:
        try:
            while (message := await self._receive()) is not None and message.kind != LEAVING:
                if message.kind == HEALTH_EVENT:
                    if message.event is not None and self.on_health_event is not None:
                        self.on_health_event(message.event)
                    continue
                reply = self._replies.pop((message.kind, message.number), None)
                if reply is not None and not reply.done():
                    reply.set_result(message)
        finally:
            self._receiving = None
            for each in self._replies.values():
                if not each.done():
                    each.set_result(None)

    @property
    def serves(self) -> bool:
        """Whether it is ready, and has not begun to leave."""
        return self._receiving is not None

    async def request(self, order: str, number: int, reply_kind: str, seconds: float) -> WorkerMessage | None:
        """Send an order and return the reply, or None if the worker has ended. Raises TimeoutError."""
        if not self.serves:
            return None
        reply: asyncio.Future[WorkerMessage | None] = asyncio.get_running_loop().create_future()
        self._replies[reply_kind, number] = reply
        try:
            self.send(f"{order} {number}")
            async with asyncio.timeout(seconds):
                return await reply
        finally:
            self._replies.pop((reply_kind, number), None)

    def send(self, order: str) -> None:
        """Send an order; if the worker has ended, the caller that waits for that will see it."""
        self._writer.write(f"{order}\n".encode())

    def kill(self) -> None:
        """Send SIGKILL."""
        # Process.kill() polls the process's status first, and may take it from the task that waits for it.
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close the channel."""
        if self._receiving is not None:
            self._receiving.cancel()
        self._writer.close()

    @property
    def exit_reason(self) -> str:
        """How the process ended: `status 1`, or `signal SIGKILL`."""
        status = self.process.returncode or 0
        if status >= 0:
            return f"status {status}"
        try:
            return f"signal {signal.Signals(-status).name}"
        except ValueError:
            return f"signal {-status}"
