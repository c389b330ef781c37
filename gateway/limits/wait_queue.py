"""Waiting for room: whoever would be refused may wait its turn, and callers take turns."""

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

# The longest time, in seconds, for which nobody is tried: another machine may have given back what is waited for.
_LONGEST = 1.0


class WaitQueue:
    """Takes charges from a store of counters: at once, or, for whoever waits, when its turn has come.

    There is a queue for each name under which there is no room. Whose turn it is goes round the callers in it, however
    many requests each of them has there, and nobody who waits is overtaken by one who came later.
    """

    def __init__(self, store: Counters) -> None:
        self.store = store
        self._queues: dict[str, _Queue] = {}

    async def take(self, charges: Sequence[Charge], *, wait: float = 0.0, who: str = "") -> Decision:
        """Take all charges, or none; where there is no room, `who` waits up to so many seconds for some.

        Raises CountersUnavailable.
        """
        if not wait:
            return await self.store.take(charges)
        queue = self._ahead(charges) if self._queues else None
        verdict = None
        if queue is None:
            verdict = await self.store.take(charges)
            if not verdict.refused or verdict.fullest()[1] == math.inf:
                return verdict
            queue = self._queue_for(verdict)
        waiter = _Waiter(charges, who, verdict, queue)
        queue.add(waiter)
        try:
            async with asyncio.timeout(wait):
                return await waiter.future
        except TimeoutError:
            if waiter.has_room():
                return waiter.future.result()
            # (It may have stood behind others all the time.)
            return waiter.verdict or await self.store.take(charges)
        except asyncio.CancelledError:
            if waiter.has_room():
                self._give_back(waiter.future.result())
            raise
        finally:
            waiter.queue.remove(waiter)

    def settle(self, verdict: Decision, actual: Sequence[float | None]) -> None:
        """Let what was really used take the place of what was taken, once; whoever waits for it is tried."""
        self.store.settle(verdict, actual)
        if self._queues:
            for charge in verdict.charges:
                if (queue := self._queues.get(charge.name)) is not None:
                    queue.room.set()

    async def close(self) -> None:
        """Let nobody wait any more, and close the store."""
        for queue in list(self._queues.values()):
            queue.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await queue.task
        await self.store.close()

    def _give_back(self, verdict: Decision) -> None:
        self.settle(verdict, [0.0] * len(verdict.charges))

    def _ahead(self, charges: Sequence[Charge]) -> _Queue | None:
        """Return the queue of those who came before for the same, if there is one.

        What costs nothing always has room, and what is too much never has: neither waits. Nor does who comes with
        another rule than those who wait, since a reload.
        """
        if any(each.cost > each.rule.size for each in charges):
            return None
        queues = ((self._queues.get(each.name), each.rule) for each in charges if each.cost)
        return next((queue for queue, rule in queues if queue is not None and queue.rule.terms == rule.terms), None)

    def _queue_for(self, verdict: Decision) -> _Queue:
        """Return the queue for what is full."""
        name, _ = verdict.fullest()
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = _Queue()
            queue.task = asyncio.create_task(self._serve(name, queue), name=f"waiting for {name}")
        queue.rule = next(each.rule for each in verdict.charges if each.name == name)
        return queue

    async def _serve(self, name: str, queue: _Queue) -> None:
        """Try whose turn it is, until nobody waits."""
        try:
            while queue.callers:
                queue.room.clear()
                pause = await self._round(name, queue)
                if pause > 0:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(min(pause, _LONGEST)):
                            await queue.room.wait()
        finally:
            del self._queues[name]
            for waiter in queue.all():
                waiter.future.cancel()

    async def _round(self, name: str, queue: _Queue) -> float:
        """Try the first request of each caller until one has room; return how long to wait else, in seconds."""
        pause = 0.0
        for waiter in queue.firsts():
            try:
                verdict = await self.store.take(waiter.charges)
            except Exception as exc:  # who waits is told, as if it had asked itself
                if not waiter.future.done():
                    waiter.future.set_exception(exc)
                queue.remove(waiter)
                continue
            if not verdict.refused:
                queue.remove(waiter, turn_over=True)
                if waiter.future.done():  # it left while it was tried
                    self._give_back(verdict)
                else:
                    waiter.future.set_result(verdict)
                return 0.0
            waiter.verdict = verdict
            full, seconds = verdict.fullest()
            if seconds == math.inf:  # a limit that a reload lowered
                if not waiter.future.done():
                    waiter.future.set_result(verdict)
                queue.remove(waiter)
                continue
            pause = max(pause, seconds)
            if full == name:
                break  # nobody overtakes
            # It waits for what is really full, in turn with those who do.
            queue.remove(waiter)
            waiter.queue = self._queue_for(verdict)
            waiter.queue.add(waiter)
        return pause or _LONGEST


class _Waiter:
    """One request that waits, and the last verdict on it."""

    def __init__(self, charges: Sequence[Charge], who: str, verdict: Decision | None, queue: _Queue) -> None:
        self.queue = queue
        self.charges = charges
        self.who = who
        self.verdict = verdict
        self.future: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()

    def has_room(self) -> bool:
        """Whether its charges were taken."""
        return self.future.done() and not self.future.cancelled() and self.future.exception() is None


class _Queue:
    """Those who wait for room under one name: each caller's requests, and the callers in the order of their turns."""

    task: asyncio.Task[None]
    rule: Limit
    """By which the last of them came."""

    def __init__(self) -> None:
        self.callers: OrderedDict[str, deque[_Waiter]] = OrderedDict()
        self.room = asyncio.Event()
        """Something was given back."""

    def add(self, waiter: _Waiter) -> None:
        self.callers.setdefault(waiter.who, deque()).append(waiter)

    def remove(self, waiter: _Waiter, *, turn_over: bool = False) -> None:
        """Take one out, if it is there; its caller comes last then where its `turn_over`."""
        waiting = self.callers.get(waiter.who)
        if waiting is None or waiter not in waiting:
            return
        waiting.remove(waiter)
        self.room.set()  # those behind it may have room where it had none
        if not waiting:
            del self.callers[waiter.who]
        elif turn_over:
            self.callers.move_to_end(waiter.who)

    def firsts(self) -> list[_Waiter]:
        """Return each caller's first."""
        return [waiting[0] for waiting in self.callers.values()]

    def all(self) -> Iterator[_Waiter]:
        for waiting in self.callers.values():
            yield from waiting
