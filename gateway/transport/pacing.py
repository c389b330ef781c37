"""Pacing: events that arrive in bursts leave one after the other, each within its maximum delay.

Theory of operation: an event is due `delay` seconds after its arrival. When events arrive, the interval between events
becomes the one at which all queued events are sent within `delay` seconds, unless it is shorter already. So neither the
queued nor the new events are late. If none is queued, the next event leaves immediately.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from gateway.protocol.sse import EventSplitter

__all__ = ("Pacer",)

# Maximum size of the queue, in bytes; above it, the whole queue is sent.
_MAX_QUEUED = 256 * 1024


class Pacer:
    """Takes the bytes of a stream, and writes its events one after the other."""

    def __init__(self, delay: float, write: Callable[[bytes], None], loop: asyncio.AbstractEventLoop) -> None:
        self._delay = delay
        self._write = write
        self._loop = loop
        self._splitter = EventSplitter()
        self._queue: deque[bytes] = deque()
        self._size = 0  # of the queue, in bytes
        self._interval = delay  # in seconds, from event to event
        self._next = 0.0  # when the next event leaves
        self._timer: asyncio.TimerHandle | None = None
        self._drained: asyncio.Future[None] | None = None
        self._paused = False

    def take(self, data: bytes) -> None:
        """Take a piece of the stream. Raises the errors of `write`, and StreamBroken."""
        events = self._splitter.feed(data)
        if not events:
            return
        now = self._loop.time()
        if not self._queue:
            self._interval, self._next = self._delay, now
        self._queue.extend(events)
        self._size += sum(map(len, events))
        self._interval = min(self._interval, self._delay / len(self._queue))
        self._next = min(self._next, now + self._interval)
        if self._size > _MAX_QUEUED:
            self._write_all()
        elif not self._paused:
            self._write_due()

    def _write_due(self) -> None:
        """Write the events that are due, and set the timer for the next one."""
        self._stop_timer()
        now = self._loop.time()
        due = []
        while self._queue and self._next <= now:
            due.append(self._queue.popleft())
            self._next += self._interval
        if due:
            data = b"".join(due)
            self._size -= len(data)
            self._write(data)
        if self._queue:
            self._timer = self._loop.call_at(self._next, self._tick)
        elif self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def _tick(self) -> None:
        try:
            self._write_due()
        except Exception as exc:
            # `end` raises it, if it waits; otherwise the loss of the client's connection ends the stream.
            self._queue.clear()
            if self._drained is not None and not self._drained.done():
                self._drained.set_exception(exc)

    def pause(self) -> None:
        """Write nothing for now: the client reads too slowly."""
        self._paused = True
        self._stop_timer()

    def resume(self) -> None:
        """Continue writing."""
        self._paused = False
        self._tick()

    def flush(self) -> None:
        """Write the whole queue immediately, and the beginning of an incomplete event."""
        self._queue.append(self._splitter.close())
        self._write_all()

    def _write_all(self) -> None:
        self._stop_timer()
        data = b"".join(self._queue)
        self._queue.clear()
        self._size = 0
        if data:
            self._write(data)

    async def end(self) -> None:
        """Write an unterminated last event, and wait for the end of the queue. Raises the errors of `write`."""
        if rest := self._splitter.close():
            self._queue.append(rest)
            self._size += len(rest)
        if self._queue:
            self._drained = self._loop.create_future()
            if not self._paused:
                self._tick()
            await self._drained

    def stop(self) -> None:
        """Drop the queue."""
        self._stop_timer()
        self._queue.clear()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
