"""Many streams at once: nothing is left behind, whoever ends them."""

from __future__ import annotations

import asyncio
import gc
import os
import sys

import pytest

from gateway.testing import FakeAzure
from tests.conftest import CHAT, StartGateway, until

pytestmark = pytest.mark.both_loops

COUNTING = """
from dataclasses import dataclass
from gateway import Next, Outcome, Request, Response, Stage

ENDED: dict[str, list[str]] = {}

@dataclass
class Counting(Stage):
    "Count how often each exchange ends."
    async def __call__(self, request: Request, call_next: Next) -> Response:
        ENDED.setdefault(request.id, [])
        request.defer(lambda outcome: ENDED[request.id].append(outcome.ended_by))
        return await call_next(request)
"""
YAML = """
plugins_path: mine
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline: [counting, auth_passthrough, model_map, api_version, sse_newline]
"""


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
async def test_200_streams_of_which_half_hang_up(start_gateway: StartGateway) -> None:
    """No upstream connection, task or descriptor is left, and `defer` ran once for each."""
    async with FakeAzure(words=["x"] * 60, delay=0.02) as azure:
        gateway = await start_gateway(azure.endpoint, YAML, {"mine/counting.py": COUNTING})
        async with gateway.post() as answer:
            await answer.read()
        await until(lambda: not gateway.server._running)
        files, tasks = open_files(), len(asyncio.all_tasks())

        async def one(number: int) -> bool:
            answer = await gateway.post(json={**CHAT, "stream": True}, headers={"X-Request-ID": f"n{number}"})
            if number % 2:
                await answer.content.readany()
                await asyncio.sleep(0.01 * (number % 50))
                answer.close()
                return False
            body: bytes = await answer.read()
            return body.endswith(b"data: [DONE]\n\n")

        whole = await asyncio.gather(*(one(number) for number in range(200)))

        assert [number % 2 == 0 for number in range(200)] == whole
        await until(lambda: azure.streaming == 0)
        await gateway.idle()
        await gateway.session.close()
        await until(lambda: not gateway.server._http.connections)  # type: ignore[union-attr]
        await gateway.server.upstream.close()
        await until(lambda: azure.connections == 0)
        gc.collect()
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
        await until(lambda: open_files() <= files)
        counting = sys.modules["gateway_plugins_path.mine.counting"]

        ended = {name: ways for name, ways in counting.ENDED.items() if name.startswith("n")}
        assert len(ended) == 200
        assert all(len(ways) == 1 for ways in ended.values())
        assert {f"n{number}": ["client" if number % 2 else "complete"] for number in range(200)} == ended
