"""One request on its way through a pool: the deployments that it is sent to, one after another, until one answers.

Nothing is sent again once anything of an answer may have gone to the client, which is as soon as `send` returns.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from gateway.azure.idempotency import seems_idempotent
from gateway.azure.resources import Pool, Resource, Target
from gateway.balancing.circuit_breaker import Health
from gateway.balancing.retry_policy import AttemptFailure, of_answer, of_error, of_status
from gateway.balancing.selection import Selection, Selector
from gateway.errors import ApiError, UpstreamError, UpstreamTimeout
from gateway.exchange import Outcome
from gateway.request import Request
from gateway.response import Response

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

__all__ = ("Retrier", "RetryBudget", "RetryLimits")

CallNext: TypeAlias = Callable[[Request], Awaitable[Response]]

# How long, in seconds, a request waits before it is sent again to those that have failed it and do not rest.
_FIRST_PAUSE = 0.25
_MOST = 256 * 1024  # of an error's body, in bytes
_MOST_WORDS = 200  # of them in the log
_ERROR = 5.0  # how long, in seconds, it is waited for
# (`in` and then this would take twice as long.)
_STREAM = re.compile(rb'"stream"\s*:\s*true')
# In which a client may name another deployment, for the tool that makes images.
_IMAGES = "x-ms-oai-image-generation-deployment"


@dataclass(frozen=True)
class RetryLimits:
    """What bounds the attempts of one request.

    `deadline` is in seconds from now until an answer must have begun, and `silence` from an attempt until a stream must
    have, while another deployment can be asked. `attempts` are all of them, `wait` for how many
    seconds a request may wait in all where all deployments rest, and `hold` for how many a stream's beginning is kept
    back. A body of more than `keep` bytes is not kept, and so sent once. Attempts behind one that may have been
    processed are bounded by a budget: each request adds the share `retries` of one, up to `reserve`.
    """

    deadline: float
    silence: float = 60.0
    attempts: int = 5
    wait: float = 5.0
    hold: float = 10.0
    keep: int = 16 * 1024 * 1024
    retries: float = 0.2
    reserve: float = 100.0


class RetryBudget:
    """What is left of a budget for attempts; those who share it may have different limits for it."""

    def __init__(self, left: float) -> None:
        self.left = left

    def take(self) -> bool:
        """Take one, if there is one."""
        if self.left < 1:
            return False
        self.left -= 1
        return True


class Retrier:
    """Sends the requests for one pool to its deployments."""

    def __init__(
        self,
        pool: Pool,
        health: Health,
        budget: RetryBudget,
        limits: RetryLimits,
        logger: FilteringBoundLogger,
        seed: int | None = None,
    ) -> None:
        """Send within these limits; under one `seed` the choices are the same each time."""
        self.pool = pool
        self.chooser = Selector(pool, health, seed)
        self.budget = budget
        self.limits = limits
        self.logger = logger
        self._most = max(1.0, limits.reserve)
        self._impatient = len(pool.deployments) > 1 and limits.attempts > 1 and limits.silence < limits.deadline

    async def send(self, request: Request, call_next: CallNext, key: bytes | None = None) -> Response:
        """Send a request until a deployment answers it, or it must not be sent again.

        Requests of one `key` go to one deployment, while it is available. A request whose resource is known goes there,
        once: what it is about is kept there. Its target is its own again when this returns.
        """
        budget, limits, target, begin_by = self.budget, self.limits, request.target, request.first_byte_deadline
        if budget.left < self._most:
            budget.left = min(budget.left + limits.retries, self._most)
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
        choice = self._there(target.resource) if target.resource is not None else self.chooser.pick(now, (), key)
        impatient = self._impatient and body is not None and not pinned and _can_be_cut_short(request, body)
        response = None
        trying = 0
        if choice is not None:
            health = choice.health
            health.in_flight += 1
            if health.cautious:
                # (A body that is on its way may take as long as its client likes.)
                trying = health.begin_try(now, alone=kept)
            request.target = _to(target, choice)
            request.first_byte_deadline = deadline if not impatient else self.until(now, deadline, (choice,))
            try:
                response = await call_next(request)
            except BaseException:
                health.end()
                if trying:
                    health.left(monotonic(), trying)
                raise
            # Nearly every request is over with this, and what the others need is made when it is not.
            if (
                response.status < 400
                and response.body.__class__ is bytes
                and response.error is None
                and not response.is_event_stream
            ):
                health.succeeded(monotonic(), trying, response.headers.fields)
                health.in_flight -= 1
                request.target, request.first_byte_deadline = target, begin_by
                return response
        attempts = _Attempts(
            self, request, call_next, saved, key, deadline, kept=kept, pinned=pinned, impatient=impatient
        )
        if choice is not None:
            attempts.take_over(choice, trying, now, asked)
        response = await attempts.on(response)
        request.target, request.first_byte_deadline = target, begin_by
        return response

    def until(self, now: float, deadline: float, tried: Sequence[Selection]) -> float:
        """Return until when a stream may take to begin: not as long as all may, if there is another to ask."""
        until = now + self.limits.silence
        return until if until < deadline and self.chooser.has_another(now, tried) else deadline

    def _there(self, resource: Resource) -> Selection:
        """Return the pool's deployment in a resource. Raises ApiError 400 where it has none there."""
        for each in self.chooser.all:
            if each.deployment.resource.name == resource.name:
                return each
        raise ApiError(
            400, f"the model is not in the resource {resource.name!r}", param="model", code="resource_mismatch"
        )


