"""A worker's side of its supervisor: what it inherits, and the line between the two.

The line is a pair of sockets. The worker says on it `READY`, or why it cannot serve; the supervisor sends `DRAIN`
and `AT_ONCE`, and the line's end means that the supervisor is gone. Signals would not do: systemd and terminals
send theirs to every process of a group, and a worker must not take the supervisor's for a second one.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from dataclasses import dataclass

__all__ = ("AT_ONCE", "DRAIN", "READY", "Handover", "Line")

READY, DRAIN, AT_ONCE = b"ready", b"d", b"n"


@dataclass(frozen=True)
class Handover:
    """What a worker inherits, as descriptors: the listening sockets, and its line to the supervisor."""

    sockets: tuple[int, ...]
    line: int

    def __str__(self) -> str:
        return ",".join(map(str, (*self.sockets, self.line)))

    @classmethod
    def parse(cls, text: str) -> Handover:
        """Read what `str` wrote. Raises ValueError."""
        *sockets, line = map(int, text.split(","))
        return cls(tuple(sockets), line)


class Line:
    """A worker's end of the line to its supervisor."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.set_inheritable(False)

    def ready(self) -> None:
        """Say that the worker serves."""
        self._say(READY)

    def failed(self, reason: str) -> None:
        """Say why it cannot."""
        self._say(reason.encode())

    def _say(self, words: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # the supervisor is gone; `obey` sees it, too
            self._socket.sendall(words)
            self._socket.shutdown(socket.SHUT_WR)

    def obey(self, stop: asyncio.Event, now: asyncio.Event) -> None:
        """Set `stop`, then `now`, as the supervisor says; a signal asks for no more than `stop`."""
        loop = asyncio.get_running_loop()

        def told() -> None:
            try:
                orders = self._socket.recv(16)
            except ConnectionError:
                orders = b""
            if not orders:  # the supervisor is gone
                loop.remove_reader(self._socket)
            stop.set()
            if AT_ONCE in orders:
                now.set()

        loop.add_reader(self._socket, told)
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, stop.set)
        loop.add_signal_handler(signal.SIGUSR2, lambda: None)  # the supervisor's business
