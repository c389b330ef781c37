"""The write timeout: how long the gateway waits for a client that stops reading (`timeouts.client`, settings.py).

A client that reads at all, however slowly, is waited for: each byte that it takes restarts the timeout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

__all__ = ("WriteTimeout",)


class WritableConnection(Protocol):
    """A connection with pending writes."""

    @property
    def unsent_bytes(self) -> int:
        """The number of bytes that the client has not taken yet."""


class WriteTimeout:
    """Calls `on_timeout` when a client has taken no byte for `seconds`, unless `cancel` is called before."""

    __slots__ = ("_connection", "_on_timeout", "_seconds", "_timer", "_unsent_bytes")

    def __init__(self, connection: WritableConnection, seconds: float, on_timeout: Callable[[], None]) -> None:
        self._connection = connection
        self._seconds = seconds
        self._on_timeout = on_timeout
        self._wait()

    def _wait(self) -> None:
        self._unsent_bytes = self._connection.unsent_bytes
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._check)

    def _check(self) -> None:
        if self._connection.unsent_bytes < self._unsent_bytes:
            self._wait()
        else:
            self._on_timeout()

    def cancel(self) -> None:
        """Stop the timeout."""
        self._timer.cancel()
