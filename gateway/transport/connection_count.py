"""How many clients are connected: to this process, or to all workers of a supervisor together.

The workers share one array in memory, with a place for each worker. A worker writes its own number there before it
adds all of them up, so two that take the last free connection at once both see that it is one too many: the limit is
never passed. The supervisor gives places out and clears that of a worker that has ended.
"""

from __future__ import annotations

import mmap
import os

from gateway.limits.shared_memory import make_shared_memory

__all__ = ("ConnectionCount", "Places")

_MOST = 512  # workers, those included that drain after a rolling restart
_SIZE = 8 * _MOST


class ConnectionCount:
    """One process's number, and the sum of all."""

    def __init__(self, descriptor: int | None = None, place: int = 0) -> None:
        """Without a descriptor, this process is alone."""
        if descriptor is not None:
            os.set_inheritable(descriptor, False)  # a stage's own child processes have no business with it
        memory = mmap.mmap(-1 if descriptor is None else descriptor, _SIZE)
        self._numbers = memoryview(memory).cast("q")
        self._place = place

    def set(self, number: int) -> int:
        """Let `number` be the clients of this process; returns how many all processes have."""
        self._numbers[self._place] = number
        return sum(self._numbers)


class Places:
    """The supervisor's side: which places are taken. `descriptor` is the array's."""

    def __init__(self) -> None:
        self.descriptor = make_shared_memory("gateway-connections", _SIZE)
        self._numbers = memoryview(mmap.mmap(self.descriptor, _SIZE)).cast("q")
        self._free = list(range(_MOST - 1, -1, -1))

    def take(self) -> int:
        """Return a place that no worker has. Raises OSError if there are too many workers."""
        if not self._free:
            raise OSError(f"there are more than {_MOST} workers, those included that drain")
        return self._free.pop()

    def give_back(self, place: int) -> None:
        """Clear the place of a worker that has ended."""
        self._numbers[place] = 0
        self._free.append(place)
