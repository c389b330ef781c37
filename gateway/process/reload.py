"""The reload loop: waits for a trigger, reloads, and reports the result; one reload at a time.

The triggers are a changed file, SIGHUP and `gateway reload`. The reload itself is in `generations.py` for one process,
and in `two_phase_reload.py` for several.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from gateway.config.files import LogFile
from gateway.config.sources import Sources
from gateway.logs import exception_fields, get_logger
from gateway.process import control_socket as control
from gateway.process.control_socket import ReloadReport
from gateway.process.file_watch import wait_for_change
from gateway.process.systemd import Notifier

__all__ = ("Prepared", "ReloadLoop", "WatchedState", "log_exceptions")

STOPPING = "the gateway is stopping"
# Pause, in seconds, after a failure that no mistake explains.
_PAUSE = 1.0


class WatchedState(msgspec.Struct, frozen=True):
    """The part of a configuration that the reload loop needs: its files, and its `watch` and `log` settings."""

    sources: Sources = msgspec.field(default_factory=Sources)
    watch: bool = True
    log: LogFile = msgspec.field(default_factory=LogFile)


class Prepared(msgspec.Struct, frozen=True):
    """The result of one attempt, and the state after it; the sources are those that were tried."""

    report: ReloadReport
    state: WatchedState


class ReloadLoop:
    """Runs reloads and reports their results. `state` has the files to watch (`watch` sets it); None watches none."""

    def __init__(
        self,
        reload: Callable[[], Awaitable[Prepared]],
        notify: Notifier,
        config: Path,
        state: WatchedState | None = None,
    ) -> None:
        self.state = state
        self._reload = reload
        self._notify = notify
        self._config = config
        self._waiting: list[asyncio.Future[ReloadReport]] = []
        self._asked = asyncio.Event()
        self._state_replaced = asyncio.Event()

    def watch(self, state: WatchedState | None) -> None:
        """Watch the files of another configuration, which serves now without a reload."""
        self.state = state
        self._state_replaced.set()

    def ask(self) -> asyncio.Future[ReloadReport]:
        """Ask for a reload that begins after this call; returns a future of its report."""
        asked: asyncio.Future[ReloadReport] = asyncio.get_running_loop().create_future()
        self._waiting.append(asked)
        self._asked.set()
        return asked

    async def run(self) -> None:
        """Reload at each trigger, until cancelled."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.ask)
        listening = asyncio.create_task(log_exceptions(control.listen(self._config, self.ask)))
        try:
            while True:
                try:
                    if await self._wait():
                        await self._once()
                except Exception as exc:  # such as no thread left: the next reload may succeed
                    get_logger().error("reload_crashed", **exception_fields(exc))
                    await asyncio.sleep(_PAUSE)
        finally:
            listening.cancel()
            for each in self._waiting:
                if not each.done():
                    each.set_result(ReloadReport(mistakes=[STOPPING]))

    async def _wait(self) -> bool:
        """Return True at a trigger; False if the state to watch was replaced."""
        self._state_replaced.clear()
        replaced = asyncio.create_task(self._state_replaced.wait())
        tasks: set[asyncio.Task[Any]] = {replaced, asyncio.create_task(self._asked.wait())}
        if self.state is not None and self.state.watch:
            tasks.add(asyncio.create_task(wait_for_change(self.state.sources)))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
            return done != {replaced}
        finally:
            for each in tasks:
                each.cancel()

    async def _once(self) -> None:
        self._asked.clear()
        waiting, self._waiting = self._waiting, []
        report = ReloadReport(mistakes=[STOPPING])
        self._notify.reloading()
        try:
            prepared = await self._reload()
            report, self.state = prepared.report, prepared.state
            _log(report)
        except Exception as exc:
            report = ReloadReport(mistakes=[f"{type(exc).__name__}; see the log"])
            self._notify.ready()
            raise
        finally:
            for each in waiting:
                if not each.done():
                    each.set_result(report)
        self._notify.ready()


def _log(report: ReloadReport) -> None:
    log = get_logger().bind(pid=os.getpid())
    if report.mistakes:
        log.error("reload_failed", mistakes=report.mistakes)
    elif report.same:
        log.info("reload_unchanged")
    else:
        log.info("reloaded", changes=report.changes)
    for note in report.notes:
        log.warning("restart_needed", reason=note)


async def log_exceptions(work: Coroutine[Any, Any, None]) -> None:
    """Run background work; log an exception that ends it, so that it harms nothing else."""
    try:
        await work
    except Exception as exc:
        get_logger().error("reload_loop_ended", **exception_fields(exc))
