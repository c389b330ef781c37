"""A reload in several workers, in two phases: all prepare it; then all commit it, or all abort it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

from gateway import logs
from gateway.logs import get_logger
from gateway.process.control_socket import ReloadReport
from gateway.process.reload import Prepared, WatchedState
from gateway.process.worker_messages import ABORT, COMMIT, COMMITTED, PREPARE, PREPARED
from gateway.process.worker_process import STOP_TIMEOUT, WorkerProcess

__all__ = ("TwoPhaseReload",)


class TwoPhaseReload:
    """Reloads all workers that `serving` returns. `timeout` bounds the first phase, in seconds."""

    def __init__(self, serving: Callable[[], Sequence[WorkerProcess]], timeout: float) -> None:
        self._serving = serving
        self._timeout = timeout
        self._numbers = itertools.count(1)

    async def run(self, state: WatchedState | None) -> Prepared:
        """Reload all workers or none. `state` is what is watched now."""
        prepared = await self._attempt(state) or await self._attempt(state)
        if prepared is not None:
            return prepared
        state = state or WatchedState()
        # The files count as unread, so that the watcher tries them again.
        return Prepared(
            ReloadReport(mistakes=["the files changed while they were read; the gateway reads them again"]),
            WatchedState(state.sources.unread(), state.watch, state.log),
        )

    async def _attempt(self, state: WatchedState | None) -> Prepared | None:
        """Reload once; None if the files changed meanwhile, so that workers have read different ones."""
        number, workers = next(self._numbers), self._serving()
        prepared: list[Prepared] = []
        if workers:
            # The first worker goes alone, so that each mistake in the configuration is found and reported once.
            prepared.append(await self._prepare(workers[0], number, state))
            if not prepared[0].report.mistakes:
                prepared += await asyncio.gather(*(self._prepare(worker, number, state) for worker in workers[1:]))
        else:
            prepared.append(await _failed("no worker is ready; the next workers read the files when they start", state))
        failed = next((each for each in prepared if each.report.mistakes), None)
        if failed is not None or len({each.state.sources.digest for each in prepared}) > 1:
            for worker in workers:
                worker.send(f"{ABORT} {number}")
            return failed
        await asyncio.gather(*(_commit(*each, number) for each in zip(workers, prepared, strict=True)))
        # A worker that replaced another may have read the current files earlier than the others.
        result = next((each for each in prepared if not each.report.same), prepared[0])
        if state is None or result.state.log != state.log:
            logs.configure(result.state.log.level, result.state.log.format)
        return result

    async def _prepare(self, worker: WorkerProcess, number: int, state: WatchedState | None) -> Prepared:
        try:
            reply = await worker.request(PREPARE, number, PREPARED, self._timeout)
        except TimeoutError:
            return await _failed(f"a worker did not prepare the reload within {self._timeout:g} s", state)
        if reply is None or reply.prepared is None:
            return await _failed("a worker exited while it prepared the reload", state)
        return reply.prepared


async def _commit(worker: WorkerProcess, prepared: Prepared, number: int) -> None:
    # If the worker has ended, it is replaced, and its successor reads the files itself.
    worker.state = prepared.state
    try:
        await worker.request(COMMIT, number, COMMITTED, STOP_TIMEOUT)
    except TimeoutError:
        get_logger().warning("worker_reload_late", pid=worker.process.pid)


async def _failed(reason: str, state: WatchedState | None) -> Prepared:
    """Return a failure that no worker reports; the current files are not tried again."""
    state = state or WatchedState()
    try:
        sources = await asyncio.to_thread(state.sources.now)
    except (OSError, RuntimeError):  # no descriptor is left, or no thread
        sources = state.sources.unread()
    return Prepared(ReloadReport(mistakes=[reason]), WatchedState(sources, state.watch, state.log))
