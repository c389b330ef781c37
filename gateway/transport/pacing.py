"""Pacing: events that come in lumps leave one after the other, none later than it may.

Theory of operation: an event is due `delay` seconds after it came. When events come, the pace becomes the one at
which all that wait are gone in `delay` seconds, unless it is faster already: so those that waited stay in time, and
the new ones are. Where none waits, the next leaves at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from gateway.protocol.sse import EventSplitter

__all__ = ("Pacer",)

# What may wait, in bytes; above it, all that waits leaves.
_MOST = 256 * 1024


class Pacer:
    """Takes the bytes of a stream, and puts its events one after the other."""

    def __init__(self, delay: float, put: Callable[[bytes], None], loop: asyncio.AbstractEventLoop) -> None:
        self._delay = delay
        self._put = put
        self._loop = loop
        self._splitter = EventSplitter()
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._pace = delay
        """Seconds from event to event."""
        self._next = 0.0  # when the next one leaves
        self._timer: asyncio.TimerHandle | None = None
        self._empty: asyncio.Future[None] | None = None
        self._held = False

    def take(self, data: bytes) -> None:
        """Take a piece of the stream. Raises what `put` raises, and StreamBroken."""
        events = self._splitter.feed(data)
        if not events:
            return
        now = self._loop.time()
        if not self._waiting:
            self._pace, self._next = self._delay, now
        self._waiting.extend(events)
        self._size += sum(map(len, events))
        self._pace = min(self._pace, self._delay / len(self._waiting))
        self._next = min(self._next, now + self._pace)
        if self._size > _MOST:
            self._leave()
        elif not self._held:
            self._go_on()

    def _go_on(self) -> None:
        """Put what is due, and come back for the next one."""
        self._stop_timer()
        now = self._loop.time()
        due = []
        while self._waiting and self._next <= now:
            due.append(self._waiting.popleft())
            self._next += self._pace
        if due:
            leaving = b"".join(due)
            self._size -= len(leaving)
            self._put(leaving)
        if self._waiting:
            self._timer = self._loop.call_at(self._next, self._tick)
        elif self._empty is not None and not self._empty.done():
            self._empty.set_result(None)

    def _tick(self) -> None:
        try:
            self._go_on()
        except Exception as exc:
            # Whoever waits for the end is told; the loss of the client's connection ends it otherwise.
            self._waiting.clear()
            if self._empty is not None and not self._empty.done():
                self._empty.set_exception(exc)

    def hold(self) -> None:
        """Put nothing for now: the client does not take it."""
        self._held = True
        self._stop_timer()

    def release(self) -> None:
        """Go on putting."""
        self._held = False
        self._tick()

    def flush(self) -> None:
        """Put all that waits at once, with what has come of an event that has not ended."""
        self._waiting.append(self._splitter.close())
        self._leave()

    def _leave(self) -> None:
        self._stop_timer()
        leaving = b"".join(self._waiting)
        self._waiting.clear()
        self._size = 0
        if leaving:
            self._put(leaving)

    async def end(self) -> None:
        """Wait until the last event has left, and put what no blank line ended. Raises what `put` raises."""
        if rest := self._splitter.close():
            self._waiting.append(rest)
            self._size += len(rest)
        if self._waiting:
            self._empty = self._loop.create_future()
            if not self._held:
                self._tick()
            await self._empty

    def stop(self) -> None:
        """Put nothing any more."""
        self._stop_timer()
        self._waiting.clear()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
