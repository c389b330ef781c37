"""Health of pooled deployments: which ones may receive requests, as seen by this process.

`Health` keeps one circuit breaker (`circuit_breaker.py`) for each deployment, across reloads. It does no I/O. Other
processes learn of changes through `listeners`, and their changes arrive in `apply`. A late or lost event does no harm,
because each process learns from its own requests, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

from gateway.azure.resources import Deployment
from gateway.balancing.circuit_breaker import DeploymentHealth, HealthEvent
from gateway.settings import HealthSettings

__all__ = ("Health",)


class Health:
    """The health of all pooled deployments. One for each process; it outlives reloads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = HealthSettings()
        self.listeners: list[Callable[[HealthEvent], None]] = []
        """Called with each change that this process observes."""
        self._clock = clock
        self._known: dict[str, DeploymentHealth] = {}
        self._used: list[DeploymentHealth] = []

    def use(self, settings: HealthSettings, deployments: Sequence[Deployment]) -> None:
        """Apply a configuration; deployments that were in the previous one keep their state."""
        self.settings = settings
        self._used = [self.of(each) for each in deployments]
        for found, each in zip(self._used, deployments, strict=True):
            found.deployment = each
        self._known = {each.key: each for each in self._used}

    def of(self, deployment: Deployment) -> DeploymentHealth:
        """Return the health of a deployment."""
        key = _key(deployment)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = DeploymentHealth(deployment, key, self)
        return found

    def all(self) -> list[DeploymentHealth]:
        """Return the health of the configured deployments, each once, in the configuration's order."""
        return list(dict.fromkeys(self._used))

    def publish(self, event: HealthEvent) -> None:
        """Pass a change on to the listeners."""
        for each in self.listeners:
            each(event)

    def apply(self, event: HealthEvent) -> None:
        """Apply an event of another process; ignore it if the deployment is unknown here."""
        found = self._known.get(event.key)
        if found is not None:
            found.apply(self._clock(), event)

    def events(self) -> list[HealthEvent]:
        """Return the events that bring a new process up to date."""
        now = self._clock()
        return [
            HealthEvent(each.key, each.blocked_until - now, each.failing, each.reason)
            for each in self.all()
            if each.is_resting(now)
        ]

    def report(self) -> list[dict[str, Any]]:
        """Return the state of each deployment, for operators."""
        now = self._clock()
        return [each.report(now) for each in self.all()]


def _key(deployment: Deployment) -> str:
    """Return the identity of a deployment in all processes: a new endpoint or credential makes it another one."""
    resource = deployment.resource
    shown = (
        resource.credential.digest
        if resource.credential is not None
        else repr(resource.tokens and resource.tokens.identity)
    )
    by = blake2b(shown.encode(), digest_size=6).hexdigest()
    return f"{resource.name}/{deployment.name} {resource.endpoint} {by}"
