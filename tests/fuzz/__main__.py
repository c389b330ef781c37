"""`python -m tests.fuzz`: half of the mutants on asyncio's event loop, half on the one of the extra `speed`."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence

from gateway.process.event_loop import loop_factory
from tests.fuzz.fuzzing import Report, fuzz


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _run(seed: int, numbers: Sequence[int], name: str, factory: Callable[[], asyncio.AbstractEventLoop]) -> Report:
    began = time.monotonic()

    def tell(text: str) -> None:
        _say(f"{name}: {text}, {time.monotonic() - began:.0f} s")

    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(fuzz(seed, numbers, tell=tell))


def main() -> int:
    """Run the fuzzer; return 1 if a mutant failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=14, help="seed of the mutants")
    parser.add_argument("--count", type=int, default=50_000, help="number of mutants")
    parser.add_argument("--only", type=int, nargs="+", help="run only the mutants with these numbers, on both loops")
    asked = parser.parse_args()
    half = asked.count // 2
    loops = [("asyncio", asyncio.SelectorEventLoop), (loop_factory().__name__, loop_factory())]
    report = Report()
    for (name, factory), numbers in zip(loops, (range(half), range(half, asked.count)), strict=True):
        report.add(_run(asked.seed, asked.only or numbers, name, factory))
    for line in report.lines(asked.seed):
        _say(line)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
