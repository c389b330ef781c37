"""WebSocket pings: each ping interval (`timeouts.ping`, settings.py), the gateway checks that both sides are alive."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence

from gateway.protocol.websocket_frames import PING, encode_frame
from gateway.transport.websocket_side import RelaySide

__all__ = ("KeepAlivePings",)


class KeepAlivePings:
    """Sends a ping to a side that is silent for one interval, and reports it if it stays silent for another."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        interval: float,
        sides: Sequence[RelaySide],
        on_silent: Callable[[RelaySide], None],
    ) -> None:
        """Check `sides` every `interval` seconds; call `on_silent` for a side without a sign of life."""
        self._loop = loop
        self.interval = interval
        self._sides = sides
        self._on_silent = on_silent
        # Random, so that another gateway on the path does not take the pong for its own.
        self.payload = os.urandom(8).hex().encode()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Schedule the next check."""
        self._timer = self._loop.call_later(self.interval, self._check)

    def stop(self) -> None:
        """Stop checking."""
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        self.start()
        for side in self._sides:
            if side.frames.closed or side.close_sent:
                continue  # it has sent a close frame, or must answer one
            if side.active or side.pause_reasons:
                side.active = False
            elif side.ping_sent:
                self._on_silent(side)
                return
            elif side.other.at_frame_boundary:
                side.ping_sent = True
                side.write(encode_frame(PING, self.payload, masked=not side.client))
