"""`access_log`: one log event for each exchange, at its end."""

from dataclasses import dataclass
from typing import Annotated

from gateway import Meta, Next, Outcome, Request, Response, Services, Stage

DETAILS = ("cached_tokens", "reasoning_tokens", "audio_input_tokens", "audio_output_tokens")
RESERVED = frozenset(("event", "level", "timestamp", "team", "stage"))


@dataclass
class AccessLog(Stage):
    """Log each exchange once, at its end: caller, operation, target, outcome and duration.

    `reason` is the message of an error that the gateway itself raised. A request that is not an operation has its
    method and path. `counts` are the changes of stages to the response, such as repairs. Azure reports the tokens; if
    a response breaks off or its client leaves, they are counted or estimated: `usage_source` says so. `cost` is their
    cost by `prices`. Times are in milliseconds. The log has no bodies and no keys; a caller is its key's digest.
    """

    usage: Annotated[
        bool, Meta(description="log tokens: streams are asked for their usage, which is hidden from clients")
    ] = True

    must_precede = ("caller",)  # a rejected request is an exchange, too

    @property
    def needs_usage(self) -> bool:
        return self.usage

    async def start(self, services: Services) -> None:
        self._logger = services.logger
        self._prices = services.prices

    async def __call__(self, request: Request, call_next: Next) -> Response:
        def log(outcome: Outcome) -> None:
            target = outcome.target
            resource = target.resource if target is not None else None
            facts: dict[str, object] = {
                # First: a stage's note never replaces a fact.
                **request.notes,
                "request_id": request.id,
                "operation": request.operation,
                "caller": request.caller,
                "resource": resource.name if resource is not None else None,
                "deployment": target.deployment if target is not None else None,
                "status": outcome.status,
                "ended_by": outcome.ended_by,
                "error": outcome.error,
                "first_byte_ms": None if outcome.first_byte is None else round(outcome.first_byte * 1000, 1),
                "total_ms": round(outcome.duration * 1000, 1),
                "bytes": outcome.bytes_sent,
            }
            if (used := outcome.usage) is not None and self.usage:
                facts["input_tokens"], facts["output_tokens"] = used.input_tokens, used.output_tokens
                facts["usage_source"] = used.source
                price = self._prices.of(str(request.notes.get("model", ""))) if self._prices else None
                if price is not None:
                    facts["cost"] = price.cost(used) / 1_000_000
                for name in DETAILS:
                    if amount := getattr(used, name):
                        facts[name] = amount
            if outcome.reason is not None:
                facts["reason"] = outcome.reason
            if outcome.counts:
                facts["counts"] = dict(outcome.counts)
            if outcome.close_code is not None:
                facts["close_code"] = outcome.close_code
            if request.operation is None:
                facts["method"], facts["path"] = request.method, request.path[:200]
            if not RESERVED.isdisjoint(facts):
                facts = {name: value for name, value in facts.items() if name not in RESERVED}
            self._logger.info("exchange", **facts)

        request.defer(log)
        return await call_next(request)
