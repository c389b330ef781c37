"""`gateway serve --workers N`: a supervisor that holds the listening sockets, and N workers that share them.

A worker is a fresh process, so a rolling restart takes new code and a changed configuration.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gateway.errors import StartError
from gateway.handover import AT_ONCE, DRAIN, READY, Handover
from gateway.listener import Listener
from gateway.logs import get_logger
from gateway.systemd import Notifier

__all__ = ("Supervisor", "worker_command")

# What a worker that died is replaced after, in seconds: doubled each time, and as at first for one that lived long.
_FIRST_DELAY, _LAST_DELAY, _LONG_LIFE = 0.5, 30.0, 60.0
# How long, in seconds, a worker that was told to end at once may still take.
_LAST_WORDS = 10.0


def worker_command(config: Path | None, *, cors: bool = False) -> list[str]:
    """Return the command that starts a worker, but for its handover."""
    # -m looks for modules in the working directory first; where this process does not, its workers must not.
    here = sys.path[0] in ("", os.getcwd())
    command = [sys.executable, *(() if here else ("-P",)), "-m", "gateway", "serve", *(("--cors",) if cors else ())]
    return command if config is None else [*command, "--config", str(config)]


class _Worker:
    """The supervisor's side of one process."""

    def __init__(self, process: asyncio.subprocess.Process, line: socket.socket) -> None:
        self.process = process
        self._line = line

    @classmethod
    async def start(cls, command: Sequence[str], listener: Listener) -> _Worker:
        """Start a process. Raises OSError where the system has none."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                handover = Handover(tuple(sock.fileno() for sock in listener.sockets), theirs.fileno())
                process = await asyncio.create_subprocess_exec(
                    *command,
                    "--handover",
                    str(handover),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(*handover.sockets, handover.line),
                )
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        return cls(process, ours)

    async def wait_ready(self, patience: float) -> str | None:
        """Wait until it serves: None. Where it does not, return why; it is killed if it cannot say."""
        said = b""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(patience):
                while words := await loop.sock_recv(self._line, 65536):
                    said += words
                if said == READY:
                    return None
                await self.process.wait()
        except TimeoutError:
            self.kill()
            return f"a worker was not ready after {patience:g} s"
        except ConnectionError:
            await self.process.wait()
        return said.decode() or f"a worker ended before it was ready: {_fate(self.process)}"

    def order(self, word: bytes) -> None:
        """Tell it to drain, or to end at once."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, and whoever waits for that will see it
            self._line.send(word)

    def kill(self) -> None:
        """End it without its help."""
        # Process.kill() asks for the process's status first, and may take it away from who waits for it.
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Let go of the line."""
        self._line.close()


class _Place:
    """One worker's place: the worker, and after it the one that replaces it, until the place is retired."""

    def __init__(self) -> None:
        self.retired = asyncio.Event()
        self.settled = asyncio.Event()
        """The first worker is ready, or `failure` says why not."""
        self.failure: str | None = None
        self.worker: _Worker | None = None

    async def keep(self, command: Sequence[str], listener: Listener, patience: float) -> None:
        """Keep a worker here; return when the place is retired and its worker gone, or the first never served."""
        loop = asyncio.get_running_loop()
        delay = 0.0
        while not self.retired.is_set():
            born = loop.time()
            facts = await self._run(command, listener, patience)
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

    async def _run(self, command: Sequence[str], listener: Listener, patience: float) -> dict[str, Any]:
        """Run one worker from its start to its end, and return what the log should say of that."""
        try:
            worker = self.worker = await _Worker.start(command, listener)
        except OSError as exc:
            reason = f"cannot start a worker: {exc.strerror or exc}"
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
            self._settle(failure)
            await worker.process.wait()
        finally:
            worker.close()
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

    SIGTERM and SIGINT drain them, a second one ends them at once; SIGUSR2 is a rolling restart. One that comes
    while another runs is done after it. `patience` is how many seconds a worker may take to become ready.
    """

    def __init__(
        self, listener: Listener, command: Sequence[str], count: int, notify: Notifier, *, patience: float = 60.0
    ) -> None:
        self._listener = listener
        self._command = command
        self._count = count
        self._notify = notify
        self._patience = patience
        self._current: list[_Place] = []
        self._tasks: dict[asyncio.Task[None], _Place] = {}
        self._stopping = False
        self._again = asyncio.Event()
        """A signal asks for something: a rolling restart, unless it is time to stop."""

    async def run(self) -> None:
        """Supervise until a signal says to stop. Raises StartError where the first workers cannot serve."""
        loop = asyncio.get_running_loop()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, self._stop)
        loop.add_signal_handler(signal.SIGUSR2, self._again.set)
        failure = None
        async with asyncio.TaskGroup() as self._group:
            try:
                self._current = await self._start()
                self._tell_ready()
                while True:
                    await self._again.wait()
                    if self._stopping:
                        break
                    self._again.clear()
                    await self._restart()
            except StartError as exc:
                failure = exc
        # The group has waited for every worker's end.
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
        place = _Place()
        task = self._group.create_task(place.keep(self._command, self._listener, self._patience))
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
        self._tell_ready()

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
        get_logger().info("stopping", pid=os.getpid())
        self._notify.stopping()
        self._listener.close()  # or newcomers would wait in a queue that nobody takes them from
        for place in places:
            place.retire()
        self._again.set()


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
