"""How the deployments of pools are: which of them may be asked now, as far as this process knows.

A deployment rests when Azure asks for that (a 429), or when it fails: so many times in a row, or too large a share of
what it was asked of late. After a rest for failures one request tries it, and the others follow if that succeeds: a
circuit breaker, which is closed, open, and then half-open.

After any rest the others follow in a slow start, and not all at once: as many requests as its window allows may be sent
and not accepted yet. The window begins at one and doubles in each round, up to half of what it was when Azure last
refused a request; from there on it grows by one in each round (as TCP does it, RFC 5681).

Nothing here waits or does I/O. Whoever shares what is known here with other processes is told by `told`, and tells by
`hear`; what is heard late, or not at all, does no harm: each process learns by itself, too.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Any

import msgspec

from gateway.azure.resources import Deployment
from gateway.logs import get_logger
from gateway.protocol.headers import Field
from gateway.settings import HealthSettings

__all__ = ("DeploymentHealth", "Health", "HealthEvent")

# The longest rest that Azure can ask for, in seconds: it has asked for a day, and quotas are raised meanwhile.
MOST_REST = 3600.0
# For how long, in seconds, what Azure said of its room is believed, and how often it is looked at.
_ROOM_FOR, _LOOK_EVERY = 5.0, 0.1
# What is left of a room that is used up: nothing, but for a number that can be divided by.
_FULL = 1e-3
# For how long, in seconds, nobody else tries one that has failed while a request does.
_TRY_FOR = 5.0
# Slow start: a refusal (429) comes sooner than this, in seconds, so what was not refused by then was accepted; and how
# long after a rest it ends if nothing is refused.
_ACCEPTED_AFTER, _SLOW_FOR = 0.15, 10.0
# What `begin` returns for a request of a slow start; the numbers of tries are above 0.
_SLOWLY = -1
# In how many parts the window is counted.
_PARTS = 10

_REMAINING = {
    b"x-ratelimit-remaining-requests": b"x-ratelimit-limit-requests",
    b"x-ratelimit-remaining-tokens": b"x-ratelimit-limit-tokens",
}
_LIMITS = frozenset(_REMAINING.values())
# Of a provisioned deployment: how much of it is in use, as `98.5%`.
_UTILISATION = b"azure-openai-deployment-utilization"


class HealthEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one process tells others of a deployment: that it rests for so many seconds, or, with none, no more."""

    key: str
    seconds: float = 0.0
    failing: bool = False
    """Whether it rests for failures, so that after it one request tries it first."""
    reason: str = ""


