"""Restarts with backoff: keeps one worker running, and starts another after one that died."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from gateway.logs import get_logger
from gateway.process.worker_messages import DRAIN, EXIT_NOW
from gateway.process.worker_process import STOP_TIMEOUT, WorkerProcess
from gateway.transport.connection_limit import WorkerSlots
from gateway.transport.listener import Listener

__all__ = ("SupervisedWorker", "pids_of")

# Restart backoff, in seconds: initial, maximum, and the uptime after which it resets. It doubles with each restart.
_FIRST_DELAY, _MAX_DELAY, _RESET_AFTER = 0.5, 30.0, 60.0


class SupervisedWorker:
    """A worker process, and after its death the one that replaces it, until it is retired.

    `on_ready` is called whenever a worker becomes ready.
    """

    def __init__(self, on_ready: Callable[[WorkerProcess], None], counts: WorkerSlots) -> None:
        self._on_ready = on_ready
        self._counts = counts
        self.retired = asyncio.Event()
        self.settled = asyncio.Event()
        """Set when the first worker is ready, or when `failure` has the reason why not."""
        self.failure: str | None = None
        self.worker: WorkerProcess | None = None

    async def keep(self, command: Sequence[str], listener: Listener, table: int, ready_timeout: float) -> None:
        """Keep a worker running. Return when it is retired and the process gone, or if the first never serves."""
        loop = asyncio.get_running_loop()
        delay = 0.0
        while not self.retired.is_set():
            started = loop.time()
            facts = await self._run(command, listener, table, ready_timeout)
            self.worker = None
            if self.retired.is_set() or self.failure is not None:
                break
            reset = loop.time() - started >= _RESET_AFTER
            delay = _FIRST_DELAY if reset else min(max(2 * delay, _FIRST_DELAY), _MAX_DELAY)
            get_logger().error("worker_died", **facts, restart_in=delay)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.retired.wait(), delay)
        self.failure = self.failure or "the gateway is stopping"
        self.settled.set()

    async def _run(
        self, command: Sequence[str], listener: Listener, table: int, ready_timeout: float
    ) -> dict[str, Any]:
        """Run one worker from its start to its end, and return the fields of the log event about its end."""
        index: int | None = None
        try:
            index = self._counts.acquire()
            worker = self.worker = await WorkerProcess.start(command, listener, table, self._counts.descriptor, index)
        except (OSError, RuntimeError) as exc:
            reason = f"cannot start a worker: {(isinstance(exc, OSError) and exc.strerror) or exc}"
            if index is not None:
                self._counts.release(index)
            self._settle(reason)
            return {"reason": reason}
        pid = worker.process.pid
        failure: str | None = None
        try:
            if self.retired.is_set():  # retired while the process started
                worker.send(DRAIN)
            failure = await worker.wait_ready(ready_timeout)
            if failure is None:
                get_logger().info("worker_ready", pid=pid)
                self._on_ready(worker)
            self._settle(failure)
            await worker.process.wait()
        finally:
            worker.close()
            self._counts.release(index)
        facts = {"pid": pid, "exit": worker.exit_reason}
        return facts if failure is None else {**facts, "reason": failure}

    def _settle(self, failure: str | None) -> None:
        if not self.settled.is_set():
            self.failure = failure
            self.settled.set()

    def retire(self) -> None:
        """Drain the worker, and start no other."""
        if self.retired.is_set():
            return
        self.retired.set()
        if self.worker is not None:
            self.worker.send(DRAIN)

    def end_now(self) -> None:
        """End the worker without the grace period; kill it if it does not obey."""
        if self.worker is not None:
            self.worker.send(EXIT_NOW)
            asyncio.get_running_loop().call_later(STOP_TIMEOUT, self.worker.kill)


def pids_of(workers: Sequence[SupervisedWorker]) -> list[int]:
    """Return the process ids of the workers."""
    return [each.worker.process.pid for each in workers if each.worker is not None]
