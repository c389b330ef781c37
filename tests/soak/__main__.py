"""`python -m tests.soak`: mixed traffic for `$SOAK_SECONDS` (an hour); exits with 1 if something is wrong or left.

Each of twelve rounds has traffic, then silence: all connections are closed, and the gateway's process is inspected.
Tasks, threads and descriptors must be as many as after the first round. Two more descriptors are accepted, for a file
that is being read, and two more threads: a thread pool starts one when two jobs overlap, and keeps it. The minimum
memory of the second half may be at most 10 % or 8 MB above that of the first half, without the first sixth, in which
caches fill.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.soak.clients import KEY, KINDS, Clients

__all__ = ("Census", "Run", "judge", "soak", "started")

_MOST_SECONDS = 24 * 3600
_ROUNDS = 12
_CLIENTS = 16
# Mean pause of a client between two requests, in seconds; the run can share a core.
_PAUSE = 0.15
_MB = 1024 * 1024

_CONFIGURATION = """
listen: 127.0.0.1:0
resources: {azure: {endpoint: "http://127.0.0.1:%d"}}
plugins_path: %s
log: {format: json}
timeouts: {first_byte: 50, idle: 50, client: 50, head: 50, keep_alive: %d}
pipeline:
  - census
  - access_log
  - auth_passthrough
  - model_map: {unmapped: own_name_without_dots}
  - resource_ids
  - api_version: {version: 2024-10-21, otherwise: [v1, 2025-04-01-preview]}
  - missing_message
  - openai_errors
  - sse_newline
"""


@dataclass(frozen=True)
class Census:
    """Resources of the idle gateway process; memory in bytes."""

    memory: int
    descriptors: int
    tasks: int
    threads: int
    by_coroutine: str = ""

    def __str__(self) -> str:
        return f"{self.memory / _MB:.1f} MB, {self.descriptors} descriptors, {self.tasks} tasks, {self.threads} threads"


def judge(rounds: list[Census]) -> list[str]:
    """Return a description of each resource that grew; an empty list if none did."""
    grown = []
    first, last = rounds[0], rounds[-1]
    for name, slack in (("tasks", 0), ("threads", 2), ("descriptors", 2)):
        before, now = getattr(first, name), getattr(last, name)
        if now > before + slack:
            grown.append(f"{name}: {before} after the first round, {now} at the end ({last.by_coroutine})")
    half = len(rounds) // 2
    before = min(each.memory for each in rounds[len(rounds) // 6 : half] or rounds[:1])
    now = min(each.memory for each in rounds[half:])
    if now > before + max(before // 10, 8 * _MB):
        grown.append(f"memory: {before / _MB:.1f} MB in the first half, {now / _MB:.1f} MB in the second")
    return grown


class _Gateway:
    """A gateway's process and its log."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.port = 0
        self.listening = asyncio.Event()
        self.reloads = 0
        self.wrong: list[str] = []
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            text = line.decode(errors="replace").strip()
            try:
                event: dict[str, Any] = json.loads(text)
            except ValueError:
                event = {"level": "error"}  # log events are JSON; this is a traceback or a warning
            if KEY in text:
                self.wrong.append("a key in the log")
            if event.get("level") in ("error", "critical"):
                self.wrong.append(text)
            elif event.get("event") == "listening":
                self.port = int(event["address"].rpartition(":")[2])
                self.listening.set()
            elif event.get("event") == "reloaded":
                self.reloads += 1


@contextlib.asynccontextmanager
async def started(folder: Path) -> AsyncIterator[tuple[_Gateway, asyncio.subprocess.Process]]:
    """Start a fake Azure, and a gateway in front of it."""
    azure = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.soak.azure", stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert azure.stdout is not None
    port = int(await azure.stdout.readline())
    config = folder / "gateway.yaml"
    config.write_text(_configuration(port, 75))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "serve", "--config", str(config)),
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 20,
    )
    gateway = _Gateway(process)
    try:
        async with asyncio.timeout(30):
            await gateway.listening.wait()
        yield gateway, azure
    finally:
        for each in (process, azure):
            if each.returncode is None:
                each.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(40):
                await asyncio.gather(process.wait(), azure.wait())
        except TimeoutError:
            gateway.wrong.append("a process did not end in 40 s")
            for each in (process, azure):
                if each.returncode is None:
                    each.kill()
        await gateway.reading
        if process.returncode != 0:
            gateway.wrong.append(f"the gateway ended with {process.returncode}")


def _configuration(port: int, keep_alive: int) -> str:
    return _CONFIGURATION % (port, Path(__file__).parent / "stages", keep_alive)


