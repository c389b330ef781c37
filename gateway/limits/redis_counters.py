"""Counters in Redis or Valkey: one limit for several gateways.

A gateway has one call to Redis in flight at a time; orders that arrive meanwhile are sent together in the next one.
Calls are idempotent: each has a number, and for a number that it knows the script repeats its reply. So a call whose
reply was lost can be repeated.
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
from gateway.limits.recent_refusals import RecentRefusals
from gateway.limits.redis_messages import counter_key, decode_replies, encode_settle, encode_take
from gateway.limits.redis_script import SCRIPT, RedisScript
from gateway.limits.redis_url import RedisUrl
from gateway.limits.stall_tolerant_timer import StallTolerantTimer, stall_tolerant_timeout
from gateway.limits.token_bucket import Charge, Decision, Limit
from gateway.logs import get_logger, redacted

__all__ = ("RedisCounters",)

# In seconds: the heartbeat of an idle gateway, and the silence after which a gateway counts as gone.
_HEARTBEAT, _GATEWAY_TIMEOUT = 5.0, 20.0
# Seconds between two tries while Redis is unavailable. No request waits for it meanwhile.
_RETRY = 1.0
# Timeout for a new connection with TLS, authentication and cluster discovery, in seconds. No request waits this long.
_CONNECT_TIMEOUT = 3.0
# Maximum number of orders per call: more would block Redis for too long.
_MAX_TAKES, _MAX_SETTLEMENTS = 100, 1000
# Maximum number of pending settlements before takes are rejected, and how long, in seconds, settlements are kept for a
# Redis that is unavailable: after that, tokens no longer matter. (Concurrent use is given back however late.)
_MAX_PENDING, _MAX_PENDING_AGE = 50_000, 3600.0
# Maximum number of names whose limits are cached.
_MAX_CACHED = 50_000
# How long `close` waits for the last settlements, in seconds.
_CLOSE_TIMEOUT = 2.0

_CALL = Struct("<ddB")


class _Take(NamedTuple):
    charges: Sequence[Charge]
    keys: list[bytes]
    order: bytes
    decision: asyncio.Future[Decision]


class _Settlement(NamedTuple):
    key: bytes
    order: bytes
    since: float
    concurrent: bool


@dataclass
class _Call:
    """Orders that are sent together, under one number."""

    number: int
    takes: list[_Take] = field(default_factory=list)
    settlements: list[_Settlement] = field(default_factory=list)
    farewell: bool = False
    repeated: bool = False


class RedisCounters:
    """Counters that several gateways share."""

    def __init__(self, url: RedisUrl, *, script: str = SCRIPT, gateway_timeout: float = _GATEWAY_TIMEOUT) -> None:
        self.url = url
        self._script = RedisScript(url, script)
        self._gateway_timeout = gateway_timeout
        self._id = os.urandom(8).hex().encode()
        self._gateways_key = f"{url.keys}gateways".encode()
        self._last_call_key = f"{url.keys}last:{self._id.decode()}".encode()
        self._refusals = RecentRefusals()
        self._limits: dict[str, Limit] = {}  # of the last take: settlements use them, also after a reload
        self._takes: deque[_Take] = deque()
        self._settlements: deque[_Settlement] = deque()
        self._wakeup = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._number = 0
        self._call: _Call | None = None  # in flight, or to be repeated
        self._unavailable_since: float | None = None
        self._reported_conflict = False
        self._closing = asyncio.Event()

    async def take(self, charges: Sequence[Charge]) -> Decision:
        """Take all charges, or none if one has no room. Raises CountersUnavailable."""
        refusal = self._refusals.find(charges)
        if refusal is not None:
            return refusal
        if self._unavailable_since is not None or self._closing.is_set():
            raise CountersUnavailable(f"{self.url} is unavailable")
        if len(self._settlements) > _MAX_PENDING:
            raise CountersUnavailable(f"{self.url} is too slow: {len(self._settlements)} settlements are pending")
        for charge in charges:
            if self._limits.get(charge.name) is not charge.limit:
                if len(self._limits) >= _MAX_CACHED:
                    self._limits.clear()
                self._limits[charge.name] = charge.limit
        keys = [counter_key(self.url.keys, charge) for charge in charges]
        take = _Take(charges, keys, encode_take(charges), asyncio.get_running_loop().create_future())
        self._takes.append(take)
        self._wake()
        # (It also waits for the call that is in flight.)
        timeout = self.url.timeout * (2 if self._call is not None else 1)
        timer = StallTolerantTimer(timeout, lambda: self._time_out(take))
        try:
            decision = await take.decision
        except asyncio.CancelledError:
            if not take.decision.cancelled() and take.decision.exception() is None:
                self._undo(take.decision.result())  # it arrived in the moment of the cancellation
            raise
        finally:
            timer.cancel()
        if decision.refused:
            self._refusals.add(decision)
        return decision

    def settle(self, decision: Decision, actual: Sequence[float | None]) -> None:
        """Replace the cost of each charge with its actual use. None leaves a charge unchanged."""
        if decision.settled:
            return
        decision.settled = True
        now = time.monotonic()
        for index, (charge, used) in enumerate(zip(decision.charges, actual, strict=True)):
            if used is None or used == charge.cost or not decision.was_taken(index):
                continue
            self._refusals.forget(charge.name)
            charge = Charge(charge.name, self._limits.get(charge.name, charge.limit), charge.cost)  # noqa: PLW2901
            order = encode_settle(charge, decision.records[index], used)
            concurrent = charge.limit.period == "at_once"
            self._settlements.append(_Settlement(counter_key(self.url.keys, charge), order, now, concurrent))
        if self._settlements:
            self._wake()

    async def close(self) -> None:
        """Complete the pending settlements, for two seconds at most, and disconnect."""
        self._closing.set()
        self._wakeup.set()
        if self._worker is not None:
            await asyncio.wait((self._worker,), timeout=_CLOSE_TIMEOUT)
            self._worker.cancel()
            await asyncio.wait((self._worker,))
            self._worker = None
        left = len(self._settlements) + (len(self._call.settlements) if self._call is not None else 0)
        if left:
            get_logger().warning("limit_store_settlements_lost", store=str(self.url), charges=left)
        self._settlements.clear()
        self._call = None
        self._fail(self._takes)
        self._takes.clear()
        await self._script.disconnect()

    @property
    def _idle(self) -> bool:
        """Whether there are no orders, and no call is in flight."""
        return not (self._takes or self._settlements) and self._call is None

    # -- calls -----------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self._wakeup.set()
        if self._worker is None and not self._closing.is_set():
            self._worker = asyncio.create_task(self._work())

    async def _work(self) -> None:
        """Make calls while there are orders, and heartbeats while there are none."""
        while True:
            if self._call is None:
                await self._wait_for_orders()
                self._call = self._next_call()
            call = self._call
            try:
                await self._send(call)
            except Exception as exc:  # any error of the library means that Redis does not respond as it should
                self._mark_unavailable(_reason(exc))
                self._fail(call.takes)
                call.repeated = True
                self._drop_old_settlements()
                await self._script.disconnect()
                self._script.use_next_node()
                if self._closing.is_set() and not (call.settlements or call.takes or self._settlements):
                    return  # only the farewell is left
                await self._pause()
                continue
            self._call = None
            self._mark_available()
            if call.farewell:
                return

    async def _wait_for_orders(self) -> None:
        """Wait for orders, but no longer than until the next heartbeat."""
        if not (self._takes or self._settlements or self._closing.is_set() or self._unavailable_since is not None):
            self._wakeup.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(_HEARTBEAT, self._gateway_timeout / 4)):
                    await self._wakeup.wait()

    def _next_call(self) -> _Call:
        self._number += 1
        call = _Call(self._number)
        if not self._script.connected:
            return call  # connect with an empty call first: requests that time out meanwhile have taken nothing
        # Settlements go first: they make room for the takes.
        while self._settlements and len(call.settlements) < _MAX_SETTLEMENTS:
            call.settlements.append(self._settlements.popleft())
        while self._takes and len(call.takes) < _MAX_TAKES:
            take = self._takes.popleft()
            if not take.decision.done():
                call.takes.append(take)
        call.farewell = self._closing.is_set() and not (call.settlements or call.takes)
        return call

    def _drop_old_settlements(self) -> None:
        """Drop settlements that have waited for so long that they no longer matter."""
        oldest = time.monotonic() - _MAX_PENDING_AGE
        if any(each.since < oldest and not each.concurrent for each in itertools.islice(self._settlements, 1)):
            self._settlements = deque(each for each in self._settlements if each.concurrent or each.since >= oldest)

    async def _pause(self) -> None:
        """Wait before the next try; for a shorter time during `close`."""
        if self._closing.is_set():
            await asyncio.sleep(0.05)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RETRY):
                await self._closing.wait()

    async def _send(self, call: _Call) -> None:
        """Send a call, and deliver its results. If it raises, the call can be repeated."""
        keys = [self._gateways_key, self._last_call_key, *(each.key for each in call.settlements)]
        orders = [each.order for each in call.settlements]
        for take in () if call.repeated else call.takes:
            keys += take.keys
            orders.append(take.order)
        head = _CALL.pack(call.number, self._gateway_timeout, call.farewell)
        seconds = self.url.timeout if self._script.connected else max(self.url.timeout, _CONNECT_TIMEOUT)
        async with stall_tolerant_timeout(seconds):
            reply: bytes = await self._script.run(len(keys), *keys, self._id, head, *orders)
        # (Takes are not repeated: their callers have left. If the script repeats its reply, they had been made.)
        made = call.takes if not call.repeated or reply[:1] == b"\1" else ()
        try:
            decisions = decode_replies(reply, [take.charges for take in made])
        except ValueError:
            decisions = [None] * len(made)
        for take, decision in zip(made, decisions, strict=True):
            self._deliver(take, decision)

    def _deliver(self, take: _Take, decision: Decision | None) -> None:
        if take.decision.done():  # the caller has left
            if decision is not None:
                self._undo(decision)
        elif decision is not None:
            take.decision.set_result(decision)
        else:
            if not self._reported_conflict:
                self._reported_conflict = True
                get_logger().warning("limit_store_key_conflict", store=str(self.url), prefix=self.url.prefix)
            take.decision.set_exception(CountersUnavailable(f"a counter's key in {self.url} holds something else"))

    def _undo(self, decision: Decision) -> None:
        self.settle(decision, [0.0] * len(decision.charges))

    # -- availability ----------------------------------------------------------------------------------

    def _mark_unavailable(self, reason: str) -> None:
        """Note that Redis does not respond: no request waits for it until it does."""
        if self._unavailable_since is None:
            self._unavailable_since = time.monotonic()
            shown = redacted({"reason": reason}, [self.url.password] if self.url.password else [])
            get_logger().warning("limit_store_unavailable", store=str(self.url), **shown)
        self._fail(self._takes)
        self._takes.clear()

    def _time_out(self, take: _Take) -> None:
        """Fail a take that has waited for its timeout."""
        if not take.decision.done():
            self._mark_unavailable(f"no reply within {self.url.timeout:g} s")
            self._fail((take,))

    def _fail(self, takes: Iterable[_Take]) -> None:
        for take in takes:
            if not take.decision.done():
                take.decision.set_exception(CountersUnavailable(f"{self.url} is unavailable"))

    def _mark_available(self) -> None:
        if self._unavailable_since is not None:
            seconds = round(time.monotonic() - self._unavailable_since, 3)
            self._unavailable_since = None
            get_logger().info("limit_store_available", store=str(self.url), seconds=seconds)


def _reason(exc: BaseException) -> str:
    """Return the error, with its cause if the library's text does not include it."""
    text = f"{type(exc).__name__}: {exc}"
    cause = exc.__cause__ or exc.__context__
    if cause is None or (cause.args and str(cause.args[-1]) in text):
        return text
    return f"{text} ({_reason(cause)})"
