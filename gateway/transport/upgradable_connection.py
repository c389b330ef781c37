"""A connection that can become a WebSocket: after a 101, its bytes go to a relay.

Bytes that arrive between the 101 and `start_relay` wait here, and reading is paused.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from gateway.transport.deadline import Deadline
from gateway.transport.paused_reading import PausableProtocol

__all__ = ("UpgradableConnection", "WebSocketSink")


class WebSocketSink(Protocol):
    """Takes the bytes of a connection that has become a WebSocket: its relay."""

    @property
    def azure_held(self) -> bool:
        """Whether reading is paused."""

    def from_azure(self, data: bytes) -> None:
        """Take bytes."""

    def azure_lost(self) -> None:
        """Note that the connection is closed."""

    def azure_flow(self, paused: bool) -> None:
        """Note whether writing is paused."""


class UpgradableConnection(PausableProtocol):
    """A connection to Azure after its upgrade."""

    __slots__ = ("_deadline", "_early_data", "_relay", "lost")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.lost = False  # it is closed
        self._relay: WebSocketSink | None = None
        self._early_data: bytes | None = None  # bytes after a 101, until the relay takes them
        self._deadline = Deadline(loop)

    def start_relay(self, relay: WebSocketSink) -> None:
        """Pass all bytes from now on to a relay."""
        self._relay = relay
        early_data, self._early_data = self._early_data, None
        if early_data:
            relay.from_azure(early_data)
        if self.lost:
            relay.azure_lost()
        elif not relay.azure_held:
            self.release_relay()

    def end_relay(self, seconds: float) -> None:
        """Close as soon as all bytes are written, or after `seconds`."""
        self._relay = None
        self.close()
        if self.transport is not None:
            self._deadline.set(seconds, self.abort)

    def hold_relay(self) -> None:
        """Pause reading from the WebSocket; the relay keeps bytes that still arrive in this turn."""
        self._pause_reading()

    def release_relay(self) -> None:
        """Resume reading."""
        self._resume_reading()

    def pause_writing(self) -> None:
        """Note that Azure reads too slowly."""
        super().pause_writing()
        if self._relay is not None:
            self._relay.azure_flow(True)

    def resume_writing(self) -> None:
        """Note that Azure reads fast enough again."""
        super().resume_writing()
        if self._relay is not None:
            self._relay.azure_flow(False)

    def close(self) -> None:
        """Close gracefully; aiohttp's connector calls this, too."""
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """Close at once; discard unsent bytes."""
        raise NotImplementedError
