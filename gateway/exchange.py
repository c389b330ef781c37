"""One exchange: a request and its response, from the first byte to the end of the stream.

It owns what must happen exactly once, for whatever reason the exchange ends: the deferred callbacks run, and the
connection to Azure is closed or returned. Copies of a request share their exchange.
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
from gateway.usage.usage_fields import Usage

if TYPE_CHECKING:
    from gateway.azure.resources import Target
    from gateway.limits.memory_budget import Hold

__all__ = ("EndedBy", "Exchange", "Outcome")

EndedBy = Literal["complete", "client", "upstream", "gateway"]

# After the deadline: how often, in seconds, a pipeline that still runs is cancelled again.
_CANCEL_AGAIN = 1.0
# The counts of most exchanges.
_NO_COUNTS: Mapping[str, int] = MappingProxyType({})


class Outcome(msgspec.Struct, frozen=True):
    """The outcome of an exchange, for `request.defer` callbacks.

    `status` is the status sent to the client, or 499 if the client left before. `bytes_sent` counts the bytes of the
    body. `first_byte` and `duration` are seconds since the request's head arrived; `first_byte` is None if nothing was
    sent. `ended_by` says who ended the exchange; `complete` is a normal end. `target` is that of the last attempt at
    Azure, or None. `error` is the code or name of the error, and `reason` the gateway's own error message to the
    client, if there is one. `counts` has the totals of `request.count`. `close_code` is the code of a WebSocket's first
    close frame (1005 if it had none). `usage` is set if a stage of the pipeline has `needs_usage` and tokens were used.
    """

    status: int
    bytes_sent: int
    first_byte: float | None
    duration: float
    ended_by: EndedBy
    target: Target | None
    error: str | None
    reason: str | None = None
    counts: Mapping[str, int] = _NO_COUNTS
    close_code: int | None = None
    usage: Usage | None = None


class Abortable(Protocol):
    """Something to close when the exchange tries again or ends, such as a connection to Azure."""

    def abort(self) -> None:
        """Close immediately; do nothing if it is already closed or returned."""


class BudgetHolder(Protocol):
    """The request of an exchange."""

    @property
    def holder(self) -> str:
        """The owner of the memory that it uses."""


class _NoHolder:
    """The holder of bytes that belong to no client, such as a probe's."""

    holder = ""


_NO_HOLDER = _NoHolder()


