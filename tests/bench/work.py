"""The work rows: CPU for a request or an event, compared with nginx, HAProxy and a usual aiohttp proxy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from tests.bench import limits, peers, traffic
from tests.bench.interpreters import Interpreter
from tests.bench.limits import FAILED
from tests.bench.load import Loader, Traffic
from tests.bench.measure import BUSY, Meter, Sample, middle, rounds, say
from tests.bench.peers import Peer
from tests.bench.processes import Broken
from tests.bench.table import table
from tests.bench.upstream import Azure, Tls
from tests.bench.workplace import Workplace

EVENTS = 200


@dataclass(frozen=True)
class Work:
    """One row."""

    name: str
    title: str
    size: int
    """Bytes of a request body."""
    every: int | None = None
    """Milliseconds between events of a stream, 0 for no pause; None for a plain response."""
    tls: bool = False

    @property
    def closed(self) -> bool:
        """Whether a faster gateway gets more work, so that it must be the busiest."""
        return not self.every


ROWS = (
    Work("json-1k", "JSON, request of 1 KB", 1024),
    Work("json-100k", "JSON, request of 100 KB", 102_400),
    Work("paced", "stream, an event each 20 ms", 1024, every=20),
    Work("unpaced", "stream, as fast as it comes", 1024, every=0),
    Work("tls-json-1k", "TLS upstream: JSON, 1 KB", 1024, tls=True),
    Work("tls-json-100k", "TLS upstream: JSON, 100 KB", 102_400, tls=True),
    Work("tls-paced", "TLS upstream: stream, each 20 ms", 1024, every=20, tls=True),
)
DIRECT = "asked directly"


@dataclass(frozen=True)
class Result:
    """The result of a row: the samples of each peer."""

    work: Work
    samples: dict[str, list[Sample]]
    problem: str = ""
    """The reason why there are no samples."""

    def cpu(self, name: str) -> float | None:
        """Return the microseconds of a peer, or None if it does not do this work."""
        return middle(self.samples[name], lambda sample: sample.cpu) if name in self.samples else None

    def ratio(self, name: str) -> float:
        """Return a peer's CPU as a multiple of nginx's."""
        cpu, nginx = self.cpu(name), self.cpu("nginx")
        assert cpu is not None
        assert nginx is not None
        return cpu / nginx

    def added(self, name: str) -> list[float]:
        """Return the milliseconds that a peer adds to the median latency of the first byte, round by round."""
        pairs = zip(self.samples[name], self.samples[DIRECT], strict=True)
        return [through.report.first_p50 - directly.report.first_p50 for through, directly in pairs]

    def verdict(self, name: str) -> str:
        """Return the verdict on one of our gateways."""
        if self.problem:
            return f"{FAILED}: {self.problem}"
        if self.work.closed and middle(self.samples[name], lambda sample: sample.busy) < BUSY:
            return f"{FAILED}: its core was not full"
        return limits.WORK[self.work.name].verdict(self.ratio(name))


class Bench:
    """The work rows, and the programs that they use."""

    def __init__(self, workplace: Workplace, azure: Azure, loader: Loader, *, warm_up: float) -> None:
        self._workplace = workplace
        self._azure = azure
        self._loader = loader
        self._warm_up = warm_up

    def run(
        self, rows: Sequence[Work], interpreters: Sequence[Interpreter], count: int, seconds: float
    ) -> list[Result]:
        """Measure rows under interpreters, for `rounds` of `seconds` each."""
        found = []
        for tls in (False, True):
            chosen = [row for row in rows if row.tls is tls]
            if not chosen:
                continue
            front = Tls.start(self._workplace, self._azure) if tls else None
            alike = self._peers(interpreters, front)
            meter = Meter(self._loader, self._warm_up)
            for row in chosen:
                try:
                    found.append(Result(row, self._row(row, alike, meter, count, seconds)))
                except Broken as exc:
                    found.append(Result(row, {}, str(exc)))
            for peer in alike:
                peer.process.stop()
        return found

    def _peers(self, interpreters: Sequence[Interpreter], tls: Tls | None) -> list[Peer]:
        found = [peers.ours(self._workplace, self._azure, each, tls=tls) for each in interpreters]
        found.append(peers.nginx(self._workplace, self._azure, tls))
        if tls is None:
            found.append(peers.haproxy(self._workplace, self._azure))
            found.append(peers.usual(self._workplace, self._azure, interpreters[0]))
        return found

    def _row(
        self, work: Work, alike: Sequence[Peer], meter: Meter, count: int, seconds: float
    ) -> dict[str, list[Sample]]:
        content = traffic.body(work.size, stream=work.every is not None)
        requests = self._workplace.write(f"{work.name}.request", traffic.request(content))
        load = Traffic(requests, self._azure.answer)
        if work.every is None:
            self._azure.plain()
        else:
            # Opened one by one: clients that arrive at once would measure their queue.
            opening = 1 if work.every else 0
            load = Traffic(requests, self._azure.event, events=EVENTS, connections=64, opening=opening)
            self._azure.stream(EVENTS, work.every)
            # Only the second wave of streams counts; it begins while the others run.
            seconds = max(seconds, EVENTS * work.every / 1000 + 1)
        measurements: dict[str, Callable[[], Sample]] = {
            peer.name: functools.partial(self._sample, meter, work, peer, load, seconds) for peer in alike
        }
        if work.name == "paced":
            file = self._workplace.write("direct.request", traffic.request_to_azure(content))
            direct = Traffic(file, load.answer, events=EVENTS, connections=64, opening=1)
            nobody = Peer(DIRECT, self._azure.process, self._azure.port, 1)
            measurements[DIRECT] = functools.partial(self._sample, meter, work, nobody, direct, seconds)
        for peer in alike:
            meter.warm(peer, load)
        return rounds(count, measurements)

    def _sample(self, meter: Meter, work: Work, peer: Peer, load: Traffic, seconds: float) -> Sample:
        sample = meter.sample(peer, load, seconds)
        say(f"{work.name}: {peer.name}: {sample.cpu:.1f} us, core {sample.busy:.0%}")
        return sample


def best(results: Sequence[Result], interpreters: Sequence[Interpreter]) -> Interpreter:
    """Return the interpreter on which limits are judged: the fastest optimised one."""
    candidates = [each for each in interpreters if each.optimised] or list(interpreters)

    def cost(interpreter: Interpreter) -> float:
        return sum(result.ratio(f"ours, {interpreter.name}") for result in results if not result.problem)

    return min(candidates, key=cost)


def show(results: Sequence[Result], interpreter: Interpreter, *, judged: bool) -> str:
    """Return the table of one interpreter."""
    ours = f"ours, {interpreter.name}"
    rows = []
    for result in results:
        limit = limits.WORK[result.work.name]
        cpus = [result.cpu(name) for name in (ours, "nginx", "HAProxy", "usual aiohttp")]
        spread = [sample.cpu for sample in result.samples.get(ours, ())]
        rows.append([
            result.work.title, *("-" if cpu is None else f"{cpu:.1f}" for cpu in cpus),
            f"{min(spread):.1f}-{max(spread):.1f}" if spread else "-",
            f"{result.ratio(ours):.2f}" if spread else "-", f"{limit.goal:.1f}", f"{limit.fail_above:.1f}",
            result.verdict(ours) if judged else f"({result.verdict(ours)})",
        ])  # fmt: skip
    head = ["work", "ours us", "nginx us", "HAProxy us", "usual aiohttp us", "ours from-to",
            "ours/nginx", "goal", "fail above", "verdict"]  # fmt: skip
    return table(head, rows)


def show_rates(results: Sequence[Result]) -> str:
    """Return the table of rates and latencies, which are less exact than CPU on a shared machine."""
    rows = []
    for result in results:
        for name, samples in result.samples.items():
            streams = result.work.every is not None
            reports = [sample.report for sample in samples]
            rows.append([
                result.work.title, name, f"{middle(samples, lambda sample: sample.rate):,.0f}",
                f"{median(report.first_p50 if streams else report.whole_p50 for report in reports):.2f}",
                f"{median(report.first_p99 if streams else report.whole_p99 for report in reports):.2f}",
                f"{middle(samples, lambda sample: sample.busy):.0%}",
            ])  # fmt: skip
    head = ["work", "by", "requests or events/s", "p50 ms", "p99 ms", "its core"]
    return table(head, rows)
