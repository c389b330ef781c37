"""`rate_limit`: how many requests a caller may make in a minute, and how many at once."""

import math
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from gateway import ApiError, Meta, Next, Outcome, Request, Response, Services, Stage

# What was used comes back in steps of at most this many seconds, as Azure counts its own limits; between two
# steps a caller gets exactly its limit, however long its requests take to arrive.
STEP = 10.0
# Above this many callers, those whose allowance is full again are forgotten.
CALLERS = 10_000


@dataclass
class RateLimit(Stage):
    """Limit requests per minute, and requests in flight, for each caller.

    A caller may make `burst` requests at once; what it used comes back at the rate of
    `requests_per_minute`, in steps of at most ten seconds. Above the limit the answer is a 429 that says
    when to try again. Every answer carries OpenAI's `x-ratelimit-*` headers.
    """

    requests_per_minute: Annotated[int | None, Meta(gt=0, description="the limit; none if it is left out")] = None
    burst: Annotated[
        int | None, Meta(gt=0, description="how many may come at once; requests_per_minute if it is left out")
    ] = None
    in_flight: Annotated[int | None, Meta(gt=0, description="how many may run at once")] = None
    per: Annotated[
        Literal["key", "team", "client"], Meta(description="whose requests count together: of one key, team or address")
    ] = "key"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("caller",) if self.per == "key" else ()

    def check(self, services: Services) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.requests_per_minute is None and self.in_flight is None:
            yield (), "there is nothing to limit; set requests_per_minute, in_flight or both"
        if self.burst is not None and self.requests_per_minute is None:
            yield ("burst",), "burst is how many of requests_per_minute may come at once; set that too"

    async def start(self, services: Services) -> None:
        self._clock = services.clock
        self._buckets: MutableMapping[str, Any] = services.store.setdefault("buckets", {})
        self._running: MutableMapping[str, int] = services.store.setdefault("running", {})
        self._sweep_at = CALLERS
        self._limit = self.requests_per_minute or 0
        self._limit_text = str(self._limit)
        self._size = float(self.burst or self._limit)
        self._rate = self._limit / 60.0
        self._step = min(STEP, self._size / self._rate) if self._rate else STEP

    async def __call__(self, request: Request, call_next: Next) -> Response:
        who = self._who(request)
        if self.in_flight is not None and self._running.get(who, 0) >= self.in_flight:
            raise ApiError(
                429,
                f"{self.in_flight} requests of this {self.per} are running, which is the most at once; "
                "try again when one has ended",
                code="rate_limit_exceeded",
                headers={"retry-after": "1", "retry-after-ms": "1000"},
            )
        headers = self._take(who) if self._limit else None
        if self.in_flight is not None:
            self._running[who] = self._running.get(who, 0) + 1
            request.defer(lambda outcome: self._leave(who, outcome))
        response = await call_next(request)
        if headers is not None:
            # Two limits may stand in one pipeline: the client is told of the one with the least room.
            room = int(headers["x-ratelimit-remaining-requests"])
            told = request.notes.get("ratelimit_remaining")
            if not isinstance(told, int) or room < told:
                request.notes["ratelimit_remaining"] = room
                response.headers.update(headers)
        return response

    def _who(self, request: Request) -> str:
        if self.per == "team":
            return request.team
        if self.per == "client":
            return request.client
        return request.caller or ""

    def _take(self, who: str) -> dict[str, str]:
        """Take one request from a caller's allowance, or raise ApiError 429; return the headers to show."""
        now = self._clock()
        left, since = self._buckets.get(who) or (self._size, now)
        if left >= self._size or now - since >= self._step - 1e-6:
            left, since = self._refilled(left, since, now)
        if left >= 1:
            left -= 1
            self._buckets[who] = (left, since)
            if len(self._buckets) > self._sweep_at:
                self._sweep(now)
            return self._headers(left, since, now)
        self._buckets[who] = (left, since)
        wait = max(0.001, since + self._steps_to(1 - left) * self._step - now)
        raise ApiError(
            429,
            f"the limit of {self._limit} requests per minute for this {self.per} is used up; "
            f"try again in {duration(wait)}",
            code="rate_limit_exceeded",
            headers={
                **self._headers(left, since, now),
                "retry-after": str(math.ceil(wait)),
                "retry-after-ms": str(math.ceil(wait * 1000)),
            },
        )

    def _refilled(self, left: float, since: float, now: float) -> tuple[float, float]:
        """Return (what is left, when the last step was) at `now`; the first request after full starts the steps."""
        if left < self._size:
            steps = math.floor((now - since) / self._step + 1e-9)
            left = min(self._size, left + steps * self._step * self._rate)
            since += steps * self._step
        return (left, since) if left < self._size else (self._size, now)

    def _steps_to(self, missing: float) -> int:
        return math.ceil(missing / (self._step * self._rate) - 1e-9)

    def _headers(self, left: float, since: float, now: float) -> dict[str, str]:
        full = since + self._steps_to(self._size - left) * self._step - now if left < self._size else 0.0
        return {
            "x-ratelimit-limit-requests": self._limit_text,
            "x-ratelimit-remaining-requests": str(int(left + 1e-9)),
            "x-ratelimit-reset-requests": duration(max(0.0, full)),
        }

    def _leave(self, who: str, _: Outcome) -> None:
        running = self._running.get(who, 1) - 1
        if running > 0:
            self._running[who] = running
        else:
            self._running.pop(who, None)

    def _sweep(self, now: float) -> None:
        for who, (left, since) in list(self._buckets.items()):
            if self._refilled(left, since, now)[0] >= self._size:
                del self._buckets[who]
        # If most are still in use, do not look at all of them for each newcomer.
        self._sweep_at = max(CALLERS, 2 * len(self._buckets))


def duration(seconds: float) -> str:
    """Write seconds as OpenAI does: `12ms`, `1.5s`, `6m0s`, `1h0m0s`."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    whole, rest = divmod(milliseconds, 1000)
    hours, minutes, secs = whole // 3600, whole // 60 % 60, whole % 60
    if not whole // 60:
        return f"{secs}.{rest:03d}".rstrip("0").rstrip(".") + "s"
    secs += 1 if rest else 0
    minutes, secs = minutes + secs // 60, secs % 60
    hours, minutes = hours + minutes // 60, minutes % 60
    return f"{hours}h{minutes}m{secs}s" if hours else f"{minutes}m{secs}s"
