"""How soon a stream of Azure ends after its client disconnects: 1,000 streams, disconnected one after the other.

Prints the time from a client's disconnect to the end of its stream at the upstream. Fails if the 99th percentile
exceeds 50 ms, or if a connection stays open.
"""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import subprocess
import sys
import time

import aiohttp
from aiohttp import web

from gateway.testing import FakeAzure, Seen

STREAMS = 1000
LIMIT = 0.050


async def main() -> int:
    """Run the measurement; return the exit status."""
    closed: dict[str | None, float] = {}
    left: dict[str | None, float] = {}

    async def stream(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        try:
            await response.prepare(request)
            while True:
                await response.write(b"data: x\n\n")
                await asyncio.sleep(0.5)
        finally:
            closed[seen.headers.get("x-number")] = time.perf_counter()

    async with FakeAzure(respond=stream) as azure:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "serve", "--listen", "127.0.0.1:18080"],
            env={**os.environ, "AZURE_OPENAI_ENDPOINT": azure.endpoint},
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        await asyncio.to_thread(process.stderr.readline)
        drained = asyncio.create_task(asyncio.to_thread(process.stderr.read))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def start(number: int) -> aiohttp.ClientResponse:
                answer = await session.post(
                    "http://127.0.0.1:18080/v1/chat/completions",
                    json={"model": "gpt-4o", "stream": True, "messages": []},
                    headers={"api-key": "k", "x-number": str(number)},
                )
                await answer.content.readany()
                return answer

            answers: list[aiohttp.ClientResponse] = []
            for first in range(0, STREAMS, 100):
                answers += await asyncio.gather(*(start(number) for number in range(first, first + 100)))
            running = azure.connections
            for number, answer in enumerate(answers):
                left[str(number)] = time.perf_counter()
                answer.close()
                if number % 5 == 0:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(2)
        process.send_signal(signal.SIGTERM)
        status = await asyncio.to_thread(process.wait)
        await drained
        open_still = azure.connections
    waits = sorted(closed[number] - left[number] for number in left if number in closed)
    p50, p99, most = (1000 * waits[int(len(waits) * share)] for share in (0.5, 0.99, 0.9999))
    sys.stdout.write(
        f"{platform.python_implementation()} {platform.python_version()}, {running} streams, {len(waits)} closed "
        f"upstream: p50 {p50:.1f} ms, p99 {p99:.1f} ms, most {most:.1f} ms; {open_still} left open; exit {status}\n"
    )
    return 0 if len(waits) == STREAMS and p99 < 1000 * LIMIT and not open_still and status == 0 else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
