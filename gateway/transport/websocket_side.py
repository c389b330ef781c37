"""One side of a relayed WebSocket: the client or Azure, with its frames and its backpressure."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from gateway.fair_scheduler import FairScheduler
from gateway.protocol.filters import EventFilter
from gateway.protocol.websocket_frames import FrameParser, FrameWriter
from gateway.transport.websocket_limits import MAX_KEPT_MESSAGE, ControlFrameLimit
from gateway.transport.write_timeout import WriteTimeout

__all__ = ("BACKPRESSURE", "PENDING_INPUT", "PENDING_REPLIES", "RelaySide")

PENDING_INPUT, BACKPRESSURE, PENDING_REPLIES = "pending_input", "backpressure", "pending_replies"
"""Why reading from a side is paused: received bytes wait for a later turn of the loop; the other side does not read
fast enough; the gateway's own messages for this side are not written yet."""


class RelaySide:
    """The state of one side: `frames` are the ones that it sends."""

    other: RelaySide

    def __init__(
        self,
        scheduler: FairScheduler,
        *,
        client: bool,
        filters: Sequence[EventFilter],
        max_message: int,
        write: Callable[[bytes], None],
        pause: Callable[[bool], None],
        resume: Callable[[], None],
        handle: Callable[[RelaySide], None],
        is_over: Callable[[], bool],
    ) -> None:
        """Create a side that reads with `pause` and `resume`, is written to with `write`, and is the `client` or Azure.

        In later turns of the loop, `handle` processes received bytes, unless the relay `is_over`.
        """
        self._scheduler = scheduler
        self.client = client
        self.filters = filters  # on the messages that it sends
        most = min(max_message, MAX_KEPT_MESSAGE) if filters else max_message
        self.frames = FrameParser(masked=client, most=most, whole=bool(filters))
        self.write = write
        self._pause = pause
        self._resume = resume
        self._handle = handle
        self._is_over = is_over
        self.pause_reasons: set[str] = set()
        self.writable = True  # no backpressure from it
        self.unwritten: deque[bytes | FrameWriter] = deque()  # its output from a large message on
        self.held = 0  # bytes of its messages that the exchange holds
        self.replies: list[bytes] = []  # messages of the gateway's own to it that are not written yet
        self.active = True  # since the last check for silence
        self.ping_sent = False
        self.lost = False
        self.close_sent = False  # a close frame was written to it
        self.messages = 0  # number of messages that it sent
        self.write_timer: asyncio.TimerHandle | WriteTimeout | None = None  # while it is not writable
        self.controls = ControlFrameLimit()

    def pause(self, reason: str) -> None:
        """Pause reading from it, until `resume` for the same reason."""
        if reason not in self.pause_reasons:
            if self.pause_reasons <= {PENDING_INPUT}:
                # If it disconnects meanwhile, bytes that only wait for their turn are still handled.
                self._pause(reason != PENDING_INPUT)
            self.pause_reasons.add(reason)

    def resume(self, reason: str) -> None:
        """Resume reading, unless there is another reason for the pause."""
        if reason in self.pause_reasons:
            self.pause_reasons.remove(reason)
            if not self.pause_reasons:
                self.active = True
                self._resume()
            elif self.may_continue:
                self._pause(False)
                self._scheduler.add(self)

    @property
    def has_pending_input(self) -> bool:
        """Whether received bytes wait for a later turn."""
        return PENDING_INPUT in self.pause_reasons

    @property
    def may_continue(self) -> bool:
        """Whether such bytes may be handled now."""
        return len(self.pause_reasons) == 1 and PENDING_INPUT in self.pause_reasons

    def step(self) -> bool:
        """Handle a bounded part of the received bytes; return whether there are more to handle now."""
        if self.may_continue and not self._is_over():
            self._handle(self)
        return self.may_continue and not self._is_over()

    @property
    def at_frame_boundary(self) -> bool:
        """Whether no frame of it is partly forwarded: a control frame may be written to the other side."""
        return self.frames.between and not self.unwritten

    @property
    def at_message_boundary(self) -> bool:
        """Whether a message may be written to the other side, too."""
        return self.frames.between_messages and not self.unwritten
