"""`balance`: a request for a pool goes to one of its deployments, and to another where that one cannot answer it."""

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
    """Pick a deployment of the pool that the model is mapped to, and ask another where it does not answer.

    The lowest priority number is asked first; among those of one, the one with the least in flight for its weight and
    for the room that Azure says it has. A request goes on to another deployment after a failed connection, a time-out
    before the first byte, a 408, a 429, a 5xx, or an error with which a stream begins: never once anything of the
    answer has gone to the client, and, unless it surely was not processed, never if it would do harm to process it
    twice. A deployment that fails, or says 429, rests for a while (`health:` in gateway.yaml). If all fail, the client
    gets the error that tells it most. Stands below `model_map` and `resource_ids`, and above `api_version`.
    """

    attempts: Annotated[int, Meta(ge=1, le=100, description="how often a request may be sent, to all together")] = 5
    deadline: Annotated[
        float | None,
        Meta(
            gt=0, description="seconds for all attempts and waits, until an answer has begun; timeouts.first_byte else"
        ),
    ] = None
    silence: Annotated[
        float,
        Meta(gt=0, description="seconds until a stream that has not begun is asked for elsewhere, where it can be"),
    ] = 60.0
    wait: Annotated[
        float,
        Meta(ge=0, le=600, description="seconds that a request may wait for one to come back, where all of them rest"),
    ] = 5.0
    retries: Annotated[
        float, Meta(ge=0, le=10, description="how many attempts more there may be, as a share of the requests")
    ] = 0.2
    reserve: Annotated[int, Meta(ge=0, le=1_000_000, description="and how many more at once, for bad moments")] = 100
    affinity: Annotated[
        list[Field],
        Meta(description="requests alike in the first of these that they have go to one deployment, while it can"),
    ] = field(default_factory=list)
    hold: Annotated[
        float,
        Meta(ge=0, le=60, description="seconds that a stream which has begun is kept back for its first words"),
    ] = 10.0
    keep: Annotated[
        int, Meta(ge=0, description="the largest body, in bytes, that is kept so that it can be sent again")
    ] = 16 * 1024 * 1024
    seed: Annotated[int | None, Meta(description="makes the choices the same each time, for tests")] = None

    needs = ("deployment",)
    provides = ("choice",)
    must_precede = ("api_version",)  # which a resource may have one of its own

    async def start(self, services: Services) -> None:
        budget: RetryBudget = services.store.setdefault("budget", RetryBudget(self.reserve))
        limits = RetryLimits(
            # (So much sooner that it is a failed attempt, and not the end of everything.)
            min(self.deadline or math.inf, 0.98 * services.first_byte_timeout),
            self.silence,
            self.attempts,
            self.wait,
            self.hold,
            self.keep,
            self.retries,
            self.reserve,
        )
        self._balancers = {
            name: Retrier(pool, services.health, budget, limits, services.logger, self.seed)
            for name, pool in services.pools.items()
        }
        self.idle = not services.pools

    async def __call__(self, request: Request, call_next: Next) -> Response:
        pool = request.target.pool
        if pool is None:
            return await call_next(request)
        key = await self._key(request) if self.affinity else None
        return await self._balancers[pool.name].send(request, call_next, key)

    async def _key(self, request: Request) -> bytes | None:
        """Return what a request has in common with those that are to go where it goes."""
        names = [name for name in self.affinity if name != "caller"]
        form = (request.headers.get("content-type") or "").lower().startswith("multipart/")
        try:
            fields = await request.fields(*names) if names and not form else {}
        except ApiError:  # it is no JSON, and Azure will say so
            fields = {}
        for name in self.affinity:
            value = request.caller.encode() if name == "caller" and request.caller else fields.get(name)
            if value and value != b"null":
                return value
        return None
