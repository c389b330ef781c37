"""Switching one process to a new generation of stages: `prepare` it, then `commit` or `abort`.

The current generation serves until the commit, and any error keeps it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar, cast

from gateway import logs
from gateway.config import Loaded
from gateway.config.diff import diff
from gateway.config.files import LogFile
from gateway.config.sources import Sources
from gateway.errors import ConfigError, StartError
from gateway.generation import Generation
from gateway.logs import exception_fields, get_logger
from gateway.process.control_socket import ReloadReport
from gateway.process.reload import Prepared, WatchedState
from gateway.server import Server
from gateway.services import Shared

__all__ = ("GenerationSwitch",)

T = TypeVar("T")

# Timeout, in seconds, for reading the files and starting the stages.
_PREPARE_TIMEOUT = 60.0


class GenerationSwitch:
    """Replaces the configuration of a server. `load` reads the files again, and records them in the sources."""

    def __init__(self, server: Server, loaded: Loaded, load: Callable[[Shared, Sources], Loaded]) -> None:
        self._server = server
        self._loaded = loaded
        self._listen = loaded.settings.listen
        self._load = load
        self._prepared: tuple[Loaded, Generation] | None = None

    @property
    def state(self) -> WatchedState:
        """The files and settings of the current configuration that are watched."""
        return _state(self._loaded)

    async def reload(self) -> Prepared:
        """Prepare and commit."""
        prepared = await self.prepare()
        self.commit()
        return prepared

    async def prepare(self) -> Prepared:
        """Load the files and start the new generation beside the current one; on failure, nothing is prepared."""
        await self.abort()
        sources = Sources()
        try:
            async with asyncio.timeout(_PREPARE_TIMEOUT):
                return await self._prepare(sources)
        except ConfigError as exc:
            mistakes = list(map(str, exc.mistakes))
        except StartError as exc:
            mistakes = [str(exc)]
        except TimeoutError:
            mistakes = [f"the stages of the new configuration were not ready after {_PREPARE_TIMEOUT:g} s"]
        except Exception as exc:
            facts = exception_fields(exc)
            facts.pop("message")  # it may hold anything from the configuration
            get_logger().error("reload_crashed", **facts)
            mistakes = [f"{type(exc).__name__}; see the log"]
        await self.abort()
        if not sources.files:  # it failed before it read a file; to watch no files would end the watch
            sources = self._loaded.sources.unread()
        return Prepared(ReloadReport(mistakes=mistakes), WatchedState(sources, self._loaded.watch, self._loaded.log))

    async def _prepare(self, sources: Sources) -> Prepared:
        old = self._loaded
        # Reading the files of many teams takes a while, and requests go on meanwhile.
        new = await _in_daemon_thread(lambda: self._load(self._server.shared, sources))
        if new.sources.digest == old.sources.digest:
            return Prepared(ReloadReport(same=True), _state(old))
        changes = await _in_daemon_thread(lambda: diff(old, new))
        notes = []
        if new.settings.listen not in (old.settings.listen, self._listen):
            notes.append(f"listen: the gateway listens on {self._server.address} until it is restarted")
        if new.settings.admin != old.settings.admin:
            notes.append("admin: the admin listener keeps its address until the gateway is restarted")
        _configure_log(new.log, old.log)  # before the stages start: they keep their loggers
        try:
            generation = await self._server.prepare(new.teams, new.settings)
        except BaseException:
            _configure_log(old.log, new.log)
            raise
        self._prepared = new, generation
        return Prepared(ReloadReport(changes=changes, notes=notes), _state(new))

    def commit(self) -> None:
        """Let the prepared generation serve; without a change, there is none."""
        if self._prepared is not None:
            self._loaded, generation = self._prepared
            self._prepared = None
            self._server.swap(generation)

    async def abort(self) -> None:
        """Stop what is prepared and not committed."""
        if self._prepared is not None:
            new, generation = self._prepared
            self._prepared = None
            _configure_log(self._loaded.log, new.log)
            await self._server.discard(generation)


async def _in_daemon_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread that does not keep the process alive: a read from a pipe may block for ever."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, exc: BaseException | None) -> None:
        if not done.done():
            done.set_exception(exc) if exc is not None else done.set_result(cast(T, result))

    def run() -> None:
        result, failed = None, None
        try:
            result = work()
        except BaseException as exc:
            failed = exc if isinstance(exc, Exception) else RuntimeError(f"{type(exc).__name__}: {exc}")
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(finish, result, failed)

    threading.Thread(target=run, name="reading the configuration", daemon=True).start()
    return await done


def _state(loaded: Loaded) -> WatchedState:
    return WatchedState(loaded.sources, loaded.watch, loaded.log)


def _configure_log(log: LogFile, current: LogFile) -> None:
    if log != current:
        logs.configure(log.level, log.format)
