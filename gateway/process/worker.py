"""A worker's side: what it inherits from its supervisor, and the channel between the two.

`worker_messages.py` has the messages, `worker_process.py` the supervisor's side.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from gateway.balancing.circuit_breaker import HealthEvent
from gateway.balancing.health import Health
from gateway.process.reload import WatchedState
from gateway.process.worker_messages import (
    COMMIT,
    COMMITTED,
    DRAIN,
    EXIT_NOW,
    FAILED,
    HEALTH_EVENT,
    HEALTH_REPORT,
    LEAVING,
    PREPARE,
    PREPARED,
    READY,
    REPORT_HEALTH,
    TAKE_HEALTH_EVENT,
    WorkerMessage,
)

if TYPE_CHECKING:
    from gateway.process.generations import GenerationSwitch

__all__ = ("SupervisorChannel", "WorkerInheritance")

# Timeout, in seconds, for the supervisor to read a message.
_SEND_TIMEOUT = 10.0


@dataclass(frozen=True)
class WorkerInheritance:
    """The descriptors that a worker inherits: sockets, the limits' table, the connection counts, and the channel.

    `index` is the worker's position in the connection counts.
    """

    sockets: tuple[int, ...]
    table: int
    counts: int
    index: int
    channel: int

    def __str__(self) -> str:
        return ",".join(map(str, (*self.sockets, self.table, self.counts, self.index, self.channel)))

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All of them."""
        return (*self.sockets, self.table, self.counts, self.channel)

    @classmethod
    def parse(cls, text: str) -> WorkerInheritance:
        """Read the text that `str` makes. Raises ValueError."""
        *sockets, table, counts, index, channel = map(int, text.split(","))
        return cls(tuple(sockets), table, counts, index, channel)


class SupervisorChannel:
    """A worker's end of the channel to its supervisor: sends messages, and obeys orders."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.set_inheritable(False)
        # A message may be long, and the loop's own reader has made the descriptor non-blocking.
        self._socket.settimeout(_SEND_TIMEOUT)
        self._received = b""  # an incomplete order
        self._orders: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        self._health: Health | None = None

    def ready(self, state: WatchedState) -> None:
        """Report that the worker serves, and with which configuration."""
        self._send(WorkerMessage(READY, state=state))

    def failed(self, reason: str) -> None:
        """Report why it cannot serve."""
        self._send(WorkerMessage(FAILED, reason=reason))

    def share(self, health: Health) -> None:
        """Exchange health events with the other workers, through the supervisor."""
        self._health = health
        health.listeners.append(lambda news: self._send(WorkerMessage(HEALTH_EVENT, event=news)))

    def _send(self, message: WorkerMessage) -> None:
        with contextlib.suppress(OSError):  # the supervisor is gone, which `obey` sees too, or does not read
            self._socket.sendall(msgspec.json.encode(message) + b"\n")

    def obey(self, stop: asyncio.Event, now: asyncio.Event) -> None:
        """Set `stop`, then `now`, when the supervisor orders it; a signal sets only `stop`."""
        loop = asyncio.get_running_loop()

        def receive() -> None:
            try:
                received = self._socket.recv(4096)
            except ConnectionError:
                received = b""
            if not received:  # the supervisor is gone
                loop.remove_reader(self._socket)
                stop.set()
            *orders, self._received = (self._received + received).split(b"\n")
            for order in orders:
                word, _, argument = order.decode().partition(" ")
                if word == TAKE_HEALTH_EVENT:
                    if self._health is not None:
                        self._health.apply(msgspec.json.decode(argument, type=HealthEvent))
                elif word == REPORT_HEALTH:
                    report = self._health.report() if self._health is not None else []
                    self._send(WorkerMessage(HEALTH_REPORT, int(argument), report=report))
                elif word in (DRAIN, EXIT_NOW):
                    stop.set()
                    if word == EXIT_NOW:
                        now.set()
                else:
                    self._orders.put_nowait((word, int(argument)))

        loop.add_reader(self._socket, receive)
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, stop.set)
        loop.add_signal_handler(signal.SIGUSR2, lambda: None)  # for the supervisor, as is SIGHUP

    async def handle_reloads(self, generations: GenerationSwitch) -> None:
        """Reload as the supervisor orders, until cancelled; then stop what is prepared."""
        preparing: asyncio.Task[None] | None = None
        try:
            while True:
                word, number = await self._orders.get()
                if word == COMMIT:
                    generations.commit()
                    self._send(WorkerMessage(COMMITTED, number))
                    continue
                await _cancel(preparing)
                preparing = None
                if word == PREPARE:
                    preparing = asyncio.create_task(self._prepare(generations, number))
                else:
                    await generations.abort()
        finally:
            self._send(WorkerMessage(LEAVING))
            await _cancel(preparing)
            await generations.abort()

    async def _prepare(self, generations: GenerationSwitch, number: int) -> None:
        self._send(WorkerMessage(PREPARED, number, prepared=await generations.prepare()))


async def _cancel(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.wait((task,))
