"""One measurement: a load on one gateway for some seconds, and its cost."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from tests.bench.load import Loader, Report, Running, Traffic
from tests.bench.peers import Peer
from tests.bench.processes import Broken

T = TypeVar("T")

# A gateway that uses less of its core than this was limited by something else.
BUSY = 0.90


@dataclass(frozen=True)
class Sample:
    """The result of one measurement."""

    cpu: float
    """Microseconds for a request or an event."""
    rate: float
    """Requests or events in a second."""
    busy: float
    """The share of its core that the gateway used."""
    report: Report


@dataclass(frozen=True)
class Meter:
    """Measures each gateway with the same load and upstream."""

    loader: Loader
    warm_up: float

    def warm(self, peer: Peer, traffic: Traffic) -> None:
        """Put a load on a gateway without measuring it."""
        _whole(peer, self.loader.run(traffic, peer.port, self.warm_up, newlines=peer.newlines))

    def sample(self, peer: Peer, traffic: Traffic, seconds: float) -> Sample:
        """Measure for `seconds`. Raises Broken if a response was wrong."""
        os.truncate(peer.process.log, 0)  # the log of millions of requests would fill the disk
        cpu, begun = peer.process.cpu(), time.monotonic()
        report = _whole(peer, self.loader.run(traffic, peer.port, seconds, newlines=peer.newlines))
        took = time.monotonic() - begun
        cpu = peer.process.cpu() - cpu
        # The event that ends a stream counts as well.
        count = report.answers * (traffic.events + 1 if traffic.events else 1)
        return Sample(cpu / count * 1e6, count / report.seconds, cpu / took, report)

    @contextmanager
    def held(self, peer: Peer, traffic: Traffic) -> Iterator[Running]:
        """Keep long streams open in the `with` block. Raises Broken if one cannot be opened."""
        os.truncate(peer.process.log, 0)
        with self.loader.start(traffic, peer.port, hold=True, newlines=peer.newlines) as running:
            _whole(peer, running.report())
            yield running
            _whole(peer, running.ask())

    def hold(self, peer: Peer, traffic: Traffic, seconds: float) -> float:
        """Return the microseconds of an event of open streams, once all are open."""
        with self.held(peer, traffic) as running:
            time.sleep(1)
            before, cpu = running.ask(), peer.process.cpu()
            time.sleep(seconds)
            after, cpu = running.ask(), peer.process.cpu() - cpu
        return cpu / ((after.bytes - before.bytes) / traffic.answer.stat().st_size) * 1e6


def _whole(peer: Peer, report: Report) -> Report:
    if report.errors or not (report.answers or report.bytes):
        raise Broken(f"{peer.name}: {report.errors} wrong answers, {report.answers} right; {report.first_error}")
    return report


def rounds(count: int, measurements: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Run measurements in turn, A B C A B C, so that changes on the machine affect all of them."""
    found: dict[str, list[T]] = {name: [] for name in measurements}
    for _ in range(count):
        for name, measure in measurements.items():
            found[name].append(measure())
    return found


def middle(samples: list[Sample], of: Callable[[Sample], float]) -> float:
    """Return the median of a figure."""
    return median(map(of, samples))


def say(text: str) -> None:
    """Print the progress of the run."""
    sys.stderr.write(f"# {text}\n")
