"""Messages between a worker and its supervisor: what each may tell the other, one line of text per message.

They share a pair of sockets. The supervisor sends orders: a word, and a number or JSON after it. The worker sends one
JSON object (`WorkerMessage`) per line. If a side closes its end, the other side knows that it is gone.

Signals would not do: systemd and terminals send theirs to every process of a group, and a worker must not mistake the
supervisor's order for a second signal.
"""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.balancing.circuit_breaker import HealthEvent
from gateway.process.reload import Prepared, WatchedState

__all__ = (
    "ABORT",
    "COMMIT",
    "COMMITTED",
    "DRAIN",
    "EXIT_NOW",
    "FAILED",
    "HEALTH_EVENT",
    "HEALTH_REPORT",
    "LEAVING",
    "PREPARE",
    "PREPARED",
    "READY",
    "REPORT_HEALTH",
    "TAKE_HEALTH_EVENT",
    "WorkerMessage",
)

# Orders of the supervisor. The number of a reload or of a report follows `prepare`, `commit`, `abort` and `report`, and
# an event in JSON follows `hear`.
DRAIN, EXIT_NOW = "drain", "end"
PREPARE, COMMIT, ABORT = "prepare", "commit", "abort"
TAKE_HEALTH_EVENT, REPORT_HEALTH = "hear", "report"
# Messages of a worker.
READY, FAILED, LEAVING = "ready", "failed", "leaving"
PREPARED, COMMITTED = "prepared", "committed"
HEALTH_EVENT, HEALTH_REPORT = "news", "reported"


class WorkerMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """A message from a worker to its supervisor.

    `ready` carries the worker's `state`, `failed` the `reason`, `prepared` the result, `news` an event about a
    deployment's health, and `reported` the health of all deployments.
    """

    kind: str = msgspec.field(name="word")
    number: int = 0
    """The number of the reload or report that this replies to."""
    reason: str | None = None
    state: WatchedState | None = None
    prepared: Prepared | None = None
    event: HealthEvent | None = msgspec.field(default=None, name="news")
    report: list[dict[str, Any]] | None = None
