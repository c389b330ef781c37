"""The attempts of one request: the loop that follows the first attempt, if that one failed or returned a stream.

The loop classifies each response (`failure_policy.py`), records it in the deployment's health, and sends the request
again while the limits and the retry budget (`retry_budget.py`) allow that.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import msgspec

from gateway.azure.resources import Target
from gateway.balancing.failure_policy import AttemptFailure, of_error, of_response, of_status
from gateway.balancing.retry_budget import RetryBudget, RetryLimits
from gateway.balancing.selection import Candidate, Selector
from gateway.errors import ApiError, UpstreamError, UpstreamTimeout
from gateway.exchange import Outcome
from gateway.request import Request
from gateway.response import Response

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

__all__ = ("Attempts", "CallNext", "RetryContext", "target_of")

CallNext: TypeAlias = Callable[[Request], Awaitable[Response]]

# Backoff, in seconds, before a request is sent again to available deployments that have all failed it; then doubled.
_FIRST_BACKOFF = 0.25
_MAX_ERROR_BODY = 256 * 1024  # in bytes
_MAX_LOGGED_WORDS = 200  # characters of an error's message in the log
_ERROR_TIMEOUT = 5.0  # for reading the body of an error, in seconds
# The header in which a client may name another deployment, for the image generation tool.
_IMAGES = "x-ms-oai-image-generation-deployment"


class RetryContext(NamedTuple):
    """What the requests of one pool share."""

    pool: str
    selector: Selector
    budget: RetryBudget
    limits: RetryLimits
    logger: FilteringBoundLogger

    def stream_deadline(self, now: float, deadline: float, tried: Sequence[Candidate]) -> float:
        """Return when a stream must have started: before `deadline`, if another deployment is available."""
        until = now + self.limits.silence
        return until if until < deadline and self.selector.has_another(now, tried) else deadline


def target_of(target: Target, candidate: Candidate) -> Target:
    """Return a target with the deployment of a candidate."""
    if target.credential is None and target.api_version is None:
        return candidate.target
    return Target(candidate.deployment.resource, candidate.deployment.name, target.api_version, target.credential)


class Attempts:
    """The attempts of one request, from the end of the first one on."""

    def __init__(
        self,
        context: RetryContext,
        request: Request,
        call_next: CallNext,
        saved: tuple[Any, ...],
        key: bytes | None,
        deadline: float,
        *,
        kept: bool,
        pinned: bool,
        cut: bool,
    ) -> None:
        """Continue with a request that was `saved` before its first attempt.

        `kept`: its body can be sent again. `pinned`: it can go to one resource only. `cut`: it has less time than until
        the deadline, while another deployment is available.
        """
        self._context = context
        self._selector = context.selector
        self._limits = context.limits
        self._request = request
        self._call_next = call_next
        self._saved = saved
        self._key = key
        self._deadline = deadline
        self._kept = kept
        self._pinned = pinned
        self._cut = cut
        self._waited = 0.0
        self._count = 0
        self._tried: list[Candidate] = []
        self._counted: list[Candidate] = []  # whose health has a failure of this request
        self._log: list[dict[str, Any]] = []  # the attempts, for the log
        # The current attempt: its deployment, the trial number, start time, deadline, the meter's count of requests
        # before it, and whether it returned a stream that has started.
        self._candidate: Candidate | None = None
        self._trial = 0
        self._started = self._until = 0.0
        self._asked = 0
        self._streaming = False
        request.defer(self._finished)

    # -- one attempt -----------------------------------------------------------------------------------

    def take_over(self, candidate: Candidate, trial: int, started: float, asked: int) -> None:
        """Make the first attempt the current one."""
        self._candidate, self._trial, self._started, self._asked = candidate, trial, started, asked
        self._until = self._request.first_byte_deadline or self._deadline

    async def _attempt(self, candidate: Candidate) -> Response:
        """Send the request to a deployment."""
        request, now = self._request, monotonic()
        meter = request._exchange.meter
        trial = candidate.health.begin(now, exclusive=self._kept)
        self.take_over(candidate, trial, now, meter.asked if meter is not None else 0)
        request.restore(self._saved)
        request.target = target_of(request.target, candidate)
        tried = (*self._tried, candidate)
        self._until = self._context.stream_deadline(now, self._deadline, tried) if self._cut else self._deadline
        request.first_byte_deadline = self._until
        return await self._call_next(request)

    def _responded(self, response: Response) -> None:
        """Record that the current deployment responds."""
        now = monotonic()
        health = self._current().health
        if response.body.__class__ is bytes and not response.is_event_stream:
            health.succeeded(now, self._trial, response.headers.fields)
        else:
            health.response_started(now, self._trial, response.headers.fields)
            self._streaming = True
        self._trial = 0
        if self._log:
            self._log_attempt({"status": response.status}, now)

    def _refused(self, response: Response) -> None:
        """Record a response that is no failure of the deployment: an error of the client's, or the gateway's own."""
        now = monotonic()
        if self._trial:
            health = self._current().health
            # (A deployment that finds a mistake in a request is reachable.)
            if response.error is None and response.status not in (401, 403):
                health.response_started(now, self._trial)
            else:
                health.abandoned(now, self._trial)
            self._trial = 0
        if self._log:
            self._log_attempt({"status": response.status}, now)

    def _finished(self, outcome: Outcome) -> None:
        """Record the end of the exchange."""
        candidate, now = self._candidate, monotonic()
        if candidate is None:
            return
        candidate.health.end()
        if self._trial:
            candidate.health.abandoned(now, self._trial)
        elif self._streaming and outcome.ended_by == "upstream" and _is_at(outcome.target, candidate):
            candidate.health.failed(now, "broken_off")  # in the middle of its response
        elif self._streaming:
            candidate.health.succeeded(now)

    def _current(self) -> Candidate:
        """Return the deployment of the current attempt."""
        assert self._candidate is not None, "no attempt was made"  # noqa: S101 -- a bug of ours
        return self._candidate

    def _log_attempt(self, facts: dict[str, Any], now: float) -> None:
        """Add the current attempt to the log event of the exchange."""
        took = round((now - self._started) * 1000, 1)
        self._log.append({"deployment": self._current().name, **facts, "ms": took})
        self._request.notes["attempts"] = self._log

    # -- the loop --------------------------------------------------------------------------------------

    async def run(self, response: Response | None) -> Response:
        """Continue after the response of the first attempt, or with the first attempt if none was possible before."""
        best: Response | None = None
        unprocessed = True  # Azure certainly did not process the last attempt
        while True:
            stopped: str | None = None
            if response is not None:
                self._count += 1
                response, failure = await self._inspect(response)
                if failure is None:
                    if response.status < 400 and response.error is None:
                        self._responded(response)
                    else:
                        self._refused(response)
                    return response
                self._record_failure(response, failure)
                unprocessed = failure.retry == "always"
                stopped = await self._why_not_retried(failure)
                if stopped is None or monotonic() >= self._deadline:
                    await self._read_error(response)
                best = _more_useful(best, response)
            candidate = None if stopped is not None else await self._next()
            if candidate is None:
                unavailable = "no other deployment is available" if self._count else "no deployment is available"
                return self._give_up(best, stopped or unavailable)
            if self._count and not unprocessed and not self._context.budget.take():
                return self._give_up(best, "the retry budget is used up")
            response = await self._attempt(candidate)

    def _record_failure(self, response: Response, failure: AttemptFailure) -> None:
        """Record a failure in the deployment's health, and end the current attempt."""
        candidate, now, trial = self._current(), monotonic(), self._trial
        words = failure.message[:_MAX_LOGGED_WORDS]
        facts: dict[str, Any] = {"status": response.status, "reason": failure.reason, "words": words}
        if failure.blames_deployment:
            # A request counts as one failure of each deployment; if it may itself be the cause, as one in total.
            counts = candidate not in self._counted and not (failure.maybe_request and self._counted)
            self._counted.append(candidate)
            candidate.health.failed(
                now, failure.reason, words, trial=trial, permanent=failure.permanent, counts=counts
            )  # fmt: skip
        if failure.cooldown is not None:
            trial = 0 if failure.blames_deployment else trial
            candidate.health.cool_down(now, failure.cooldown, failure.reason, words, trial=trial)
        elif not failure.blames_deployment and trial:
            candidate.health.abandoned(now, trial)
        if (rest := candidate.health.available_in(now)) > 0:
            facts["rest"] = round(rest, 3)
        if self._request._exchange.meter is not None:
            self._request._exchange.meter.forget(self._asked)
        self._log_attempt(facts, now)
        candidate.health.end()
        self._tried.append(candidate)
        self._candidate, self._trial = None, 0

    async def _why_not_retried(self, failure: AttemptFailure) -> str | None:
        """Return why the request is not sent again, or None."""
        if failure.retry == "never":
            return failure.reason
        if self._pinned:
            return "the request refers to an object in this resource"
        if self._count >= self._limits.attempts:
            return "the limit of attempts is reached"
        if failure.retry == "if_idempotent" and not await self._request.is_idempotent():
            return "the request may have been processed and is not idempotent"
        if not self._kept and not failure.before_body:
            return "the body is larger than `keep`"
        if monotonic() >= self._deadline:
            return "the deadline has passed"
        return None

    async def _next(self) -> Candidate | None:
        """Return the next deployment; wait for one to become available if that is soon enough."""
        selector, now = self._selector, monotonic()
        until = min(now + self._limits.wait - self._waited, self._deadline)
        candidate = selector.pick(now, self._tried, self._key)
        if candidate is None and not self._limits.wait:
            return selector.pick_throttled(now, self._tried)  # the request must not wait
        backoff = _FIRST_BACKOFF
        while candidate is None:
            delay = selector.available_in(now)
            if self._tried and delay <= 0:  # the available ones have just failed
                delay, backoff = backoff, 2 * backoff
            if now + delay > until or now >= until:
                return None
            with selector.waiting():
                await asyncio.sleep(max(delay, 0.001) + selector.jitter(until - now - delay))
            self._waited += monotonic() - now
            now = monotonic()
            self._tried.clear()
            candidate = selector.pick(now, (), self._key)
        return candidate

    def _give_up(self, best: Response | None, stopped: str) -> Response:
        """Return the error for the client after the last attempt."""
        now = monotonic()
        rows = [each.health for each in self._selector.all if not each.health.half_open]
        waits = [seconds for each in rows if (seconds := each.available_in(now)) > 0]
        soonest = min(waits, default=1.0)
        if best is None:
            best = Response.from_error(_unavailable(self._selector, soonest))
        elif best.status in (401, 403) and best.error is None:
            # The client would look for the mistake in its own key.
            best = Response.from_error(
                ApiError(
                    502,
                    "Azure rejected the gateway's credential for this model. Contact the gateway's operator and quote "
                    f"request id {self._request.id}.",
                    code="upstream_error",
                )
            )
        if best.status in (429, 503):
            asked = best.retry_after()
            soonest = min(soonest, asked) if waits and asked is not None else soonest if asked is None else asked
            best.headers.set("retry-after", str(math.ceil(soonest)))
            best.headers.set("retry-after-ms", str(math.ceil(soonest * 1000)))
        self._context.logger.warning(
            "pool_failed",
            request_id=self._request.id,
            pool=self._context.pool,
            stopped=stopped,
            attempts=self._log,
            resting={each.name: each.health.reason for each in self._selector.all if each.health.available_in(now) > 0},
        )
        return best

    # -- inspecting a response -------------------------------------------------------------------------

    async def _inspect(self, response: Response) -> tuple[Response, AttemptFailure | None]:
        """Return a response, and the failure that it means; None if another deployment would respond the same."""
        if response.status == 200 and response.error is None and response.is_event_stream:
            response, failure = await self._inspect_stream(response)
        else:
            own = self._request.target.credential is None and self._current().deployment.resource.has_credential
            failure = await of_response(response, own_credential=own, seconds=self._at_most(_ERROR_TIMEOUT))
        if failure is not None and failure.reason == "no_deployment" and _IMAGES in self._request.headers:
            failure = None  # it may be the deployment in that header
        if failure is not None and failure.reason in ("timeout", "connect_timeout", "dns_timeout", "stalled"):
            usual = self._limits.silence if self._cut else self._limits.deadline
            timeouts = self._current().deployment.resource.timeouts
            if timeouts is not None and timeouts.first_byte is not None:
                usual = min(usual, timeouts.first_byte)
            if self._until - self._started < usual / 2:
                # It had too little time, because earlier attempts had used it.
                failure = msgspec.structs.replace(failure, blames_deployment=False)
        return response, failure

    async def _inspect_stream(self, response: Response) -> tuple[Response, AttemptFailure | None]:
        """Inspect the beginning of a stream, and hold it back until it is known to be no error."""
        timeouts = self._current().deployment.resource.timeouts
        started = monotonic()
        timeout = max(0.0, self._until - started)
        if timeouts is not None and timeouts.first_byte is not None:
            timeout = min(timeout, timeouts.first_byte)
        try:
            begun = await response.peek(bool, timeout)
            if not begun and monotonic() - started < timeout:
                raise UpstreamError("Azure ended a stream without sending an event. Retry the request.")
            if not begun:
                text = f"Azure started a stream, but sent no event within {timeout:g} s. Retry the request."
                raise UpstreamTimeout(text, fault="stalled")
            found = await response.opening_error(self._at_most(self._limits.hold), responses=True)
        except UpstreamError as exc:
            return Response.from_error(exc), of_error(exc)
        failure = None if found is None else of_status(response, found.status, found.message)
        if found is None or failure is None:
            return response, None
        if found.from_responses_api and failure.retry == "always":
            failure.retry = "if_idempotent"  # a response was created, and may be stored
        return response.error_response(found), failure

    def _at_most(self, seconds: float) -> float:
        """Return a number of seconds, or the time until the deadline if that is less."""
        return min(seconds, max(0.0, self._deadline - monotonic()))

    async def _read_error(self, response: Response) -> None:
        """Read the whole body of an error before the next attempt closes its connection; replace a slow one."""
        if isinstance(response.body, bytes):
            return
        try:
            async with asyncio.timeout(self._at_most(_ERROR_TIMEOUT)):
                await response.read(_MAX_ERROR_BODY)
        except (ApiError, TimeoutError):
            response.body = ApiError(response.status, f"Azure responded with status {response.status}.").body()
            response.headers.set("content-type", "application/json")
            response.headers.remove("content-length")


def _is_at(target: Target | None, candidate: Candidate) -> bool:
    """Whether a target is a candidate's deployment."""
    there = candidate.deployment
    return target is not None and target.resource is there.resource and target.deployment == there.name


def _more_useful(one: Response | None, other: Response) -> Response:
    """Return the more useful of two errors.

    If every attempt fails, the client gets the most useful error: a 429 if there is one, else Azure's own error, else a
    connection error, else a 401, 403 or 404, which the client cannot correct.
    """

    def rank(response: Response) -> int:
        if response.status == 429:
            return 3
        if isinstance(response.error, UpstreamError):
            return 1
        return 0 if response.status in (401, 403, 404) else 2

    return other if one is None or rank(other) >= rank(one) else one


def _unavailable(selector: Selector, wait: float) -> ApiError:
    """Return the error for a request while no deployment is available."""
    limited = all(each.health.reason in ("rate_limited", "abuse_penalty") for each in selector.all)
    retry = f"Retry in {math.ceil(wait)} s."
    if limited:
        return ApiError(
            429, f"Azure is rate limiting every deployment of this model. {retry}", code="rate_limit_exceeded"
        )
    return ApiError(503, f"No deployment of this model is available. {retry}", code="no_deployment_available")
