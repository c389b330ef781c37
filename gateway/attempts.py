"""One request on its way through a pool: the deployments that it is sent to, one after another, until one answers.

Nothing is sent again once anything of an answer may have gone to the client, which is as soon as `send` returns.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

from gateway.choosing import Choice, Chooser
from gateway.errors import ApiError, UpstreamError
from gateway.exchange import Outcome
from gateway.failures import Failure, of_answer, of_error, of_status
from gateway.messages import Request, Response

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

__all__ = ("AttemptLimits", "Attempts", "RetryBudget")

# How often, in seconds, somebody looks whether the one request that tries a deployment has come back.
_LOOK_AGAIN = 0.05
# How long, in seconds, a request waits before it is sent again to those that have failed it and do not rest.
_FIRST_PAUSE = 0.25
# The longest, in seconds, that a stream's first event is waited for; the connection's own time-out ends it sooner.
_LONGEST = 3600.0


@dataclass(frozen=True)
class AttemptLimits:
    """What bounds the attempts of one request.

    `attempts` are all of them. `deadline` is in seconds from now until an answer must have begun, `wait` for how many a
    request may wait where all deployments rest, and `hold` for how many a stream's beginning is kept back. A body of
    more than `keep` bytes is not kept, and so sent once.
    """

    attempts: int = 5
    deadline: float | None = None
    wait: float = 5.0
    hold: float = 10.0
    keep: int = 16 * 1024 * 1024


class RetryBudget:
    """How many more attempts there may be than requests: each request adds a share of one, up to a reserve."""

    def __init__(self) -> None:
        self.left = math.inf
        self.share = 0.0
        self.most = 0.0

    def use(self, share: float, most: float) -> None:
        """Have another share and another reserve; what is left stays, as far as it may."""
        self.share, self.most = share, most
        self.left = min(self.left, most)

    def add(self) -> None:
        """Add what a request adds."""
        if self.left < self.most:
            self.left = min(self.left + self.share, self.most)

    def take(self) -> bool:
        """Take one, if there is one."""
        if self.left < 1:
            return False
        self.left -= 1
        return True


class Attempts:
    """One request on its way through a pool."""

    __slots__ = (
        "_begun",
        "_budget",
        "_call_next",
        "_chooser",
        "_count",
        "_current",
        "_deadline",
        "_failed",
        "_kept",
        "_key",
        "_limits",
        "_logger",
        "_request",
        "_tried",
        "_trying",
    )

    def __init__(
        self,
        request: Request,
        call_next: Callable[[Request], Awaitable[Response]],
        chooser: Chooser,
        budget: RetryBudget,
        limits: AttemptLimits,
        logger: FilteringBoundLogger,
    ) -> None:
        now = monotonic()
        self._kept = False
        self._key: bytes | None = None
        self._budget = budget
        self._limits = limits
        self._logger = logger
        self._request = request
        self._call_next = call_next
        self._chooser = chooser
        self._deadline = math.inf if limits.deadline is None else now + limits.deadline
        self._current: Choice | None = None  # what is asked, or has answered
        self._trying = False  # it rested, and this is the request that tries it
        self._begun = now
        self._count = 0
        self._tried: list[Choice] = []
        self._failed: list[dict[str, Any]] = []  # for the log

    async def send(self, key: bytes | None = None) -> Response:
        """Send the request until a deployment answers it, or it must not be sent again. Call it once.

        Requests of one `key` go to one deployment, while it is available.
        """
        self._budget.add()
        self._request.defer(self._over)
        if (resource := self._request.target.resource) is not None:
            # What it is about is kept there, and nowhere else.
            return await self._pinned(resource.name)
        self._kept = await self._request.buffer_up_to(self._limits.keep)
        self._key = key
        choice = self._chooser.pick(self._begun, (), key)
        if choice is None:
            return await self._on(None)
        response = await self._attempt(choice)
        if response.status < 400 and response.error is None and not response.event_stream:
            self._succeeded(response)
            return response
        return await self._on(response)

    # -- one attempt -----------------------------------------------------------------------------------

    async def _attempt(self, choice: Choice) -> Response:
        """Ask one deployment."""
        self._current = choice
        self._trying = choice.health.begin()
        self._count += 1
        request, deployment = self._request, choice.deployment
        asked = request.copy(target=request.target.replace(resource=deployment.resource, deployment=deployment.name))
        if self._deadline < math.inf:
            asked.begin_by = self._deadline
        return await self._call_next(asked)

    def _succeeded(self, response: Response) -> None:
        """Note that the deployment at hand has answered."""
        assert self._current is not None  # noqa: S101 -- it was asked
        health, now = self._current.health, monotonic()
        health.succeeded(now, tried=self._trying)
        health.observe(now, response.headers.fields)
        self._trying = False
        if self._failed:
            self._tell({"status": response.status}, now)

    def _over(self, outcome: Outcome) -> None:
        """Note the end of the exchange."""
        choice = self._current
        if choice is None:
            return
        choice.health.end()
        if self._trying:
            choice.health.left()
        elif outcome.ended_by == "upstream" and outcome.first_byte is not None and outcome.status < 400:
            choice.health.failed(monotonic(), "broken_off")  # in the middle of its answer

    def _tell(self, facts: dict[str, Any], now: float) -> None:
        """Note an attempt for the log."""
        assert self._current is not None  # noqa: S101 -- it was asked
        self._failed.append({"deployment": self._current.name, **facts, "ms": round((now - self._begun) * 1000, 1)})
        self._begun = now
        self._request.notes["attempts"] = self._failed

    # -- more than one ---------------------------------------------------------------------------------

    async def _pinned(self, resource: str) -> Response:
        """Ask the pool's deployment in one resource, once."""
        for choice in self._chooser.all:
            if choice.deployment.resource.name == resource:
                response = await self._attempt(choice)
                response, failure = await self._look(response)
                if failure is None:
                    self._succeeded(response)
                else:
                    self._note(response, failure)
                return response
        raise ApiError(400, f"the model is not in the resource {resource!r}", param="model", code="resource_mismatch")

    async def _on(self, response: Response | None) -> Response:
        """Go on after the first attempt, or without one, where no deployment was available."""
        best: Response | None = None
        while True:
            stopped: str | None = None
            if response is not None:
                response, failure = await self._look(response)
                if failure is None:
                    self._succeeded(response)
                    return response
                self._note(response, failure)
                best = _more_telling(best, response)
                stopped = await self._stop(failure)
            if stopped is None:
                choice = await self._next()
                if choice is None:
                    stopped = "all rest" if self._count == 0 else "none is left"
                elif self._count and not self._budget.take():
                    stopped = "the retry budget is used up"
            if stopped is not None:
                return self._given_up(best, stopped)
            assert choice is not None  # noqa: S101 -- or it would have stopped
            response = await self._attempt(choice)

    def _note(self, response: Response, failure: Failure) -> None:
        """Note a failure, and let go of the deployment."""
        assert self._current is not None  # noqa: S101 -- it was asked
        choice, now = self._current, monotonic()
        facts = {"status": response.status, "reason": failure.reason}
        if failure.rest is not None:
            choice.health.cool_down(now, failure.rest, failure.reason, tried=self._trying)
            facts["rest"] = round(failure.rest, 3)
        else:
            choice.health.failed(now, failure.reason, tried=self._trying, certain=failure.certain)
        self._tell(facts, now)
        choice.health.end()
        self._tried.append(choice)
        self._current, self._trying = None, False

    async def _stop(self, failure: Failure) -> str | None:
        """Return why the request is not sent again, or None."""
        if failure.again == "never":
            return failure.reason
        if self._count >= self._limits.attempts:
            return "it was sent as often as it may be"
        if failure.again == "if_repeatable" and not await self._request.repeatable():
            return "it may have been processed, and must not be twice"
        if not self._kept and not failure.unread:
            return "its body is too large to be kept"
        if monotonic() >= self._deadline:
            return "the deadline is over"
        return None

    async def _next(self) -> Choice | None:
        """Return the next deployment to ask; waits for one to come back where that is soon enough."""
        chooser, now = self._chooser, monotonic()
        until = min(now + self._limits.wait, self._deadline)
        choice = chooser.pick(now, self._tried, self._key)
        pause = _FIRST_PAUSE
        while choice is None:
            back = chooser.available_in(now)
            if back == math.inf:
                back = _LOOK_AGAIN
            elif self._tried:  # those that do not rest have failed just now
                back, pause = max(back, pause), 2 * pause
            if now + back > until or now >= until:
                return None
            await asyncio.sleep(max(back, 0.001))
            now = monotonic()
            self._tried.clear()
            choice = chooser.pick(now, (), self._key)
        return choice

    def _given_up(self, best: Response | None, stopped: str) -> Response:
        """Return the answer where no deployment gave one."""
        now = monotonic()
        waits = [seconds for each in self._chooser.all if 0 < (seconds := each.health.available_in(now)) < math.inf]
        soonest = min(waits, default=1.0)
        if best is None:
            best = Response.from_error(_all_rest(self._chooser, soonest))
        if best.status in (429, 503):
            told = best.retry_after()
            soonest = min(soonest, told) if waits and told is not None else soonest if told is None else told
            best.headers.set("retry-after", str(math.ceil(soonest)))
            best.headers.set("retry-after-ms", str(math.ceil(soonest * 1000)))
        self._logger.warning(
            "no deployment of a pool has answered",
            request_id=self._request.id,
            pool=self._request.target.pool.name if self._request.target.pool is not None else None,
            stopped=stopped,
            attempts=self._failed,
        )
        return best

    # -- what an answer means --------------------------------------------------------------------------

    async def _look(self, response: Response) -> tuple[Response, Failure | None]:
        """Return an answer, and why it is a failure that another deployment may not have; None where it is none."""
        if response.status == 200 and response.error is None and response.event_stream:
            return await self._look_into(response)
        assert self._current is not None  # noqa: S101 -- it was asked
        own = self._request.target.credential is None and self._current.deployment.resource.has_credential
        return response, await of_answer(response, own_credential=own)

    async def _look_into(self, response: Response) -> tuple[Response, Failure | None]:
        """Look at the beginning of a stream, which is kept back until it is known to be one."""
        seconds = self._patience()
        try:
            begun = await response.peek(bool, seconds)
            if not begun:
                raise UpstreamError("Azure began a stream, and sent nothing in it", fault="stalled")
            found = await response.opening_error(self._limits.hold, responses=True)
        except UpstreamError as exc:
            return Response.from_error(exc), of_error(exc)
        failure = None if found is None else of_status(response, found.status, found.message)
        if found is None or failure is None:
            return response, None
        answer = Response(found.status, json.dumps({"error": found.error}).encode(), response.headers.copy())
        answer.headers.remove("content-length")
        answer.headers.set("content-type", "application/json")
        return answer, failure

    def _patience(self) -> float:
        """Return how long, in seconds, a stream's first event may take."""
        assert self._current is not None  # noqa: S101 -- it was asked
        own = self._current.deployment.resource.timeouts
        own_seconds = own.first_byte if own is not None else None
        return min(own_seconds or math.inf, max(0.0, self._deadline - monotonic()), _LONGEST)


def _more_telling(one: Response | None, other: Response) -> Response:
    """Return which of two errors tells a client more: when to come back, what Azure said, that it was away."""

    def rank(response: Response) -> int:
        if response.status == 429:
            return 3
        if isinstance(response.error, UpstreamError):
            return 1
        return 0 if response.status in (401, 403, 404) else 2

    return other if one is None or rank(other) >= rank(one) else one


def _all_rest(chooser: Chooser, wait: float) -> ApiError:
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
