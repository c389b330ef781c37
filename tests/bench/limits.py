"""The goal and the limit of each row."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class Limit:
    """A goal and a limit; lower is better."""

    goal: float | None
    fail_above: float

    def verdict(self, measured: float) -> str:
        """Return the verdict on a measured value."""
        if measured > self.fail_above:
            return FAILED
        if self.goal is not None and measured <= self.goal:
            return "goal met"
        return "within limit" if self.fail_above < inf else "GOAL MISSED"


FAILED = "FAILED"
NONE = Limit(None, 0)  # for a row that could not be measured

# CPU as a multiple of nginx's, for the same work in the same run.
WORK = {
    "json-1k": Limit(2.5, 3.3),
    "json-100k": Limit(2.2, 3.5),
    "paced": Limit(1.6, 2.2),
    "unpaced": Limit(0.9, 1.5),
    "tls-json-1k": Limit(2.4, 3.2),
    "tls-json-100k": Limit(1.4, 2.0),
    "tls-paced": Limit(1.7, 2.3),
}

FIRST_BYTE = Limit(1.0, 3.0)  # ms added to the upstream's latency, p50 at 64 paced streams
START = Limit(0.5, 1.0)  # s from the start of the process to its first response
IDLE = Limit(45, 60)  # MB of memory before any work
STREAM = Limit(20, 32)  # KiB of memory for each open stream
# Growth has only goals: a missed one is reported in capitals, but does not fail the run.
TEAMS = Limit(5, inf)  # % more CPU for a request with 500 teams of 5 keys each instead of one
MODELS = Limit(5, inf)  # % more with 200 models in the map instead of one
STAGE = Limit(0.3, inf)  # us for a no-op stage
STAGES = Limit(5, inf)  # % more with twice the stages
STREAMS = Limit(20, inf)  # % more CPU for an event with 5,000 open streams instead of 100
USAGE = Limit(5, inf)  # % more CPU for an event of a stream whose usage is requested
BALANCE = Limit(3, inf)  # % more CPU for a request to a pool instead of one deployment
BALANCE_P50 = Limit(1, 2)  # ms more at p50
REPAIRS = Limit(5, 8)  # % more CPU for an event with the default repairs instead of without
LIMITER = Limit(2, 4)  # us to count a request against one limit
SHARED_LIMITER = Limit(None, 8)  # us if the workers of a machine share it
LOAD = Limit(0.5, 1.0)  # s to load 500 teams with 5 keys each
UPLOAD = Limit(None, 8)  # MB of memory for an upload of 1 GB
WORKERS = Limit(None, 10)  # % more CPU for a request with two workers instead of one
RESTARTS = Limit(None, 0)  # failed requests in three rolling restarts
