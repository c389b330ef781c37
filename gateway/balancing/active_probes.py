"""Active probes (`health: probe`): the gateway tests failing deployments before it sends them a client's request.

A probe asks the resource for its list of models, which costs no tokens. The response shows whether the resource is
reachable and accepts the credential. If so, the next request may be the trial of the circuit breaker at once.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from gateway.azure.resources import Resource
from gateway.balancing.circuit_breaker import DeploymentHealth
from gateway.balancing.circuit_state import CircuitState
from gateway.balancing.health import Health
from gateway.errors import ApiError, UpstreamError
from gateway.logs import exception_fields, get_logger
from gateway.response import Response

__all__ = ("ActiveProbes",)

_TIMEOUT = 10.0  # of a probe, in seconds


class ListsModels(Protocol):
    """An upstream that can list the models of a resource."""

    async def models(self, resource: Resource, seconds: float) -> Response:
        """Return the response once it has started. Raises UpstreamError, ApiError."""


class ActiveProbes:
    """Probes the deployments whose circuit is open, at the interval in the settings."""

    def __init__(self, health: Health, upstream: ListsModels) -> None:
        self._health = health
        self._upstream = upstream
        self._task: asyncio.Task[None] | None = None

    def follow(self) -> None:
        """Start or stop, according to the current settings of `health`."""
        interval = self._health.settings.probe
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if interval is not None and self._health.all():
            self._task = asyncio.create_task(self._run(interval), name="active probes")

    async def stop(self) -> None:
        """Stop probing."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _run(self, interval: float) -> None:
        while True:
            # (A resource without a credential of the gateway needs a client's key: a request is its trial.)
            open_circuits = [
                each
                for each in self._health.all()
                if each.state is CircuitState.OPEN and each.deployment.resource.has_credential
            ]
            await asyncio.gather(*(self._probe(each, interval) for each in open_circuits))
            await asyncio.sleep(interval)

    async def _probe(self, each: DeploymentHealth, interval: float) -> None:
        try:
            reason = await self._failure(each)
        except Exception as exc:  # a bug in one probe must not stop the others
            get_logger().error("probe_failed", **exception_fields(exc))
            return
        # After a failed probe no request is a trial before the next probe has ended.
        each.probed(time.monotonic(), reason, interval + _TIMEOUT)

    async def _failure(self, each: DeploymentHealth) -> str | None:
        """Return why a deployment's resource cannot serve requests, as a short reason, or None."""
        try:
            response = await self._upstream.models(each.deployment.resource, _TIMEOUT)
        except UpstreamError as exc:
            return exc.fault
        except ApiError:
            return "credential"
        if response.status in (401, 403):
            return "refused"
        return f"status_{response.status}" if response.status == 408 or response.status >= 500 else None