class DeploymentHealth:
    """How one deployment is. Times are on the clock of `time.monotonic`."""

    __slots__ = (
        "_answered",
        "_answered_now",
        "_cools_until",
        "_failed",
        "_health",
        "_limits",
        "_look_at",
        "_part",
        "_rest",
        "_rests_until",
        "_sent",
        "_slow_until",
        "_threshold",
        "_tries",
        "_try",
        "_turn_at",
        "_window",
        "answered",
        "away_until",
        "cautious",
        "counts",
        "deployment",
        "failing",
        "failures",
        "in_flight",
        "key",
        "reason",
        "room",
        "room_until",
    )

    def __init__(self, deployment: Deployment, health: Health) -> None:
        self.deployment = deployment
        self.key = _key(deployment)
        self.in_flight = 0
        self.away_until = 0.0
        """Until when it is asked only if no other can be: it rests, or has no room left."""
        self.rests_until = 0.0
        self.reason = ""
        """Why it rests, or rested last."""
        self.failing = False
        """Whether the circuit is open, or half-open once the rest is over."""
        self.cautious = False
        """Whether `begin_try` must be asked: it is failing, or in a slow start."""
        self.failures = 0
        """How many there were in a row."""
        self.room = 1.0
        """How much of its quota was left by what Azure said last, up to 1; 1 where it has said nothing."""
        self.room_until = 0.0
        """Until when that is believed to be so."""
        self.answered = 0
        """How many requests it had answered since the start when that was looked at last."""
        self.counts: Counter[str] = Counter()
        """How many it has not, by the reasons."""
        self._health = health
        self._rest = 0.0
        self._cools_until = 0.0  # as Azure has asked
        self._try = 0  # the number of the one under way
        self._tries = 0
        self._window = 1.0  # of a slow start: how many may be sent and not accepted
        self._threshold = math.inf  # from which the window grows slowly
        self._sent: deque[float] = deque()  # when those were sent that are not accepted yet
        self._slow_until = 0.0
        self._limits: dict[bytes, float] = {}
        self._look_at = 0.0
        self._answered = [0] * _PARTS
        self._answered_now = 0  # and not counted in its part yet
        self._failed = [0] * _PARTS
        self._part = 0
        self._turn_at = 0.0

    @property
    def rests_until(self) -> float:
        """Until when it may not be asked."""
        return self._rests_until

    @rests_until.setter
    def rests_until(self, until: float) -> None:
        self._rests_until = self.away_until = until

    # -- asking it -------------------------------------------------------------------------------------

    def is_available(self, now: float) -> bool:
        """Whether it may be asked."""
        return self.rests_until <= now

    def available_in(self, now: float) -> float:
        """Return in how many seconds it may be asked, if the request that tries it now does not come back before."""
        return max(0.0, self.rests_until - now)

    def begin(self, now: float, *, alone: bool = True) -> int:
        """Note that it is asked; returns the number of the try that this request is, whose end must be told, or 0."""
        self.in_flight += 1
        return self.begin_try(now, alone=alone) if self.cautious else 0

    def begin_try(self, now: float, *, alone: bool) -> int:
        """Begin to try one that has failed, if its rest is over; returns the number of the try, or 0.

        Nobody else tries it meanwhile if it is to be tried `alone`, but not for ever: that may take as long as an
        answer does. In a slow start, it begins one of the requests that its window allows.
        """
        if not self.failing:
            return self._begin_slowly(now)
        if self.rests_until > now:
            return 0
        self._tries += 1
        self._try = self._tries
        if alone:
            self.rests_until = now + _TRY_FOR
        return self._try

    @property
    def trying(self) -> bool:
        """Whether a request tries it, behind its rest."""
        return self._try != 0

    def end(self) -> None:
        """Note that a request is over; once for each `begin`."""
        self.in_flight -= 1

    def began(self, now: float, tried: int = 0, fields: Sequence[Field] = ()) -> None:
        """Note that it has begun to answer, with these header fields; `tried` is what `begin` said."""
        if now >= self._look_at:
            self._look(now, fields)
        if tried:
            self._accepted(now, tried)

    def succeeded(self, now: float, tried: int = 0, fields: Sequence[Field] = ()) -> None:
        """Note that it has answered, with these header fields; `tried` is what `begin` said."""
        if now >= self._look_at:
            self._look(now, fields)
        self._answered_now += 1
        self.failures = 0
        if tried:
            self._accepted(now, tried)

    def failed(
        self, now: float, reason: str, words: str = "", *, tried: int = 0, certain: bool = False, counts: bool = True
    ) -> None:
        """Note that it could not answer, and in what words.

        Where it is `certain` that it cannot, once is enough. What does not count is only told: it may be the request's
        own fault.
        """
        self.counts[reason] += 1
        settings = self._health.settings
        if tried and tried == self._try:
            self._try = 0
            self._rest = min(2 * self._rest, settings.most_rest)
            self.rests_until = self._cools_until
            self._rest_for(now, self._rest, reason, words)
            return
        if not counts:
            return
        if now >= self._turn_at:
            self._turn(now)
        self._failed[self._part] += 1
        self.failures += 1
        if self.failing:
            return  # it was sent before it began to rest
        if certain:
            self._rest = settings.most_rest
        elif self.failures >= settings.failures or self._share_is_too_large():
            self._rest = settings.rest
        else:
            return
        self._begin_failing()
        self._rest_for(now, self._rest, reason, words)

    def cool_down(self, now: float, seconds: float, reason: str, words: str = "", *, tried: int = 0) -> None:
        """Note that Azure asks for it to be left alone."""
        self.counts[reason] += 1
        self.room, self.room_until = 1.0, 0.0  # what was left before says nothing of what is there after its rest
        if tried > 0:
            self._close(now)  # it is there, and says so
        if tried and self._cools_until <= now:
            self._threshold = max(1.0, self._window / 2)
        if self.holds_back(now):
            self._open()  # it rests for another reason now
        self._cools_until = max(self._cools_until, now + min(seconds, MOST_REST))
        self._start_slowly(self._cools_until)
        self._rest_for(now, min(seconds, MOST_REST), reason, words)

    def left(self, now: float, tried: int) -> None:
        """Note that the request which tried it ended before it was known how that went: another may."""
        if tried == self._try:
            self._try = 0
            self.rests_until = max(now, self._cools_until)

    def probed(self, now: float, reason: str | None, again: float) -> None:
        """Note what a probe found while it rests: nothing wrong, so a request may try it; or what, so not so soon."""
        if not self.failing or self.trying:
            return
        if reason is None:
            self.rests_until = max(now, self._cools_until)
        else:
            self.rests_until = max(self.rests_until, now + again)
            self.reason = reason

    # -- slow start ------------------------------------------------------------------------------------

    def holds_back(self, now: float) -> bool:
        """Whether it is asked no more only because its slow start has sent what its window allows."""
        return self.cautious and not self.failing and self._cools_until <= now < self.rests_until

    def _start_slowly(self, begins: float) -> None:
        """Let few requests go first when its rest is over."""
        self.cautious = True
        self._window = 1.0
        self._sent.clear()
        self._slow_until = begins + _SLOW_FOR

    def _begin_slowly(self, now: float) -> int:
        """Note that a request is sent in a slow start; the last one that the window allows holds the others back."""
        if now >= self._slow_until:
            self.cautious = False
            self._threshold = math.inf
            self._sent.clear()
            return 0
        sent = self._sent
        while sent and sent[0] + _ACCEPTED_AFTER <= now:
            self._grow()
        sent.append(now)
        if len(sent) >= self._window:
            self._rests_until = sent[0] + _ACCEPTED_AFTER
            self.away_until = max(self.away_until, self._rests_until)
        return _SLOWLY

    def _accepted(self, now: float, tried: int) -> None:
        """Note that a request was accepted that had tried it, or was one of a slow start."""
        if tried > 0:
            self._close(now)
        elif self._sent and not self.failing:
            self._grow()
            if len(self._sent) < self._window and self.holds_back(now):
                self._open()

    def _grow(self) -> None:
        self._sent.popleft()
        self._window += 1 if self._window < self._threshold else 1 / self._window

    def _open(self) -> None:
        """Hold nobody back any more."""
        if self.away_until == self._rests_until:
            self.away_until = self._cools_until
        self._rests_until = self._cools_until

    # -- what Azure says of its room -------------------------------------------------------------------

    def _look(self, now: float, fields: Sequence[Field]) -> None:
        """Do what is not done for every answer: go on in the window, and look at how much room is left."""
        self._look_at = now + _LOOK_EVERY
        if now >= self._turn_at:
            self._turn(now)
        if fields:
            self.observe(now, fields)

    def observe(self, now: float, fields: Iterable[Field]) -> None:
        """Take what the header fields of an answer say of how much room is left."""
        rooms: list[float] = []
        seen: dict[bytes, float] = {}
        for name, value, _, _ in fields:
            if name in _REMAINING or name in _LIMITS:
                if (number := _number(value)) is not None:
                    seen[name] = number
            elif name == _UTILISATION and (number := _number(value.rstrip(b" %"))) is not None:
                rooms.append(1 - number / 100)
        for name, limit in _REMAINING.items():
            left = seen.get(name)
            if left is not None:
                # Where Azure does not say the limit, the most that was ever left stands for it.
                most = self._limits[name] = seen.get(limit) or max(left, self._limits.get(name, 0.0))
                rooms.append(left / most if most > 0 else 0.0)
        if rooms:
            self.room, self.room_until = min(1.0, max(_FULL, min(rooms))), now + _ROOM_FOR
            if self.room <= _FULL:
                self.away_until = max(self.away_until, self.room_until)

    # -- inside ----------------------------------------------------------------------------------------

    def _rest_for(self, now: float, seconds: float, reason: str, words: str) -> None:
        until = now + seconds
        if until <= self.rests_until:
            return
        longer = until - self.rests_until > 0.05 or self.rests_until <= now
        self.rests_until, self.reason = until, reason
        if longer:
            get_logger().warning(
                "a deployment rests",
                deployment=str(self.deployment),
                reason=reason,
                words=words,
                seconds=round(seconds, 3),
            )
            self._health.tell(HealthEvent(self.key, seconds, self.failing, reason))

    def _begin_failing(self) -> None:
        self.failing = self.cautious = True
        self._sent.clear()

    def _close(self, now: float) -> None:
        self._try = 0
        if self.failing:
            self.failing = False
            self.rests_until = self._cools_until
            self._start_slowly(max(now, self._cools_until))
            self._rest = 0.0
            self.failures = 0
            self.answered += self._answered_now
            self._answered, self._failed, self._answered_now = [0] * _PARTS, [0] * _PARTS, 0
            get_logger().info("a deployment is back", deployment=str(self.deployment))
            self._health.tell(HealthEvent(self.key))

    def hear(self, now: float, news: HealthEvent) -> None:
        """Take what another process knows."""
        if news.seconds > 0:
            until = now + min(news.seconds, MOST_REST)
            if self.holds_back(now):
                self._open()
            if not news.failing:
                self._cools_until = max(self._cools_until, until)
                if not self.failing:
                    self._start_slowly(self._cools_until)
            elif not self.failing:
                self._begin_failing()
                self._rest = self._health.settings.rest
            if until > self.rests_until:
                self.rests_until, self.reason = until, news.reason
        elif self.failing and not self.trying:
            self.failing = False
            self.rests_until, self.failures = self._cools_until, 0
            self._start_slowly(max(now, self._cools_until))

    def _turn(self, now: float) -> None:
        """Go on to the part of the window that is now."""
        self._answered[self._part] += self._answered_now
        self.answered, self._answered_now = self.answered + self._answered_now, 0
        part = self._health.settings.window / _PARTS
        over = int((now - self._turn_at) / part) + 1 if self._turn_at else _PARTS
        for _ in range(min(over, _PARTS)):
            self._part = (self._part + 1) % _PARTS
            self._answered[self._part] = self._failed[self._part] = 0
        self._turn_at = now + part

    def _share_is_too_large(self) -> bool:
        settings = self._health.settings
        failed = sum(self._failed)
        asked = failed + sum(self._answered) + self._answered_now
        return asked >= settings.least and failed / asked >= settings.share

    def report(self, now: float) -> dict[str, Any]:
        """Return how it is, for people: seconds, shares from 0 to 1, counts since the start."""
        if now >= self._turn_at:
            self._turn(now)
        failed, answered = sum(self._failed), sum(self._answered) + self._answered_now
        rests = self.rests_until > now and not self.trying and not self.holds_back(now)
        state = ("open" if rests else "half_open") if self.failing else "cooling_down" if rests else "available"
        return {
            "resource": self.deployment.resource.name,
            "deployment": self.deployment.name,
            "region": self.deployment.resource.region,
            "state": state,
            "reason": self.reason if state != "available" else None,
            "cool_down": round(self.rests_until - now, 3) if rests else 0.0,
            "in_flight": self.in_flight,
            "error_share": round(failed / (failed + answered), 4) if failed + answered else 0.0,
            "requests": failed + answered,
            "failures_in_a_row": self.failures,
            "headroom": (round(self.room, 4) if self.room > _FULL else 0.0) if self.room_until > now else None,
            "counts": {"answered": self.answered + self._answered_now, **dict(sorted(self.counts.items()))},
        }


