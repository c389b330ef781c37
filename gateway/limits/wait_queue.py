"""The queue of requests that wait for room under a limit. Callers take turns (round robin)."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from gateway.limits.token_bucket import Charge, Decision, Limit

if TYPE_CHECKING:
    from gateway.limits.counters import Counters

__all__ = ("WaitQueue",)

# Longest time between two tries, in seconds: another machine may have made room.
_MAX_PAUSE = 1.0


class WaitQueue:
    """Takes charges from a store of counters: at once, or after waiting for room.

    Each name without room has a queue. Its callers take turns, however many requests each of them has in the queue, and
    no later request overtakes a waiting one.
    """

    def __init__(self, store: Counters) -> None:
        self.store = store
        self._queues: dict[str, _Queue] = {}

    async def take(self, charges: Sequence[Charge], *, wait: float = 0.0, caller: str = "") -> Decision:
        """Take all charges, or none. If there is no room, `caller` waits up to `wait` seconds for it.

        Raises CountersUnavailable.
        """
        if not wait:
            return await self.store.take(charges)
        queue = self._queue_ahead_of(charges) if self._queues else None
        decision = None
        if queue is None:
            decision = await self.store.take(charges)
            if not decision.refused or decision.longest_wait()[1] == math.inf:
                return decision
            queue = self._queue_for(decision)
        waiter = _Waiter(charges, caller, decision, queue)
        queue.add(waiter)
        try:
            async with asyncio.timeout(wait):
                return await waiter.future
        except TimeoutError:
            if waiter.has_room():
                return waiter.future.result()
            # (Its turn may never have come.)
            return waiter.decision or await self.store.take(charges)
        except asyncio.CancelledError:
            if waiter.has_room():
                self._give_back(waiter.future.result())
            raise
        finally:
            waiter.queue.remove(waiter)

    def settle(self, decision: Decision, actual: Sequence[float | None]) -> None:
        """Replace the cost of each charge with its actual use, once, and try the requests that wait for room."""
        self.store.settle(decision, actual)
        if self._queues:
            for charge in decision.charges:
                if (queue := self._queues.get(charge.name)) is not None:
                    queue.room.set()

    async def close(self) -> None:
        """Cancel all waiting requests, and close the store."""
        for queue in list(self._queues.values()):
            queue.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await queue.task
        await self.store.close()

    def _give_back(self, decision: Decision) -> None:
        self.settle(decision, [0.0] * len(decision.charges))

    def _queue_ahead_of(self, charges: Sequence[Charge]) -> _Queue | None:
        """Return the queue of requests that wait for the same limit. Returns None if these charges need not queue.

        A cost of 0 always has room, and a cost above the capacity never has: neither waits. After a reload, a request
        with a new limit does not queue up after those with the old one.
        """
        if any(each.cost > each.limit.capacity for each in charges):
            return None
        queues = ((self._queues.get(each.name), each.limit) for each in charges if each.cost)
        return next((queue for queue, limit in queues if queue is not None and queue.limit.terms == limit.terms), None)

    def _queue_for(self, decision: Decision) -> _Queue:
        """Return the queue of the name without room."""
        name, _ = decision.longest_wait()
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = _Queue()
            queue.task = asyncio.create_task(self._serve(name, queue), name=f"waiting for {name}")
        queue.limit = next(each.limit for each in decision.charges if each.name == name)
        return queue

    async def _serve(self, name: str, queue: _Queue) -> None:
        """Try the waiting requests in turn until the queue is empty."""
        try:
            while queue.callers:
                queue.room.clear()
                pause = await self._try_each_caller(name, queue)
                if pause > 0:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(min(pause, _MAX_PAUSE)):
                            await queue.room.wait()
        finally:
            del self._queues[name]
            for waiter in queue.all():
                waiter.future.cancel()

    async def _try_each_caller(self, name: str, queue: _Queue) -> float:
        """Try the first request of each caller until one has room. Return the seconds to wait before the next try."""
        pause = 0.0
        for waiter in queue.first_of_each_caller():
            try:
                decision = await self.store.take(waiter.charges)
            except Exception as exc:  # the waiting request gets it, as if it had called the store itself
                if not waiter.future.done():
                    waiter.future.set_exception(exc)
                queue.remove(waiter)
                continue
            if not decision.refused:
                queue.remove(waiter, end_turn=True)
                if waiter.future.done():  # it left during the try
                    self._give_back(decision)
                else:
                    waiter.future.set_result(decision)
                return 0.0
            waiter.decision = decision
            full, seconds = decision.longest_wait()
            if seconds == math.inf:  # a reload lowered the limit
                if not waiter.future.done():
                    waiter.future.set_result(decision)
                queue.remove(waiter)
                continue
            pause = max(pause, seconds)
            if full == name:
                break  # no overtaking
            # Move it to the queue of the name that has no room now.
            queue.remove(waiter)
            waiter.queue = self._queue_for(decision)
            waiter.queue.add(waiter)
        return pause or _MAX_PAUSE


class _Waiter:
    """A waiting request, and the last decision on it."""

    def __init__(self, charges: Sequence[Charge], caller: str, decision: Decision | None, queue: _Queue) -> None:
        self.queue = queue
        self.charges = charges
        self.caller = caller
        self.decision = decision
        self.future: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()

    def has_room(self) -> bool:
        """Whether its charges were taken."""
        return self.future.done() and not self.future.cancelled() and self.future.exception() is None


class _Queue:
    """The requests that wait for room under one name, by caller, with the callers in the order of their turns."""

    task: asyncio.Task[None]
    limit: Limit
    """The limit of the newest request."""

    def __init__(self) -> None:
        self.callers: OrderedDict[str, deque[_Waiter]] = OrderedDict()
        self.room = asyncio.Event()
        """Some use was given back."""

    def add(self, waiter: _Waiter) -> None:
        self.callers.setdefault(waiter.caller, deque()).append(waiter)

    def remove(self, waiter: _Waiter, *, end_turn: bool = False) -> None:
        """Remove a request if it is there. With `end_turn` its caller moves to the end."""
        waiting = self.callers.get(waiter.caller)
        if waiting is None or waiter not in waiting:
            return
        waiting.remove(waiter)
        self.room.set()  # the next ones may have room that this one did not have
        if not waiting:
            del self.callers[waiter.caller]
        elif end_turn:
            self.callers.move_to_end(waiter.caller)

    def first_of_each_caller(self) -> list[_Waiter]:
        return [waiting[0] for waiting in self.callers.values()]

    def all(self) -> Iterator[_Waiter]:
        for waiting in self.callers.values():
            yield from waiting
