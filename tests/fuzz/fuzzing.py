"""Runs each mutant through both parsers and through a gateway, and reports one failure of each kind."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import structlog

from tests.fuzz import lane as lanes
from tests.fuzz import readings
from tests.fuzz.corpus import KEY
from tests.fuzz.lane import Failure, Lane
from tests.fuzz.mutants import Mutant, make
from tests.fuzz.shrink import shrink

__all__ = ("Report", "differ", "fuzz")

_LANES = 8
# Mutants of a round; after each round the gateway must hold nothing.
_ROUND = 2000
# Seconds that one turn of the event loop may take; the process ends after that, as the loop is stuck.
_STUCK = 60.0
_CANARY = b"GET /canary HTTP/1.1\r\nHost: gw.test\r\n\r\n"

Reader = Callable[..., readings.Reading]


@dataclass
class Found:
    """A kind of failure: its count, and the first mutant that caused it, shrunk."""

    number: int
    mutant: Mutant
    detail: str
    count: int = 0


@dataclass
class Report:
    """Findings of a run. `differences` counts differences between the parsers that move no boundary."""

    failures: dict[str, Found] = field(default_factory=dict)
    differences: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    mutants: int = 0
    agreed: int = 0

    def note(self, failure: Failure, number: int, mutant: Mutant) -> bool:
        """Count a failure; return whether it is the first of its kind."""
        kind = f"{mutant.kind}: {failure.kind}"
        first = kind not in self.failures
        found = self.failures.setdefault(kind, Found(number, mutant, failure.detail))
        found.count += 1
        return first

    def add(self, other: Report) -> None:
        """Add the findings of another run."""
        for kind, found in other.failures.items():
            known = self.failures.setdefault(kind, found)
            if known is not found:
                known.count += found.count
        self.differences += other.differences
        self.statuses += other.statuses
        self.mutants += other.mutants
        self.agreed += other.agreed

    def lines(self, seed: int) -> Iterator[str]:
        """Yield the lines that `make fuzz` prints."""
        yield f"{self.mutants} mutants of seed {seed}; both parsers agree on {self.agreed}"
        yield f"responses by status: {', '.join(f'{key} {count}' for key, count in sorted(self.statuses.items()))}"
        yield "differences between the parsers that move no boundary:"
        for kind, count in self.differences.most_common():
            yield f"  {count:6}  {kind}"
        for kind, found in self.failures.items():
            mutant = found.mutant
            yield f"FAILED {found.count} times: {kind}"
            yield f"  first: --seed {seed} --only {found.number}; shrunk to:"
            yield f"  {mutant.data!r}"
            cuts = "at every byte" if len(mutant.cuts) >= len(mutant.data) - 1 > 0 else mutant.cuts
            more = {"cuts": cuts, "ending": mutant.ending, "asked": mutant.asked, "late": mutant.late}
            yield f"  {', '.join(f'{name} {value!r}' for name, value in more.items() if value)}"
            yield f"  {found.detail[:600]}"
        yield "failed" if self.failures else "passed"


# -- the parsers ---------------------------------------------------------------------------------------


def differ(
    mutant: Mutant,
    loop: asyncio.AbstractEventLoop,
    our_requests: Reader = readings.our_requests,
    our_response: Reader = readings.our_response,
) -> readings.Difference | None:
    """Return how our parser and aiohttp's C parser differ on a mutant; a canary after a request marks its end."""
    if mutant.kind == "request":
        pieces = [*mutant.pieces, _CANARY]
        return readings.compare(our_requests(pieces), readings.requests(pieces, loop))
    pieces, eof = mutant.pieces, mutant.ending == "close"
    return readings.compare(our_response(pieces, eof=eof), readings.response(pieces, loop, eof=eof))


async def _read(number: int, mutant: Mutant, report: Report, readers: Sequence[Reader]) -> None:
    loop = asyncio.get_running_loop()
    difference = differ(mutant, loop, *readers)
    if difference is None:
        report.agreed += 1
    elif not difference.moved:
        report.differences[f"{mutant.kind}: {difference.kind}"] += 1
    else:
        failure = Failure(f"the parsers differ: {difference.kind}", "")

        async def fails(candidate: Mutant) -> bool:
            return differ(candidate, loop, *readers) == difference

        if report.note(failure, number, mutant):
            smaller = await shrink(mutant, fails)
            report.failures[f"{mutant.kind}: {failure.kind}"].mutant = smaller


# -- the gateway ---------------------------------------------------------------------------------------