def _to(target: Target, choice: Selection) -> Target:
    """Return a target at a deployment of its pool."""
    if target.credential is None and target.api_version is None:
        return choice.target
    return Target(choice.deployment.resource, choice.deployment.name, target.api_version, target.credential)


def _can_be_cut_short(request: Request, body: bytes) -> bool:
    """Whether a request is for a stream, which begins soon, and may be sent again where that does not."""
    return _STREAM.search(body) is not None and seems_idempotent(request, body)


class _Attempts:
    """The attempts of one request, where the first one has not answered it, or is not over with its answer."""

    def __init__(
        self,
        balancer: Retrier,
        request: Request,
        call_next: CallNext,
        saved: tuple[Any, ...],
        key: bytes | None,
        deadline: float,
        *,
        kept: bool,
        pinned: bool,
        impatient: bool,
    ) -> None:
        """Go on with a request that was `saved` before its first attempt.

        `kept` says that its body can be sent again, `pinned` that it can go nowhere else, and `impatient` that it is
        not waited for as long as the deadline says, while there is another deployment to ask.
        """
        self._balancer = balancer
        self._chooser = balancer.chooser
        self._limits = balancer.limits
        self._request = request
        self._call_next = call_next
        self._saved = saved
        self._key = key
        self._deadline = deadline
        self._kept = kept
        self._pinned = pinned
        self._impatient = impatient
        self._waited = 0.0
        self._count = 0
        self._tried: list[Selection] = []
        self._counted: list[Selection] = []  # as failing
        self._failed: list[dict[str, Any]] = []  # for the log
        # Of the attempt at hand: what is asked, or has answered; the number of the try that it is, if it rested; when
        # it began; until when it may take to begin; how often Azure had been asked before; whether it is by a stream.
        self._choice: Selection | None = None
        self._trying = 0
        self._begun = self._until = 0.0
        self._asked = 0
        self._answering = False
        request.defer(self._over)

    # -- one attempt -----------------------------------------------------------------------------------

    def take_over(self, choice: Selection, trying: int, begun: float, asked: int) -> None:
        """Take charge of the first attempt."""
        self._choice, self._trying, self._begun, self._asked = choice, trying, begun, asked
        self._until = self._request.first_byte_deadline or self._deadline

    async def _attempt(self, choice: Selection) -> Response:
        """Ask one deployment."""
        request, now = self._request, monotonic()
        meter = request._exchange.meter
        trying = choice.health.begin(now, alone=self._kept)
        self.take_over(choice, trying, now, meter.asked if meter is not None else 0)
        request.restore(self._saved)
        request.target = _to(request.target, choice)
        tried = (*self._tried, choice)
        self._until = self._balancer.until(now, self._deadline, tried) if self._impatient else self._deadline
        request.first_byte_deadline = self._until
        return await self._call_next(request)

    def _began(self, response: Response) -> None:
        """Note that the deployment at hand has begun to answer."""
        now = monotonic()
        health = self._at_hand().health
        if response.body.__class__ is bytes and not response.is_event_stream:
            health.succeeded(now, self._trying, response.headers.fields)
        else:
            health.began(now, self._trying, response.headers.fields)
            self._answering = True
        self._trying = 0
        if self._failed:
            self._tell({"status": response.status}, now)

    def _passed(self, response: Response) -> None:
        """Note an answer that says nothing of the deployment: an error that is the client's, or the gateway's own."""
        now = monotonic()
        if self._trying:
            health = self._at_hand().health
            # (Whoever says what is wrong with a request is there.)
            if response.error is None and response.status not in (401, 403):
                health.began(now, self._trying)
            else:
                health.left(now, self._trying)
            self._trying = 0
        if self._failed:
            self._tell({"status": response.status}, now)

    def _over(self, outcome: Outcome) -> None:
        """Note the end of the exchange."""
        choice, now = self._choice, monotonic()
        if choice is None:
            return
        choice.health.end()
        if self._trying:
            choice.health.left(now, self._trying)
        elif self._answering and outcome.ended_by == "upstream" and _is_at(outcome.target, choice):
            choice.health.failed(now, "broken_off")  # in the middle of its answer
        elif self._answering:
            choice.health.succeeded(now)

    def _at_hand(self) -> Selection:
        """Return the deployment at hand."""
        assert self._choice is not None, "none was asked"  # noqa: S101 -- a bug of ours
        return self._choice

    def _tell(self, facts: dict[str, Any], now: float) -> None:
        """Note an attempt for the log."""
        took = round((now - self._begun) * 1000, 1)
        self._failed.append({"deployment": self._at_hand().name, **facts, "ms": took})
        self._request.notes["attempts"] = self._failed

    # -- more than one ---------------------------------------------------------------------------------

    async def on(self, response: Response | None) -> Response:
        """Go on after the first attempt, or without one, where no deployment was available."""
        best: Response | None = None
        sure = True  # the last attempt surely was not processed
        while True:
            stopped: str | None = None
            if response is not None:
                self._count += 1
                response, failure = await self._look(response)
                if failure is None:
                    (self._began if response.status < 400 and response.error is None else self._passed)(response)
                    return response
                self._note(response, failure)
                sure = failure.again == "surely"
                stopped = await self._stop(failure)
                if stopped is None or monotonic() >= self._deadline:
                    await self._keep(response)
                best = _more_telling(best, response)
            choice = None if stopped is not None else await self._next()
            if choice is None:
                return self._given_up(best, stopped or ("none is left" if self._count else "all rest"))
            if self._count and not sure and not self._balancer.budget.take():
                return self._given_up(best, "the retry budget is used up")
            response = await self._attempt(choice)

    def _note(self, response: Response, failure: AttemptFailure) -> None:
        """Note a failure, and let go of the deployment."""
        choice, now, tried = self._at_hand(), monotonic(), self._trying
        words = failure.words[:_MOST_WORDS]
        facts: dict[str, Any] = {"status": response.status, "reason": failure.reason, "words": words}
        if failure.fails:
            # One request says of a deployment once that it fails; of an error that may be its own fault once in all.
            counts = choice not in self._counted and not (failure.by_request and self._counted)
            self._counted.append(choice)
            choice.health.failed(now, failure.reason, words, tried=tried, certain=failure.certain, counts=counts)
        if failure.rest is not None:
            tried = 0 if failure.fails else tried
            choice.health.cool_down(now, failure.rest, failure.reason, words, tried=tried)
        elif not failure.fails and tried:
            choice.health.left(now, tried)
        if (rest := choice.health.available_in(now)) > 0:
            facts["rest"] = round(rest, 3)
        if self._request._exchange.meter is not None:
            self._request._exchange.meter.forget(self._asked)
        self._tell(facts, now)
        choice.health.end()
        self._tried.append(choice)
        self._choice, self._trying = None, 0

    async def _stop(self, failure: AttemptFailure) -> str | None:
        """Return why the request is not sent again, or None."""
        if failure.again == "never":
            return failure.reason
        if self._pinned:
            return "what it is about is kept there, and nowhere else"
        if self._count >= self._limits.attempts:
            return "it was sent as often as it may be"
        if failure.again == "if_repeatable" and not await self._request.is_idempotent():
            return "it may have been processed, and must not be twice"
        if not self._kept and not failure.unread:
            return "its body is too large to be kept"
        if monotonic() >= self._deadline:
            return "the deadline is over"
        return None

    async def _next(self) -> Selection | None:
        """Return the next deployment to ask; waits for one to come back where that is soon enough."""
        chooser, now = self._chooser, monotonic()
        until = min(now + self._limits.wait - self._waited, self._deadline)
        choice = chooser.pick(now, self._tried, self._key)
        if choice is None and not self._limits.wait:
            return chooser.pick_held_back(now, self._tried)  # it cannot wait for its turn
        pause = _FIRST_PAUSE
        while choice is None:
            back = chooser.available_in(now)
            if self._tried and back <= 0:  # those that do not rest have failed just now
                back, pause = pause, 2 * pause
            if now + back > until or now >= until:
                return None
            with chooser.waiting():
                await asyncio.sleep(max(back, 0.001) + chooser.jitter(until - now - back))
            self._waited += monotonic() - now
            now = monotonic()
            self._tried.clear()
            choice = chooser.pick(now, (), self._key)
        return choice

    def _given_up(self, best: Response | None, stopped: str) -> Response:
        """Return the answer where no deployment gave one."""
        now = monotonic()
        rows = [each.health for each in self._chooser.all if not each.health.trying]
        waits = [seconds for each in rows if (seconds := each.available_in(now)) > 0]
        soonest = min(waits, default=1.0)
        if best is None:
            best = Response.from_error(_all_rest(self._chooser, soonest))
        elif best.status in (401, 403) and best.error is None:
            # As it stands the client would look for the mistake in its own key.
            best = Response.from_error(
                ApiError(
                    502,
                    "Azure refuses the credential that the gateway itself has for this model; its operator finds this "
                    f"as {self._request.id}",
                    code="upstream_error",
                )
            )
        if best.status in (429, 503):
            told = best.retry_after()
            soonest = min(soonest, told) if waits and told is not None else soonest if told is None else told
            best.headers.set("retry-after", str(math.ceil(soonest)))
            best.headers.set("retry-after-ms", str(math.ceil(soonest * 1000)))
        self._balancer.logger.warning(
            "no deployment of a pool has answered",
            request_id=self._request.id,
            pool=self._balancer.pool.name,
            stopped=stopped,
            attempts=self._failed,
            resting={each.name: each.health.reason for each in self._chooser.all if each.health.available_in(now) > 0},
        )
        return best

    # -- what an answer means --------------------------------------------------------------------------

    async def _look(self, response: Response) -> tuple[Response, AttemptFailure | None]:
        """Return an answer, and why it is a failure that another deployment may not have; None where it is none."""
        if response.status == 200 and response.error is None and response.is_event_stream:
            response, failure = await self._look_into(response)
        else:
            own = self._request.target.credential is None and self._at_hand().deployment.resource.has_credential
            failure = await of_answer(response, own_credential=own, seconds=self._left(_ERROR))
        if failure is not None and failure.reason == "no_deployment" and _IMAGES in self._request.headers:
            failure = None  # it may be the one of that header
        if failure is not None and failure.reason in ("timeout", "connect_timeout", "dns_timeout", "stalled"):
            usual = self._limits.silence if self._impatient else self._limits.deadline
            timeouts = self._at_hand().deployment.resource.timeouts
            if timeouts is not None and timeouts.first_byte is not None:
                usual = min(usual, timeouts.first_byte)
            if self._until - self._begun < usual / 2:
                # It had less time than it may take, since others had taken it.
                failure = msgspec.structs.replace(failure, fails=False)
        return response, failure

    async def _look_into(self, response: Response) -> tuple[Response, AttemptFailure | None]:
        """Look at the beginning of a stream, which is kept back until it is known to be one."""
        own = self._at_hand().deployment.resource.timeouts
        looked = monotonic()
        patience = max(0.0, self._until - looked)
        if own is not None and own.first_byte is not None:
            patience = min(patience, own.first_byte)
        try:
            begun = await response.peek(bool, patience)
            if not begun and monotonic() - looked < patience:
                raise UpstreamError("Azure ended a stream that had nothing in it")
            if not begun:
                said = f"Azure began a stream, and sent nothing in it for {patience:g} s"
                raise UpstreamTimeout(said, fault="stalled")
            found = await response.opening_error(self._left(self._limits.hold), responses=True)
        except UpstreamError as exc:
            return Response.from_error(exc), of_error(exc)
        failure = None if found is None else of_status(response, found.status, found.message)
        if found is None or failure is None:
            return response, None
        if found.from_responses_api and failure.again == "surely":
            failure.again = "if_repeatable"  # a response was made, and may be stored
        return response.error_response(found), failure

    def _left(self, seconds: float) -> float:
        """Return so many seconds, or what is left of all, if that is less."""
        return min(seconds, max(0.0, self._deadline - monotonic()))

    async def _keep(self, response: Response) -> None:
        """Read an error whole: its connection is closed when another is asked, and one that drips keeps nobody."""
        if isinstance(response.body, bytes):
            return
        try:
            async with asyncio.timeout(self._left(_ERROR)):
                await response.read(_MOST)
        except (ApiError, TimeoutError):
            response.body = ApiError(response.status, f"Azure answered with status {response.status}").body()
            response.headers.set("content-type", "application/json")
            response.headers.remove("content-length")


def _is_at(target: Target | None, choice: Selection) -> bool:
    """Whether a target is a deployment."""
    there = choice.deployment
    return target is not None and target.resource is there.resource and target.deployment == there.name


def _more_telling(one: Response | None, other: Response) -> Response:
    """Return which of two errors tells a client more: when to come back, what Azure said, that it was away."""

    def rank(response: Response) -> int:
        if response.status == 429:
            return 3
        if isinstance(response.error, UpstreamError):
            return 1
        return 0 if response.status in (401, 403, 404) else 2

    return other if one is None or rank(other) >= rank(one) else one


def _all_rest(chooser: Selector, wait: float) -> ApiError:
    """Return the error for a request that came while every deployment rests."""
    limited = all(each.health.reason in ("rate_limited", "abuse_penalty") for each in chooser.all)
    when = f"try again in {math.ceil(wait)} s"
    if limited:
        return ApiError(
            429, f"Azure limits every deployment of this model at present; {when}", code="rate_limit_exceeded"
        )
    return ApiError(
        503, f"no deployment of this model can be reached at present; {when}", code="no_deployment_available"
    )
