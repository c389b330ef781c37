"""The load generator (`load.c`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.bench.processes import LOAD_CORE, Process
from tests.bench.workplace import Workplace


@dataclass(frozen=True)
class Traffic:
    """The requests to send and the responses to expect."""

    requests: Path
    answer: Path
    """The expected body, or one event of a stream."""
    kinds: int = 1
    """The number of requests, of equal length, in `requests`."""
    faithful: bool = False
    """Whether each connection always sends the same one."""
    events: int = 0
    """The number of events of a stream; 0 for a plain response."""
    connections: int = 32
    opening: int = 0
    """How many connections may wait for their first byte at once while they are opened; 0 for all."""


@dataclass(frozen=True)
class Report:
    """The result of a load. Times are in milliseconds; `seconds` and `cpu` are in seconds."""

    answers: int
    errors: int
    first_error: str
    bytes: int
    connections: int
    seconds: float
    cpu: float
    first_p50: float
    first_p99: float
    whole_p50: float
    whole_p99: float


class Loader:
    """Runs loads; builds the program once."""

    def __init__(self, workplace: Workplace) -> None:
        self._workplace = workplace
        self._program = workplace.build("load")

    def start(
        self, traffic: Traffic, port: int, *, seconds: float = 0, hold: bool = False, newlines: int = 2
    ) -> Running:
        """Start a load on a port, for `seconds`, or until `end` if that is 0."""
        command: list[str | Path] = [self._program, "-c", str(traffic.connections), "-s", str(seconds)]
        command += ["-o", str(traffic.opening), "-k", str(traffic.kinds), "-n", str(traffic.events)]
        command += ["-t", str(newlines), *(["-h"] if hold else []), *(["-f"] if traffic.faithful else [])]
        command += [str(port), traffic.requests, traffic.answer]
        return Running(self._workplace.start(command, core=LOAD_CORE, talks=True))

    def run(self, traffic: Traffic, port: int, seconds: float, *, newlines: int = 2) -> Report:
        """Put a load on a port for `seconds`."""
        with self.start(traffic, port, seconds=seconds, newlines=newlines) as running:
            return running.report()


class Running:
    """A running load; it ends with the `with` block."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.stop()

    def report(self) -> Report:
        """Wait for the next report: at the end, or when all held streams have received their first event."""
        return Report(**json.loads(self.process.line()))

    def ask(self) -> Report:
        """Return a report of held streams."""
        assert self.process.popen.stdin is not None
        self.process.popen.stdin.write("\n")
        self.process.popen.stdin.flush()
        return self.report()

    def end(self) -> Report:
        """End a load without a time limit; return its report."""
        assert self.process.popen.stdin is not None
        self.process.popen.stdin.close()
        return self.report()
