"""A program of a run: its core, the CPU and memory that it and its children use, and its end."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

# The measured program has the first core to itself; the load has the last one.
_CORES = sorted(os.sched_getaffinity(0))
GATEWAY_CORE, LOAD_CORE = _CORES[0], _CORES[-1]


class Broken(Exception):
    """A program failed."""


class Process:
    """A process on one core, with its children. Its output is appended to `log`."""

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
        """Return the next line of its output. Raises Broken if it has ended."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if not line:
            raise self.ended()
        return line

    def ended(self) -> Broken:
        """Return an error with its exit status and its last output."""
        words = self.log.read_text()[-2000:].strip()
        return Broken(f"{Path(self.command).name} ended with {self.popen.wait()}: {words}")

    def pids(self) -> list[int]:
        """Return the process ids of the whole tree."""
        found = [self.popen.pid]
        for pid in found:
            try:
                tasks = list(Path(f"/proc/{pid}/task").iterdir())
                found += [int(child) for task in tasks for child in (task / "children").read_text().split()]
            except (FileNotFoundError, ProcessLookupError):
                continue  # a child that has just ended
        return found

    def cpu(self) -> float:
        """Return the seconds of CPU that the tree has used; the kernel counts them in ns."""
        total = 0
        for pid in self.pids():
            try:
                for task in Path(f"/proc/{pid}/task").iterdir():
                    total += int((task / "schedstat").read_text().split()[0])
            except (FileNotFoundError, ProcessLookupError):
                continue
        return total / 1e9

    def rss(self) -> int:
        """Return the resident memory of the tree, in bytes."""
        return sum(_kilobytes(pid, "VmRSS") for pid in self.pids()) * 1024

    def peak(self) -> int:
        """Return the peak of the tree's resident memory since `forget_peak`, in bytes."""
        return sum(_kilobytes(pid, "VmHWM") for pid in self.pids()) * 1024

    def forget_peak(self) -> None:
        """Reset `peak`."""
        for pid in self.pids():
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    def stop(self) -> None:
        """Stop it and wait for its end."""
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
