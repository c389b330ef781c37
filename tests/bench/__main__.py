"""The cost of the gateway, compared with nginx, HAProxy and usual aiohttp: `python -m tests.bench`; see README.md here.

Exits with 1 if a limit is exceeded, with 2 if the machine lacks something.
"""

from __future__ import annotations

import argparse
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.bench import growth, inside, limits, memory, start, work, workers
from tests.bench.interpreters import Interpreter, prepare
from tests.bench.limits import FAILED
from tests.bench.load import Loader
from tests.bench.measure import Meter, say
from tests.bench.place import Place
from tests.bench.processes import Broken
from tests.bench.rows import Row, show
from tests.bench.upstream import Azure
from tests.bench.workplace import Missing, Workplace

# The rows about the gateway alone, by their names in --only.
OURS: dict[str, Callable[[Place], list[Row]]] = {
    "start": start.start,
    "memory": memory.memory,
    "upload": memory.upload,
    "teams": growth.teams,
    "models": growth.models,
    "stages": growth.stages,
    "streams": growth.streams,
    "balance": growth.balance,
    "repairs": growth.repairs,
    "usage": growth.usage,
    "limiter": inside.limiter,
    "load": inside.load,
    "workers": workers.workers,
    "restarts": workers.restarts,
}
NAMES = [*(row.name for row in work.ROWS), *OURS]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; return the exit status."""
    options = _options(arguments)
    # A signal that ends the run cleans up, too.
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, lambda number, frame: sys.exit(128 + number))
    try:
        with Workplace() as workplace:
            return 1 if _measure(workplace, options) else 0
    except Missing as exc:
        sys.stderr.write(f"bench: {exc}\n")
        return 2
    except Broken as exc:
        sys.stderr.write(f"bench: {exc}\n")
        return 1
    except KeyboardInterrupt:
        return 130


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", metavar="ROW,...", help=f"only these rows: {', '.join(NAMES)}")
    parser.add_argument("--rounds", metavar="N", type=int, default=3, help="rounds of each row (3)")
    parser.add_argument("--secs", metavar="N", type=float, default=4, help="seconds of each measurement (4)")
    parser.add_argument("--quick", action="store_true", help="one round of 2 seconds, to check that it runs")
    parser.add_argument(
        "--python",
        metavar="PATH",
        type=Path,
        action="append",
        help="measure the gateway under this interpreter; repeatable (default: this one)",
    )
    options = parser.parse_args(arguments)
    options.only = set(options.only.split(",")) if options.only else set(NAMES)
    if unknown := options.only - set(NAMES):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    if options.quick:
        options.rounds, options.secs = 1, 2
    # Not resolved: the interpreter of an environment is a link, and its path selects the environment.
    options.python = [python.absolute() for python in options.python or [Path(sys.executable)]]
    return options


def _measure(workplace: Workplace, options: argparse.Namespace) -> bool:
    """Measure and print; return whether anything failed."""
    interpreters = [prepare(workplace, python) for python in options.python]
    azure, loader = Azure(workplace), Loader(workplace)
    for line in _versions(interpreters):
        sys.stdout.write(f"{line}\n")
    warm_up = min(1.0, options.secs / 2)
    bench = work.Bench(workplace, azure, loader, warm_up=warm_up)
    chosen = [row for row in work.ROWS if row.name in options.only]
    results = bench.run(chosen, interpreters, options.rounds, options.secs)
    judged = work.best(results, interpreters)
    for interpreter in interpreters if results else ():
        note = "" if interpreter == judged else "; limits are judged on another one"
        sys.stdout.write(f"\n{interpreter.name}{note}: CPU for a request or an event\n\n")
        sys.stdout.write(work.show(results, interpreter, judged=interpreter == judged))
    meter = Meter(loader, warm_up)
    place = Place(workplace, azure, meter, judged, options.rounds, options.secs)
    rows = _first_byte(results, judged)
    for name in OURS:
        if name in options.only:
            rows += _row(name, place)
    if rows:
        sys.stdout.write(f"\n{judged.name}: latency, memory, growth\n\n{show(rows)}")
    if results:
        sys.stdout.write(f"\nRates and latencies (of streams: to the first byte)\n\n{work.show_rates(results)}")
    verdicts = [result.verdict(f"ours, {judged.name}") for result in results] + [row.verdict for row in rows]
    failed = sum(verdict.startswith(FAILED) for verdict in verdicts)
    sys.stdout.write(f"\n{failed} of {len(verdicts)} rows failed\n")
    return bool(failed)


def _first_byte(results: Sequence[work.Result], judged: Interpreter) -> list[Row]:
    """Return the row of the latency added to the first byte, if paced streams were measured."""
    name = f"ours, {judged.name}"
    title = "added to the first byte, p50 at 64 paced streams"
    return [
        Row(title, "ms", limits.FIRST_BYTE, result.added(name))
        for result in results
        if result.work.name == "paced" and not result.problem
    ]


def _row(name: str, place: Place) -> list[Row]:
    say(f"{name}:")
    try:
        return OURS[name](place)
    except Broken as exc:
        return [Row(name, "", limits.NONE, problem=str(exc))]
    finally:
        place.clear()


def _versions(interpreters: Sequence[Interpreter]) -> list[str]:
    say("versions")
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    nginx = subprocess.run(["nginx", "-v"], check=True, capture_output=True, text=True).stderr.strip()
    haproxy = subprocess.run(["haproxy", "-v"], check=True, capture_output=True, text=True).stdout.split("\n", 1)[0]
    return [
        *(interpreter.describe() for interpreter in interpreters),
        f"{nginx.removeprefix('nginx version: ')}; {haproxy.partition(' - ')[0]}",
        f"{platform.system()} {platform.release()}; {cpu.partition(': ')[2]}",
    ]


if __name__ == "__main__":
    sys.exit(main())
