"""How one process gets from changed files to a new set of stages: `prepare` it, then `commit` or `abort`.

Until it is committed, the set at hand serves, and any error leaves it as it is.
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

# How long, in seconds, reading the files and starting the stages may take.
_PATIENCE = 60.0


class GenerationSwitch:
    """Replaces the configuration of a server. `load` reads the files anew, and notes what it reads in the sources."""

    def __init__(self, server: Server, loaded: Loaded, load: Callable[[Shared, Sources], Loaded]) -> None:
        self._server = server
        self._loaded = loaded
        self._listen = loaded.settings.listen
        self._load = load
        self._ready: tuple[Loaded, Generation] | None = None

    @property
    def state(self) -> WatchedState:
        """What the configuration at hand is made of."""
        return _state(self._loaded)

    async def reload(self) -> Prepared:
        """Prepare and commit."""
        prepared = await self.prepare()
        self.commit()
        return prepared

    async def prepare(self) -> Prepared:
        """Load the files and start the new set, beside the one that serves; nothing is prepared where it fails."""
        await self.abort()
        sources = Sources()
        try:
            async with asyncio.timeout(_PATIENCE):
                return await self._prepare(sources)
        except ConfigError as exc:
            mistakes = list(map(str, exc.mistakes))
        except StartError as exc:
            mistakes = [str(exc)]
        except TimeoutError:
            mistakes = [f"the stages of the new configuration were not ready after {_PATIENCE:g} s"]
        except Exception as exc:
            facts = exception_fields(exc)
            facts.pop("message")  # it may hold anything that the configuration does
            get_logger().error("reloading failed by a bug", **facts)
            mistakes = [f"{type(exc).__name__}; the log has more"]
        await self.abort()
        if not sources.files:  # it failed before it read one: watching nothing would be the end of the watch
            sources = self._loaded.sources.unread()
        return Prepared(ReloadReport(mistakes=mistakes), WatchedState(sources, self._loaded.watch, self._loaded.log))

    async def _prepare(self, sources: Sources) -> Prepared:
        old = self._loaded
        # Reading the files of many teams takes a while, in which requests go on.
        new = await _aside(lambda: self._load(self._server.shared, sources))
        if new.sources.digest == old.sources.digest:
            return Prepared(ReloadReport(same=True), _state(old))
        changes = await _aside(lambda: diff(old, new))
        notes = []
        if new.settings.listen not in (old.settings.listen, self._listen):
            notes.append(f"listen: the gateway listens on {self._server.address} until it is restarted")
        if new.settings.admin != old.settings.admin:
            notes.append("admin: where the operator may look stays as it is until the gateway is restarted")
        _use(new.log, old.log)  # before the stages start: they keep their loggers
        try:
            generation = await self._server.prepare(new.teams, new.settings)
        except BaseException:
            _use(old.log, new.log)
            raise
        self._ready = new, generation
        return Prepared(ReloadReport(changes=changes, notes=notes), _state(new))

    def commit(self) -> None:
        """Let the prepared set serve; where nothing had changed, there is none."""
        if self._ready is not None:
            self._loaded, generation = self._ready
            self._ready = None
            self._server.swap(generation)

    async def abort(self) -> None:
        """Stop what was prepared and not committed."""
        if self._ready is not None:
            new, generation = self._ready
            self._ready = None
            _use(self._loaded.log, new.log)
            await self._server.discard(generation)


async def _aside(work: Callable[[], T]) -> T:
    """Do something in a thread that nobody waits for when the process ends: a file may be a pipe that says nothing."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, exc: BaseException | None) -> None:
        if not done.done():
            done.set_exception(exc) if exc is not None else done.set_result(cast(T, result))

    def run() -> None:
        result, failed = None, None
        try:
            result = work()
        except BaseException as exc:
            failed = exc if isinstance(exc, Exception) else RuntimeError(f"{type(exc).__name__}: {exc}")
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants to know any more
            loop.call_soon_threadsafe(tell, result, failed)

    threading.Thread(target=run, name="reading the configuration", daemon=True).start()
    return await done


def _state(loaded: Loaded) -> WatchedState:
    return WatchedState(loaded.sources, loaded.watch, loaded.log)


def _use(log: LogFile, instead: LogFile) -> None:
    if log != instead:
        logs.configure(log.level, log.format)
