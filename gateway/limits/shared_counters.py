"""Counters that the workers of one machine share: a table in memory that all of them map.

Rule 1: the table is only touched under its lock, which the kernel takes away from a process that dies.
Rule 2: nothing waits under the lock, which is held for some microseconds, and nobody waits long for it: it may be held
by a process that was stopped. What was to be settled then is settled later.
Rule 3: what a worker holds at once is counted as that worker's, so that it is nobody's any more when it is gone.
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
from gateway.limits.token_bucket import NONE, Charge, Decision, Limit, Record
from gateway.logs import get_logger

__all__ = ("SharedCounters", "make_table")

# A worker's place in the head of the table: its process, how many workers have had the place before it, and when the
# process began, by which it is told from a later one of the same number.
_PLACE = struct.Struct("=IIQ")
_PLACES = 256
_HEAD = _PLACE.size * _PLACES
# A row: the digest of a name, its record, and when nothing of it will be left.
_ROW = struct.Struct("=16sddddd")
_ROWS = 1 << 17
_SIZE = _HEAD + _ROW.size * _ROWS
_FREE = bytes(16)
# Of the rows in which a name may be, the first is by its digest.
_TRIED = 32
# How long, in seconds, the lock is waited for, and for how long nobody waits for it after that.
_PATIENCE, _STUCK = 0.02, 1.0
# How many names' rows are remembered by each process.
_KNOWN = 50_000


def make_table() -> int:
    """Return the descriptor of a new table, which every worker is to inherit. Its pages are only taken when used."""
    return make_shared_memory("gateway-counters", _SIZE)


class SharedCounters:
    """One worker's side of the table."""

    def __init__(self, descriptor: int, now: Callable[[], float] = time.time) -> None:
        self._descriptor = descriptor
        self._now = now
        os.set_inheritable(descriptor, False)  # a stage's own child processes have no business with it
        self._table = mmap.mmap(descriptor, _SIZE)
        self._known: dict[str, tuple[int, bytes]] = {}
        self._rules: dict[str, Limit] = {}  # of what was taken last: by them it is settled, also after a reload
        self._waiting: list[tuple[Decision, Sequence[float | None]]] = []  # to be settled, when the lock can be had
        self._stuck_until = 0.0
        self._full = False  # it was said that the table is
        lockf(descriptor, LOCK_EX)
        try:
            self._place, self._number = self._claim()
        finally:
            lockf(descriptor, LOCK_UN)

    async def take(self, charges: Sequence[Charge]) -> Decision:
        """Take all charges, or none. Raises CountersUnavailable where the table cannot be locked for now."""
        now = self._now()
        found: list[tuple[int, bytes, str]] = []
        records: list[Record] = []
        over: list[int] = []
        refused = False
        if not self._lock():
            raise CountersUnavailable("another worker holds the table of counters")
        try:
            for place, charge in enumerate(charges):
                rule = charge.rule
                if self._rules.get(charge.name) is not rule:
                    self._learn(charge)
                name = charge.name if rule.period != "at_once" else self._own(charge.name)
                row, digest, record = self._find(name)
                found.append((row, digest, name))
                record = rule.at(record, now)
                level = record[0] if rule.period != "at_once" else self._held(charge.name)
                if level + charge.cost > rule.most and charge.cost:
                    over.append(place)
                    refused = refused or not charge.shadow
                records.append(record)
            if not refused:
                for place, charge in enumerate(charges):
                    if place not in over:
                        records[place] = record = charge.rule.with_use(records[place], charge.cost)
                        self._put(*found[place], charge.rule, record, now)
                    elif found[place][0]:
                        self._put(*found[place], charge.rule, records[place], now)
            else:
                for (row, digest, name), charge, record in zip(found, charges, records, strict=True):
                    if row:  # steps that a clock that was set back begins anew, go on
                        self._put(row, digest, name, charge.rule, record, now)
        finally:
            lockf(self._descriptor, LOCK_UN)
        return Decision(charges, records, now, over, refused)

    def settle(self, verdict: Decision, actual: Sequence[float | None]) -> None:
        """Let what was really used take the place of what was taken, charge by charge; None leaves one as it is."""
        if verdict.settled:
            return
        verdict.settled = True
        if not self._lock():
            self._waiting.append((verdict, actual))
            return
        try:
            self._settle(verdict, actual)
        finally:
            lockf(self._descriptor, LOCK_UN)

    def _settle(self, verdict: Decision, actual: Sequence[float | None]) -> None:
        now = self._now()
        for place, (charge, used) in enumerate(zip(verdict.charges, actual, strict=True)):
            if used is not None and verdict.holds(place):
                rule = self._rules.get(charge.name, charge.rule)
                name = charge.name if rule.period != "at_once" else self._own(charge.name)
                row, digest, record = self._find(name)
                record = rule.settled(rule.passed(record, now), verdict.records[place], charge.cost, used)
                self._put(row, digest, name, rule, record, now)

    def _learn(self, charge: Charge) -> None:
        if len(self._rules) >= _KNOWN:
            self._rules.clear()
        self._rules[charge.name] = charge.rule

    def _lock(self) -> bool:
        """Lock the table; False where that takes longer than a request may be kept waiting for it."""
        try:
            lockf(self._descriptor, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < self._stuck_until or not self._lock_soon():
                return False
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for verdict, actual in waiting:
                self._settle(verdict, actual)
        return True

    def _lock_soon(self) -> bool:
        until = time.monotonic() + _PATIENCE
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
        """Give up the worker's place, and what it held with it."""
        if self._lock():
            _PLACE.pack_into(self._table, self._place * _PLACE.size, 0, self._number, 0)
        self._table.close()
        os.close(self._descriptor)

    # -- places ----------------------------------------------------------------------------------------

    def _claim(self) -> tuple[int, int]:
        """Take a place that is nobody's; those of processes that are gone become nobody's."""
        mine = None
        for place in range(_PLACES):
            pid, number, began = _PLACE.unpack_from(self._table, place * _PLACE.size)
            if pid and _began(pid) != began:
                pid = 0
                _PLACE.pack_into(self._table, place * _PLACE.size, 0, number, 0)
            if not pid and mine is None:
                mine = place, number + 1
        if mine is None:
            raise StartError(f"there are more than {_PLACES} workers, old ones that drain included")
        _PLACE.pack_into(self._table, mine[0] * _PLACE.size, os.getpid(), mine[1], _began(os.getpid()))
        return mine

    def _own(self, name: str) -> str:
        """Return the name under which this worker counts what it holds at once under a name."""
        return f"{name}\x1f{self._place}\x1f{self._number}"

    def _held(self, name: str) -> float:
        """Return how much is held at once under a name by all workers that there are."""
        held = 0.0
        for place in range(_PLACES):
            pid, number, _ = _PLACE.unpack_from(self._table, place * _PLACE.size)
            if pid:
                held += self._find(f"{name}\x1f{place}\x1f{number}")[2][0]
            elif not number:
                break  # no worker has ever had this place, nor one behind it
        return held

    # -- rows ------------------------------------------------------------------------------------------

    def _digest(self, name: str) -> tuple[int, bytes]:
        """Return the row at which a name was last seen, or is looked for first, and its digest."""
        known = self._known.get(name)
        if known is None:
            digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            known = _HEAD + int.from_bytes(digest[:4], "little") % _ROWS * _ROW.size, digest
            if len(self._known) >= _KNOWN:
                self._known.clear()
            self._known[name] = known
        return known

    def _find(self, name: str) -> tuple[int, bytes, Record]:
        """Return the row of a name, 0 where it has none, its digest, and its record."""
        row, digest = self._known.get(name) or self._digest(name)
        found, level, since, inflow, born, _ = _ROW.unpack_from(self._table, row)
        if found == digest:
            return row, digest, (level, since, inflow, born)
        for row in _tried(digest):
            found, level, since, inflow, born, _ = _ROW.unpack_from(self._table, row)
            if found == digest:
                self._known[name] = row, digest
                return row, digest, (level, since, inflow, born)
        return 0, digest, NONE

    def _put(self, row: int, digest: bytes, name: str, rule: Limit, record: Record, now: float) -> None:
        """Keep the record of a name, in a row of its own if it has none."""
        if not row:
            row = self._free_row(digest, now)
            self._known[name] = row, digest
        _ROW.pack_into(self._table, row, digest, *record, now + rule.kept(record, now))

    def _free_row(self, digest: bytes, now: float) -> int:
        """Return a row for a new name: one of which nothing is left, else that of the name with the least use.

        Clients can make up names, of models for instance, but each use of one costs a request.
        """
        first, least = 0, math.inf
        for row in _tried(digest):
            found, level, *_, gone = _ROW.unpack_from(self._table, row)
            if found == _FREE or gone <= now:
                return row
            if level < least:
                first, least = row, level
        if not self._full:
            self._full = True
            get_logger().warning("more is counted than there is room for; some limits begin anew", rows=_ROWS)
        return first


def _tried(digest: bytes) -> Iterator[int]:
    """Yield the rows in which a name may be."""
    first = int.from_bytes(digest[:4], "little")
    for step in range(_TRIED):
        yield _HEAD + (first + step) % _ROWS * _ROW.size


def _began(pid: int) -> int:
    """Return when a process began, in ticks since the machine did (proc(5)); 0 where it is gone, or has ended.

    Where the system does not tell, 1 for every process that there is.
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