class Health:
    """How all deployments of pools are. One for each process; it outlives reloads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = HealthSettings()
        self.told: list[Callable[[HealthEvent], None]] = []
        """Who wants to know what changes here."""
        self._clock = clock
        self._known: dict[str, DeploymentHealth] = {}
        self._used: list[DeploymentHealth] = []

    def use(self, settings: HealthSettings, deployments: Sequence[Deployment]) -> None:
        """Have these settings, and these deployments; of those that were there already all stays known."""
        self.settings = settings
        self._used = [self.of(each) for each in deployments]
        for found, each in zip(self._used, deployments, strict=True):
            found.deployment = each
        self._known = {each.key: each for each in self._used}

    def of(self, deployment: Deployment) -> DeploymentHealth:
        """Return how a deployment is."""
        key = _key(deployment)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = DeploymentHealth(deployment, self)
        return found

    def all(self) -> list[DeploymentHealth]:
        """Return those of the configuration that counts, each once, in its order."""
        return list(dict.fromkeys(self._used))

    def tell(self, news: HealthEvent) -> None:
        """Tell everyone who wants to know."""
        for each in self.told:
            each(news)

    def hear(self, news: HealthEvent) -> None:
        """Take what another process knows; of a deployment that is not known here it is nothing."""
        found = self._known.get(news.key)
        if found is not None:
            found.hear(self._clock(), news)

    def news(self) -> list[HealthEvent]:
        """Return what a process that is new has to know."""
        now = self._clock()
        return [
            HealthEvent(each.key, each.rests_until - now, each.failing, each.reason)
            for each in self.all()
            if each.rests_until > now and not each.trying and not each.holds_back(now)
        ]

    def report(self) -> list[dict[str, Any]]:
        """Return how each of them is, for people."""
        now = self._clock()
        return [each.report(now) for each in self.all()]


def _key(deployment: Deployment) -> str:
    """Return what a deployment is known by everywhere: one that a reload moved, or gave another key, is another."""
    resource = deployment.resource
    shown = (
        resource.credential.digest
        if resource.credential is not None
        else repr(resource.tokens and resource.tokens.identity)
    )
    by = blake2b(shown.encode(), digest_size=6).hexdigest()
    return f"{resource.name}/{deployment.name} {resource.endpoint} {by}"


def _number(text: bytes) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
