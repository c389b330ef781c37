"""The connection limit: the connections of all workers count together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from gateway.testing import FakeAzure
from gateway.transport.connection_limit import ConnectionCount, WorkerSlots
from tests.conftest import until
from tests.process.test_supervisor import YAML, Fleet, fleet

LIMITED = "limits: {connections: 4}\n" + YAML


def test_processes_count_together() -> None:
    """Each process has its own slot; the slot of one that has ended is cleared and reused."""
    slots = WorkerSlots()
    first, second = slots.acquire(), slots.acquire()
    one, two = ConnectionCount(slots.descriptor, first), ConnectionCount(slots.descriptor, second)
    assert one.set(3) == 3
    assert two.set(2) == 5
    assert one.set(1) == 3
    slots.release(second)
    assert one.set(1) == 1
    assert slots.acquire() == second
    assert ConnectionCount().set(7) == 7  # a process alone


def test_there_are_not_more_workers_than_slots() -> None:
    """The supervisor logs the error and retries."""
    slots = WorkerSlots()
    assert len({slots.acquire() for _ in range(512)}) == 512
    with pytest.raises(OSError, match="more than 512 workers"):
        slots.acquire()


async def status(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Send a request, and return the status of the response."""
    writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\n\r\n")
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    if b" 503 " in head.splitlines()[0]:
        assert b"overloaded" in await asyncio.wait_for(reader.read(), 20)
    return head.split(b" ")[1]


async def test_the_limit_is_that_of_all_workers_together(azure: FakeAzure, tmp_path: Path) -> None:
    """Whichever worker has a connection; a closed one frees its slot, and so does a killed worker."""
    async with fleet(azure, tmp_path, yaml=LIMITED) as running, contextlib.AsyncExitStack() as stack:
        host, _, port = running.named("workers_ready")[0]["address"].rpartition(":")

        async def fits() -> asyncio.StreamWriter | None:
            """Open one more; a rejected one is closed again."""
            reader, writer = await asyncio.open_connection(host, int(port))
            if await status(reader, writer) == b"503":
                writer.close()
                return None
            stack.callback(writer.close)
            return writer

        async def fits_soon() -> None:
            async with asyncio.timeout(20):
                while await fits() is None:
                    await asyncio.sleep(0.05)

        kept = [await fits() for _ in range(4)]
        assert None not in kept
        for _ in range(6):
            assert await fits() is None
        assert kept[0] is not None
        kept[0].close()
        await fits_soon()
        await _killed(running)
        for _ in range(4):
            await fits_soon()


async def _killed(running: Fleet) -> None:
    """Kill every worker, and wait until others have replaced them."""
    for pid in running.pids:
        os.kill(pid, signal.SIGKILL)
    await running.until("worker_ready", 4)
    await until(lambda: len(running.named("worker_died")) == 2)
