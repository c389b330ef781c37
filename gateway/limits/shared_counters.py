"""Counters that the workers of one machine share: a table in shared memory that all of them map.

Rule 1: a worker touches the table only under its lock, and the kernel releases the lock of a process that dies.
Rule 2: nothing blocks under the lock, which is held for some microseconds, and no worker waits long for it: a stopped
process may hold it. Settlements that find it locked are made later.
Rule 3: concurrent use (`at_once`) counts per worker, so that it ends with the worker.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, lockf
from hashlib import blake2b
from pathlib import Path

from gateway.errors import StartError
from gateway.limits.counters import CountersUnavailable
from gateway.limits.shared_memory import make_shared_memory
from gateway.limits.token_bucket import EMPTY, Charge, Decision, Limit, Record
from gateway.logs import get_logger

__all__ = ("SharedCounters", "make_table")

# The entry of a worker in the head of the table: its process id, the number of workers that have had the entry so far,
# and the start time of the process, which distinguishes it from a later one with the same id.
_WORKER = struct.Struct("=IIQ")
_MAX_WORKERS = 256
_HEAD = _WORKER.size * _MAX_WORKERS
# A row: the digest of a name, its record, and the time at which nothing of the record counts any more.
_ROW = struct.Struct("=16sddddd")
_ROWS = 1 << 17
_SIZE = _HEAD + _ROW.size * _ROWS
_FREE = bytes(16)
# Rows to try for a name (open addressing): its digest gives the first one.
_PROBES = 32
# In seconds: how long to wait for the lock, and how long not to wait again after that failed.
_LOCK_TIMEOUT, _STUCK = 0.02, 1.0
# Maximum number of names whose rows and limits each process caches.
_MAX_CACHED = 50_000


def make_table() -> int:
    """Return the descriptor of a new table, for every worker to inherit. Pages are allocated when first used."""
    return make_shared_memory("gateway-counters", _SIZE)


class SharedCounters:
    """The counters of one worker, in the table."""

    def __init__(self, descriptor: int, now: Callable[[], float] = time.time) -> None:
        self._descriptor = descriptor
        self._now = now
        os.set_inheritable(descriptor, False)  # child processes of stages must not inherit it
        self._table = mmap.mmap(descriptor, _SIZE)
        self._rows: dict[str, tuple[int, bytes]] = {}
        self._limits: dict[str, Limit] = {}  # of the last take: settlements use them, also after a reload
        self._pending: list[tuple[Decision, Sequence[float | None]]] = []  # settlements that found the table locked
        self._stuck_until = 0.0
        self._reported_full = False
        lockf(descriptor, LOCK_EX)
        try:
            self._index, self._generation = self._claim_worker()
        finally:
            lockf(descriptor, LOCK_UN)

    async def take(self, charges: Sequence[Charge]) -> Decision:
        """Take all charges, or none. Raises CountersUnavailable if another worker holds the lock for long."""
        now = self._now()
        found: list[tuple[int, bytes, str]] = []
        records: list[Record] = []
        over: list[int] = []
        refused = False
        if not self._lock():
            raise CountersUnavailable("another worker holds the lock of the table of counters")
        try:
            for index, charge in enumerate(charges):
                limit = charge.limit
                if self._limits.get(charge.name) is not limit:
                    self._remember(charge)
                name = charge.name if limit.period != "at_once" else self._name_of_worker(charge.name)
                row, digest, record = self._find(name)
                found.append((row, digest, name))
                record = limit.current(record, now)
                level = record[0] if limit.period != "at_once" else self._held(charge.name)
                if level + charge.cost > limit.max_level and charge.cost:
                    over.append(index)
                    refused = refused or not charge.shadow
                records.append(record)
            if not refused:
                for index, charge in enumerate(charges):
                    if index not in over:
                        records[index] = record = charge.limit.add(records[index], charge.cost)
                        self._put(*found[index], charge.limit, record, now)
                    elif found[index][0]:
                        self._put(*found[index], charge.limit, records[index], now)
            else:
                for (row, digest, name), charge, record in zip(found, charges, records, strict=True):
                    if row:  # keeps an interval that was restarted after the clock was set back
                        self._put(row, digest, name, charge.limit, record, now)
        finally:
            lockf(self._descriptor, LOCK_UN)
        return Decision(charges, records, now, over, refused)

    def settle(self, decision: Decision, actual: Sequence[float | None]) -> None:
        """Replace the cost of each charge with its actual use. None leaves a charge unchanged."""
        if decision.settled:
            return
        decision.settled = True
        if not self._lock():
            self._pending.append((decision, actual))
            return
        try:
            self._settle(decision, actual)
        finally:
            lockf(self._descriptor, LOCK_UN)

    def _settle(self, decision: Decision, actual: Sequence[float | None]) -> None:
        now = self._now()
        for index, (charge, used) in enumerate(zip(decision.charges, actual, strict=True)):
            if used is not None and decision.was_taken(index):
                limit = self._limits.get(charge.name, charge.limit)
                name = charge.name if limit.period != "at_once" else self._name_of_worker(charge.name)
                row, digest, record = self._find(name)
                record = limit.settle(limit.refill(record, now), decision.records[index], charge.cost, used)
                self._put(row, digest, name, limit, record, now)

    def _remember(self, charge: Charge) -> None:
        if len(self._limits) >= _MAX_CACHED:
            self._limits.clear()
        self._limits[charge.name] = charge.limit

    def _lock(self) -> bool:
        """Lock the table. Returns False if that takes too long for a request to wait."""
        try:
            lockf(self._descriptor, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < self._stuck_until or not self._wait_for_lock():
                return False
        if self._pending:
            pending, self._pending = self._pending, []
            for decision, actual in pending:
                self._settle(decision, actual)
        return True

    def _wait_for_lock(self) -> bool:
        until = time.monotonic() + _LOCK_TIMEOUT
        while time.monotonic() < until:
            try:
                lockf(self._descriptor, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                time.sleep(0)
            else:
                return True
        self._stuck_until = time.monotonic() + _STUCK
        return False

    async def close(self) -> None:
        """Release the entry of this worker, and its concurrent use with it."""
        if self._lock():
            _WORKER.pack_into(self._table, self._index * _WORKER.size, 0, self._generation, 0)
        self._table.close()
        os.close(self._descriptor)

    # -- workers ---------------------------------------------------------------------------------------

    def _claim_worker(self) -> tuple[int, int]:
        """Claim a free entry, and free those of dead processes. Return its index and generation."""
        mine = None
        for index in range(_MAX_WORKERS):
            pid, generation, started = _WORKER.unpack_from(self._table, index * _WORKER.size)
            if pid and _start_time(pid) != started:
                pid = 0
                _WORKER.pack_into(self._table, index * _WORKER.size, 0, generation, 0)
            if not pid and mine is None:
                mine = index, generation + 1
        if mine is None:
            raise StartError(f"there are more than {_MAX_WORKERS} workers, including old ones that drain")
        _WORKER.pack_into(self._table, mine[0] * _WORKER.size, os.getpid(), mine[1], _start_time(os.getpid()))
        return mine

    def _name_of_worker(self, name: str) -> str:
        """Return the name under which this worker counts its concurrent use of a name."""
        return f"{name}\x1f{self._index}\x1f{self._generation}"

    def _held(self, name: str) -> float:
        """Return the concurrent use of a name by all live workers."""
        held = 0.0
        for index in range(_MAX_WORKERS):
            pid, generation, _ = _WORKER.unpack_from(self._table, index * _WORKER.size)
            if pid:
                held += self._find(f"{name}\x1f{index}\x1f{generation}")[2][0]
            elif not generation:
                break  # no worker has ever used this entry or a later one
        return held

    # -- rows ------------------------------------------------------------------------------------------

    def _row_and_digest(self, name: str) -> tuple[int, bytes]:
        """Return the last known row of a name, or the first row to try, and the digest of the name."""
        cached = self._rows.get(name)
        if cached is None:
            digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            cached = _HEAD + int.from_bytes(digest[:4], "little") % _ROWS * _ROW.size, digest
            if len(self._rows) >= _MAX_CACHED:
                self._rows.clear()
            self._rows[name] = cached
        return cached

    def _find(self, name: str) -> tuple[int, bytes, Record]:
        """Return the row of a name (0 if it has none), its digest, and its record."""
        row, digest = self._rows.get(name) or self._row_and_digest(name)
        found, level, since, inflow, born, _ = _ROW.unpack_from(self._table, row)
        if found == digest:
            return row, digest, (level, since, inflow, born)
        for row in _probed_rows(digest):
            found, level, since, inflow, born, _ = _ROW.unpack_from(self._table, row)
            if found == digest:
                self._rows[name] = row, digest
                return row, digest, (level, since, inflow, born)
        return 0, digest, EMPTY

    def _put(self, row: int, digest: bytes, name: str, limit: Limit, record: Record, now: float) -> None:
        """Store the record of a name, in a free row if it has none."""
        if not row:
            row = self._free_row(digest, now)
            self._rows[name] = row, digest
        _ROW.pack_into(self._table, row, digest, *record, now + limit.lifetime(record, now))

    def _free_row(self, digest: bytes, now: float) -> int:
        """Return a row for a new name: a free or expired one, else the row of the name with the least use.

        Clients can invent names, for example of models, but each use of one costs a request.
        """
        candidate, least = 0, math.inf
        for row in _probed_rows(digest):
            found, level, *_, expires = _ROW.unpack_from(self._table, row)
            if found == _FREE or expires <= now:
                return row
            if level < least:
                candidate, least = row, level
        if not self._reported_full:
            self._reported_full = True
            get_logger().warning("limit_table_full", rows=_ROWS, consequence="some limits start from zero")
        return candidate


def _probed_rows(digest: bytes) -> Iterator[int]:
    """Yield the rows that can hold a name."""
    first = int.from_bytes(digest[:4], "little")
    for step in range(_PROBES):
        yield _HEAD + (first + step) % _ROWS * _ROW.size


def _start_time(pid: int) -> int:
    """Return the start time of a process, in clock ticks since boot (proc(5)), or 0 if it has ended.

    On a system without /proc it is 1 for every live process.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="latin-1")
    except OSError:
        if os.path.isdir("/proc/self"):
            return 0
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return 0
        except PermissionError:
            pass
        return 1
    state, *fields = text.rpartition(")")[2].split()
    return 0 if state in "ZX" else int(fields[18])
