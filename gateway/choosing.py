"""Which deployment of a pool a request goes to.

Of the first priority in which one is available: the one with the least in flight for its weight, and for the room
that Azure says it has. Where several have as little, they take turns by their weights, so that the shares are right
also where one request comes after another. A request with a key goes where all of that key go, as long as that one is
available (rendezvous hashing: when one is not, only its own keys go elsewhere).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from hashlib import blake2b
from random import Random

from gateway.health import DeploymentHealth, Health
from gateway.targets import Deployment, Pool

__all__ = ("Choice", "Chooser")


class Choice:
    """A deployment that can be chosen."""

    __slots__ = ("deployment", "health", "name", "turn", "weight")

    def __init__(self, deployment: Deployment, health: DeploymentHealth, turn: float) -> None:
        self.deployment = deployment
        self.health = health
        self.name = str(deployment)
        self.weight = deployment.weight
        self.turn = turn  # when it is its turn, in a time that goes on with each choice


class Chooser:
    """Chooses among the deployments of one pool; the same choices under the same seed, if all else is the same."""

    def __init__(self, pool: Pool, health: Health, seed: int | None = None) -> None:
        # Not to be guessed by nobody, but different in each process, so that all do not begin with the same one.
        random = Random(None if seed is None else f"{seed} {pool.name}")  # noqa: S311 -- no secret
        self.all = [Choice(each, health.of(each), random.random() / each.weight) for each in pool.deployments]
        priorities = sorted({each.deployment.priority for each in self.all})
        self._groups = [[each for each in self.all if each.deployment.priority == one] for one in priorities]
        self._turns = [0.0] * len(self._groups)

    def pick(self, now: float, tried: Collection[Choice] = (), key: bytes | None = None) -> Choice | None:
        """Return one that is available and was not tried, or None. One without room is the last that is taken."""
        full = False
        for place, group in enumerate(self._groups):
            best: Choice | None = None
            least = math.inf
            for each in group:
                health = each.health
                if health.rests_until > now or health.trying or each in tried:
                    continue
                weight = each.weight
                if health.room_until > now:
                    if health.room <= 0.0:
                        full = True
                        continue
                    weight *= health.room
                load = health.in_flight / weight if key is None else _distance(key, each)
                if load < least or (load == least and best is not None and each.turn < best.turn):
                    best, least = each, load
            if best is not None:
                if key is None:
                    self._take_turn(place, best)
                return best
        return self._pick_full(now, tried) if full else None

    def _pick_full(self, now: float, tried: Collection[Choice]) -> Choice | None:
        for each in self.all:
            if each.health.is_available(now) and each not in tried:
                return each
        return None

    def _take_turn(self, place: int, best: Choice) -> None:
        # One that rested does not make up for what it missed: its turn is now.
        at = self._turns[place] = max(best.turn, self._turns[place])
        best.turn = at + 1 / best.weight

    def available_in(self, now: float) -> float:
        """Return in how many seconds the first of them is available; infinity where that is not known."""
        return min(each.health.available_in(now) for each in self.all)


def _distance(key: bytes, choice: Choice) -> float:
    """Return how far a deployment is from a key: each is the nearest to its share of all keys, by its weight."""
    digest = blake2b(key + b"\0" + choice.name.encode(), digest_size=8).digest()
    drawn = (int.from_bytes(digest, "big") + 1) / (2**64 + 1)
    return -math.log(drawn) / choice.weight
