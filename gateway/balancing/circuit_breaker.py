"""The circuit breaker of one deployment: it decides when the deployment may receive requests.

A 429 starts a cooldown of the length that Azure asks for. Failures open the circuit: a number of them in a row, or too
large a share of recent requests. After a while one trial request decides whether the circuit closes or opens for twice
as long. After a cooldown or a successful trial, a slow start (`slow_start.py`) keeps waiting requests from arriving all
at once.

Its states and their transitions are in `circuit_state.py`. Nothing here waits or does I/O.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import msgspec

from gateway.azure.resources import Deployment
from gateway.balancing.circuit_state import CLOSED, CircuitState
from gateway.balancing.failure_window import FailureWindow
from gateway.balancing.headroom import FULL, HEADROOM_SECONDS, headroom_of
from gateway.balancing.slow_start import SlowStart
from gateway.logs import get_logger
from gateway.protocol.headers import Field
from gateway.settings import HealthSettings

__all__ = ("DeploymentHealth", "HealthEvent")

# The longest cooldown, in seconds: Azure has asked for a day, and quotas can be raised meanwhile.
_MAX_COOLDOWN = 3600.0
# For how long, in seconds, a trial without a result keeps other requests away.
_TRIAL_SECONDS = 5.0
# Minimum interval between two looks at the headroom and the failure window, in seconds.
_OBSERVE_INTERVAL = 0.1
# What `begin` returns for a request of a slow start; the numbers of trials are above 0.
_SLOW = -1


class HealthEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """A change that processes share: a deployment is unavailable for `seconds`, or available again if that is 0."""

    key: str
    seconds: float = 0.0
    failing: bool = False
    """Whether the circuit is open, so that a trial comes first when the time is over."""
    reason: str = ""


class HealthOwner(Protocol):
    """The part of `Health` that a circuit breaker uses."""

    settings: HealthSettings

    def publish(self, event: HealthEvent) -> None:
        """Pass a change on to other processes."""


class DeploymentHealth:
    """The circuit breaker, the headroom and the counts of one deployment, on the clock of `time.monotonic`."""

    __slots__ = (
        "_backoff",
        "_cooldown_until",
        "_limits",
        "_new_responses",
        "_observe_at",
        "_owner",
        "_slow_start",
        "_trial",
        "_trials",
        "_window",
        "avoid_until",
        "blocked_until",
        "counts",
        "deployment",
        "failures",
        "headroom",
        "headroom_until",
        "in_flight",
        "key",
        "reason",
        "responses",
        "state",
    )

    def __init__(self, deployment: Deployment, key: str, owner: HealthOwner) -> None:
        self.deployment = deployment
        self.key = key
        self.state = CLOSED
        self.in_flight = 0
        self.blocked_until = 0.0
        """Until when it must not receive requests."""
        self.avoid_until = 0.0
        """Until when it receives requests only if no other deployment can: it is blocked, or its quota is used up."""
        self.reason = ""
        """Why it is unavailable, or was the last time."""
        self.failures = 0
        """Number of failures in a row."""
        self.headroom = 1.0
        """The share of its quota that is left, as Azure last reported it; 1 if it reported none."""
        self.headroom_until = 0.0
        """Until when `headroom` is valid."""
        self.responses = 0
        """Number of responses since the start, without the newest ones."""
        self.counts: Counter[str] = Counter()
        """Number of failed requests since the start, by reason."""
        self._owner = owner
        self._backoff = 0.0  # how long the circuit stays open, in seconds
        self._cooldown_until = 0.0  # as Azure asked
        self._trial = 0  # the number of the trial under way
        self._trials = 0
        self._slow_start = SlowStart()
        self._window = FailureWindow()
        self._new_responses = 0  # not in `_window` and `responses` yet
        self._limits: dict[bytes, float] = {}
        self._observe_at = 0.0

    @property
    def failing(self) -> bool:
        """Whether the circuit is open or half-open."""
        return self.state is CircuitState.OPEN or self.state is CircuitState.HALF_OPEN

    @property
    def half_open(self) -> bool:
        """Whether a trial is under way."""
        return self.state is CircuitState.HALF_OPEN

    # -- availability ----------------------------------------------------------------------------------

    def is_available(self, now: float) -> bool:
        """Whether it may receive requests."""
        return self.blocked_until <= now

    def available_in(self, now: float) -> float:
        """Return in how many seconds it may receive requests, unless a trial ends before."""
        return max(0.0, self.blocked_until - now)

    def is_resting(self, now: float) -> bool:
        """Whether it is unavailable for a reason that other processes and operators should know."""
        return self.blocked_until > now and self.state is not CircuitState.HALF_OPEN and not self.is_throttled(now)

    def is_throttled(self, now: float) -> bool:
        """Whether it is unavailable only because the window of its slow start is full."""
        return (
            (self.state is CircuitState.COOLING_DOWN or self.state is CircuitState.SLOW_START)
            and self._cooldown_until <= now < self.blocked_until
        )  # fmt: skip

    def block_until(self, until: float) -> None:
        """Send it no requests until then."""
        self.blocked_until = self.avoid_until = until

    # -- requests --------------------------------------------------------------------------------------

    def begin(self, now: float, *, exclusive: bool = True) -> int:
        """Count a request that is sent to it; return what `begin_trial` returns, or 0. Each `begin` needs an `end`."""
        self.in_flight += 1
        return self.begin_trial(now, exclusive=exclusive) if self.state is not CLOSED else 0

    def begin_trial(self, now: float, *, exclusive: bool) -> int:
        """Send a request while the circuit is not closed; return a number that its outcome needs, or 0.

        If the circuit was open for long enough, the request is the trial. An `exclusive` trial keeps other requests
        away for some seconds, and no longer, because a response may take any time.
        """
        if not self.failing:
            return self._begin_slowly(now)
        if self.blocked_until > now:
            return 0
        self.state = CircuitState.HALF_OPEN
        self._trials += 1
        self._trial = self._trials
        if exclusive:
            self.block_until(now + _TRIAL_SECONDS)
        return self._trial

    def end(self) -> None:
        """Count the end of a request; once for each `begin`."""
        self.in_flight -= 1

    def response_started(self, now: float, trial: int = 0, fields: Sequence[Field] = ()) -> None:
        """Record that a response has started, with these header fields; `trial` is the result of `begin`."""
        if now >= self._observe_at:
            self._observe(now, fields)
        if trial:
            self._accepted(now, trial)

    def succeeded(self, now: float, trial: int = 0, fields: Sequence[Field] = ()) -> None:
        """Record a complete response with these header fields; `trial` is the result of `begin`."""
        if now >= self._observe_at:
            self._observe(now, fields)
        self._new_responses += 1
        self.failures = 0
        if trial:
            self._accepted(now, trial)

    def failed(
        self,
        now: float,
        reason: str,
        message: str = "",
        *,
        trial: int = 0,
        permanent: bool = False,
        counts: bool = True,
    ) -> None:
        """Record a failed request.

        A `permanent` failure affects every request, so that one is enough to open the circuit. A failure that does not
        count is reported only, because the request itself may be its cause.
        """
        self.counts[reason] += 1
        settings = self._owner.settings
        if trial and trial == self._trial:
            self._end_trial(self._cooldown_until)
            self._backoff = min(2 * self._backoff, settings.most_rest)
            self._block_for(now, self._backoff, reason, message)
            return
        if not counts:
            return
        if now >= self._window.advance_at:
            self._advance_window(now)
        self._window.add_failure()
        self.failures += 1
        if self.failing:
            return  # the request was sent before the circuit opened
        if permanent:
            self._backoff = settings.most_rest
        elif self.failures >= settings.failures or self._failure_share_is_too_large():
            self._backoff = settings.rest
        else:
            return
        self._open()
        self._block_for(now, self._backoff, reason, message)

    def cool_down(self, now: float, seconds: float, reason: str, message: str = "", *, trial: int = 0) -> None:
        """Record that Azure asks for no requests for a number of seconds: a 429, or an error with Retry-After."""
        self.counts[reason] += 1
        self.headroom, self.headroom_until = 1.0, 0.0  # it will be another one after the cooldown
        if trial > 0:
            self._close(now)  # it is reachable
        if trial and self._cooldown_until <= now:
            self._slow_start.refuse()
        if self.is_throttled(now):
            self._stop_throttling()
        self._cooldown_until = max(self._cooldown_until, now + min(seconds, _MAX_COOLDOWN))
        self._start_slowly(now, self._cooldown_until)
        self._block_for(now, min(seconds, _MAX_COOLDOWN), reason, message)

    def abandoned(self, now: float, trial: int) -> None:
        """Record that the trial ended without a result: another request may be the next one."""
        if trial == self._trial:
            self._end_trial(max(now, self._cooldown_until))

    def probed(self, now: float, reason: str | None, retry_in: float) -> None:
        """Record the result of a probe while the circuit is open: a trial is due if it found no reason against it."""
        if self.state is not CircuitState.OPEN:
            return
        if reason is None:
            self.block_until(max(now, self._cooldown_until))
        else:
            self.block_until(max(self.blocked_until, now + retry_in))
            self.reason = reason

    def apply(self, now: float, event: HealthEvent) -> None:
        """Apply an event of another process."""
        if event.seconds > 0:
            until = now + min(event.seconds, _MAX_COOLDOWN)
            if self.is_throttled(now):
                self._stop_throttling()
            if not event.failing:
                self._cooldown_until = max(self._cooldown_until, until)
                if not self.failing:
                    self._start_slowly(now, self._cooldown_until)
            elif not self.failing:
                self._open()
                self._backoff = self._owner.settings.rest
            if until > self.blocked_until:
                self.block_until(until)
                self.reason = event.reason
        elif self.state is CircuitState.OPEN:
            self._leave_open(now)
            self.failures = 0

    # -- transitions -----------------------------------------------------------------------------------

    def _open(self) -> None:
        self.state = CircuitState.OPEN
        self._slow_start.interrupt()

    def _end_trial(self, blocked_until: float) -> None:
        """Return from half-open to open."""
        if self._trial:
            self.state = CircuitState.OPEN
        self._trial = 0
        self.block_until(blocked_until)

    def _close(self, now: float) -> None:
        """Close the circuit, because the deployment responds."""
        self._trial = 0
        if self.failing:
            self._leave_open(now)
            self._backoff = 0.0
            self.failures = 0
            self.responses += self._new_responses
            self._window.clear()
            self._new_responses = 0
            get_logger().info("deployment_recovered", deployment=str(self.deployment))
            self._owner.publish(HealthEvent(self.key))

    def _leave_open(self, now: float) -> None:
        self.state = CLOSED
        self.block_until(self._cooldown_until)
        self._start_slowly(now, max(now, self._cooldown_until))

    def _start_slowly(self, now: float, at: float) -> None:
        """Prepare a slow start at a time; until then the deployment cools down. An open circuit stays open."""
        if not self.failing:
            self.state = CircuitState.COOLING_DOWN if at > now else CircuitState.SLOW_START
        self._slow_start.start(at)

    def _begin_slowly(self, now: float) -> int:
        """Send a request of a slow start; if it fills the window, block the others until one is accepted."""
        slow_start = self._slow_start
        if slow_start.is_over(now):
            self.state = CLOSED
            slow_start.finish()
            return 0
        if self._cooldown_until <= now:
            self.state = CircuitState.SLOW_START
        blocked_until = slow_start.send(now)
        if blocked_until is not None:
            self.blocked_until = blocked_until
            self.avoid_until = max(self.avoid_until, blocked_until)
        return _SLOW

    def _accepted(self, now: float, trial: int) -> None:
        """Record that Azure accepted the trial, or a request of a slow start."""
        if trial > 0:
            self._close(now)
        elif not self.failing and self._slow_start.accept() and self.is_throttled(now):
            self._stop_throttling()

    def _stop_throttling(self) -> None:
        if self.avoid_until == self.blocked_until:
            self.avoid_until = self._cooldown_until
        self.blocked_until = self._cooldown_until

    def _block_for(self, now: float, seconds: float, reason: str, message: str) -> None:
        """Block it for a number of seconds, and say so, unless it is blocked for longer."""
        until = now + seconds
        if until <= self.blocked_until:
            return
        noticeable = until - self.blocked_until > 0.05 or self.blocked_until <= now
        self.block_until(until)
        self.reason = reason
        if noticeable:
            get_logger().warning(
                "deployment_unavailable",
                deployment=str(self.deployment),
                reason=reason,
                words=message,
                seconds=round(seconds, 3),
            )
            self._owner.publish(HealthEvent(self.key, seconds, self.failing, reason))

    # -- headroom and counts ---------------------------------------------------------------------------

    def _observe(self, now: float, fields: Sequence[Field]) -> None:
        """Do the work that not every response needs: move the failure window, and read the headroom."""
        self._observe_at = now + _OBSERVE_INTERVAL
        if now >= self._window.advance_at:
            self._advance_window(now)
        if fields:
            self.observe(now, fields)

    def observe(self, now: float, fields: Iterable[Field]) -> None:
        """Read the headroom from the header fields of a response."""
        headroom = headroom_of(fields, self._limits)
        if headroom is not None:
            self.headroom, self.headroom_until = headroom, now + HEADROOM_SECONDS
            if headroom <= FULL:
                self.avoid_until = max(self.avoid_until, self.headroom_until)

    def _advance_window(self, now: float) -> None:
        self._window.advance(now, self._owner.settings.window, self._new_responses)
        self.responses, self._new_responses = self.responses + self._new_responses, 0

    def _failure_share_is_too_large(self) -> bool:
        settings = self._owner.settings
        responses, failures = self._window.totals()
        requests = failures + responses + self._new_responses
        return requests >= settings.least and failures / requests >= settings.share

    def report(self, now: float) -> dict[str, Any]:
        """Return its state for operators: seconds, shares from 0 to 1, counts since the start."""
        if now >= self._window.advance_at:
            self._advance_window(now)
        responses, failures = self._window.totals()
        responses += self._new_responses
        resting = self.is_resting(now)
        # An open circuit whose time is over is half-open for operators, although its trial has not begun.
        state = ("open" if resting else "half_open") if self.failing else "cooling_down" if resting else "available"
        return {
            "resource": self.deployment.resource.name,
            "deployment": self.deployment.name,
            "region": self.deployment.resource.region,
            "state": state,
            "reason": self.reason if state != "available" else None,
            "cool_down": round(self.blocked_until - now, 3) if resting else 0.0,
            "in_flight": self.in_flight,
            "error_share": round(failures / (failures + responses), 4) if failures + responses else 0.0,
            "requests": failures + responses,
            "failures_in_a_row": self.failures,
            "headroom": (
                (round(self.headroom, 4) if self.headroom > FULL else 0.0) if self.headroom_until > now else None
            ),
            "counts": {"answered": self.responses + self._new_responses, **dict(sorted(self.counts.items()))},
        }
