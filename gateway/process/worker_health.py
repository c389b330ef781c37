"""Health of deployments, shared between workers: events to all others, and one report of all."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from gateway.admin.listener import merge_reports
from gateway.balancing.circuit_breaker import HealthEvent
from gateway.errors import ApiError
from gateway.process.worker_messages import HEALTH_REPORT, REPORT_HEALTH, TAKE_HEALTH_EVENT
from gateway.process.worker_process import WorkerProcess

__all__ = ("WorkerHealth",)

# Timeout, in seconds, for a worker's report.
_REPORT_TIMEOUT = 3.0


class WorkerHealth:
    """Passes each worker's health events on to the others. `serving` returns the workers that serve."""

    def __init__(self, serving: Callable[[], Sequence[WorkerProcess]]) -> None:
        self._serving = serving
        self._numbers = itertools.count(1)
        self._events: dict[str, tuple[float, HealthEvent]] = {}  # the last one of each deployment, and when it came

    def connect(self, worker: WorkerProcess) -> None:
        """Send a new worker the events that are still in force, and pass on those that it sends."""
        worker.on_health_event = lambda event: self._pass_on(worker, event)
        now = asyncio.get_running_loop().time()
        for key, (since, event) in list(self._events.items()):
            left = since + event.seconds - now
            if left > 0:
                _send(worker, msgspec.structs.replace(event, seconds=left))
            else:
                del self._events[key]

    def _pass_on(self, sender: WorkerProcess, event: HealthEvent) -> None:
        self._events[event.key] = asyncio.get_running_loop().time(), event
        for worker in self._serving():
            if worker is not sender:
                _send(worker, event)

    async def report(self) -> list[dict[str, Any]]:
        """Return the health of deployments, merged from all workers that serve. Raises ApiError 503 without any."""
        number, workers = next(self._numbers), self._serving()
        await asyncio.gather(*(self._update(worker, number) for worker in workers))
        reports = [worker.health_report for worker in workers if worker.health_report is not None]
        if not reports:
            reason = "the workers do not reply" if workers else "not all workers are ready"
            raise ApiError(503, f"{reason}; try again", code="no_report", headers={"retry-after": "1"})
        return merge_reports(reports)

    async def _update(self, worker: WorkerProcess, number: int) -> None:
        """Have a worker report; if it does not reply in time, its last report counts."""
        with contextlib.suppress(TimeoutError):
            reply = await worker.request(REPORT_HEALTH, number, HEALTH_REPORT, _REPORT_TIMEOUT)
            worker.health_report = reply.report if reply is not None else None


def _send(worker: WorkerProcess, event: HealthEvent) -> None:
    worker.send(f"{TAKE_HEALTH_EVENT} {msgspec.json.encode(event).decode()}")
