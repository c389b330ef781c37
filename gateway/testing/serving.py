"""Run a gateway with your configuration in this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from gateway.config import load
from gateway.server import Server
from gateway.settings import Listen

__all__ = ("serving",)


@contextlib.asynccontextmanager
async def serving(config: str | Path, **variables: str) -> AsyncIterator[str]:
    """Run a gateway on a free port of loopback; yields its URL.

    `variables` override environment variables in the configuration. Raises ConfigError and StartError.
    """
    loaded = load(Path(config), {**os.environ, **variables})
    server = Server(loaded.teams, replace(loaded.settings, listen=Listen("127.0.0.1", 0)))
    await server.start()
    now = asyncio.Event()
    now.set()
    try:
        yield f"http://{server.address}"
    finally:
        await server.stop(now=now)
