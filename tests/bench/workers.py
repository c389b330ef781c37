"""Several workers: their cost, and rolling restarts without a failed request."""

from __future__ import annotations

import functools
import signal
import subprocess
import time

from tests.bench import limits, traffic
from tests.bench.growth import SHORT
from tests.bench.load import Traffic
from tests.bench.measure import rounds, say
from tests.bench.peers import Peer, Setup
from tests.bench.place import Place
from tests.bench.processes import Broken
from tests.bench.rows import Row

WORKERS, RESTARTS = 2, 3
PATIENCE = 60  # seconds for one rolling restart


def workers(place: Place) -> list[Row]:
    """Measure a request with two workers and with one."""
    _need_workers(place)
    load = _load(place)
    peers = {count: place.ours(Setup(workers=count)) for count in (1, WORKERS)}
    for peer in peers.values():
        place.meter.warm(peer, load)

    def measure(peer: Peer, count: int) -> float:
        cpu = place.meter.sample(peer, load, place.seconds / SHORT).cpu
        say(f"{count} workers: {cpu:.1f} us")
        return cpu

    measurements = {str(count): functools.partial(measure, peer, count) for count, peer in peers.items()}
    found = rounds(SHORT * place.rounds, measurements)
    more = [100 * (several / one - 1) for one, several in zip(found["1"], found[str(WORKERS)], strict=True)]
    return [Row(f"a request, {WORKERS} workers instead of 1", "% more CPU", limits.WORKERS, more)]


def restarts(place: Place) -> list[Row]:
    """Replace all workers several times under constant load."""
    _need_workers(place)
    peer = place.ours(Setup(workers=WORKERS))
    with place.meter.loader.start(_load(place), peer.port) as running:
        time.sleep(1)
        for _ in range(RESTARTS):
            _restart(peer)
            time.sleep(0.5)
        report = running.end()
    say(f"restarts: {report.answers} answers, {report.errors} failed {report.first_error}")
    if report.errors:
        raise Broken(f"{report.errors} of {report.answers + report.errors} requests failed; {report.first_error}")
    return [Row(f"{RESTARTS} rolling restarts under load", "requests failed", limits.RESTARTS, [report.errors])]


def _restart(peer: Peer) -> None:
    """Request a rolling restart and wait until every worker is a new one."""
    before = set(peer.process.pids()[1:])
    peer.process.popen.send_signal(signal.SIGUSR2)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        now = set(peer.process.pids()[1:])
        # The supervisor may have other children, which stay.
        if len(before - now) >= WORKERS and len(now) >= len(before):
            return
        if peer.process.popen.poll() is not None:
            raise peer.process.ended()
        time.sleep(0.05)
    raise Broken(f"a rolling restart was not over after {PATIENCE} s")


def _load(place: Place) -> Traffic:
    place.azure.plain()
    file = place.workplace.write("workers.request", traffic.request(traffic.body(1024)))
    return Traffic(file, place.azure.answer)


def _need_workers(place: Place) -> None:
    command = [str(place.interpreter.python), "-P", "-m", "gateway", "serve", "--help"]
    if "--workers" not in subprocess.run(command, check=True, capture_output=True, text=True).stdout:
        raise Broken("not built yet: `gateway serve` knows no --workers")
