"""What the tests of tokens and keys share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """Yield a client session for fetching tokens and keys."""
    async with aiohttp.ClientSession() as session:
        yield session
