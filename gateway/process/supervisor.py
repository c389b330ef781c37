"""`gateway serve --workers N`: the supervisor holds the listening sockets, and N workers share them.

A worker is a fresh process, so a rolling restart takes new code and a changed configuration. A reload takes only a
changed configuration, into the running workers (`two_phase_reload.py`).
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from gateway.admin.listener import Admin
from gateway.errors import StartError
from gateway.limits.shared_counters import make_table
from gateway.logs import get_logger
from gateway.process.reload import Prepared, ReloadLoop, log_exceptions
from gateway.process.systemd import Notifier
from gateway.process.two_phase_reload import TwoPhaseReload
from gateway.process.worker_health import WorkerHealth
from gateway.process.worker_process import WorkerProcess
from gateway.process.worker_restarts import SupervisedWorker, pids_of
from gateway.settings import Listen
from gateway.transport.connection_limit import WorkerSlots
from gateway.transport.listener import Listener

__all__ = ("Supervisor",)


class Supervisor:
    """Runs `count` workers that share one listener.

    SIGTERM and SIGINT drain them; a second signal ends them at once. SIGUSR2 starts a rolling restart, and `reload.py`
    lists what starts a reload. A restart or reload that is requested while another runs is done after it. `timeout` is
    how long, in seconds, a worker may take to become ready, or to prepare a reload.
    """

    def __init__(
        self,
        listener: Listener,
        command: Sequence[str],
        count: int,
        notify: Notifier,
        *,
        config: Path,
        admin: Listen | None = None,
        timeout: float = 60.0,
    ) -> None:
        self._listener = listener
        self._command = command
        self._count = count
        self._notify = notify
        self._timeout = timeout
        self._table = make_table()  # the limits' counters, for all present and future workers
        self._counts = WorkerSlots()  # of clients' connections
        self._current: list[SupervisedWorker] = []
        self._tasks: dict[asyncio.Task[None], SupervisedWorker] = {}
        self._stopping = False
        self._wake = asyncio.Event()
        """Set by a signal: start a rolling restart, or stop if `_stopping`."""
        self._reloads = ReloadLoop(self._reload, notify, config)
        self._reload_workers = TwoPhaseReload(self._serving, timeout)
        self._reloading: asyncio.Task[None] | None = None
        self._busy = asyncio.Lock()  # held by a rolling restart, or by a reload
        self._health = WorkerHealth(self._serving)
        self._admin = Admin(self._health.report)
        self._admin_listen = admin

    async def run(self) -> None:
        """Supervise until a signal orders a stop. Raises StartError if the first workers cannot serve."""
        loop = asyncio.get_running_loop()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, self._stop)
        loop.add_signal_handler(signal.SIGUSR2, self._wake.set)
        failure = None
        async with asyncio.TaskGroup() as self._group:
            try:
                if self._admin_listen is not None:
                    await self._admin.start(self._admin_listen)
                self._current = await self._start()
                self._watch()
                self._announce_ready()
                self._reloading = self._group.create_task(log_exceptions(self._reloads.run()))
                while True:
                    await self._wake.wait()
                    if self._stopping:
                        break
                    self._wake.clear()
                    async with self._busy:
                        await self._restart()
            except StartError as exc:
                failure = exc
        # The group has waited for every worker's end.
        await self._admin.stop()
        self._listener.close()
        self._listener.remove()
        if self._stopping:
            get_logger().info("stopped", pid=os.getpid())
        elif failure is not None:
            raise failure

    # -- starting and restarting -----------------------------------------------------------------------

    async def _start(self) -> list[SupervisedWorker]:
        """Start a set of workers and wait until all serve. Raises StartError if one does not; the others end then.

        The first starts alone, so that a mistake that all of them share is found and reported once.
        """
        workers = [self._open()]
        try:
            await self._settled(workers[0])
            workers += [self._open() for _ in range(self._count - 1)]
            for worker in workers:
                await self._settled(worker)
        except StartError:
            for worker in workers:
                worker.retire()
            raise
        return workers

    def _open(self) -> SupervisedWorker:
        worker = SupervisedWorker(self._on_ready, self._counts)
        task = self._group.create_task(worker.keep(self._command, self._listener, self._table, self._timeout))
        self._tasks[task] = worker
        task.add_done_callback(self._tasks.pop)
        return worker

    async def _settled(self, worker: SupervisedWorker) -> None:
        await worker.settled.wait()
        if worker.failure is not None or self._stopping:
            raise StartError(worker.failure or "the gateway is stopping")

    async def _restart(self) -> None:
        """Start new workers, and retire the old ones when the new ones serve."""
        get_logger().info("rolling_restart", pids=pids_of(self._current))
        self._notify.reloading()
        old = self._current
        try:
            self._current = await self._start()
        except StartError as exc:
            if self._stopping:
                return
            get_logger().error("rolling_restart_failed", reason=str(exc), pids=pids_of(old))
        else:
            for worker in old:
                worker.retire()
            self._watch()
        self._announce_ready()

    def _on_ready(self, worker: WorkerProcess) -> None:
        self._health.connect(worker)
        self._compare()

    def _announce_ready(self) -> None:
        get_logger().info("workers_ready", address=str(self._listener.address), pids=pids_of(self._current))
        self._notify.ready()

    # -- reloading -------------------------------------------------------------------------------------

    def _serving(self) -> list[WorkerProcess]:
        return [each.worker for each in self._current if each.worker is not None and each.worker.serves]

    def _watch(self) -> None:
        """Watch the files that the current workers have read."""
        self._reloads.watch(next((worker.state for worker in self._serving()), None))
        self._compare()

    def _compare(self) -> None:
        """Reload if workers have read different files: one that replaced another started after a change."""
        states = [worker.state for worker in self._serving() if worker.state is not None]
        if len({state.sources.digest for state in states}) > 1:
            get_logger().warning("workers_differ", pids=pids_of(self._current))
            self._reloads.ask()

    async def _reload(self) -> Prepared:
        async with self._busy:
            return await self._reload_workers.run(self._reloads.state)

    # -- stopping --------------------------------------------------------------------------------------

    def _stop(self) -> None:
        workers = list(self._tasks.values())
        if self._stopping:
            for worker in workers:
                worker.end_now()
            return
        self._stopping = True
        if self._reloading is not None:
            self._reloading.cancel()
        get_logger().info("stopping", pid=os.getpid())
        self._notify.stopping()
        self._listener.close()  # else new connections would wait in a queue that no process accepts from
        for worker in workers:
            worker.retire()
        self._wake.set()