class Run:
    """One run."""

    def __init__(self, gateway: _Gateway, azure: asyncio.subprocess.Process, folder: Path, seed: int) -> None:
        self.gateway, self.azure, self._folder = gateway, azure, folder
        self.counts: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.asked = 0
        self._rng = random.Random(seed)

    async def traffic(self, seconds: float, reload_after: float) -> None:
        """Send mixed traffic for `seconds`, with a reload every `reload_after` seconds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        clients = [Clients(self.gateway.port, random.Random(self._rng.random())) for _ in range(_CLIENTS)]
        reloading = asyncio.create_task(self._reload(reload_after))
        try:
            await asyncio.gather(*(self._client(each, end) for each in clients))
        finally:
            reloading.cancel()
            for each in clients:
                await each.session.close()

    async def _client(self, clients: Clients, end: float) -> None:
        names = list(KINDS)
        weights = [weight for weight, _ in KINDS.values()]
        while asyncio.get_running_loop().time() < end:
            (name,) = clients.rng.choices(names, weights)
            try:
                await KINDS[name][1](clients)
            except Exception as exc:
                self.failures[f"{name}: {type(exc).__name__}: {exc}"[:300]] += 1
            self.counts[name] += 1
            await asyncio.sleep(clients.rng.uniform(0, 2 * _PAUSE))

    async def _reload(self, after: float) -> None:
        while True:
            await asyncio.sleep(after)
            self.reload()

    def reload(self) -> None:
        """Change the configuration and send SIGHUP."""
        config = self._folder / "gateway.yaml"
        port = int(config.read_text().partition("http://127.0.0.1:")[2].partition('"')[0])
        self.asked += 1
        config.write_text(_configuration(port, 75 + self.asked % 2))
        self.gateway.process.send_signal(signal.SIGHUP)

    async def settle(self) -> Census:
        """Close all connections, wait until the gateway has released everything, and take a census."""
        await asyncio.sleep(1)
        self.azure.send_signal(signal.SIGUSR1)
        await asyncio.sleep(2.5)  # old stages are garbage-collected one second after they stop
        best: Census | None = None
        for _ in range(20):
            census = await self._census()
            if best is not None and census == best:
                break
            if best is None or (census.tasks, census.descriptors) <= (best.tasks, best.descriptors):
                best = census
            await asyncio.sleep(0.5)
        assert best is not None
        return best

    async def _census(self) -> Census:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.gateway.port)
        try:
            writer.write(b"GET /v1/census HTTP/1.1\r\nHost: gw.test\r\nConnection: close\r\n\r\n")
            body = (await reader.read()).partition(b"\r\n\r\n")[2]
        finally:
            writer.close()
        told = json.loads(body)
        proc = Path("/proc", str(self.gateway.process.pid))
        pages = int((proc / "statm").read_text().split()[1])
        return Census(
            pages * os.sysconf("SC_PAGE_SIZE"),
            len(os.listdir(proc / "fd")),
            told["tasks"],
            told["threads"],
            str(told["by_coroutine"]),
        )


async def soak(seconds: float, seed: int) -> list[str]:
    """Run for `seconds`; return a description of everything that is wrong."""
    rounds: list[Census] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        async with started(folder) as (gateway, azure):
            run = Run(gateway, azure, folder, seed)
            began = time.monotonic()
            minutes = asyncio.create_task(_tell_each_minute(run, began))
            for number in range(_ROUNDS):
                await run.traffic(seconds / _ROUNDS, max(2.0, seconds / _ROUNDS / 6))
                rounds.append(await run.settle())
                _say(f"round {number + 1} of {_ROUNDS}, {sum(run.counts.values())} done: {rounds[-1]}")
            minutes.cancel()
            asked, reloads = run.asked, gateway.reloads
    _say("done: " + ", ".join(f"{name} {count}" for name, count in sorted(run.counts.items())))
    wrong = judge(rounds)
    wrong += [f"{count} times {what}" for what, count in run.failures.most_common(20)]
    wrong += [f"logged: {text[:600]}" for text in gateway.wrong[:20]]
    if asked and not reloads:
        wrong.append(f"{asked} reloads were requested, and none was logged")
    _say(f"{reloads} reloads, {asked} requested")
    return wrong


async def _tell_each_minute(run: Run, began: float) -> None:
    while True:
        await asyncio.sleep(60)
        minute = (time.monotonic() - began) / 60
        _say(f"minute {minute:.0f}: {sum(run.counts.values())} done, {run.failures.total()} failed")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    """Run the soak; return 1 if something is wrong."""
    argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__).parse_args()
    seconds = float(os.environ.get("SOAK_SECONDS") or 3600)
    if not 12 <= seconds <= _MOST_SECONDS:
        _say(f"SOAK_SECONDS must be from 12 to {_MOST_SECONDS}")
        return 2
    wrong = asyncio.run(soak(seconds, seed=14))
    for each in wrong:
        _say(f"FAILED {each}")
    _say("failed" if wrong else "passed: memory, tasks, threads and descriptors are as at the start")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
