"""Which deployment of a pool a request goes to.

Of the first priority in which one is available they take turns by their weights, and by the room that Azure says they
have; but each comes so much later as it has requests in flight. So the shares are right where one request comes after
another, and where many run at once it is the one with the least in flight for its weight. A request with a key goes
where all of that key go, as long as that one is available (rendezvous hashing: when one is not, only its own keys go
elsewhere).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from random import Random

from gateway.azure.resources import Deployment, Pool, Target
from gateway.balancing.circuit_breaker import DeploymentHealth, Health

__all__ = ("Selection", "Selector")

# How often, in seconds, it is looked whether a request that tries a deployment has come back.
_LOOK_AGAIN = 0.05
# Requests that wait wake about so many seconds apart.
_APART = 0.005


class Selection:
    """A deployment that can be chosen."""

    __slots__ = ("deployment", "health", "name", "step", "target", "turn", "weight")

    def __init__(self, deployment: Deployment, health: DeploymentHealth, turn: float) -> None:
        self.deployment = deployment
        self.health = health
        self.name = str(deployment)
        self.weight = deployment.weight
        self.turn = turn  # when it is its turn, in a time that goes on with each choice
        self.step = 1 / deployment.weight  # from one of its turns to the next
        self.target = Target(deployment.resource, deployment.name)


class _Group:
    """Those of one priority, and the time in which they take turns."""

    __slots__ = ("choices", "time")

    def __init__(self, choices: list[Selection]) -> None:
        # (What is looked at for each request is at hand without a look at the choice.)
        self.choices = [(each, each.health, each.step) for each in choices]
        self.time = 0.0

    def next(self, now: float, tried: Collection[Selection]) -> Selection | None:
        """Return the one whose turn it is: each comes so much later as it has requests in flight."""
        best: Selection | None = None
        least = math.inf
        at = next_turn = time = self.time
        for each, health, step in self.choices:
            if health.away_until > now or (tried and each in tried):
                continue
            if health.room < 1.0:
                if health.room_until <= now:
                    health.room = 1.0  # that was long ago, and a quota is new each minute
                step /= health.room  # noqa: PLW2901 -- less room is less weight
            # One that was passed over makes up for one turn at most, and none waits longer than for one: it may have
            # more room by now than when it was chosen last. (`max` would be a call, for each request and deployment.)
            turn = each.turn
            if turn < time - step:
                turn = time - step
            elif turn > time + step:
                turn = time + step
            behind = turn + health.in_flight * step
            if behind < least:
                best, least, at, next_turn = each, behind, turn, turn + step
        if best is not None:
            best.turn = next_turn
            if at > time:
                self.time = at
        return best

    def nearest(self, now: float, tried: Collection[Selection], key: bytes) -> Selection | None:
        """Return the one that is nearest to a key."""
        found = [each for each, health, _ in self.choices if health.away_until <= now and each not in tried]
        return min(found, key=lambda each: _distance(key, each), default=None)


class Selector:
    """Chooses among the deployments of one pool; the same choices under the same seed, if all else is the same."""

    def __init__(self, pool: Pool, health: Health, seed: int | None = None) -> None:
        # Not to be guessed by nobody, but different in each process, so that all do not begin with the same one.
        self._random = random = Random(None if seed is None else f"{seed} {pool.name}")  # noqa: S311 -- no secret
        self._waiting = 0
        self.all = [Selection(each, health.of(each), random.random() / each.weight) for each in pool.deployments]
        priorities = sorted({each.deployment.priority for each in self.all})
        self._groups = [_Group([each for each in self.all if each.deployment.priority == one]) for one in priorities]

    def pick(self, now: float, tried: Collection[Selection] = (), key: bytes | None = None) -> Selection | None:
        """Return one that is available and was not tried, or None. One without room is the last that is taken."""
        for group in self._groups:
            best = group.next(now, tried) if key is None else group.nearest(now, tried, key)
            if best is not None:
                return best
        return self._pick_full(now, tried)

    def has_another(self, now: float, tried: Collection[Selection]) -> bool:
        """Whether there is another one that is available and was not tried."""
        return any(each.health.is_available(now) and each not in tried for each in self.all)

    def _pick_full(self, now: float, tried: Collection[Selection]) -> Selection | None:
        for each in self.all:
            if each.health.is_available(now) and each not in tried:
                return each
        return None

    def pick_held_back(self, now: float, tried: Collection[Selection]) -> Selection | None:
        """Return one that only its slow start holds back, for a request that cannot wait; or None."""
        return next((each for each in self.all if each.health.holds_back(now) and each not in tried), None)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count a request that waits for one of them to be available."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def jitter(self, most: float) -> float:
        """Return for how many seconds more a request waits, so that not all wake at once; at most half of `most`."""
        return self._random.random() * min(most / 2, _APART * self._waiting)

    def available_in(self, now: float) -> float:
        """Return in how many seconds it is worth while to look again whether one of them is available."""
        return min(_LOOK_AGAIN if each.health.trying else each.health.available_in(now) for each in self.all)


def _distance(key: bytes, choice: Selection) -> float:
    """Return how far a deployment is from a key: each is the nearest to its share of all keys, by its weight."""
    digest = blake2b(key + b"\0" + choice.name.encode(), digest_size=8).digest()
    drawn = (int.from_bytes(digest, "big") + 1) / (2**64 + 1)
    return -math.log(drawn) / choice.weight
