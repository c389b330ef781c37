"""A short `make soak`: each kind of client once. Growth and wrong responses are reported."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from tests.soak.__main__ import Census, Run, judge, started
from tests.soak.clients import KINDS, Clients, Wrong

pytestmark = pytest.mark.slow

MB = 1024 * 1024
ROUND = Census(memory=100 * MB, descriptors=15, tasks=8, threads=2)


async def test_each_kind_of_client_gets_what_is_its_own(tmp_path: Path) -> None:
    """All of them at once, then a reload; afterwards the gateway's process holds no more than before."""
    async with started(tmp_path) as (gateway, azure):
        run = Run(gateway, azure, tmp_path, seed=1)
        before = await run.settle()
        clients = Clients(gateway.port, random.Random(1))
        try:
            await asyncio.gather(*(act(clients) for _, act in KINDS.values()))
        finally:
            await clients.session.close()
        run.reload()
        async with asyncio.timeout(10):
            while not gateway.reloads:
                await asyncio.sleep(0.05)
        after = await run.settle()
    assert not judge([before, replace(after, memory=before.memory)])
    assert not gateway.wrong


@pytest.fixture
async def confused() -> AsyncIterator[Clients]:
    """Clients of a server that sends every client the same response."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        return web.json_response({"nonce": "somebody's", "sha256": "0", "size": 0, "x": "poison"})

    server = web.Server(answer)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    clients = Clients(listener.sockets[0].getsockname()[1], random.Random(1))
    yield clients
    await clients.session.close()
    listener.close()
    await server.shutdown(timeout=0.1)


@pytest.mark.parametrize(
    "name", ["json", "refused", "upstream_error", "late", "stream", "broken_stream", "upload", "upload_in_pieces"]
)
async def test_a_client_tells_a_wrong_answer(name: str, confused: Clients) -> None:
    """The response to another request, or an incomplete body, raises Wrong."""
    with pytest.raises(Wrong):
        await KINDS[name][1](confused)


def test_what_stays_as_it_was_is_no_growth() -> None:
    """Memory may vary a little and reach its plateau in the first half."""
    memory = (90, 95, 100, 110, 108, 109, 112, 110, 115, 111, 113, 112)
    assert not judge([replace(ROUND, memory=each * MB) for each in memory])


@pytest.mark.parametrize(
    ("grown", "told"),
    [
        (replace(ROUND, tasks=9), "tasks: 8"),
        (replace(ROUND, threads=5), "threads: 2"),
        (replace(ROUND, descriptors=18), "descriptors: 15"),
    ],
)
def test_what_grew_is_told(grown: Census, told: str) -> None:
    """One more task is too many, or three more threads or descriptors."""
    (line,) = judge([ROUND] * 11 + [grown])
    assert line.startswith(told)


def test_memory_that_grows_without_end_is_told() -> None:
    """The minimum of the second half is compared with the minimum of the first."""
    (line,) = judge([replace(ROUND, memory=(100 + 3 * number) * MB) for number in range(12)])
    assert line.startswith("memory: 106.0 MB in the first half, 118.0 MB")
