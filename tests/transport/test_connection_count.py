"""How many clients are connected, to all workers together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from gateway.testing import FakeAzure
from gateway.transport.connection_count import ConnectionCount, Places
from tests.conftest import until
from tests.process.test_supervisor import YAML, Fleet, fleet

LIMITED = "limits: {connections: 4}\n" + YAML


def test_processes_count_together() -> None:
    """Each has a place of its own; that of one that has ended is cleared and given to another."""
    places = Places()
    first, second = places.take(), places.take()
    one, two = ConnectionCount(places.descriptor, first), ConnectionCount(places.descriptor, second)
    assert one.set(3) == 3
    assert two.set(2) == 5
    assert one.set(1) == 3
    places.give_back(second)
    assert one.set(1) == 1
    assert places.take() == second
    assert ConnectionCount().set(7) == 7  # a process alone


def test_there_are_not_more_workers_than_places() -> None:
    """The error is one that a supervisor tells, and waits after."""
    places = Places()
    assert len({places.take() for _ in range(512)}) == 512
    with pytest.raises(OSError, match="more than 512 workers"):
        places.take()


async def status(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Ask on a connection, and return the status of the answer and its Retry-After."""
    writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\n\r\n")
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    if b" 503 " in head.splitlines()[0]:
        assert b"overloaded" in await asyncio.wait_for(reader.read(), 20)
    return head.split(b" ")[1]


async def test_the_limit_is_that_of_all_workers_together(azure: FakeAzure, tmp_path: Path) -> None:
    """Whichever worker has a connection; one that ends makes room, and so does a worker that is killed."""
    async with fleet(azure, tmp_path, yaml=LIMITED) as running, contextlib.AsyncExitStack() as stack:
        host, _, port = running.named("workers_ready")[0]["address"].rpartition(":")

        async def fits() -> asyncio.StreamWriter | None:
            """Open one more; a refused one is closed again."""
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
