"""`rate_limit`: how much a key, a team, a model or an address may use."""

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

# What is limited: the setting's name, its period, and what is counted.
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
HEADERS = [f"x-ratelimit-{what}-{unit}" for what in ("limit", "remaining", "reset") for unit in ("requests", "tokens")]
# How many callers' charges are kept made.
CALLERS = 10_000


@dataclass
class LimitSettings:
    """How much may be used by whom; what is left out is not limited."""

    requests_per_minute: Annotated[int | None, Meta(gt=0, description="how many requests in a minute")] = None
    burst: Annotated[
        int | None, Meta(gt=0, description="how many may come at once; requests_per_minute if it is left out")
    ] = None
    requests_per_day: Annotated[int | None, Meta(gt=0, description="how many requests in a day, in UTC")] = None
    tokens_per_minute: Annotated[
        int | None, Meta(gt=0, description="how many tokens in a minute, of prompts and answers together")
    ] = None
    token_burst: Annotated[
        int | None, Meta(gt=0, description="how many tokens may be used at once; tokens_per_minute if it is left out")
    ] = None
    tokens_per_day: Annotated[int | None, Meta(gt=0, description="how many tokens in a day, in UTC")] = None
    spend_per_day: Annotated[
        float | None, Meta(ge=0.01, description="how much may be spent in a day, in UTC, in the currency of `prices`")
    ] = None
    spend_per_month: Annotated[float | None, Meta(ge=0.01, description="how much may be spent in a month, in UTC")] = (
        None
    )
    in_flight: Annotated[int | None, Meta(gt=0, description="how many requests may run at once")] = None
    per: Annotated[
        Per | list[Per],
        Meta(description="whose use counts together: of one key, team, model or client address, or of a pair of them"),
    ] = "key"
    shadow: Annotated[bool, Meta(description="true refuses nothing, and only counts what would be refused")] = False

    @property
    def dimensions(self) -> tuple[Per, ...]:
        """Whose use counts together, each once, in one order."""
        return tuple(sorted({self.per} if isinstance(self.per, str) else set(self.per)))

    @property
    def kinds(self) -> list[str]:
        """What is limited."""
        return [kind for kind in KINDS if getattr(self, kind) is not None]

    @property
    def spends(self) -> bool:
        """Whether money is limited."""
        return any(KINDS[kind][1] == "spend" for kind in self.kinds)


class Entry:
    """One thing that is limited, by one limit."""

    def __init__(self, stage: str, limit: LimitSettings, kind: str) -> None:
        period, self.unit = KINDS[kind]
        amount = getattr(limit, kind)
        self.dimensions = limit.dimensions
        self.shadow = limit.shadow
        self.name = f"{stage}: {kind} {amount:,} per {' and '.join(self.dimensions)}"
        burst = {"requests_per_minute": limit.burst, "tokens_per_minute": limit.token_burst}.get(kind)
        self.rule = Limit(round(amount * MILLION) if self.unit == "spend" else amount, period, burst)
        self.limit = str(amount)
        self.note = {"requests": "ratelimit_remaining", "tokens": "ratelimit_remaining_tokens"}.get(self.unit)
        self.error_type = {"tokens": "tokens", "spend": "insufficient_quota"}.get(self.unit, "requests")
        self._prefix = f"{stage}:{'shadow:' if limit.shadow else ''}{kind}:{'+'.join(self.dimensions)}:"
        self._whose = f"this {' and this '.join(self.dimensions)}"
        self._amount = f"{amount:,}"
        self._period = {"minute": "per minute", "day": "per day", "month": "per month"}.get(period, "")

    def charge(self, values: dict[str, str]) -> Charge:
        """Return the charge of one request by whom these values say."""
        name = self._prefix + "\x1f".join(values[each] for each in self.dimensions)
        return Charge(name, self.rule, 1.0 if self.unit in ("requests", "slots") else 0.0, shadow=self.shadow)

    def words(self, cost: float, left: int, wait: float) -> str:
        """Return what a client is told that has to wait so many seconds for room."""
        again = f"try again in {duration(wait)}" if wait < math.inf else ""
        if self.unit == "slots":
            return (
                f"{self._amount} requests of {self._whose} are running, which is the most at once; "
                "try again when one has ended"
            )
        if self.unit == "requests":
            return f"the limit of {self._amount} requests {self._period} for {self._whose} is used up; {again}"
        if self.unit == "spend":
            may_use, left_over = f"this request may cost {cost / MILLION:,.4g}", f"{left / MILLION:,.4g} is left"
        else:
            may_use, left_over = f"this request may use {cost:,.0f} tokens", f"{left:,} are left"
        smaller = "send a shorter prompt, or ask for less with max_tokens"
        if not again:
            return f"{may_use}, more than {self._whose} may use at once of {self._amount} {self._period}; {smaller}"
        return (
            f"{may_use}, and {left_over} of the {self._amount} {self._period} for {self._whose}; {smaller}, or {again}"
        )


