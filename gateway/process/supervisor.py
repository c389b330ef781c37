"""`gateway serve --workers N`: a supervisor that holds the listening sockets, and N workers that share them.

A worker is a fresh process, so a rolling restart takes new code and a changed configuration. A reload takes a changed
configuration alone, into the workers that run: all prepare it, and when all have, all take it over, or none does.
"""

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

from gateway import logs
from gateway.admin.listener import Admin, merged
from gateway.balancing.circuit_breaker import HealthEvent
from gateway.errors import ApiError, StartError
from gateway.limits.shared_counters import make_table
from gateway.logs import get_logger
from gateway.process.control_socket import ReloadReport
from gateway.process.reload import Prepared, ReloadLoop, WatchedState, log_exceptions
from gateway.process.systemd import Notifier
from gateway.process.worker import (
    ABORT,
    AT_ONCE,
    COMMIT,
    COMMITTED,
    DRAIN,
    HEAR,
    LEAVING,
    NEWS,
    PREPARE,
    PREPARED,
    READY,
    REPORT,
    REPORTED,
    SupervisorMessage,
    WorkerInheritance,
)
from gateway.settings import Listen
from gateway.transport.connection_limit import WorkerSlots
from gateway.transport.listener import Listener

__all__ = ("Supervisor", "worker_command")

# What a worker that died is replaced after, in seconds: doubled each time, and as at first for one that lived long.
_FIRST_DELAY, _LAST_DELAY, _LONG_LIFE = 0.5, 30.0, 60.0
# How long, in seconds, a worker that was told to end at once may still take.
_LAST_WORDS = 10.0
# How long, in seconds, the operator waits for a worker to tell how deployments are.
_REPORT_IN = 3.0
# The longest line that a worker may say, in bytes: it names every file of its configuration.
_LONGEST = 1 << 26


def worker_command(config: Path | None, *, cors: bool = False, listen: Listen | None = None) -> list[str]:
    """Return the command that starts a worker, but for its handover."""
    # -m looks for modules in the working directory first; where this process does not, its workers must not.
    here = sys.path[0] in ("", os.getcwd())
    command = [sys.executable, *(() if here else ("-P",)), "-m", "gateway", "serve", *(("--cors",) if cors else ())]
    if listen is not None:
        command += ["--listen", str(listen)]  # it inherits the sockets: this is for what it says of `listen:`
    return command if config is None else [*command, "--config", str(config)]


