"""`balance`: load balancing and failover between the deployments of a pool."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from gateway import (
    ApiError,
    Meta,
    Next,
    Request,
    Response,
    Retrier,
    RetryBudget,
    RetryLimits,
    Services,
    Stage,
)

Field = Literal["prompt_cache_key", "user", "safety_identifier", "caller"]


@dataclass
class Balance(Stage):
    """Send a request to one deployment of the model's pool, and retry on another one if that fails.

    The lowest priority number goes first. Among equal priorities, the deployment with the least in flight for its
    weight and for the room that Azure reports goes first. A request is retried after a failed connection, a timeout
    before the first byte, a 408, a 429, a 5xx, or an error at the beginning of a stream: never after the client has
    received a byte of the response, and, unless it surely was not processed, only if it is idempotent. A deployment
    that fails or returns a 429 gets a cooldown (`health:` in gateway.yaml). If every attempt fails, the client gets
    the most useful error. Put it below `model_map` and `resource_ids`, and above `api_version`.
    """

    attempts: Annotated[
        int, Meta(ge=1, le=100, description="maximum number of attempts for a request, over all deployments")
    ] = 5
    deadline: Annotated[
        float | None,
        Meta(
            gt=0,
            description="seconds for all attempts and waits, until the response begins; default: timeouts.first_byte",
        ),
    ] = None
    silence: Annotated[
        float,
        Meta(gt=0, description="seconds without the first byte of a stream before another deployment is tried"),
    ] = 60.0
    wait: Annotated[
        float,
        Meta(ge=0, le=600, description="seconds that a request may wait for a deployment if all are in cooldown"),
    ] = 5.0
    retries: Annotated[
        float, Meta(ge=0, le=10, description="retry budget: retries as a share of the requests (0.2 is 20 %)")
    ] = 0.2
    reserve: Annotated[
        int, Meta(ge=0, le=1_000_000, description="retries that the budget allows at once on top of that share")
    ] = 100
    affinity: Annotated[
        list[Field],
        Meta(
            description="fields by which requests stick to one deployment while it is available; the first one that a "
            "request has counts"
        ),
    ] = field(default_factory=list)
    hold: Annotated[
        float,
        Meta(ge=0, le=60, description="seconds to hold a stream back for its first content, so that it can fail over"),
    ] = 10.0
    keep: Annotated[int, Meta(ge=0, description="maximum size of a body kept for retries, in bytes")] = 16 * 1024 * 1024
    seed: Annotated[int | None, Meta(description="random seed: makes the choices reproducible in tests")] = None

    needs = ("deployment",)
    provides = ("choice",)
    must_precede = ("api_version",)  # a resource may have its own

    async def start(self, services: Services) -> None:
        budget: RetryBudget = services.store.setdefault("budget", RetryBudget(self.reserve))
        limits = RetryLimits(
            # (Slightly sooner, so that it ends an attempt and not the whole exchange.)
            min(self.deadline or math.inf, 0.98 * services.first_byte_timeout),
            self.silence,
            self.attempts,
            self.wait,
            self.hold,
            self.keep,
            self.retries,
            self.reserve,
        )
        self._retriers = {
            name: Retrier(pool, services.health, budget, limits, services.logger, self.seed)
            for name, pool in services.pools.items()
        }
        self.idle = not services.pools

    async def __call__(self, request: Request, call_next: Next) -> Response:
        pool = request.target.pool
        if pool is None:
            return await call_next(request)
        key = await self._affinity_key(request) if self.affinity else None
        return await self._retriers[pool.name].send(request, call_next, key)

    async def _affinity_key(self, request: Request) -> bytes | None:
        """Return the value that requests with the same deployment have in common."""
        names = [name for name in self.affinity if name != "caller"]
        form = request.media_type.startswith("multipart/")
        try:
            fields = await request.fields(*names) if names and not form else {}
        except ApiError:  # not JSON: Azure rejects it
            fields = {}
        for name in self.affinity:
            value = request.caller.encode() if name == "caller" and request.caller else fields.get(name)
            if value and value != b"null":
                return value
        return None
