"""Trying deployments that rest because they fail, so that no request has to: `health: probe`.

A probe asks the resource for its models, which costs no tokens: it tells whether the resource can be reached and takes
the credential. Where it can, a request may try the deployment at once.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from gateway.azure.resources import Resource
from gateway.balancing.circuit_breaker import DeploymentHealth, Health
from gateway.errors import ApiError, UpstreamError
from gateway.logs import exception_fields, get_logger
from gateway.response import Response

__all__ = ("ActiveProbes",)

# How long, in seconds, a probe may take.
_PATIENCE = 10.0


class ListsModels(Protocol):
    """Asks a resource for its models."""

    async def models(self, resource: Resource, seconds: float) -> Response:
        """Return the answer, which has begun. Raises UpstreamError, ApiError."""


class ActiveProbes:
    """Probes what rests, as often as the settings of `health` say."""

    def __init__(self, health: Health, upstream: ListsModels) -> None:
        self._health = health
        self._upstream = upstream
        self._task: asyncio.Task[None] | None = None

    def follow(self) -> None:
        """Begin, or end, as the settings of `health` say now."""
        every = self._health.settings.probe
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if every is not None and self._health.all():
            self._task = asyncio.create_task(self._work(every), name="probing deployments")

    async def stop(self) -> None:
        """End."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _work(self, every: float) -> None:
        while True:
            # (One that only clients have keys for cannot be asked without theirs: a request tries it.)
            resting = [
                each
                for each in self._health.all()
                if each.failing and not each.trying and each.deployment.resource.has_credential
            ]
            await asyncio.gather(*(self._probe(each, every) for each in resting))
            await asyncio.sleep(every)

    async def _probe(self, each: DeploymentHealth, every: float) -> None:
        try:
            reason = await self._ask(each)
        except Exception as exc:  # one probe's bug must not end the others
            get_logger().error("a probe failed", **exception_fields(exc))
            return
        # What no probe has found well is not tried by a request until the next one has looked.
        each.probed(time.monotonic(), reason, every + _PATIENCE)

    async def _ask(self, each: DeploymentHealth) -> str | None:
        """Return what is wrong with a deployment's resource, in a word, or None."""
        try:
            response = await self._upstream.models(each.deployment.resource, _PATIENCE)
        except UpstreamError as exc:
            return exc.fault
        except ApiError:
            return "credential"
        if response.status in (401, 403):
            return "refused"
        return f"status_{response.status}" if response.status == 408 or response.status >= 500 else None
