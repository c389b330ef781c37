"""One exchange: a request and its response, from the first byte to the end of the stream.

It owns what must happen once, however the exchange ends: the deferred callbacks, and the connection to
Azure. Copies of a request share their exchange.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from gateway.limits.memory_budget import BUDGETS, Hold, MemoryBudget
from gateway.logs import exception_fields, get_logger
from gateway.usage.accounting import UsageMeter
from gateway.usage.reported_usage import Usage

if TYPE_CHECKING:
    from gateway.azure.resources import Target
    from gateway.limits.memory_budget import Hold

__all__ = ("EndedBy", "Exchange", "Outcome")

EndedBy = Literal["complete", "client", "upstream", "gateway"]

# After the deadline, how often (in seconds) a pipeline that still holds on is cancelled again.
_AGAIN = 1.0
# What is counted in most exchanges.
_NONE: Mapping[str, int] = MappingProxyType({})


class Outcome(msgspec.Struct, frozen=True):
    """How an exchange ended; what `request.defer` callbacks are given.

    `status` is the status sent to the client, or 499 where it left before any was. `sent` counts body
    bytes. `first_byte` and `total` are seconds since the request's head had arrived; `first_byte` is None
    when nothing was sent. `ended_by` says who ended it: `complete` is the good end. `target` is where
    Azure was last asked, None if it never was. `error` is the code or name of what went wrong, and `reason`
    the words that the client was told, where they are the gateway's own. `counts` is what `request.count` counted.
    `close_code` is a WebSocket's, of the close frame that was seen or sent first (1005 where it had none). `usage`
    is there where a stage of the pipeline has `needs_usage`, and tokens were used.
    """

    status: int
    sent: int
    first_byte: float | None
    total: float
    ended_by: EndedBy
    target: Target | None
    error: str | None
    reason: str | None = None
    counts: Mapping[str, int] = _NONE
    close_code: int | None = None
    usage: Usage | None = None


class Abortable(Protocol):
    """Something that is closed when the exchange moves on or ends, such as a connection to Azure."""

    def abort(self) -> None:
        """Close at once; do nothing if it is closed or handed back already."""


class BudgetHolder(Protocol):
    """The request of an exchange."""

    @property
    def holder(self) -> str:
        """Whose share of the budgets it uses."""


class _Nobody:
    """Keeps bytes for no client, as probes do."""

    holder = ""


_NOBODY = _Nobody()


class Exchange:
    """What the copies of one request share: callbacks, the upstream connection, the deadline, the facts."""

    # One is made for each request, and most of these are never set: defaults of the class cost nothing.
    first_byte_at: float | None = None
    sent = 0
    status = 499
    ended_by: EndedBy = "client"
    error: str | None = None
    reason: str | None = None
    target: Target | None = None
    counts: dict[str, int] | None = None
    close_code: int | None = None
    meter: UsageMeter | None = None
    """What was used, where somebody wants to know."""
    request: BudgetHolder | None = None
    """Whose share of the budgets is used, if it keeps more than most do; until the exchange is over."""
    taken: dict[str, Any] | None = None
    """What stages took before the body was read, by their ids; see `Request.taken`."""
    before_body: Sequence[Callable[[Any], Awaitable[None]]] = ()
    """What the pipeline's stages do before a body that has not arrived is read."""
    _asked = 0  # how many of them have
    _memory: Hold | None = None
    _disk: Hold | None = None
    _upstream: Abortable | None = None
    _over = False
    _deadline: asyncio.TimerHandle | None = None
    _task: asyncio.Task[object] | None = None
    _expired = False

    def __init__(self) -> None:
        self.started = time.monotonic()
        self._callbacks: list[Callable[[Outcome], None]] = []

    def defer(self, callback: Callable[[Outcome], None]) -> None:
        """Run `callback` once, when the exchange is over; the last one registered runs first."""
        if self._over:
            raise RuntimeError("the exchange is over; register with request.defer() before call_next")
        self._callbacks.append(callback)

    def count(self, name: str, amount: int = 1) -> None:
        """Add to what is counted under `name`."""
        if self.counts is None:
            self.counts = {}
        self.counts[name] = self.counts.get(name, 0) + amount

    def own(self, upstream: Abortable) -> None:
        """Take charge of a connection; the one before it is closed, and this one if the exchange is over."""
        self.release()
        if self._over:
            upstream.abort()
            return
        self._upstream = upstream

    async def before_reading(self) -> None:
        """Let each stage take its share, once, before a body is read that has not arrived.

        Raises ApiError if one refuses; the next reader asks that one again.
        """
        while self._asked < len(self.before_body):
            await self.before_body[self._asked](self.request)
            self._asked += 1

    def hold(self, size: int) -> None:
        """Count `size` more bytes that are kept in memory for this exchange, before they are.

        They are given back when the exchange is over. Raises BudgetExhausted (503, or 413 for more than one caller may
        ever hold); what was held before is still held then.
        """
        self._check_running()
        self._memory = hold = self._memory or self._new_hold(BUDGETS.memory)
        hold.grow(size)

    def let_go(self, size: int) -> None:
        """Count `size` bytes of memory less; after the end nothing is held, and this does nothing."""
        if not self._over and self._memory is not None:
            self._memory.shrink(size)

    def hold_on_disk(self, size: int) -> None:
        """Count `size` more bytes that are kept on disk; as `hold`."""
        self._check_running()
        self._disk = hold = self._disk or self._new_hold(BUDGETS.disk)
        hold.grow(size)

    def let_go_of_disk(self, size: int) -> None:
        """Count `size` bytes on disk less; as `let_go`."""
        if not self._over and self._disk is not None:
            self._disk.shrink(size)

    def _check_running(self) -> None:
        if self._over:
            raise RuntimeError("the exchange is over, and nobody would give back what it holds")

    def _new_hold(self, budget: MemoryBudget) -> Hold:
        if self.request is None:
            self.request = _NOBODY
        # Asked once: what is taken from a share is given back to the same.
        return Hold(budget, self.request.holder)

    def _give_back(self) -> None:
        for hold in (self._memory, self._disk):
            if hold is not None:
                hold.release()
        self.request = None  # which holds the exchange

    def release(self) -> None:
        """Close the connection that the exchange holds, if any."""
        if (upstream := self._upstream) is not None:
            self._upstream = None
            upstream.abort()

    # -- the deadline before the first byte ------------------------------------------------------------

    def run_in(self, task: asyncio.Task[object] | None) -> None:
        """Name the task that the deadline cancels; None when the pipeline has returned."""
        self._task = task
        if task is None and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def expire(self) -> None:
        """Cancel the task that still works on the answer: the deadline is over."""
        if self._task is not None:
            self._expired = True
            self._task.cancel()
            # A stage further up may hang in turn: it is cancelled again until the answer is out.
            self._deadline = asyncio.get_running_loop().call_later(_AGAIN, self.expire)

    def deadline_hit(self) -> bool:
        """Tell whether the cancellation just caught is the deadline's, and take it back if so.

        Only in the task that the deadline cancelled: one that a stage made for its own call is cancelled with it.
        """
        task = self._task
        if not self._expired or task is None:
            return False
        current = asyncio.current_task()
        if current is None or current != task:
            return False
        self._expired = False
        current.uncancel()
        return True

    # -- the end ---------------------------------------------------------------------------------------

    def finish(self) -> None:
        """End the exchange: close what it holds, then run the callbacks. A second call does nothing."""
        if self._over:
            return
        self._over = True
        if self.request is not None:
            self._give_back()
        self.run_in(None)
        self.release()
        callbacks, self._callbacks = self._callbacks, []
        if not callbacks:
            return
        outcome = Outcome(
            status=self.status,
            sent=self.sent,
            first_byte=None if self.first_byte_at is None else self.first_byte_at - self.started,
            total=time.monotonic() - self.started,
            ended_by=self.ended_by,
            target=self.target,
            error=self.error,
            reason=self.reason,
            counts=self.counts or _NONE,
            close_code=self.close_code,
            usage=None if self.meter is None else self.meter.usage(abandoned=self.ended_by == "client"),
        )
        # Emptying the list as it runs also breaks the cycle request -> callbacks -> request.
        while callbacks:
            callback = callbacks.pop()
            try:
                callback(outcome)
            except Exception as exc:
                # By its name: the repr of a method shows its stage, settings and all. And whatever becomes of the
                # log, the other callbacks give back what they hold.
                name = getattr(callback, "__qualname__", type(callback).__name__)
                with contextlib.suppress(Exception):
                    get_logger().error("a deferred callback failed", callback=name, **exception_fields(exc))
