"""A worker's side of its supervisor: what it inherits, and the line between the two.

The line is a pair of sockets, and what is said on it is lines of text, both ways. The worker says that it serves, or
why it cannot, and answers to `prepare` and `commit`; the supervisor orders these, `abort`, `drain` and `end`, and the
line's end means that the supervisor is gone. Signals would not do: systemd and terminals send theirs to every process
of a group, and a worker must not take the supervisor's for a second one.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.balancing.circuit_breaker import HealthEvent
from gateway.balancing.health import Health
from gateway.process.reload import Prepared, WatchedState

if TYPE_CHECKING:
    from gateway.process.generations import GenerationSwitch

__all__ = (
    "ABORT",
    "AT_ONCE",
    "COMMIT",
    "COMMITTED",
    "DRAIN",
    "FAILED",
    "HEAR",
    "LEAVING",
    "NEWS",
    "PREPARE",
    "PREPARED",
    "READY",
    "REPORT",
    "REPORTED",
    "SupervisorChannel",
    "SupervisorMessage",
    "WorkerInheritance",
)

# What the supervisor orders; the last three with the number of the reload that they are of.
DRAIN, AT_ONCE, PREPARE, COMMIT, ABORT = "drain", "end", "prepare", "commit", "abort"
# And, with what another worker knows, that this one is to know it; and, with a number, that it say how all are.
HEAR, REPORT = "hear", "report"
# What a worker says.
READY, FAILED, PREPARED, COMMITTED, LEAVING = "ready", "failed", "prepared", "committed", "leaving"
NEWS, REPORTED = "news", "reported"


# How long, in seconds, the supervisor may take to read what is said.
_PATIENCE = 10.0


class SupervisorMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a worker says, one JSON object a line.

    `ready` comes with its state, `failed` with the reason, `prepared` with what came of it, `news` with what others are
    to know of a deployment, and `reported` with how all are.
    """

    word: str
    number: int = 0
    reason: str | None = None
    state: WatchedState | None = None
    prepared: Prepared | None = None
    news: HealthEvent | None = None
    report: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class WorkerInheritance:
    """What a worker inherits, as descriptors: the sockets, the counters' table, the array of counts, and its line.

    `place` is the worker's in the array.
    """

    sockets: tuple[int, ...]
    table: int
    counts: int
    place: int
    line: int

    def __str__(self) -> str:
        return ",".join(map(str, (*self.sockets, self.table, self.counts, self.place, self.line)))

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All of them."""
        return (*self.sockets, self.table, self.counts, self.line)

    @classmethod
    def parse(cls, text: str) -> WorkerInheritance:
        """Read what `str` wrote. Raises ValueError."""
        *sockets, table, counts, place, line = map(int, text.split(","))
        return cls(tuple(sockets), table, counts, place, line)


class SupervisorChannel:
    """A worker's end of the line to its supervisor."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.set_inheritable(False)
        # What is said may be long, and the loop's own reader has made the descriptor one that does not wait.
        self._socket.settimeout(_PATIENCE)
        self._heard = b""  # an order that has not ended
        self._orders: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        self._health: Health | None = None

    def ready(self, state: WatchedState) -> None:
        """Say that the worker serves, and with what."""
        self._say(SupervisorMessage(READY, state=state))

    def failed(self, reason: str) -> None:
        """Say why it cannot."""
        self._say(SupervisorMessage(FAILED, reason=reason))

    def share(self, health: Health) -> None:
        """Tell the other workers, through the supervisor, what changes here, and hear what changes there."""
        self._health = health
        health.listeners.append(lambda news: self._say(SupervisorMessage(NEWS, news=news)))

    def _say(self, said: SupervisorMessage) -> None:
        with contextlib.suppress(OSError):  # the supervisor is gone, which `obey` sees too, or does not listen
            self._socket.sendall(msgspec.json.encode(said) + b"\n")

    def obey(self, stop: asyncio.Event, now: asyncio.Event) -> None:
        """Set `stop`, then `now`, as the supervisor says; a signal asks for no more than `stop`."""
        loop = asyncio.get_running_loop()

        def told() -> None:
            try:
                heard = self._socket.recv(4096)
            except ConnectionError:
                heard = b""
            if not heard:  # the supervisor is gone
                loop.remove_reader(self._socket)
                stop.set()
            *orders, self._heard = (self._heard + heard).split(b"\n")
            for order in orders:
                word, _, number = order.decode().partition(" ")
                if word == HEAR:
                    if self._health is not None:
                        self._health.apply(msgspec.json.decode(number, type=HealthEvent))
                elif word == REPORT:
                    report = self._health.report() if self._health is not None else []
                    self._say(SupervisorMessage(REPORTED, int(number), report=report))
                elif word in (DRAIN, AT_ONCE):
                    stop.set()
                    if word == AT_ONCE:
                        now.set()
                else:
                    self._orders.put_nowait((word, int(number)))

        loop.add_reader(self._socket, told)
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, stop.set)
        loop.add_signal_handler(signal.SIGUSR2, lambda: None)  # the supervisor's business, as SIGHUP is

    async def follow(self, renewal: GenerationSwitch) -> None:
        """Reload as the supervisor says, until cancelled; what is prepared then is stopped."""
        preparing: asyncio.Task[None] | None = None
        try:
            while True:
                word, number = await self._orders.get()
                if word == COMMIT:
                    renewal.commit()
                    self._say(SupervisorMessage(COMMITTED, number))
                    continue
                await _end(preparing)
                preparing = None
                if word == PREPARE:
                    preparing = asyncio.create_task(self._prepare(renewal, number))
                else:
                    await renewal.abort()
        finally:
            self._say(SupervisorMessage(LEAVING))
            await _end(preparing)
            await renewal.abort()

    async def _prepare(self, renewal: GenerationSwitch, number: int) -> None:
        self._say(SupervisorMessage(PREPARED, number, prepared=await renewal.prepare()))


async def _end(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.wait((task,))