Made = tuple[list[Entry], list[Charge]]


@dataclass
class RateLimit(LimitSettings, Stage):
    """Limit what may be used: requests, tokens, money, requests at once; of a key, a team, a model, an address.

    Tokens are taken before a request is sent, as many as it may use: its prompt and the most that it asks for. When it
    is over, what it really used takes their place, or nothing where it failed. Above a limit the answer is a 429 that
    says when to try again; every answer carries OpenAI's `x-ratelimit-*` headers.
    """

    limits: Annotated[list[LimitSettings], Meta(description="more limits, all of which hold at once")] = field(
        default_factory=list
    )
    answer_tokens: Annotated[
        int, Meta(ge=0, description="what an answer is taken for until it is over, where no max_tokens bounds it")
    ] = 1000
    wait: Annotated[
        float,
        Meta(ge=0, description="seconds that a request may wait for room before it is refused; callers take turns"),
    ] = 0.0
    on_error: Annotated[
        Literal["open", "closed"],
        Meta(description="what to do while the shared store cannot be asked: let requests through, or answer 503"),
    ] = "open"
    untold: Annotated[
        Literal["refuse", "allow"],
        Meta(
            description="of what uses tokens that no answer tells, such as batches, where tokens or money are limited"
        ),
    ] = "refuse"

    @property
    def _all(self) -> list[LimitSettings]:
        return [self, *self.limits]

    @property
    def needs(self) -> tuple[str, ...]:
        limits = [each for each in self._all if each.kinds]
        caller = any("key" in each.dimensions for each in limits)
        # The name that counts is the deployment's: clients can spell models in many ways.
        deployment = any("model" in each.dimensions or each.spends for each in limits)
        return (*(("caller",) if caller else ()), *(("deployment",) if deployment else ()))

    @property
    def needs_usage(self) -> bool:
        return any(KINDS[kind][1] in ("tokens", "spend") for each in self._all for kind in each.kinds)

    def check(self, services: Services) -> Iterator[tuple[tuple[str | int, ...], str]]:
        if not any(each.kinds for each in self._all):
            yield (), f"there is nothing to limit; set {', '.join(list(KINDS)[:-1])} or in_flight"
        seen: set[tuple[str, tuple[Per, ...], bool]] = set()
        for place, each in enumerate(self._all):
            path: tuple[str | int, ...] = () if each is self else ("limits", place - 1)
            if each is not self and not each.kinds:
                yield path, "this entry limits nothing"
            for burst, kind in (("burst", "requests_per_minute"), ("token_burst", "tokens_per_minute")):
                if getattr(each, burst) is not None and getattr(each, kind) is None:
                    yield (*path, burst), f"{burst} is how much of {kind} may be used at once; set that too"
            if not each.dimensions:
                yield (*path, "per"), "per names nobody"
            for kind in each.kinds:
                if KINDS[kind][1] == "spend" and not services.prices:
                    yield (*path, kind), "what is spent is not known without `prices:` in gateway.yaml"
                if (kind, each.dimensions, each.shadow) in seen:
                    already = f"there is a limit of {kind} per {' and '.join(each.dimensions)} already"
                    yield (*path, kind), f"{already}; a second one is a stage of its own: rate_limit as another_id"
                seen.add((kind, each.dimensions, each.shadow))

    async def start(self, services: Services) -> None:
        self._counters = services.counters
        self._clock = services.clock
        self._prices = services.prices
        self._entries = [Entry(self.id, each, kind) for each in self._all for kind in each.kinds]
        units = {entry.unit for entry in self._entries}
        self._estimates = bool(units & {"tokens", "spend"})
        if self._estimates:
            await services.load_tokenizers()
        try:
            await self._counters.take([])  # a store that is elsewhere is connected to now, not by the first request
        except CountersUnavailable as exc:
            then = "requests pass uncounted" if self.on_error == "open" else "requests are refused with 503"
            services.logger.warning("limits cannot be counted now", reason=str(exc), consequence=then)
        self._settles = units != {"requests"}
        self._spends = "spend" in units
        self._holds_tokens = any(each.unit in ("tokens", "spend") and not each.shadow for each in self._entries)
        dimensions = {name for entry in self._entries for name in entry.dimensions}
        self._by_model = "model" in dimensions or self._spends
        self._by_client = "client" in dimensions
        self._known: dict[tuple[str, str, str], Made] = {}
        # A model is known once the body is; these slots are taken before it is read.
        self._early = [each for each in self._entries if each.unit == "slots" and "model" not in each.dimensions]
        self._early_by_key = any("key" in each.dimensions for each in self._early)

    async def before_body(self, request: Request) -> None:
        """Take the slots of `in_flight`: no caller sends more bodies at once than it may have requests."""
        if not self._early or self.id in request.reservations or (self._early_by_key and request.caller is None):
            return
        who = (request.caller or "", request.client_address if self._by_client else "", "")
        entries, charges = self._known.get(who) or self._make(request, who)
        charges = [charge for entry, charge in zip(entries, charges, strict=True) if entry in self._early]
        begun = self._clock() if self.wait else 0.0
        try:
            verdict = await self._counters.take(charges, wait=self.wait, who=who[0] or who[1])
        except CountersUnavailable:
            self._check_open()
            return
        self._admit(request, self._early, verdict, begun)
        request.defer(lambda outcome: self._settle(self._early, verdict, (), outcome))
        request.reservations[self.id] = True

    async def __call__(self, request: Request, call_next: Next) -> Response:
        model = (await request.model() or "").strip() if self._by_model else ""
        who = (request.caller or "", request.client_address if self._by_client else "", model)
        entries, charges = self._known.get(who) or self._make(request, who)
        if self._early:
            early = request.reservations.get(self.id, False)
            request.reservations[self.id] = False
            if early:
                kept = [place for place, entry in enumerate(entries) if entry not in self._early]
                entries, charges = [entries[place] for place in kept], [charges[place] for place in kept]
        prices: list[Price] = []
        if self._estimates:
            if self._holds_tokens:
                self._refuse_untold(request)
            # By the model's name or its deployment's, whichever is dearer: clients choose the name.
            names = {model, request.target.deployment or model} if self._spends and model else set()
            prices = [price for name in names if (price := self._prices.of(name)) is not None]
            charges = self._with_costs(entries, charges, await request.expected_tokens(), model, prices)
        begun = self._clock() if self.wait else 0.0
        try:
            verdict = await self._counters.take(charges, wait=self.wait, who=who[0] or who[1])
        except CountersUnavailable:
            self._check_open()
            request.count("unlimited")
            response = await call_next(request)
            for name in HEADERS:  # Azure's own are all teams' together
                response.headers.remove(name)
            return response
        if verdict.over or self.wait:
            self._admit(request, entries, verdict, begun)
        if self._settles:
            request.defer(lambda outcome: self._settle(entries, verdict, prices, outcome))
        response = await call_next(request)
        response.headers.update(self._headers(request, entries, verdict))
        return response

    def _check_open(self) -> None:
        """Raise ApiError 503 if requests may not pass while they cannot be counted."""
        if self.on_error == "closed":
            raise ApiError(
                503,
                "limits cannot be counted now, and no request passes without; try again in a moment",
                code="limits_unavailable",
                headers={"retry-after": "1"},
            ) from None

    def _admit(self, request: Request, entries: Sequence[Entry], verdict: Decision, begun: float) -> None:
        """Note how long a request waited, and what would be refused. Raises ApiError 429 above a limit."""
        if self.wait and (waited := self._clock() - begun) > 0.001:
            request.notes["waited_ms"] = round(waited * 1000, 1)
        if verdict.over:
            if verdict.refused:
                raise self._refusal(request, entries, verdict)
            self._note_shadows(request, entries, verdict)

    # -- before it is sent -----------------------------------------------------------------------------

    def _make(self, request: Request, who: tuple[str, str, str]) -> Made:
        """Make a caller's charges, once: those of a request that uses nothing but itself."""
        caller, client, model = who
        team, deployment = request.team, (request.target.deployment or model).lower()
        values = {"key": f"{team}/{caller}", "team": team, "client": client, "model": deployment}
        entries = [each for each in self._entries if model or "model" not in each.dimensions]
        made = entries, [each.charge(values) for each in entries]
        if len(self._known) >= CALLERS:
            self._known.clear()
        self._known[who] = made
        return made

    def _with_costs(
        self,
        entries: Sequence[Entry],
        charges: Sequence[Charge],
        expected: tuple[int, int | None],
        model: str,
        prices: Sequence[Price],
    ) -> list[Charge]:
        """Return the charges of a request that may use so many tokens."""
        prompt, answer = expected
        used = Usage(prompt, self.answer_tokens if answer is None else answer)
        costs = {"requests": 1.0, "slots": 1.0, "tokens": float(used.total_tokens), "spend": 0.0}
        if prices:
            costs["spend"] = float(max(price.cost(used) for price in prices))
        elif model and any(entry.unit == "spend" and not entry.shadow for entry in entries):
            raise ApiError(
                403,
                f"the model {model!r} has no price here, and spending is limited; the operator adds it to `prices`",
                param="model",
                code="model_without_price",
            )
        return [
            Charge(charge.name, charge.rule, costs[entry.unit], shadow=charge.shadow)
            for entry, charge in zip(entries, charges, strict=True)
        ]

    def _refuse_untold(self, request: Request) -> None:
        """Raise ApiError 403 for what would get round the limits."""
        if request.operation == "responses.connect" and self._spends:
            why = "its models, and so its prices, are named by each message"
        elif self.untold == "refuse" and not request.reports_usage:
            why = "no answer tells what it uses"
        else:
            return
        raise ApiError(
            403, f"{request.operation} cannot be used where tokens or money are limited: {why}", code="not_countable"
        )

    # -- when it is over -------------------------------------------------------------------------------

    def _settle(self, entries: Sequence[Entry], verdict: Decision, prices: Sequence[Price], outcome: Outcome) -> None:
        used = outcome.usage
        actual = {"requests": None, "slots": 0.0, "tokens": float(used.total_tokens) if used is not None else 0.0}
        worked = used is not None or outcome.status < 400
        actual["spend"] = float(max(price.cost(used or Usage()) for price in prices)) if prices and worked else 0.0
        self._counters.settle(verdict, [actual[entry.unit] for entry in entries])

    # -- what the client is told -----------------------------------------------------------------------

    def _note_shadows(self, request: Request, entries: Sequence[Entry], verdict: Decision) -> None:
        names = [entries[place].name for place in verdict.over if entries[place].shadow]
        if names:
            request.count("shadow_refused")
            request.notes["shadow_refused"] = names

    def _headers(self, request: Request, entries: Sequence[Entry], verdict: Decision) -> dict[str, str]:
        """Return the headers of the limits with the least room, of requests and of tokens.

        Of all stages that limit: what the client is told already is in the notes.
        """
        headers: dict[str, str] = {}
        for place, entry in enumerate(entries):
            if entry.note is None or entry.shadow:
                continue
            left, told = verdict.left(place), request.notes.get(entry.note)
            if not isinstance(told, int) or left < told:
                request.notes[entry.note] = left
                headers[f"x-ratelimit-limit-{entry.unit}"] = entry.limit
                headers[f"x-ratelimit-remaining-{entry.unit}"] = str(left)
                headers[f"x-ratelimit-reset-{entry.unit}"] = duration(verdict.reset(place))
        return headers

    def _refusal(self, request: Request, entries: Sequence[Entry], verdict: Decision) -> ApiError:
        wait, place = max((verdict.wait(place), place) for place in verdict.over if not entries[place].shadow)
        entry, charge = entries[place], verdict.charges[place]
        request.notes["limit"] = entry.name
        headers = self._headers(request, entries, verdict)
        if wait < math.inf:
            headers |= {"retry-after": str(math.ceil(wait)), "retry-after-ms": str(math.ceil(wait * 1000))}
        else:
            headers["x-should-retry"] = "false"
        return ApiError(
            429,
            entry.words(charge.cost, verdict.left(place), wait),
            type=entry.error_type,
            code="insufficient_quota" if entry.unit == "spend" else "rate_limit_exceeded",
            headers=headers,
        )


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
