"""The limit on client connections (`limits.connections`): the count, and the 503 above the limit.

The workers of a supervisor share one array in memory, with a slot for each worker. A worker writes its own count into
its slot before it adds up all slots. So if two workers accept the last allowed connection at once, both see that it is
one too many: the limit is never exceeded. The supervisor assigns the slots and clears that of a worker that has ended.
"""

from __future__ import annotations

import mmap
import os

from gateway.errors import ApiError
from gateway.limits.shared_memory import make_shared_memory

__all__ = (
    "PROBE_CONNECTIONS",
    "PROBE_HEAD_TIMEOUT",
    "ConnectionCount",
    "WorkerSlots",
    "connection_limit_reached",
)

PROBE_CONNECTIONS = 256
"""Connections above the limit that are accepted anyway, for the probes of an orchestrator alone."""
PROBE_HEAD_TIMEOUT = 1.0
"""Timeout of the head on such a connection, in seconds."""
_RETRY_AFTER = "1"  # seconds
_MAX_WORKERS = 512  # those included that drain after a rolling restart
_SIZE = 8 * _MAX_WORKERS


def connection_limit_reached() -> ApiError:
    """Return the 503, with Retry-After, for a connection above the limit."""
    return ApiError(
        503,
        "the gateway's connection limit is reached; retry shortly",
        code="overloaded",
        headers={"retry-after": _RETRY_AFTER},
    )


class ConnectionCount:
    """The client connections of one process, and the sum of all processes."""

    def __init__(self, descriptor: int | None = None, slot: int = 0) -> None:
        """Without a descriptor, this process is the only one."""
        if descriptor is not None:
            os.set_inheritable(descriptor, False)  # child processes of a stage do not need it
        memory = mmap.mmap(-1 if descriptor is None else descriptor, _SIZE)
        self._counts = memoryview(memory).cast("q")
        self._slot = slot

    def set(self, count: int) -> int:
        """Set this process's count; returns the sum of all processes."""
        self._counts[self._slot] = count
        return sum(self._counts)


class WorkerSlots:
    """The supervisor's side: which slots are free. `descriptor` is the array's."""

    def __init__(self) -> None:
        self.descriptor = make_shared_memory("gateway-connections", _SIZE)
        self._counts = memoryview(mmap.mmap(self.descriptor, _SIZE)).cast("q")
        self._free = list(range(_MAX_WORKERS - 1, -1, -1))

    def acquire(self) -> int:
        """Return a free slot. Raises OSError if there are too many workers."""
        if not self._free:
            raise OSError(f"there are more than {_MAX_WORKERS} workers, those included that drain")
        return self._free.pop()

    def release(self, slot: int) -> None:
        """Clear the slot of a worker that has ended."""
        self._counts[slot] = 0
        self._free.append(slot)
