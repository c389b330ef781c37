"""Reload: what asks for one, one after another, and what is said of each.

A changed file, SIGHUP and `gateway reload` ask. How it is done is another's: `renewal.py` in one process,
`workers.py` in several.
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
# How long, in seconds, nothing is tried after a failure that nothing accounts for.
_PAUSE = 1.0


class WatchedState(msgspec.Struct, frozen=True):
    """What of a configuration counts for who watches over it: what it was made of, and its own settings."""

    sources: Sources = msgspec.field(default_factory=Sources)
    watch: bool = True
    log: LogFile = msgspec.field(default_factory=LogFile)


class Prepared(msgspec.Struct, frozen=True):
    """What came of an attempt, and the state after it; the sources are those that were tried."""

    report: ReloadReport
    state: WatchedState


class ReloadLoop:
    """Asks for reloads and tells what became of them. `state` is what is watched (`watch` sets it); None is nothing."""

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
        self._other = asyncio.Event()  # another state is to be watched

    def watch(self, state: WatchedState | None) -> None:
        """Watch the files of another configuration, which came to serve without a reload."""
        self.state = state
        self._other.set()

    def ask(self) -> asyncio.Future[ReloadReport]:
        """Ask for a reload that begins from now on; returns what becomes of it."""
        asked: asyncio.Future[ReloadReport] = asyncio.get_running_loop().create_future()
        self._waiting.append(asked)
        self._asked.set()
        return asked

    async def run(self) -> None:
        """Reload whenever something asks for it, until cancelled."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.ask)
        listening = asyncio.create_task(log_exceptions(control.listen(self._config, self.ask)))
        try:
            while True:
                try:
                    if await self._wait():
                        await self._once()
                except Exception as exc:  # of a thread that could not be had, for instance: the next one may do better
                    get_logger().error("reloading failed by a bug; it goes on", **exception_fields(exc))
                    await asyncio.sleep(_PAUSE)
        finally:
            listening.cancel()
            for each in self._waiting:
                if not each.done():
                    each.set_result(ReloadReport(mistakes=[STOPPING]))

    async def _wait(self) -> bool:
        """Return True when a reload was asked for, or the files have changed; False when others are to be watched."""
        self._other.clear()
        other = asyncio.create_task(self._other.wait())
        tasks: set[asyncio.Task[Any]] = {other, asyncio.create_task(self._asked.wait())}
        if self.state is not None and self.state.watch:
            tasks.add(asyncio.create_task(wait_for_change(self.state.sources)))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
            return done != {other}
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
            _tell(report)
        except Exception as exc:
            report = ReloadReport(mistakes=[f"{type(exc).__name__}; the log has more"])
            self._notify.ready()
            raise
        finally:
            for each in waiting:
                if not each.done():
                    each.set_result(report)
        self._notify.ready()


def _tell(report: ReloadReport) -> None:
    log = get_logger().bind(pid=os.getpid())
    if report.mistakes:
        log.error("reload failed; the configuration at hand stays", mistakes=report.mistakes)
    elif report.same:
        log.info("nothing changed")
    else:
        log.info("configuration reloaded", changes=report.changes)
    for note in report.notes:
        log.warning("a restart is needed", reason=note)


async def log_exceptions(work: Coroutine[Any, Any, None]) -> None:
    """Do what is done beside clients' requests; a bug in it is logged, and harms nothing else."""
    try:
        await work
    except Exception as exc:
        get_logger().error("reloading has ended", **exception_fields(exc))
