"""The cost of parts without sockets: counting a limit, and loading a configuration."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.bench import limits
from tests.bench.interpreters import ROOT
from tests.bench.measure import say
from tests.bench.peers import Setup
from tests.bench.place import Place
from tests.bench.rows import Row

TAKES = 200_000
TEAMS, KEYS = 500, 5

# Each caller has its own limit, which has room.
_TAKE = f"""
import asyncio, time
from gateway.limits.memory_counters import MemoryCounters
from gateway.limits.token_bucket import Charge, Limit
from gateway.limits.shared_counters import SharedCounters, make_table

async def main():
    charges = [[Charge(f"rate_limit:team/caller {{number}}", Limit(10**9, "minute"))] for number in range(1000)]
    for counters in (MemoryCounters(), SharedCounters(make_table())):
        begun = time.process_time()
        for number in range({TAKES}):
            await counters.take(charges[number % 1000])
        print((time.process_time() - begun) / {TAKES} * 1e6)

asyncio.run(main())
"""

_LOAD = """
import pathlib, sys, time
from gateway.config import load

begun = time.process_time()
load(pathlib.Path(sys.argv[1]))
print(time.process_time() - begun)
"""


def limiter(place: Place) -> list[Row]:
    """Measure the time to count a request against one limit."""
    alone, shared = [], []
    for _ in range(place.rounds):
        one, two = map(float, _run(place, _TAKE).split())
        alone.append(one)
        shared.append(two)
    say(f"limiter: {alone[-1]:.2f} us, {shared[-1]:.2f} us among workers")
    return [
        Row("a request counted against a limit", "us of CPU", limits.LIMITER, alone),
        Row("the same, shared by the workers of a machine", "us of CPU", limits.SHARED_LIMITER, shared),
    ]


def load(place: Place) -> list[Row]:
    """Measure the time to load the files of many teams."""
    path, _ = Setup(teams=TEAMS, keys=KEYS).write(place.workplace, "https://azure.invalid")
    figures = [float(_run(place, _LOAD, path)) for _ in range(max(3, place.rounds))]
    say(f"load: {', '.join(f'{figure:.2f}' for figure in figures)} s")
    return [Row(f"loading {TEAMS} teams with {KEYS} keys each", "s of CPU", limits.LOAD, figures)]


def _run(place: Place, code: str, *arguments: Path) -> str:
    command = [str(place.interpreter.python), "-P", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout
