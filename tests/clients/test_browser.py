"""A real browser, Chromium, whose pages call a gateway of another origin."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from gateway.testing import FakeAzure, Seen
from tests.conftest import CHAT, KEY, YAML, StartGateway

pytestmark = [pytest.mark.clients, pytest.mark.timeout(120)]

SDK = Path(__file__).parent / "node_modules" / "openai"
WITH_CORS = YAML.replace("  - auth_passthrough", "  - cors: {origins: [ORIGIN]}\n  - auth_passthrough")

# The beginning of each page: `ask` calls the gateway, and `attempt` returns the outcome of a call.
SHARED = """
const ask = (url, key, body) => fetch(url + "/v1/chat/completions", {
  method: "POST",
  headers: {"content-type": "application/json", ...(key ? {authorization: "Bearer " + key} : {})},
  body: JSON.stringify({...given.chat, ...body}),
});
const attempt = async (call) => { try { return await call(); } catch (error) { return String(error); } };
"""


class Pages:
    """A web server with its own origin, and a browser that opens its page."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._script = ""
        self._result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.arrived = asyncio.Event()
        """Set each time the page says that something has come."""

    async def start(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/", self._page)
        app.router.add_post("/arrived", self._arrived)
        app.router.add_post("/result", self._take)
        app.router.add_get("/openai/{path:.+}", self._sdk)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        # Another host than the gateway's 127.0.0.1, so another origin and another site.
        self.origin = f"http://localhost:{runner.addresses[0][1]}"
        return runner

    async def _page(self, request: web.Request) -> web.Response:
        html = f"<!doctype html><title>page</title><script type=module>{self._script}</script>"
        return web.Response(text=html, content_type="text/html")

    async def _sdk(self, request: web.Request) -> web.Response:
        file = SDK / request.match_info["path"]
        return web.Response(body=file.read_bytes(), content_type="text/javascript")

    async def _arrived(self, request: web.Request) -> web.Response:
        self.arrived.set()
        return web.Response()

    async def _take(self, request: web.Request) -> web.Response:
        self._result.set_result(await request.json())
        return web.Response()

    async def run(self, script: str, **given: Any) -> Any:
        """Open a page that runs this script as the body of an async function; return its result."""
        self._result = asyncio.get_running_loop().create_future()
        self._script = (
            f"const given = {json.dumps({'chat': CHAT, 'key': KEY, **given})};\n{SHARED}\n"
            f"const result = await attempt(async () => {{ {script} }});\n"
            'await fetch("/result", {method: "POST", body: JSON.stringify(result)});'
        )
        async with browser(self._folder, self.origin):
            async with asyncio.timeout(60):
                return await self._result


@contextlib.asynccontextmanager
async def browser(folder: Path, url: str) -> AsyncIterator[None]:
    """Run Chromium on a page, then end it with all its processes."""
    binary = shutil.which("chromium")
    assert binary, "Chromium is not installed; apt-get install chromium"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    # It connects only to the test.
    options += ["--no-proxy-server", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += ["--disable-breakpad", f"--user-data-dir={folder / 'profile'}"]
    with (folder / "chromium.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            binary, *options, url,
            stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "HOME": str(folder)},
            start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        # Its own process group has the renderers and helpers, which may have ended first.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


@pytest.fixture
async def pages(tmp_path: Path) -> AsyncIterator[Pages]:
    """A server of pages."""
    made = Pages(tmp_path)
    runner = await made.start()
    yield made
    await runner.cleanup()


async def test_a_page_gets_answers_and_errors(azure: FakeAzure, start_gateway: StartGateway, pages: Pages) -> None:
    """With the key in `Authorization`: the JSON, only the exposed headers, and the message of a 401."""
    gateway = await start_gateway(azure.endpoint, WITH_CORS.replace("ORIGIN", pages.origin))
    result = await pages.run(
        """
        const plain = await ask(given.url, given.key);
        const wrong = await ask(given.url, "wrong");
        const none = await ask(given.url);
        return {
          text: (await plain.json()).choices[0].message.content,
          id: plain.headers.get("x-request-id"),
          limit: plain.headers.get("x-ratelimit-remaining-requests"),
          hidden: plain.headers.get("x-ms-region"),
          wrong: [wrong.status, (await wrong.json()).error.code],
          none: [none.status, (await none.json()).error.code],
        };
        """,
        url=gateway.url,
    )
    await gateway.idle()
    exchanges = gateway.exchanges()
    assert isinstance(result, dict), result
    ids = [event["request_id"] for event in exchanges if event["status"] == 200]
    assert [result.pop("id")] == ids
    assert result.pop("limit")
    assert result == {"text": "Hello there!", "hidden": None, "wrong": [401, "401"], "none": [401, "invalid_api_key"]}
    # The browser sends one preflight and caches the result for `max_age`.
    assert [event["status"] for event in exchanges] == [204, 200, 401, 401]
    assert "origin" not in azure.requests[0].headers


async def test_a_page_reads_a_stream_as_it_comes(start_gateway: StartGateway, pages: Pages) -> None:
    """Each event reaches the page before the fake Azure sends the next one."""

    async def one_by_one(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for number in range(5):
            await response.write(b"data: %d\n\n" % number)
            await pages.arrived.wait()
            pages.arrived.clear()
        await response.write(b"data: [DONE]")
        return response

    async with FakeAzure(respond=one_by_one) as azure:
        gateway = await start_gateway(azure.endpoint, WITH_CORS.replace("ORIGIN", '"http://localhost:*"'))
        result = await pages.run(
            """
            const answer = await ask(given.url, given.key, {stream: true});
            const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
            const chunks = [];
            for (let got = await reader.read(); !got.done; got = await reader.read()) {
              chunks.push(got.value);
              await fetch("/arrived", {method: "POST"});
            }
            return chunks;
            """,
            url=gateway.url,
        )
    assert result[:5] == [f"data: {number}\n\n" for number in range(5)]
    assert "".join(result[5:]) == "data: [DONE]\n\n"


async def test_a_page_that_may_not_gets_nothing(azure: FakeAzure, start_gateway: StartGateway, pages: Pages) -> None:
    """Without the stage, and for an unlisted origin: `Failed to fetch`, and no request reaches Azure."""
    without = await start_gateway(azure.endpoint)
    other = await start_gateway(azure.endpoint, WITH_CORS.replace("ORIGIN", '"https://app.example.com"'))
    result = await pages.run(
        """
        const results = [];
        for (const url of given.urls) results.push(await attempt(async () => (await ask(url, given.key)).status));
        return results;
        """,
        urls=[without.url, other.url],
    )
    assert result == ["TypeError: Failed to fetch"] * 2
    assert azure.requests == []


async def test_openai_node_in_a_page(azure: FakeAzure, start_gateway: StartGateway, pages: Pages) -> None:
    """The official SDK with its own headers: a response with its id, a stream, and an error that it understands."""
    gateway = await start_gateway(azure.endpoint, WITH_CORS.replace("ORIGIN", pages.origin))
    result = await pages.run(
        """
        const {default: OpenAI} = await import("/openai/index.mjs");
        const client = (apiKey) => new OpenAI(
          {apiKey, baseURL: given.url + "/v1", maxRetries: 0, dangerouslyAllowBrowser: true});
        const plain = await client(given.key).chat.completions.create(given.chat);
        let streamed = "";
        for await (const chunk of await client(given.key).chat.completions.create({...given.chat, stream: true}))
          streamed += chunk.choices[0]?.delta?.content ?? "";
        const error = await client("wrong").chat.completions.create(given.chat).catch((error) => error);
        return {
          plain: plain.choices[0].message.content, id: plain._request_id, streamed,
          error: [error.constructor.name, error.status, typeof error.requestID],
        };
        """,
        url=gateway.url,
    )
    assert isinstance(result, dict), result
    assert [result.pop("id")] == [event["request_id"] for event in gateway.exchanges() if event["status"] == 200][:1]
    assert result == {
        "plain": "Hello there!",
        "streamed": "Hello there!",
        "error": ["AuthenticationError", 401, "string"],
    }
