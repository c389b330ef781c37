"""Retries: `Retrier` sends a request to one deployment of its pool after another, until one responds.

It does not balance: `Selector` (`selection.py`) picks the deployments. The first attempt is here, as most requests need
no other; further ones are in `attempts.py`, and the limits and the retry budget in `retry_budget.py`. A request is
never sent again after `send` returned, because bytes of the response may have gone to the client.
"""

from __future__ import annotations

import re
from time import monotonic
from typing import TYPE_CHECKING

from gateway.azure.idempotency import seems_idempotent
from gateway.azure.resources import Pool, Resource
from gateway.balancing.attempts import Attempts, CallNext, RetryContext, target_of
from gateway.balancing.circuit_state import CLOSED
from gateway.balancing.health import Health
from gateway.balancing.retry_budget import RetryBudget, RetryLimits
from gateway.balancing.selection import Candidate, Selector
from gateway.errors import ApiError
from gateway.request import Request
from gateway.response import Response

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

__all__ = ("Retrier",)

# (`in` followed by this search would take twice as long.)
_STREAM = re.compile(rb'"stream"\s*:\s*true')


class Retrier:
    """Sends the requests for one pool, and retries them if they fail."""

    def __init__(
        self,
        pool: Pool,
        health: Health,
        budget: RetryBudget,
        limits: RetryLimits,
        logger: FilteringBoundLogger,
        seed: int | None = None,
    ) -> None:
        """Send within these limits; the same `seed` makes the same selections."""
        self.selector = Selector(pool, health, seed)
        self.budget = budget
        self.limits = limits
        self._context = RetryContext(pool.name, self.selector, budget, limits, logger)
        self._capacity = max(1.0, limits.reserve)
        self._cuts_streams = len(pool.deployments) > 1 and limits.attempts > 1 and limits.silence < limits.deadline

    async def send(self, request: Request, call_next: CallNext, key: bytes | None = None) -> Response:
        """Send a request until a deployment responds, or a retry is not possible.

        Requests with the same `key` go to the same deployment while it is available. If the request's resource is
        known, it goes only there, because it refers to an object in it. Restores the request's target before it
        returns.
        """
        budget, limits, target, begin_by = self.budget, self.limits, request.target, request.first_byte_deadline
        if budget.left < self._capacity:
            budget.left = min(budget.left + limits.retries, self._capacity)
        # (As `buffer_up_to` does, which is another call, and a coroutine.)
        body = None if request._json_replaced else request._body.keep()
        kept = body is not None or await request.buffer_up_to(limits.keep)
        saved, now = request.snapshot(), monotonic()
        deadline = now + limits.deadline
        if begin_by is not None and begin_by < deadline:
            deadline = begin_by
        meter = request._exchange.meter
        asked = meter.asked if meter is not None else 0
        pinned = target.resource is not None
        candidate = self._in(target.resource) if target.resource is not None else self.selector.pick(now, (), key)
        cut = self._cuts_streams and body is not None and not pinned and _can_be_cut_short(request, body)
        response = None
        trial = 0
        if candidate is not None:
            health = candidate.health
            health.in_flight += 1
            if health.state is not CLOSED:
                # (A body that has not arrived may take as long as its client likes.)
                trial = health.begin_trial(now, exclusive=kept)
            request.target = target_of(target, candidate)
            request.first_byte_deadline = (
                deadline if not cut else self._context.stream_deadline(now, deadline, (candidate,))
            )
            try:
                response = await call_next(request)
            except BaseException:
                health.end()
                if trial:
                    health.abandoned(monotonic(), trial)
                raise
            # Most requests are complete here. Only the others pay for an `Attempts` object.
            if (
                response.status < 400
                and response.body.__class__ is bytes
                and response.error is None
                and not response.is_event_stream
            ):
                health.succeeded(monotonic(), trial, response.headers.fields)
                health.in_flight -= 1
                request.target, request.first_byte_deadline = target, begin_by
                return response
        attempts = Attempts(self._context, request, call_next, saved, key, deadline, kept=kept, pinned=pinned, cut=cut)
        if candidate is not None:
            attempts.take_over(candidate, trial, now, asked)
        response = await attempts.run(response)
        request.target, request.first_byte_deadline = target, begin_by
        return response

    def _in(self, resource: Resource) -> Candidate:
        """Return the pool's deployment in a resource. Raises ApiError 400 if there is none."""
        for each in self.selector.all:
            if each.deployment.resource.name == resource.name:
                return each
        raise ApiError(
            400,
            f"The model has no deployment in the resource {resource.name!r}, which stores the object that the request "
            "refers to. Use the model that created the object.",
            param="model",
            code="resource_mismatch",
        )


def _can_be_cut_short(request: Request, body: bytes) -> bool:
    """Whether a request asks for a stream, which starts soon, and may be sent again if the stream does not start."""
    return _STREAM.search(body) is not None and seems_idempotent(request, body)
