"""A proxy written the usual way with aiohttp, for comparison: `usual.py PORT UPSTREAM`.

`web.Application`, one handler, `ClientSession`; it rewrites the URL and the key and streams the response. No stages,
limits or logs. It uses uvloop if installed, as the gateway does, so that the loop makes no difference.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

UPSTREAM = web.AppKey("UPSTREAM", str)
SESSION = web.AppKey("SESSION", aiohttp.ClientSession)
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "host", "content-length"}


async def session(app: web.Application) -> AsyncIterator[None]:
    """Keep one session while the application runs."""
    timeout = aiohttp.ClientTimeout(total=None, sock_read=600)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=timeout, auto_decompress=False
    ) as app[SESSION]:
        yield


async def handle(request: web.Request) -> web.StreamResponse:
    """Pass one request on and its response back."""
    headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
    headers["api-key"] = headers.pop("Authorization", "").removeprefix("Bearer ")
    url = f"{request.app[UPSTREAM]}/openai/deployments/bench/chat/completions"
    async with request.app[SESSION].post(
        url, params={"api-version": "2024-10-21"}, headers=headers, data=await request.read()
    ) as answer:
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
        response = web.StreamResponse(status=answer.status, headers=kept)
        await response.prepare(request)
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
        return response


async def serve(port: int, upstream: str) -> None:
    """Serve until the process ends."""
    app = web.Application(client_max_size=1024**3)
    app[UPSTREAM] = upstream
    app.cleanup_ctx.append(session)
    app.router.add_post("/v1/chat/completions", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    main = serve(int(sys.argv[1]), sys.argv[2])
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)