class _Errors:
    """Collects errors of structlog, asyncio and the interpreter, by the lane whose task caused them."""

    def __init__(self) -> None:
        self.strays: list[str] = []

    def keep(self, text: str) -> None:
        lanes.errors.get(self.strays).append(text)

    def __call__(self, _: Any, method: str, event: Any) -> str:
        text = repr(dict(event))
        if KEY in text:
            self.keep(f"a key in the log: {text}")
        if method in ("error", "critical", "exception"):
            self.keep(text)
        return ""

    def of_loop(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.keep(f"{context.get('message')}: {context.get('exception')!r}")


@contextmanager
def _caught() -> Iterator[_Errors]:
    errors = _Errors()
    loop = asyncio.get_running_loop()
    before, hook = structlog.get_config(), sys.unraisablehook

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            errors.keep(record.getMessage())

    handler = Handler(logging.WARNING)
    structlog.configure(
        processors=[errors],
        logger_factory=structlog.ReturnLoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(0),
        cache_logger_on_first_use=False,
    )
    logging.getLogger().addHandler(handler)
    loop.set_exception_handler(errors.of_loop)
    sys.unraisablehook = lambda unraisable: errors.keep(f"unraisable: {unraisable.exc_value!r}")
    try:
        yield errors
    finally:
        sys.unraisablehook = hook
        loop.set_exception_handler(None)
        logging.getLogger().removeHandler(handler)
        structlog.configure(**before)


class _Watch:
    """Ends the process, and prints the mutants that were running, if the event loop is stuck."""

    def __init__(self, seed: int) -> None:
        self.running: set[int] = set()
        self._seed = seed
        self._turned = time.monotonic()
        self._over = threading.Event()

    def turn(self) -> None:
        self._turned = time.monotonic()

    def _look(self) -> None:
        while not self._over.wait(1.0):
            if time.monotonic() - self._turned > _STUCK:
                numbers = " ".join(map(str, sorted(self.running)))
                sys.stderr.write(f"FAILED: the loop is stuck; --seed {self._seed} --only one of {numbers}\n")
                faulthandler.dump_traceback()
                os._exit(1)

    async def _tick(self) -> None:
        while True:
            self.turn()
            await asyncio.sleep(1.0)

    @contextmanager
    def on(self) -> Iterator[None]:
        thread = threading.Thread(target=self._look, daemon=True)
        thread.start()
        ticking = asyncio.get_running_loop().create_task(self._tick())
        try:
            yield
        finally:
            ticking.cancel()
            self._over.set()
            thread.join()


def _held() -> dict[str, int]:
    return {"tasks": len(asyncio.all_tasks()), "descriptors": len(os.listdir("/proc/self/fd"))}


async def fuzz(
    seed: int,
    numbers: Sequence[int],
    *,
    readers: Sequence[Reader] = (),
    stage: str = "",
    tell: Callable[[str], None] = lambda _: None,
    smaller: bool = True,
) -> Report:
    """Run the mutants with these numbers on the running loop.

    Broken `readers`, and the source of a broken `stage`, are for tests of the fuzzer itself.
    """
    report = Report()
    watch = _Watch(seed)
    with _caught() as errors, watch.on(), TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            running = []
            for each in range(min(_LANES, len(numbers))):
                lane_folder = Path(folder, str(each))
                lane_folder.mkdir()
                running.append(lane := Lane(lane_folder, stage))
                # In its own task: the context of a task assigns its log events to a lane.
                await asyncio.create_task(lane.start())
                stack.push_async_callback(lane.stop)
            held = _held()
            for first in range(0, len(numbers), _ROUND):
                waiting = list(reversed(numbers[first : first + _ROUND]))
                last = waiting[0]
                await asyncio.gather(
                    *(_drive(lane, seed, waiting, report, watch, readers, smaller=smaller) for lane in running)
                )
                for lane in running:
                    for failure in await lane.settle():
                        report.note(failure, last, Mutant("request", b""))
                gc.collect()
                now = _held()
                if any(now[name] > held[name] for name in held):
                    grown = Failure("tasks or descriptors are left at the end", f"{held} before, {now} now")
                    report.note(grown, last, Mutant("request", b""))
                tell(f"{min(first + _ROUND, len(numbers))} of {len(numbers)}, {len(report.failures)} kinds of failure")
            for lane in running:
                for (kind, status), count in lane.statuses.items():
                    report.statuses[f"{kind} {status}"] += count
    for stray in errors.strays:
        report.note(Failure("an error in the log", stray), numbers[-1], Mutant("request", b""))
    return report


async def _drive(
    lane: Lane,
    seed: int,
    waiting: list[int],
    report: Report,
    watch: _Watch,
    readers: Sequence[Reader],
    *,
    smaller: bool,
) -> None:
    """Run mutants until none is waiting."""
    while waiting:
        number = waiting.pop()
        mutant = make(seed, number)
        report.mutants += 1
        watch.running.add(number)
        await _read(number, mutant, report, readers)
        for failure in await lane.attempt(mutant):
            if report.note(failure, number, mutant) and smaller:
                kind = failure.kind

                async def fails(candidate: Mutant, kind: str = kind) -> bool:
                    return kind in [each.kind for each in await lane.attempt(candidate)]

                small = await shrink(mutant, fails, 3 if kind == "a hang" else 300)
                report.failures[f"{mutant.kind}: {kind}"].mutant = small
        watch.running.discard(number)