class _Worker:
    """The supervisor's side of one process."""

    def __init__(
        self, process: asyncio.subprocess.Process, heard: asyncio.StreamReader, line: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self.state: WatchedState | None = None
        """Its configuration's, once it serves."""
        self.report: list[dict[str, Any]] | None = None
        """What it told last of deployments."""
        self._heard = heard
        self._line = line
        self.on_news: Callable[[HealthEvent], None] | None = None
        """What becomes of what it tells the others."""
        self._listening: asyncio.Task[None] | None = None  # from when it serves until its end of the line is closed
        self._asked: dict[tuple[str, int], asyncio.Future[SupervisorMessage | None]] = {}

    @classmethod
    async def start(cls, command: Sequence[str], listener: Listener, table: int, counts: int, place: int) -> _Worker:
        """Start a process. Raises OSError or RuntimeError where the system has none, or no thread to wait for it."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                sockets = tuple(sock.fileno() for sock in listener.sockets)
                handover = WorkerInheritance(sockets, table, counts, place, theirs.fileno())
                process = await asyncio.create_subprocess_exec(
                    *command,
                    "--handover",
                    str(handover),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=handover.descriptors,
                )
        except BaseException:
            ours.close()
            raise
        return cls(process, *await asyncio.open_unix_connection(sock=ours, limit=_LONGEST))

    async def wait_ready(self, patience: float) -> str | None:
        """Wait until it serves: None. Where it does not, return why; it is killed if it cannot say."""
        try:
            async with asyncio.timeout(patience):
                said = await self._hear()
                if said is not None and said.word == READY:
                    self.state = said.state
                    self._listening = asyncio.create_task(self._listen())
                    return None
                await self.process.wait()
        except TimeoutError:
            self.kill()
            return f"a worker was not ready after {patience:g} s"
        reason = said.reason if said is not None else None
        return reason or f"a worker ended before it was ready: {_fate(self.process)}"

    async def _hear(self) -> SupervisorMessage | None:
        """Return what it says next; None where it has said all."""
        try:
            said: SupervisorMessage = msgspec.json.decode(await self._heard.readline(), type=SupervisorMessage)
        except (ConnectionError, ValueError):
            return None
        return said

    async def _listen(self) -> None:
        try:
            while (said := await self._hear()) is not None and said.word != LEAVING:
                if said.word == NEWS:
                    if said.news is not None and self.on_news is not None:
                        self.on_news(said.news)
                    continue
                asked = self._asked.pop((said.word, said.number), None)
                if asked is not None and not asked.done():
                    asked.set_result(said)
        finally:
            self._listening = None
            for each in self._asked.values():
                if not each.done():
                    each.set_result(None)

    @property
    def serves(self) -> bool:
        """Whether it has become ready, and has not begun to leave since."""
        return self._listening is not None

    async def ask(self, order: str, number: int, word: str, patience: float) -> SupervisorMessage | None:
        """Order something and return its answer, or None where it has ended. Raises TimeoutError."""
        if not self.serves:
            return None
        asked: asyncio.Future[SupervisorMessage | None] = asyncio.get_running_loop().create_future()
        self._asked[word, number] = asked
        try:
            self.order(f"{order} {number}")
            async with asyncio.timeout(patience):
                return await asked
        finally:
            self._asked.pop((word, number), None)

    def order(self, word: str) -> None:
        """Tell it something; where it has ended, whoever waits for that will see it."""
        self._line.write(f"{word}\n".encode())

    def kill(self) -> None:
        """End it without its help."""
        # Process.kill() asks for the process's status first, and may take it away from who waits for it.
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Let go of the line."""
        if self._listening is not None:
            self._listening.cancel()
        self._line.close()


class _Place:
    """One worker's place: the worker, and after it the one that replaces it, until the place is retired.

    `ready` is called whenever one has become ready.
    """

    def __init__(self, ready: Callable[[_Worker], None], counts: WorkerSlots) -> None:
        self._ready = ready
        self._counts = counts
        self.retired = asyncio.Event()
        self.settled = asyncio.Event()
        """The first worker is ready, or `failure` says why not."""
        self.failure: str | None = None
        self.worker: _Worker | None = None

    async def keep(self, command: Sequence[str], listener: Listener, table: int, patience: float) -> None:
        """Keep a worker here; return when the place is retired and its worker gone, or the first never served."""
        loop = asyncio.get_running_loop()
        delay = 0.0
        while not self.retired.is_set():
            born = loop.time()
            facts = await self._run(command, listener, table, patience)
            self.worker = None
            if self.retired.is_set() or self.failure is not None:
                break
            lived_long = loop.time() - born >= _LONG_LIFE
            delay = _FIRST_DELAY if lived_long else min(max(2 * delay, _FIRST_DELAY), _LAST_DELAY)
            get_logger().error("worker died", **facts, replaced_in=delay)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.retired.wait(), delay)
        self.failure = self.failure or "it was told to stop"
        self.settled.set()

    async def _run(self, command: Sequence[str], listener: Listener, table: int, patience: float) -> dict[str, Any]:
        """Run one worker from its start to its end, and return what the log should say of that."""
        place: int | None = None
        try:
            place = self._counts.acquire()
            worker = self.worker = await _Worker.start(command, listener, table, self._counts.descriptor, place)
        except (OSError, RuntimeError) as exc:
            reason = f"cannot start a worker: {(isinstance(exc, OSError) and exc.strerror) or exc}"
            if place is not None:
                self._counts.release(place)
            self._settle(reason)
            return {"reason": reason}
        pid = worker.process.pid
        failure: str | None = None
        try:
            if self.retired.is_set():  # while it was being started
                worker.order(DRAIN)
            failure = await worker.wait_ready(patience)
            if failure is None:
                get_logger().info("worker ready", pid=pid)
                self._ready(worker)
            self._settle(failure)
            await worker.process.wait()
        finally:
            worker.close()
            self._counts.release(place)
        facts = {"pid": pid, "fate": _fate(worker.process)}
        return facts if failure is None else {**facts, "reason": failure}

    def _settle(self, failure: str | None) -> None:
        if not self.settled.is_set():
            self.failure = failure
            self.settled.set()

    def retire(self) -> None:
        """Let the worker drain, and have no other after it."""
        if self.retired.is_set():
            return
        self.retired.set()
        if self.worker is not None:
            self.worker.order(DRAIN)

    def hurry(self) -> None:
        """End the worker at once; one that does not is killed."""
        if self.worker is not None:
            self.worker.order(AT_ONCE)
            asyncio.get_running_loop().call_later(_LAST_WORDS, self.worker.kill)


