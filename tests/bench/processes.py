"""A program that a run has started: on which core, what CPU and memory it and its children use, and its end."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

# The gateway, or what it is compared with, has a core to itself: the first one; the load has the last one.
_CORES = sorted(os.sched_getaffinity(0))
GATEWAY_CORE, LOAD_CORE = _CORES[0], _CORES[-1]


class Broken(Exception):
    """A program did not do what it must."""


class Process:
    """A process on one core, with its children. What it writes goes to the end of `log`."""

    def __init__(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        core: int,
        log: Path,
        env: Mapping[str, str] | None = None,
        talks: bool = False,
    ) -> None:
        self.command = command[0]
        self.log = log
        with log.open("ab") as file:
            self.popen = subprocess.Popen(
                ["taskset", "-c", str(core), *command],
                cwd=log.parent,
                env={**os.environ, **(env or {})},
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else file,
                stderr=file,
                text=True,
            )

    def line(self) -> str:
        """Return the next line of its output. Raises Broken where it has ended instead."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if not line:
            raise self.ended()
        return line

    def ended(self) -> Broken:
        """Return the error that says that it has ended, and with which words."""
        words = self.log.read_text()[-2000:].strip()
        return Broken(f"{Path(self.command).name} ended with {self.popen.wait()}: {words}")

    def pids(self) -> list[int]:
        """Return its number and those of its children, and theirs."""
        found = [self.popen.pid]
        for pid in found:
            try:
                tasks = list(Path(f"/proc/{pid}/task").iterdir())
                found += [int(child) for task in tasks for child in (task / "children").read_text().split()]
            except (FileNotFoundError, ProcessLookupError):
                continue  # a child that has ended since
        return found

    def cpu(self) -> float:
        """Return the seconds of CPU that the tree has used. The kernel counts them in ns, without ticks."""
        total = 0
        for pid in self.pids():
            try:
                for task in Path(f"/proc/{pid}/task").iterdir():
                    total += int((task / "schedstat").read_text().split()[0])
            except (FileNotFoundError, ProcessLookupError):
                continue
        return total / 1e9

    def rss(self) -> int:
        """Return the bytes that the tree has in memory."""
        return sum(_kilobytes(pid, "VmRSS") for pid in self.pids()) * 1024

    def peak(self) -> int:
        """Return the most bytes that the tree had in memory since `forget_peak`."""
        return sum(_kilobytes(pid, "VmHWM") for pid in self.pids()) * 1024

    def forget_peak(self) -> None:
        """Let `peak` count from now on."""
        for pid in self.pids():
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    def stop(self) -> None:
        """End it, and wait until it has ended."""
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                pipe.close()
        self.popen.terminate()
        try:
            self.popen.wait(10)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()


def _kilobytes(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return 0
