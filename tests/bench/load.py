"""The load on what is measured (`load.c`)."""

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
    """What to send, and what must come back."""

    requests: Path
    answer: Path
    """The body to expect, or one event of it."""
    kinds: int = 1
    """How many requests of equal length `requests` has."""
    faithful: bool = False
    """Whether each connection keeps to one of these."""
    events: int = 0
    """Of a stream; 0 where the answer is a plain one."""
    connections: int = 32
    opening: int = 0
    """How many may wait for their first byte at once while connections are opened; 0: all."""


@dataclass(frozen=True)
class Report:
    """What came back. Times are milliseconds; `seconds` and `cpu` are seconds."""

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
    """Makes loads, with the program built once."""

    def __init__(self, workplace: Workplace) -> None:
        self._workplace = workplace
        self._program = workplace.build("load")

    def start(
        self, traffic: Traffic, port: int, *, seconds: float = 0, hold: bool = False, newlines: int = 2
    ) -> Running:
        """Start a load on a port, for so many seconds or until it is ended."""
        command: list[str | Path] = [self._program, "-c", str(traffic.connections), "-s", str(seconds)]
        command += ["-o", str(traffic.opening), "-k", str(traffic.kinds), "-n", str(traffic.events)]
        command += ["-t", str(newlines), *(["-h"] if hold else []), *(["-f"] if traffic.faithful else [])]
        command += [str(port), traffic.requests, traffic.answer]
        return Running(self._workplace.start(command, core=LOAD_CORE, talks=True))

    def run(self, traffic: Traffic, port: int, seconds: float, *, newlines: int = 2) -> Report:
        """Put a load on a port for so many seconds."""
        with self.start(traffic, port, seconds=seconds, newlines=newlines) as running:
            return running.report()


class Running:
    """A load that runs; it is over when the `with` block is left."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.stop()

    def report(self) -> Report:
        """Wait for the next report: at the end, or when all held streams have had their first event."""
        return Report(**json.loads(self.process.line()))

    def ask(self) -> Report:
        """Return how held streams stand now."""
        assert self.process.popen.stdin is not None
        self.process.popen.stdin.write("\n")
        self.process.popen.stdin.flush()
        return self.report()

    def end(self) -> Report:
        """End a load that would run on; returns what came of it."""
        assert self.process.popen.stdin is not None
        self.process.popen.stdin.close()
        return self.report()
