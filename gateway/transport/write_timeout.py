"""Patience with a client that does not read: as long as it takes anything, however slowly, it is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

__all__ = ("WriteTimeout",)


class WritableConnection(Protocol):
    """A connection that is written to."""

    @property
    def unsent(self) -> int:
        """The number of bytes that the client has not taken yet."""


class WriteTimeout:
    """Calls `give_up` when a client has taken nothing for so many seconds; `cancel` where it need not be waited for."""

    __slots__ = ("_connection", "_give_up", "_seconds", "_timer", "_unsent")

    def __init__(self, connection: WritableConnection, seconds: float, give_up: Callable[[], None]) -> None:
        self._connection = connection
        self._seconds = seconds
        self._give_up = give_up
        self._wait()

    def _wait(self) -> None:
        self._unsent = self._connection.unsent
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._look)

    def _look(self) -> None:
        if self._connection.unsent < self._unsent:
            self._wait()
        else:
            self._give_up()

    def cancel(self) -> None:
        """Wait no longer."""
        self._timer.cancel()
