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
from gateway.targets import Deployment, Pool, Target

__all__ = ("Choice", "Chooser")

# How often, in seconds, it is looked whether a request that tries a deployment has come back.
_LOOK_AGAIN = 0.05


class Choice:
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

    __slots__ = ("choices", "now")

    def __init__(self, choices: list[Choice]) -> None:
        # (What is looked at for each request is at hand without a look at the choice.)
        self.choices = [(each, each.health, each.step) for each in choices]
        self.now = 0.0


class Chooser:
    """Chooses among the deployments of one pool; the same choices under the same seed, if all else is the same."""

    def __init__(self, pool: Pool, health: Health, seed: int | None = None) -> None:
        # Not to be guessed by nobody, but different in each process, so that all do not begin with the same one.
        random = Random(None if seed is None else f"{seed} {pool.name}")  # noqa: S311 -- no secret
        self.all = [Choice(each, health.of(each), random.random() / each.weight) for each in pool.deployments]
        priorities = sorted({each.deployment.priority for each in self.all})
        self.alone = False
        """Whether what was picked last was the only one of its priority that could be."""
        self._groups = [_Group([each for each in self.all if each.deployment.priority == one]) for one in priorities]

    def pick(self, now: float, tried: Collection[Choice] = (), key: bytes | None = None) -> Choice | None:
        """Return one that is available and was not tried, or None. One without room is the last that is taken."""
        for group in self._groups:
            best: Choice | None = None
            least = turn = math.inf
            count = 0
            for each, health, step in group.choices:
                if health.away_until > now or (tried and each in tried):
                    continue
                count += 1
                load = health.in_flight * step / health.room if key is None else _distance(key, each)
                if load < least or (load == least and each.turn < turn):
                    best, least, turn = each, load, each.turn
            if best is not None:
                self.alone = count == 1
                if key is None:
                    # One that rested does not make up for what it missed: its turn is now.
                    turn = max(turn, group.now)
                    group.now, best.turn = turn, turn + best.step
                return best
        self.alone = True
        return self._pick_full(now, tried)

    def has_another(self, now: float, tried: Collection[Choice]) -> bool:
        """Whether there is another one that is available and was not tried."""
        return any(each.health.is_available(now) and each not in tried for each in self.all)

    def _pick_full(self, now: float, tried: Collection[Choice]) -> Choice | None:
        for each in self.all:
            if each.health.is_available(now) and each not in tried:
                return each
        return None

    def available_in(self, now: float) -> float:
        """Return in how many seconds it is worth while to look again whether one of them is available."""
        return min(_LOOK_AGAIN if each.health.trying else each.health.available_in(now) for each in self.all)


def _distance(key: bytes, choice: Choice) -> float:
    """Return how far a deployment is from a key: each is the nearest to its share of all keys, by its weight."""
    digest = blake2b(key + b"\0" + choice.name.encode(), digest_size=8).digest()
    drawn = (int.from_bytes(digest, "big") + 1) / (2**64 + 1)
    return -math.log(drawn) / choice.weight
