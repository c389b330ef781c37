"""Balancing: `Selector` picks the deployment of a pool that a request goes to; `Retrier` (`retries.py`) retries.

It uses the lowest priority number in which a deployment is available. Within it, stride scheduling distributes requests
by weight: each deployment has a virtual time at which it is due, and each request moves that time on by a stride of
1 / weight. Requests in flight delay a deployment by a stride each, and little headroom makes the stride longer. So a
sequence of requests is shared by weight, and of concurrent ones the deployment with the least load for its weight gets
the next.

A request with a key goes to the deployment of that key while it is available (rendezvous hashing: if a deployment is
unavailable, only its own keys move).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from random import Random

from gateway.azure.resources import Deployment, Pool, Target
from gateway.balancing.circuit_breaker import DeploymentHealth
from gateway.balancing.health import Health

__all__ = ("Candidate", "Selector")

# How often, in seconds, a waiting request checks whether a trial has ended.
_TRIAL_CHECK_INTERVAL = 0.05
# Mean interval between the wake-ups of waiting requests, in seconds.
_WAKE_UP_INTERVAL = 0.005


class Candidate:
    """A deployment that can be picked."""

    __slots__ = ("deployment", "due", "health", "name", "stride", "target", "weight")

    def __init__(self, deployment: Deployment, health: DeploymentHealth, due: float) -> None:
        self.deployment = deployment
        self.health = health
        self.name = str(deployment)
        self.weight = deployment.weight
        self.due = due  # the virtual time of its next request
        self.stride = 1 / deployment.weight  # from one of its requests to the next
        self.target = Target(deployment.resource, deployment.name)


class _PriorityGroup:
    """The deployments of one priority, and their virtual time."""

    __slots__ = ("candidates", "time")

    def __init__(self, candidates: list[Candidate]) -> None:
        # (Tuples save an attribute access for each deployment and request.)
        self.candidates = [(each, each.health, each.stride) for each in candidates]
        self.time = 0.0

    def pick(self, now: float, tried: Collection[Candidate]) -> Candidate | None:
        """Return the deployment that is due first, its requests in flight included."""
        best: Candidate | None = None
        least = math.inf
        at = next_due = time = self.time
        for each, health, stride in self.candidates:
            if health.avoid_until > now or (tried and each in tried):
                continue
            if health.headroom < 1.0:
                if health.headroom_until <= now:
                    health.headroom = 1.0  # the value is old, and quotas are renewed each minute
                stride /= health.headroom  # noqa: PLW2901 -- less headroom is less weight
            # A deployment that was passed over catches up by one stride at most, and waits for one at most: it may have
            # more headroom than at its last request. (`max` would be a call for each request and deployment.)
            due = each.due
            if due < time - stride:
                due = time - stride
            elif due > time + stride:
                due = time + stride
            loaded = due + health.in_flight * stride
            if loaded < least:
                best, least, at, next_due = each, loaded, due, due + stride
        if best is not None:
            best.due = next_due
            if at > time:
                self.time = at
        return best

    def pick_by_key(self, now: float, tried: Collection[Candidate], key: bytes) -> Candidate | None:
        """Return the available deployment with the lowest score for a key."""
        found = [each for each, health, _ in self.candidates if health.avoid_until <= now and each not in tried]
        return min(found, key=lambda each: _rendezvous_score(key, each), default=None)


class Selector:
    """Picks deployments of one pool; the same seed makes the same picks, if all else is equal."""

    def __init__(self, pool: Pool, health: Health, seed: int | None = None) -> None:
        # Random starts keep processes from picking the same deployment first; they need not be hard to guess.
        self._random = random = Random(None if seed is None else f"{seed} {pool.name}")  # noqa: S311 -- no secret
        self._waiting = 0
        self.all = [Candidate(each, health.of(each), random.random() / each.weight) for each in pool.deployments]
        priorities = sorted({each.deployment.priority for each in self.all})
        self._groups = [
            _PriorityGroup([each for each in self.all if each.deployment.priority == one]) for one in priorities
        ]

    def pick(self, now: float, tried: Collection[Candidate] = (), key: bytes | None = None) -> Candidate | None:
        """Return an available deployment that was not tried, or None. One without headroom is the last resort."""
        for group in self._groups:
            best = group.pick(now, tried) if key is None else group.pick_by_key(now, tried, key)
            if best is not None:
                return best
        return self._pick_full(now, tried)

    def has_another(self, now: float, tried: Collection[Candidate]) -> bool:
        """Whether a deployment is available that was not tried."""
        return any(each.health.is_available(now) and each not in tried for each in self.all)

    def _pick_full(self, now: float, tried: Collection[Candidate]) -> Candidate | None:
        for each in self.all:
            if each.health.is_available(now) and each not in tried:
                return each
        return None

    def pick_throttled(self, now: float, tried: Collection[Candidate]) -> Candidate | None:
        """Return a deployment that only its slow start blocks, for a request that must not wait; or None."""
        return next((each for each in self.all if each.health.is_throttled(now) and each not in tried), None)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count a request that waits for a deployment to become available."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def jitter(self, most: float) -> float:
        """Return a random delay in seconds that keeps waiting requests from waking up together; at most `most` / 2."""
        return self._random.random() * min(most / 2, _WAKE_UP_INTERVAL * self._waiting)

    def available_in(self, now: float) -> float:
        """Return in how many seconds to check again whether a deployment is available."""
        return min(
            _TRIAL_CHECK_INTERVAL if each.health.half_open else each.health.available_in(now)
            for each in self.all
        )  # fmt: skip


def _rendezvous_score(key: bytes, candidate: Candidate) -> float:
    """Return the score of a deployment for a key: it is the lowest for a share of all keys that its weight sets."""
    digest = blake2b(key + b"\0" + candidate.name.encode(), digest_size=8).digest()
    drawn = (int.from_bytes(digest, "big") + 1) / (2**64 + 1)
    return -math.log(drawn) / candidate.weight
