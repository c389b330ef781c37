"""`rate_limit`: limits requests, tokens, money and concurrency per key, team, model or client address."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from gateway import (
    ApiError,
    Charge,
    CountersUnavailable,
    Decision,
    Limit,
    Meta,
    Next,
    Outcome,
    Price,
    Request,
    Response,
    Services,
    Stage,
    Usage,
)  # fmt: skip

Per = Literal["key", "team", "model", "client"]

# What a setting limits: per which period, and in which unit.
KINDS: dict[str, tuple[Literal["minute", "day", "month", "at_once"], str]] = {
    "requests_per_minute": ("minute", "requests"),
    "requests_per_day": ("day", "requests"),
    "tokens_per_minute": ("minute", "tokens"),
    "tokens_per_day": ("day", "tokens"),
    "spend_per_day": ("day", "spend"),
    "spend_per_month": ("month", "spend"),
    "in_flight": ("at_once", "slots"),
}
MILLION = 1_000_000
HEADERS = [f"x-ratelimit-{name}-{unit}" for name in ("limit", "remaining", "reset") for unit in ("requests", "tokens")]
# Maximum number of callers whose charges are cached.
MAX_CACHED = 10_000


@dataclass
class LimitSettings:
    """Limits, and the use that counts together. A setting that is left out limits nothing."""

    requests_per_minute: Annotated[int | None, Meta(gt=0, description="Maximum number of requests per minute.")] = None
    burst: Annotated[
        int | None,
        Meta(gt=0, description="Maximum number of requests at once (token bucket). Default: requests_per_minute."),
    ] = None
    requests_per_day: Annotated[
        int | None, Meta(gt=0, description="Maximum number of requests per calendar day (UTC).")
    ] = None
    tokens_per_minute: Annotated[
        int | None, Meta(gt=0, description="Maximum number of tokens per minute, input and output together.")
    ] = None
    token_burst: Annotated[
        int | None, Meta(gt=0, description="Maximum number of tokens at once. Default: tokens_per_minute.")
    ] = None
    tokens_per_day: Annotated[
        int | None, Meta(gt=0, description="Maximum number of tokens per calendar day (UTC).")
    ] = None
    spend_per_day: Annotated[
        float | None, Meta(ge=0.01, description="Maximum cost per calendar day (UTC), in the currency of `prices`.")
    ] = None
    spend_per_month: Annotated[
        float | None, Meta(ge=0.01, description="Maximum cost per calendar month (UTC), in the currency of `prices`.")
    ] = None
    in_flight: Annotated[int | None, Meta(gt=0, description="Maximum number of concurrent requests.")] = None
    per: Annotated[
        Per | list[Per],
        Meta(description="Whose use counts together: per key, team, model or client address, or per a pair of them."),
    ] = "key"
    shadow: Annotated[
        bool, Meta(description="Dry run: refuse nothing, and only count the requests that would be refused.")
    ] = False

    @property
    def dimensions(self) -> tuple[Per, ...]:
        """The values of `per`, sorted and without duplicates."""
        return tuple(sorted({self.per} if isinstance(self.per, str) else set(self.per)))

    @property
    def kinds(self) -> list[str]:
        """The names of the limits that are set."""
        return [kind for kind in KINDS if getattr(self, kind) is not None]

    @property
    def spends(self) -> bool:
        """Whether money is limited."""
        return any(KINDS[kind][1] == "spend" for kind in self.kinds)


class Quota:
    """One limit of the stage: its bucket, its response headers and its error message."""

    def __init__(self, stage: str, settings: LimitSettings, kind: str) -> None:
        period, self.unit = KINDS[kind]
        amount = getattr(settings, kind)
        self.dimensions = settings.dimensions
        self.shadow = settings.shadow
        self.name = f"{stage}: {kind} {amount:,} per {' and '.join(self.dimensions)}"
        burst = {"requests_per_minute": settings.burst, "tokens_per_minute": settings.token_burst}.get(kind)
        self.limit = Limit(round(amount * MILLION) if self.unit == "spend" else amount, period, burst)
        # The model is known only after the body has been read; these slots are taken before that.
        self.before_body = self.unit == "slots" and "model" not in self.dimensions
        self.error_type = {"tokens": "tokens", "spend": "insufficient_quota"}.get(self.unit, "requests")
        notes = {"requests": "ratelimit_remaining", "tokens": "ratelimit_remaining_tokens"}
        self.note = None if self.shadow else notes.get(self.unit)
        """The note with the lowest remaining amount of all stages; None if clients see no headers of this limit."""
        self.limit_header = f"x-ratelimit-limit-{self.unit}"
        self.limit_value = str(amount)
        self.remaining_header = f"x-ratelimit-remaining-{self.unit}"
        self.reset_header = f"x-ratelimit-reset-{self.unit}"
        self._prefix = f"{stage}:{'shadow:' if self.shadow else ''}{kind}:{'+'.join(self.dimensions)}:"
        self._whose = f"this {' and this '.join(self.dimensions)}"
        self._amount = f"{amount:,}"
        self._period = {"minute": "per minute", "day": "per day", "month": "per month"}.get(period, "")

    def charge(self, values: dict[str, str]) -> "QuotaCharge":
        """Return the charge of one request; `values` are its values of all dimensions."""
        name = self._prefix + "\x1f".join(values[each] for each in self.dimensions)
        return QuotaCharge(name, self, 1.0 if self.unit in ("requests", "slots") else 0.0)

    def message(self, cost: float, left: int, wait: float) -> str:
        """Return the error message for a request that is refused; `wait` is in seconds."""
        retry = f"retry in {duration(wait)}" if wait < math.inf else ""
        if self.unit == "slots":
            return (
                f"the limit of {self._amount} concurrent requests for {self._whose} is reached; "
                "retry when one of them is complete"
            )
        if self.unit == "requests":
            return f"the limit of {self._amount} requests {self._period} for {self._whose} is reached; {retry}"
        if self.unit == "spend":
            needs, available = f"this request can cost up to {cost / MILLION:,.4g}", f"{left / MILLION:,.4g} is left"
        else:
            needs, available = f"this request can use up to {cost:,.0f} tokens", f"{left:,} are left"
        smaller = "shorten the prompt or lower max_tokens"
        if not retry:
            return f"{needs}, more than {self._whose} can use at once of {self._amount} {self._period}; {smaller}"
        return f"{needs}, but {available} of the {self._amount} {self._period} for {self._whose}; {smaller}, or {retry}"


class QuotaCharge(Charge):
    """The charge of a request against one quota."""

    __slots__ = ("quota",)

    def __init__(self, name: str, quota: Quota, cost: float) -> None:
        # (Faster than `super().__init__`: each request with a token limit makes some.)
        self.name = name
        self.limit = quota.limit
        self.cost = cost
        self.shadow = quota.shadow
        self.quota = quota


@dataclass
class RateLimit(LimitSettings, Stage):
    """Rate limiting: requests, tokens, money and concurrent requests; per key, team, model or client address.

    Before a request is sent, the stage reserves the tokens that it can use: its prompt and its `max_tokens`. When the
    exchange is over, the actual usage replaces the reservation, or nothing if the request failed. Above a limit the
    response is a 429 with Retry-After; every response has OpenAI's `x-ratelimit-*` headers.
    """

    limits: Annotated[
        list[LimitSettings], Meta(description="Additional limits. A request must be within all of them.")
    ] = field(default_factory=list)
    answer_tokens: Annotated[
        int, Meta(ge=0, description="Output tokens to reserve for a request without max_tokens.")
    ] = 1000
    wait: Annotated[
        float,
        Meta(ge=0, description="Maximum time, in seconds, that a request waits for room. Callers take turns."),
    ] = 0.0
    on_error: Annotated[
        Literal["open", "closed"],
        Meta(description="If the shared store is unavailable: `open` lets requests pass, `closed` responds with 503."),
    ] = "open"
    untold: Annotated[
        Literal["refuse", "allow"],
        Meta(
            description=(
                "If tokens or money are limited: `refuse` (403) or `allow` operations that do not report their usage, "
                "such as batches."
            )
        ),
    ] = "refuse"

    @property
    def _all(self) -> list[LimitSettings]:
        return [self, *self.limits]

    @property
    def needs(self) -> tuple[str, ...]:
        limits = [each for each in self._all if each.kinds]
        caller = any("key" in each.dimensions for each in limits)
        # The deployment's name counts: clients can spell a model in many ways.
        deployment = any("model" in each.dimensions or each.spends for each in limits)
        return (*(("caller",) if caller else ()), *(("deployment",) if deployment else ()))

    @property
    def needs_usage(self) -> bool:
        return any(KINDS[kind][1] in ("tokens", "spend") for each in self._all for kind in each.kinds)

    def check(self, services: Services) -> Iterator[tuple[tuple[str | int, ...], str]]:
        if not any(each.kinds for each in self._all):
            yield (), f"no limit is set; set {', '.join(list(KINDS)[:-1])} or in_flight"
        seen: set[tuple[str, tuple[Per, ...], bool]] = set()
        for index, each in enumerate(self._all):
            path: tuple[str | int, ...] = () if each is self else ("limits", index - 1)
            if each is not self and not each.kinds:
                yield path, "this entry sets no limit"
            for burst, kind in (("burst", "requests_per_minute"), ("token_burst", "tokens_per_minute")):
                if getattr(each, burst) is not None and getattr(each, kind) is None:
                    yield (*path, burst), f"{burst} needs {kind}; set that, too"
            if not each.dimensions:
                yield (*path, "per"), "per is empty; name key, team, model or client"
            for kind in each.kinds:
                if KINDS[kind][1] == "spend" and not services.prices:
                    yield (*path, kind), f"{kind} needs `prices:` in gateway.yaml"
                if (kind, each.dimensions, each.shadow) in seen:
                    duplicate = f"there is already a limit {kind} per {' and '.join(each.dimensions)}"
                    yield (*path, kind), f"{duplicate}; add a second stage for another one: rate_limit as another_id"
                seen.add((kind, each.dimensions, each.shadow))

    async def start(self, services: Services) -> None:
        self._counters = services.counters
        self._clock = services.clock
        self._prices = services.prices
        self._quotas = [Quota(self.id, each, kind) for each in self._all for kind in each.kinds]
        units = {quota.unit for quota in self._quotas}
        self._estimates = bool(units & {"tokens", "spend"})
        if self._estimates:
            await services.load_tokenizers()
        try:
            await self._counters.take([])  # connects to a remote store before the first request
        except CountersUnavailable as exc:
            consequence = "requests pass uncounted" if self.on_error == "open" else "requests are refused with 503"
            services.logger.warning("rate_limiting_unavailable", reason=str(exc), consequence=consequence)
        self._settles = units != {"requests"}
        self._spends = "spend" in units
        self._enforces_usage = any(each.unit in ("tokens", "spend") and not each.shadow for each in self._quotas)
        dimensions = {name for quota in self._quotas for name in quota.dimensions}
        self._by_model = "model" in dimensions or self._spends
        self._by_client = "client" in dimensions
        self._charges: dict[tuple[str, str, str], list[QuotaCharge]] = {}
        self._any_before_body = any(each.before_body for each in self._quotas)
        self._key_before_body = any(each.before_body and "key" in each.dimensions for each in self._quotas)

    async def before_body(self, request: Request) -> None:
        """Take the slots of `in_flight`: a caller cannot send more bodies at once than it can have requests."""
        if (
            not self._any_before_body
            or self.id in request.reservations
            or (self._key_before_body and request.caller is None)
        ):
            return
        who = (request.caller or "", request.client_address if self._by_client else "", "")
        charges = [charge for charge in self._charges_of(request, who) if charge.quota.before_body]
        started = self._clock() if self.wait else 0.0
        try:
            decision = await self._counters.take(charges, wait=self.wait, caller=who[0] or who[1])
        except CountersUnavailable:
            self._check_open()
            return
        self._admit(request, charges, decision, started)
        request.defer(lambda outcome: self._settle(charges, decision, (), outcome))
        request.reservations[self.id] = True

    async def __call__(self, request: Request, call_next: Next) -> Response:
        model = (await request.model() or "").strip() if self._by_model else ""
        who = (request.caller or "", request.client_address if self._by_client else "", model)
        charges = self._charges_of(request, who)
        if self._any_before_body:
            taken = request.reservations.get(self.id, False)
            request.reservations[self.id] = False
            if taken:
                charges = [charge for charge in charges if not charge.quota.before_body]
        prices: list[Price] = []
        if self._estimates:
            if self._enforces_usage:
                self._refuse_unreported(request)
            # The higher price of the model's name and the deployment's: clients choose the name.
            names = {model, request.target.deployment or model} if self._spends and model else set()
            prices = [price for name in names if (price := self._prices.of(name)) is not None]
            charges = self._with_costs(charges, await request.expected_tokens(), model, prices)
        started = self._clock() if self.wait else 0.0
        try:
            decision = await self._counters.take(charges, wait=self.wait, caller=who[0] or who[1])
        except CountersUnavailable:
            self._check_open()
            request.count("unlimited")
            response = await call_next(request)
            for name in HEADERS:  # Azure's own limits are those of all teams together
                response.headers.remove(name)
            return response
        if decision.over or self.wait:
            self._admit(request, charges, decision, started)
        if self._settles:
            request.defer(lambda outcome: self._settle(charges, decision, prices, outcome))
        response = await call_next(request)
        response.headers.update(self._headers(request, charges, decision))
        return response

    def _check_open(self) -> None:
        """Raise ApiError 503 if requests must not pass while the store is unavailable."""
        if self.on_error == "closed":
            raise ApiError(
                503,
                "rate limiting is temporarily unavailable and this gateway rejects requests meanwhile; retry shortly",
                code="limits_unavailable",
                headers={"retry-after": "1"},
            ) from None

    def _admit(self, request: Request, charges: Sequence[QuotaCharge], decision: Decision, started: float) -> None:
        """Note the time that a request waited, and shadow limits without room. Raises ApiError 429 above a limit."""
        if self.wait and (waited := self._clock() - started) > 0.001:
            request.notes["waited_ms"] = round(waited * 1000, 1)
        if decision.over:
            if decision.refused:
                raise self._refusal(request, charges, decision)
            self._note_shadows(request, charges, decision)

    # -- the charges -----------------------------------------------------------------------------------

    def _charges_of(self, request: Request, who: tuple[str, str, str]) -> list[QuotaCharge]:
        """Return the charges of a caller's request, cached. Costs of tokens and money are still 0."""
        charges = self._charges.get(who)
        if charges is None:
            caller, client, model = who
            team, deployment = request.team, (request.target.deployment or model).lower()
            values = {"key": f"{team}/{caller}", "team": team, "client": client, "model": deployment}
            charges = [each.charge(values) for each in self._quotas if model or "model" not in each.dimensions]
            if len(self._charges) >= MAX_CACHED:
                self._charges.clear()
            self._charges[who] = charges
        return charges

    def _with_costs(
        self,
        charges: Sequence[QuotaCharge],
        expected: tuple[int, int | None],
        model: str,
        prices: Sequence[Price],
    ) -> list[QuotaCharge]:
        """Return the charges of a request with these expected input and output tokens."""
        prompt, output = expected
        usage = Usage(prompt, self.answer_tokens if output is None else output)
        costs = {"requests": 1.0, "slots": 1.0, "tokens": float(usage.total_tokens), "spend": 0.0}
        if prices:
            costs["spend"] = float(max(price.cost(usage) for price in prices))
        elif model and any(charge.quota.unit == "spend" and not charge.shadow for charge in charges):
            raise ApiError(
                403,
                f"the model {model!r} has no price and spending is limited; ask the operator to add it to `prices`",
                param="model",
                code="model_without_price",
            )
        return [QuotaCharge(charge.name, charge.quota, costs[charge.quota.unit]) for charge in charges]

    def _refuse_unreported(self, request: Request) -> None:
        """Raise ApiError 403 for an operation that would bypass the limits."""
        if request.operation == "responses.connect" and self._spends:
            reason = "each of its messages names a model, and so a price"
        elif self.untold == "refuse" and not request.reports_usage:
            reason = "its response does not report its usage"
        else:
            return
        raise ApiError(
            403,
            f"{request.operation} is not available here because tokens or money are limited: {reason}",
            code="not_countable",
        )

    def _settle(
        self, charges: Sequence[QuotaCharge], decision: Decision, prices: Sequence[Price], outcome: Outcome
    ) -> None:
        """Replace the reserved costs with the actual ones, when the exchange is over."""
        usage = outcome.usage
        actual = {"requests": None, "slots": 0.0, "tokens": float(usage.total_tokens) if usage is not None else 0.0}
        succeeded = usage is not None or outcome.status < 400
        actual["spend"] = float(max(price.cost(usage or Usage()) for price in prices)) if prices and succeeded else 0.0
        self._counters.settle(decision, [actual[charge.quota.unit] for charge in charges])

    # -- the response ----------------------------------------------------------------------------------

    def _note_shadows(self, request: Request, charges: Sequence[QuotaCharge], decision: Decision) -> None:
        names = [charges[index].quota.name for index in decision.over if charges[index].shadow]
        if names:
            request.count("shadow_refused")
            request.notes["shadow_refused"] = names

    def _headers(self, request: Request, charges: Sequence[QuotaCharge], decision: Decision) -> dict[str, str]:
        """Return the headers of the limits with the least room, for requests and for tokens.

        The notes hold the lowest values of all rate_limit stages.
        """
        headers: dict[str, str] = {}
        for index, charge in enumerate(charges):
            quota = charge.quota
            if (note := quota.note) is None:
                continue
            left, lowest = decision.remaining(index), request.notes.get(note)
            if not isinstance(lowest, int) or left < lowest:
                request.notes[note] = left
                headers[quota.limit_header] = quota.limit_value
                headers[quota.remaining_header] = str(left)
                headers[quota.reset_header] = duration(decision.reset(index))
        return headers

    def _refusal(self, request: Request, charges: Sequence[QuotaCharge], decision: Decision) -> ApiError:
        over = [index for index in decision.over if not charges[index].shadow]
        wait, index = max((decision.retry_after(index), index) for index in over)
        charge = charges[index]
        quota = charge.quota
        request.notes["limit"] = quota.name
        headers = self._headers(request, charges, decision)
        if wait < math.inf:
            headers |= {"retry-after": str(math.ceil(wait)), "retry-after-ms": str(math.ceil(wait * 1000))}
        else:
            headers["x-should-retry"] = "false"
        return ApiError(
            429,
            quota.message(charge.cost, decision.remaining(index), wait),
            type=quota.error_type,
            code="insufficient_quota" if quota.unit == "spend" else "rate_limit_exceeded",
            headers=headers,
        )


def duration(seconds: float) -> str:
    """Format seconds as OpenAI does: `12ms`, `1.5s`, `6m0s`, `1h0m0s`."""
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