class Supervisor:
    """Keeps `count` workers behind one listener.

    SIGTERM and SIGINT drain them, a second one ends them at once; SIGUSR2 is a rolling restart, and what `reload.py`
    names is a reload. One that comes while another runs is done after it. `patience` is how many seconds a worker may
    take to become ready, or to prepare a reload.
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
        patience: float = 60.0,
    ) -> None:
        self._listener = listener
        self._command = command
        self._count = count
        self._notify = notify
        self._patience = patience
        self._table = make_table()  # what limits count, for all workers that there will be
        self._counts = WorkerSlots()  # of clients' connections
        self._current: list[_Place] = []
        self._tasks: dict[asyncio.Task[None], _Place] = {}
        self._stopping = False
        self._again = asyncio.Event()
        """A signal asks for something: a rolling restart, unless it is time to stop."""
        self._reloads = ReloadLoop(self._reload, notify, config)
        self._reloading: asyncio.Task[None] | None = None
        self._busy = asyncio.Lock()  # held by a rolling restart, or by a reload
        self._number = 0  # of the last reload, or report
        self._admin = Admin(self._report)
        self._admin_listen = admin
        self._news: dict[str, tuple[float, HealthEvent]] = {}  # what a worker that is new has to know, and since when

    async def run(self) -> None:
        """Supervise until a signal says to stop. Raises StartError where the first workers cannot serve."""
        loop = asyncio.get_running_loop()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, self._stop)
        loop.add_signal_handler(signal.SIGUSR2, self._again.set)
        failure = None
        async with asyncio.TaskGroup() as self._group:
            try:
                if self._admin_listen is not None:
                    await self._admin.start(self._admin_listen)
                self._current = await self._start()
                self._know()
                self._tell_ready()
                self._reloading = self._group.create_task(log_exceptions(self._reloads.run()))
                while True:
                    await self._again.wait()
                    if self._stopping:
                        break
                    self._again.clear()
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

    async def _start(self) -> list[_Place]:
        """Start a set of workers and wait until all serve. Raises StartError where one does not; none stays then.

        The first starts alone, so that what is wrong with all of them is found, and said, once.
        """
        places = [self._open()]
        try:
            await self._settled(places[0])
            places += [self._open() for _ in range(self._count - 1)]
            for place in places:
                await self._settled(place)
        except StartError:
            for place in places:
                place.retire()
            raise
        return places

    def _open(self) -> _Place:
        place = _Place(self._serves, self._counts)
        task = self._group.create_task(place.keep(self._command, self._listener, self._table, self._patience))
        self._tasks[task] = place
        task.add_done_callback(self._tasks.pop)
        return place

    async def _settled(self, place: _Place) -> None:
        await place.settled.wait()
        if place.failure is not None or self._stopping:
            raise StartError(place.failure or "it was told to stop")

    async def _restart(self) -> None:
        get_logger().info("rolling restart", pids=_pids(self._current))
        self._notify.reloading()
        old = self._current
        try:
            self._current = await self._start()
        except StartError as exc:
            if self._stopping:
                return
            get_logger().error("rolling restart failed; the old workers stay", reason=str(exc), pids=_pids(old))
        else:
            for place in old:
                place.retire()
            self._know()
        self._tell_ready()

    # -- what workers know of deployments --------------------------------------------------------------

    def _serves(self, worker: _Worker) -> None:
        """Let a new worker know what the others do, and hear what it tells them."""
        worker.on_news = lambda news: self._pass_on(worker, news)
        now = asyncio.get_running_loop().time()
        for key, (since, news) in list(self._news.items()):
            left = since + news.seconds - now
            if left > 0:
                _tell(worker, msgspec.structs.replace(news, seconds=left))
            else:
                del self._news[key]
        self._compare()

    def _pass_on(self, teller: _Worker, news: HealthEvent) -> None:
        self._news[news.key] = asyncio.get_running_loop().time(), news
        for worker in self._serving():
            if worker is not teller:
                _tell(worker, news)

    async def _report(self) -> list[dict[str, Any]]:
        """Return how deployments are, by all workers that serve. Raises ApiError 503 if none has told."""
        self._number += 1
        number, workers = self._number, self._serving()
        await asyncio.gather(*(self._ask_report(worker, number) for worker in workers))
        reports = [worker.report for worker in workers if worker.report is not None]
        if not reports:
            why = "the workers do not answer" if workers else "no worker serves now"
            raise ApiError(503, f"{why}; try again", code="no_report", headers={"retry-after": "1"})
        return merged(reports)

    async def _ask_report(self, worker: _Worker, number: int) -> None:
        """Have a worker tell how deployments are; one that does not answer in time counts as it did last."""
        with contextlib.suppress(TimeoutError):
            said = await worker.ask(REPORT, number, REPORTED, _REPORT_IN)
            worker.report = said.report if said is not None else None

    # -- reload ----------------------------------------------------------------------------------------

    def _serving(self) -> list[_Worker]:
        return [place.worker for place in self._current if place.worker is not None and place.worker.serves]

    def _know(self) -> None:
        """Have the files watched that the workers at hand have read."""
        self._reloads.watch(next((worker.state for worker in self._serving()), None))
        self._compare()

    def _compare(self) -> None:
        """Ask for a reload where workers have read different files: one that replaced another came after a change."""
        states = [worker.state for worker in self._serving() if worker.state is not None]
        if len({state.sources.digest for state in states}) > 1:
            get_logger().warning("workers have read different files; they are reloaded", pids=_pids(self._current))
            self._reloads.ask()

    async def _reload(self) -> Prepared:
        """Let every worker take over the files as they are, or none."""
        async with self._busy:
            prepared = await self._try() or await self._try()
        if prepared is not None:
            return prepared
        state = self._reloads.state or WatchedState()
        # What was read is as good as unread, so that the watcher has it tried again.
        return Prepared(
            ReloadReport(mistakes=["the files changed while they were read; they are read again"]),
            WatchedState(state.sources.unread(), state.watch, state.log),
        )

    async def _try(self) -> Prepared | None:
        """Do the same once; None where the files changed meanwhile, so that workers have read different ones."""
        self._number += 1
        number, workers = self._number, self._serving()
        prepared: list[Prepared] = []
        if workers:
            # The first alone, so that what is wrong with the configuration is found, and said, once.
            prepared.append(await self._prepare(workers[0], number))
            if not prepared[0].report.mistakes:
                prepared += await asyncio.gather(*(self._prepare(worker, number) for worker in workers[1:]))
        else:
            prepared.append(await self._failed("no worker serves now; those to come read the files as they are then"))
        failed = next((each for each in prepared if each.report.mistakes), None)
        if failed is not None or len({each.state.sources.digest for each in prepared}) > 1:
            for worker in workers:
                worker.order(f"{ABORT} {number}")
            return failed
        await asyncio.gather(*(self._commit(*each, number) for each in zip(workers, prepared, strict=True)))
        # A worker that replaced another had read the files as they are before the others.
        told = next((each for each in prepared if not each.report.same), prepared[0])
        if self._reloads.state is None or told.state.log != self._reloads.state.log:
            logs.configure(told.state.log.level, told.state.log.format)
        return told

    async def _prepare(self, worker: _Worker, number: int) -> Prepared:
        try:
            said = await worker.ask(PREPARE, number, PREPARED, self._patience)
        except TimeoutError:
            return await self._failed(f"a worker had not prepared it after {self._patience:g} s")
        if said is None or said.prepared is None:
            return await self._failed("a worker ended while it prepared it")
        return said.prepared

    async def _commit(self, worker: _Worker, prepared: Prepared, number: int) -> None:
        # One that has ended is replaced, and its heir reads the files by itself.
        worker.state = prepared.state
        try:
            await worker.ask(COMMIT, number, COMMITTED, _LAST_WORDS)
        except TimeoutError:
            get_logger().warning("a worker has not taken the configuration over yet", pid=worker.process.pid)

    async def _failed(self, reason: str) -> Prepared:
        """Return a failure that no worker tells of; the files as they are now are not tried again."""
        state = self._reloads.state or WatchedState()
        try:
            sources = await asyncio.to_thread(state.sources.now)
        except (OSError, RuntimeError):  # no descriptor is left, or no thread can be had
            sources = state.sources.unread()
        return Prepared(ReloadReport(mistakes=[reason]), WatchedState(sources, state.watch, state.log))

    # -- what others are told --------------------------------------------------------------------------

    def _tell_ready(self) -> None:
        get_logger().info("workers ready", address=str(self._listener.address), pids=_pids(self._current))
        self._notify.ready()

    def _stop(self) -> None:
        places = list(self._tasks.values())
        if self._stopping:
            for place in places:
                place.hurry()
            return
        self._stopping = True
        if self._reloading is not None:
            self._reloading.cancel()
        get_logger().info("stopping", pid=os.getpid())
        self._notify.stopping()
        self._listener.close()  # or newcomers would wait in a queue that nobody takes them from
        for place in places:
            place.retire()
        self._again.set()


def _tell(worker: _Worker, news: HealthEvent) -> None:
    worker.order(f"{HEAR} {msgspec.json.encode(news).decode()}")


def _pids(places: Sequence[_Place]) -> list[int]:
    return [place.worker.process.pid for place in places if place.worker is not None]


def _fate(process: asyncio.subprocess.Process) -> str:
    status = process.returncode or 0
    if status >= 0:
        return f"status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"
