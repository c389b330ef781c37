"""A cluster of fake Azures with scripted faults, for tests of `balance` and `doctor`.

A region is a server with its own socket. At each moment it has one fault or none. It records each request together with
its fault at that time, so that a test knows the expected outcome.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from aiohttp import web

from gateway.testing import FakeAzure, Seen

Fault = Literal[
    "limited",  # 429 with Retry-After
    "limited_silently",  # 429 without
    "limited_in_words",
    "penalty",  # 429 of Azure's abuse detection
    "error",  # 500
    "unavailable",  # 503
    "timeout",  # 408
    "mute",  # reads the request and never responds
    "stalled",  # begins a stream and sends nothing
    "stalled_late",  # sends one word, then nothing
    "broken",  # resets the connection
    "broken_late",  # resets it after the first word
    "error_in_stream",
    "error_late",
    "wrong_key",
    "no_deployment",
]
WORD = {"choices": [{"index": 0, "delta": {"content": "word"}, "finish_reason": None}]}
LIMIT = {"error": {"code": "429", "message": "Rate limit is exceeded. Try again in 2 seconds."}}


@dataclass
class Region:
    """One fake Azure. `fault` may be set at any time; `rest` is the Retry-After of its 429s, in seconds."""

    name: str
    fault: Fault | None = None
    rest: float = 0.3
    saw: list[tuple[float, Fault | None, Seen]] = field(default_factory=list)
    azure: FakeAzure = field(init=False)

    def __post_init__(self) -> None:
        self.azure = FakeAzure(respond=self._respond, tag=self.name, deployments=("gpt-4o", "embed"))

    async def _respond(self, seen: Seen, request: web.BaseRequest) -> web.StreamResponse | None:
        fault = self.fault
        self.saw.append((time.monotonic(), fault, seen))
        if fault is None:
            return None
        if (plain := self._plain(fault)) is not None:
            return plain
        streams = b'"stream":true' in seen.body.replace(b" ", b"")
        if fault == "mute" or (fault in ("stalled", "stalled_late") and not streams):
            await asyncio.sleep(3600)
        if fault == "broken" or not streams:
            reset(request)
        return await self._stream(fault, request)

    def _plain(self, fault: Fault) -> web.Response | None:
        headers: dict[str, str] = {}
        error: dict[str, Any] = {"code": "500", "message": f"{fault} of {self.name}"}
        status = {"error": 500, "unavailable": 503, "timeout": 408, "wrong_key": 401, "no_deployment": 404}.get(fault)
        if fault.startswith("limited") or fault == "penalty":
            status = 429
            error = {"code": "429", "message": "Requests have exceeded the call rate limit."}
            if fault == "limited":
                headers = {"retry-after": str(max(1, round(self.rest))), "retry-after-ms": str(round(self.rest * 1000))}
            elif fault == "limited_in_words":
                error["message"] += f" Please retry after {max(1, round(self.rest))} seconds."
            elif fault == "penalty":
                headers = {"retry-after": "1", "x-ratelimit-abusepenalty-active": "True"}
        if fault == "no_deployment":
            error["code"] = "DeploymentNotFound"
        if status is None:
            return None
        headers["content-type"] = "application/json"
        return web.Response(status=status, body=msgspec.json.encode({"error": error}), headers=headers)

    async def _stream(self, fault: Fault, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        if fault == "error_in_stream":
            await response.write(b'data: {"choices":[],"prompt_filter_results":[]}\n\n')
            await response.write(b"data: %b\n\n" % msgspec.json.encode(LIMIT))
        elif fault == "stalled":
            await asyncio.sleep(3600)
        else:
            await response.write(b"data: %b\n\n" % msgspec.json.encode(WORD))
            if fault == "broken_late":
                await asyncio.sleep(0.02)
                reset(request)
            if fault == "stalled_late":
                await asyncio.sleep(3600)
            await response.write(b"data: %b\n\n" % msgspec.json.encode(LIMIT))
        await response.write_eof()
        return response


def reset(request: web.BaseRequest) -> None:
    """Reset the connection of a request. Raises ConnectionResetError."""
    transport = request.transport
    if transport is not None:
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    raise ConnectionResetError


@contextlib.asynccontextmanager
async def cluster(*names: str) -> AsyncIterator[dict[str, Region]]:
    """Run regions of these names."""
    regions = {name: Region(name) for name in names}
    try:
        for region in regions.values():
            await region.azure.start()
        yield regions
    finally:
        for region in regions.values():
            await region.azure.stop()


@contextlib.asynccontextmanager
async def slow_tls(seconds: float) -> AsyncIterator[int]:
    """Run a server that never begins TLS and closes after `seconds`; yields its port."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await asyncio.sleep(seconds)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def closed_port() -> int:
    """Return a port without a listener."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def pool_yaml(regions: dict[str, Region], *, settings: str = "{}", top: str = "", more: str = "") -> str:
    """Return a configuration with one pool of all regions, in one priority; `more` are lines of the pool."""
    resources = "\n".join(
        f'  {name}: {{endpoint: "{region.azure.endpoint}", api_key: azure-key}}' for name, region in regions.items()
    )
    pool = "\n".join(f"    - {name}/gpt-4o" for name in regions)
    return f"""
auth: none
resources:
{resources}
pools:
  chat:
{pool}
{more}
{top}
pipeline:
  - access_log
  - model_map: {{models: {{gpt-4o: "pool:chat"}}, unmapped: refuse}}
  - balance: {settings}
  - api_version: 2024-10-21
  - openai_errors
  - sse_newline
"""
