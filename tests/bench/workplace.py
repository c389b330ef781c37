"""The workplace of a run: a temporary folder with programs and logs, and the processes of the run."""

from __future__ import annotations

import os
import random
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.bench.processes import GATEWAY_CORE, LOAD_CORE, Process

HERE = Path(__file__).parent

# Command: Debian's package.
NEEDED = {"gcc": "gcc libc6-dev", "taskset": "util-linux", "openssl": "openssl", "nginx": "nginx", "haproxy": "haproxy"}
DESCRIPTORS = 16384


class Missing(Exception):
    """The machine lacks something that a run needs."""


class Workplace:
    """A folder and its processes; both are removed at the end of the `with` block."""

    def __init__(self) -> None:
        # On Debian, nginx and haproxy are only on root's PATH.
        os.environ["PATH"] += ":/usr/sbin:/usr/local/sbin"
        _check()
        os.sched_setaffinity(0, {LOAD_CORE})  # this program, too, must not use the gateway's core
        self._stack = ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="gateway-bench-")))
        self.folder.chmod(0o711)  # nginx's worker runs as another user
        self._logs = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def write(self, name: str, text: str | bytes) -> Path:
        """Write a file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def build(self, name: str) -> Path:
        """Compile a program of this folder's `name.c`."""
        built = self.folder / name
        subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", HERE / f"{name}.c", "-o", built], check=True)
        return built

    def start(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        core: int,
        env: Mapping[str, str] | None = None,
        talks: bool = False,
    ) -> Process:
        """Start a program; it ends with the run at the latest."""
        self._logs += 1
        process = Process(command, core=core, log=self.folder / f"{self._logs}.log", env=env, talks=talks)
        self._stack.callback(process.stop)
        return process


def free_port() -> int:
    """Return a free port below the range that the kernel assigns to clients."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _check() -> None:
    """Raise Missing if the machine is not suitable; raise the limit of open files as needed."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        packages = " ".join(NEEDED[name] for name in missing)
        raise Missing(f"{', '.join(missing)} not found: apt-get install {packages}")
    if GATEWAY_CORE == LOAD_CORE:
        raise Missing("two cores are needed: one for the gateway, one for the load and the upstream")
    if not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists():
        raise Missing("this kernel does not list a process's children (CONFIG_PROC_CHILDREN)")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS:
        raise Missing(f"{DESCRIPTORS} open files are needed, and `ulimit -Hn` is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))