class Exchange:
    """State that the copies of one request share: callbacks, the upstream connection, the deadline, the outcome."""

    # There is one for each request, and most of these are never set: class attributes as defaults cost nothing.
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
    """Measures the usage, if a stage needs it."""
    request: BudgetHolder | None = None
    """The holder of reserved memory, if any is reserved; None after the end."""
    reservations: dict[str, Any] | None = None
    """What stages reserved before the body was read, by their ids; see `Request.reservations`."""
    before_body: Sequence[Callable[[Any], Awaitable[None]]] = ()
    """The `before_body` methods of the pipeline's stages, if the body has not arrived with the head."""
    _before_body_done = 0  # how many of them have run
    _memory_hold: Hold | None = None
    _disk_hold: Hold | None = None
    _upstream: Abortable | None = None
    _ended = False
    _deadline: asyncio.TimerHandle | None = None
    _task: asyncio.Task[object] | None = None
    _expired = False

    def __init__(self) -> None:
        self.started = time.monotonic()
        self._callbacks: list[Callable[[Outcome], None]] = []

    def defer(self, callback: Callable[[Outcome], None]) -> None:
        """Run `callback` once, when the exchange ends; the last one registered runs first."""
        if self._ended:
            raise RuntimeError("the exchange has ended; call request.defer() before call_next")
        self._callbacks.append(callback)

    def count(self, name: str, amount: int = 1) -> None:
        """Add `amount` to the count of `name`."""
        if self.counts is None:
            self.counts = {}
        self.counts[name] = self.counts.get(name, 0) + amount

    def own_upstream(self, upstream: Abortable) -> None:
        """Own a connection: close the previous one, and this one too if the exchange has ended."""
        self.close_upstream()
        if self._ended:
            upstream.abort()
            return
        self._upstream = upstream

    async def before_reading(self) -> None:
        """Run `before_body` of each stage, once, before the gateway reads a body that has not arrived.

        Raises ApiError if a stage refuses; the next reader then calls that stage again.
        """
        while self._before_body_done < len(self.before_body):
            await self.before_body[self._before_body_done](self.request)
            self._before_body_done += 1

    def reserve_memory(self, size: int) -> None:
        """Reserve `size` bytes of the memory budget, before the data is kept.

        They are released when the exchange ends. Raises BudgetExhausted (503, or 413 for more than one caller may ever
        use); earlier reservations stay.
        """
        self._check_running()
        self._memory_hold = hold = self._memory_hold or self._new_hold(BUDGETS.memory)
        hold.grow(size)

    def release_memory(self, size: int) -> None:
        """Release `size` bytes of memory; does nothing after the end, when all are released."""
        if not self._ended and self._memory_hold is not None:
            self._memory_hold.shrink(size)

    def reserve_disk(self, size: int) -> None:
        """Reserve `size` bytes on disk; see `reserve_memory`."""
        self._check_running()
        self._disk_hold = hold = self._disk_hold or self._new_hold(BUDGETS.disk)
        hold.grow(size)

    def release_disk(self, size: int) -> None:
        """Release `size` bytes on disk; see `release_memory`."""
        if not self._ended and self._disk_hold is not None:
            self._disk_hold.shrink(size)

    def _check_running(self) -> None:
        if self._ended:
            raise RuntimeError("the exchange has ended: a reservation would never be released")

    def _new_hold(self, budget: MemoryBudget) -> Hold:
        if self.request is None:
            self.request = _NO_HOLDER
        # The holder is read once, so that the same one gets the bytes back.
        return Hold(budget, self.request.holder)

    def _release_reservations(self) -> None:
        for hold in (self._memory_hold, self._disk_hold):
            if hold is not None:
                hold.release()
        self.request = None  # it refers to the exchange: a cycle

    def close_upstream(self) -> None:
        """Close the connection that the exchange owns, if any."""
        if (upstream := self._upstream) is not None:
            self._upstream = None
            upstream.abort()

    # -- the deadline before the first byte ------------------------------------------------------------

    def run_in(self, task: asyncio.Task[object] | None) -> None:
        """Set the task that the deadline cancels; None when the pipeline has returned."""
        self._task = task
        if task is None and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def expire(self) -> None:
        """Cancel the task that still works on the response: the deadline has passed."""
        if self._task is not None:
            self._expired = True
            self._task.cancel()
            # An outer stage may hang next: cancel again until the pipeline has returned.
            self._deadline = asyncio.get_running_loop().call_later(_CANCEL_AGAIN, self.expire)

    def deadline_hit(self) -> bool:
        """Return whether the deadline caused the cancellation just caught; if so, call `uncancel`.

        True only in the task that the deadline cancelled: a task that a stage created is cancelled with it.
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
        """End the exchange: close its connection, release its memory, run the callbacks. A second call does nothing."""
        if self._ended:
            return
        self._ended = True
        if self.request is not None:
            self._release_reservations()
        self.run_in(None)
        self.close_upstream()
        callbacks, self._callbacks = self._callbacks, []
        if not callbacks:
            return
        outcome = Outcome(
            status=self.status,
            bytes_sent=self.sent,
            first_byte=None if self.first_byte_at is None else self.first_byte_at - self.started,
            duration=time.monotonic() - self.started,
            ended_by=self.ended_by,
            target=self.target,
            error=self.error,
            reason=self.reason,
            counts=self.counts or _NO_COUNTS,
            close_code=self.close_code,
            usage=None if self.meter is None else self.meter.usage(abandoned=self.ended_by == "client"),
        )
        # Emptying the list also breaks the cycle request -> callbacks -> request.
        while callbacks:
            callback = callbacks.pop()
            try:
                callback(outcome)
            except Exception as exc:
                # Log the name only: the repr of a method shows the settings of its stage. If logging fails, the other
                # callbacks must still release their resources.
                name = getattr(callback, "__qualname__", type(callback).__name__)
                with contextlib.suppress(Exception):
                    get_logger().error("deferred_callback_failed", callback=name, **exception_fields(exc))
