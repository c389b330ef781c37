"""Counters in Redis or Valkey: one limit for several gateways.

All that is asked goes out in one line of calls, one under way at a time: while it is, what is asked gathers and goes
out together with the next. A call has a number, and the script answers a number that it has heard with the answer it
gave. So a call whose answer was lost is repeated, and is done once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from struct import Struct
from typing import NamedTuple

from gateway.limits.counters import CountersUnavailable
from gateway.limits.late_timer import LateTimer, within
from gateway.limits.recent_refusals import RecentRefusals
from gateway.limits.redis_messages import decode_replies, encode_settle, encode_take, key
from gateway.limits.redis_script import SCRIPT, RedisScript
from gateway.limits.redis_url import RedisUrl
from gateway.limits.token_bucket import Charge, Decision, Limit
from gateway.logs import get_logger, redacted

__all__ = ("RedisCounters",)

# Between two words of a gateway that has nothing to ask, and from the last until it counts as gone, in seconds.
_BEAT, _PATIENCE = 5.0, 20.0
# For how many seconds nobody is made to wait for a Redis that was away, and how often it is tried.
_RETRY = 1.0
# For a new connection, TLS, a password and what a cluster has to tell, in seconds. No request waits so long.
_CONNECT = 3.0
# In one call: more would keep Redis from others for more than a moment.
_TAKES, _SETTLES = 100, 1000
# How many settlements may wait until no more is taken, and for how many seconds they are kept for a Redis that is away:
# tokens say nothing any more then. (What is held at once is given back however late.)
_KEPT, _KEPT_FOR = 50_000, 3600.0
# How many names' rules are remembered.
_KNOWN = 50_000
# How long `close` waits for the last settlements, in seconds.
_LAST_WORDS = 2.0

_CALL = Struct("<ddB")


class _Take(NamedTuple):
    charges: Sequence[Charge]
    keys: list[bytes]
    order: bytes
    done: asyncio.Future[Decision]


class _Settle(NamedTuple):
    key: bytes
    order: bytes
    since: float
    of_slots: bool


@dataclass
class _Call:
    """What is asked together, under one number."""

    number: int
    takes: list[_Take] = field(default_factory=list)
    settles: list[_Settle] = field(default_factory=list)
    farewell: bool = False
    repeated: bool = False


class RedisCounters:
    """Counters that several gateways share."""

    def __init__(self, place: RedisUrl, *, script: str = SCRIPT, patience: float = _PATIENCE) -> None:
        self.place = place
        self._script = RedisScript(place, script)
        self._patience = patience
        self._me = os.urandom(8).hex().encode()
        self._gateways = f"{place.keys}gateways".encode()
        self._last = f"{place.keys}last:{self._me.decode()}".encode()
        self._refusals = RecentRefusals()
        self._rules: dict[str, Limit] = {}  # of what was taken last: by them it is settled, also after a reload
        self._takes: deque[_Take] = deque()
        self._settles: deque[_Settle] = deque()
        self._asked = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._number = 0
        self._call: _Call | None = None  # under way, or to be repeated
        self._away_since: float | None = None
        self._odd = False
        self._closing = asyncio.Event()

    async def take(self, charges: Sequence[Charge]) -> Decision:
        """Take all charges, or, where one has no room, none. Raises CountersUnavailable."""
        known = self._refusals.of(charges)
        if known is not None:
            return known
        if self._away_since is not None or self._closing.is_set():
            raise CountersUnavailable(f"{self.place} is away")
        if len(self._settles) > _KEPT:
            raise CountersUnavailable(f"{self.place} is too slow for what is counted in it")
        for charge in charges:
            if self._rules.get(charge.name) is not charge.rule:
                if len(self._rules) >= _KNOWN:
                    self._rules.clear()
                self._rules[charge.name] = charge.rule
        keys = [key(self.place.keys, charge) for charge in charges]
        take = _Take(charges, keys, encode_take(charges), asyncio.get_running_loop().create_future())
        self._takes.append(take)
        self._wake()
        # (Behind a call that is under way it takes its turn.)
        patience = self.place.timeout * (2 if self._call is not None else 1)
        timer = LateTimer(patience, lambda: self._late(take))
        try:
            verdict = await take.done
        except asyncio.CancelledError:
            if not take.done.cancelled() and take.done.exception() is None:
                self._undo(take.done.result())  # it was told in the very moment in which nobody waited any more
            raise
        finally:
            timer.cancel()
        if verdict.refused:
            self._refusals.note(verdict)
        return verdict

    def settle(self, verdict: Decision, actual: Sequence[float | None]) -> None:
        """Let what was really used take the place of what was taken, charge by charge; None leaves one as it is."""
        if verdict.settled:
            return
        verdict.settled = True
        now = time.monotonic()
        for place, (charge, used) in enumerate(zip(verdict.charges, actual, strict=True)):
            if used is None or used == charge.cost or not verdict.holds(place):
                continue
            self._refusals.forget(charge.name)
            charge = Charge(charge.name, self._rules.get(charge.name, charge.rule), charge.cost)  # noqa: PLW2901
            order = encode_settle(charge, verdict.records[place], used)
            of_slots = charge.rule.period == "at_once"
            self._settles.append(_Settle(key(self.place.keys, charge), order, now, of_slots))
        if self._settles:
            self._wake()

    async def close(self) -> None:
        """Settle what is still to be settled, for two seconds at most, and hang up."""
        self._closing.set()
        self._asked.set()
        if self._worker is not None:
            await asyncio.wait((self._worker,), timeout=_LAST_WORDS)
            self._worker.cancel()
            await asyncio.wait((self._worker,))
            self._worker = None
        left = len(self._settles) + (len(self._call.settles) if self._call is not None else 0)
        if left:
            get_logger().warning("limits that were not settled", charges=left)
        self._settles.clear()
        self._call = None
        self._refuse(self._takes)
        self._takes.clear()
        await self._script.hang_up()

    @property
    def _idle(self) -> bool:
        """Whether nothing is asked and no call is under way."""
        return not (self._takes or self._settles) and self._call is None

    # -- the line of calls -----------------------------------------------------------------------------

    def _wake(self) -> None:
        self._asked.set()
        if self._worker is None and not self._closing.is_set():
            self._worker = asyncio.create_task(self._work())

    async def _work(self) -> None:
        """Make calls while there is something to ask, and one now and then where there is not."""
        while True:
            if self._call is None:
                await self._something()
                self._call = self._gather()
            call = self._call
            try:
                await self._make(call)
            except Exception as exc:  # whatever a library finds to raise: Redis does not answer as it should
                self._gone(_reason(exc))
                self._refuse(call.takes)
                call.repeated = True
                self._drop_old()
                await self._script.hang_up()
                self._script.try_another()
                if self._closing.is_set() and not (call.settles or call.takes or self._settles):
                    return  # a farewell that nobody hears
                await self._pause()
                continue
            self._call = None
            self._back()
            if call.farewell:
                return

    async def _something(self) -> None:
        """Wait until there is something to ask, but not longer than a gateway may be silent."""
        if not (self._takes or self._settles or self._closing.is_set() or self._away_since is not None):
            self._asked.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(_BEAT, self._patience / 4)):
                    await self._asked.wait()

    def _gather(self) -> _Call:
        self._number += 1
        call = _Call(self._number)
        if not self._script.connected:
            return call  # a connection is made first, with nothing: whoever does not wait for it has taken nothing then
        # What is given back makes room for what is asked for.
        while self._settles and len(call.settles) < _SETTLES:
            call.settles.append(self._settles.popleft())
        while self._takes and len(call.takes) < _TAKES:
            take = self._takes.popleft()
            if not take.done.done():
                call.takes.append(take)
        call.farewell = self._closing.is_set() and not (call.settles or call.takes)
        return call

    def _drop_old(self) -> None:
        """Forget settlements that have waited so long that they say nothing any more."""
        oldest = time.monotonic() - _KEPT_FOR
        if any(each.since < oldest and not each.of_slots for each in itertools.islice(self._settles, 1)):
            self._settles = deque(each for each in self._settles if each.of_slots or each.since >= oldest)

    async def _pause(self) -> None:
        """Wait until Redis is tried again; not so long where `close` waits."""
        if self._closing.is_set():
            await asyncio.sleep(0.05)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RETRY):
                await self._closing.wait()

    async def _make(self, call: _Call) -> None:
        """Make a call and tell everyone what it came to. Raises whatever goes wrong, and may be repeated then."""
        keys = [self._gateways, self._last, *(settle.key for settle in call.settles)]
        orders = [settle.order for settle in call.settles]
        for take in () if call.repeated else call.takes:
            keys += take.keys
            orders.append(take.order)
        head = _CALL.pack(call.number, self._patience, call.farewell)
        seconds = self.place.timeout if self._script.connected else max(self.place.timeout, _CONNECT)
        async with within(seconds):
            reply: bytes = await self._script.run(len(keys), *keys, self._me, head, *orders)
        # (Takes are not repeated: nobody waits for them. That they were done is known where the answer is an old one.)
        done = call.takes if not call.repeated or reply[:1] == b"\1" else ()
        try:
            verdicts = decode_replies(reply, [take.charges for take in done])
        except ValueError:
            verdicts = [None] * len(done)
        for take, verdict in zip(done, verdicts, strict=True):
            self._tell(take, verdict)

    def _tell(self, take: _Take, verdict: Decision | None) -> None:
        if take.done.done():  # whoever asked has left
            if verdict is not None:
                self._undo(verdict)
        elif verdict is not None:
            take.done.set_result(verdict)
        else:
            if not self._odd:
                self._odd = True
                get_logger().warning("Redis holds something else where limits are counted", prefix=self.place.prefix)
            take.done.set_exception(CountersUnavailable(f"{self.place} holds something else under a counter's name"))

    def _undo(self, verdict: Decision) -> None:
        self.settle(verdict, [0.0] * len(verdict.charges))

    # -- away and back ---------------------------------------------------------------------------------

    def _gone(self, reason: str) -> None:
        """Note that Redis does not answer: until it does, nobody waits for it."""
        if self._away_since is None:
            self._away_since = time.monotonic()
            shown = redacted({"reason": reason}, [self.place.password] if self.place.password else [])
            get_logger().warning("the counters of limits are away", store=str(self.place), **shown)
        self._refuse(self._takes)
        self._takes.clear()

    def _late(self, take: _Take) -> None:
        """Refuse a take that has waited its time."""
        if not take.done.done():
            self._gone(f"no answer within {self.place.timeout:g} s")
            self._refuse((take,))

    def _refuse(self, takes: Iterable[_Take]) -> None:
        for take in takes:
            if not take.done.done():
                take.done.set_exception(CountersUnavailable(f"{self.place} is away"))

    def _back(self) -> None:
        if self._away_since is not None:
            seconds = round(time.monotonic() - self._away_since, 3)
            self._away_since = None
            get_logger().info("the counters of limits are back", store=str(self.place), seconds=seconds)


def _reason(exc: BaseException) -> str:
    """Say what went wrong, and what was behind it where the library keeps that to itself."""
    text = f"{type(exc).__name__}: {exc}"
    behind = exc.__cause__ or exc.__context__
    if behind is None or (behind.args and str(behind.args[-1]) in text):
        return text
    return f"{text} ({_reason(behind)})"
