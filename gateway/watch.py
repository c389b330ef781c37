"""Waiting until the files of a configuration have changed: they are looked at every second, in a thread.

Looking works where notifications do not: on network file systems, in containers, for links that are switched.
"""

from __future__ import annotations

import asyncio

from gateway.config.sources import Sources

__all__ = ("until_changed",)

# How often, in seconds, the files are looked at.
_EVERY = 1.0


async def until_changed(sources: Sources) -> None:
    """Return when the files' content is another than what `sources` were read with, and no longer being written.

    Two looks in a row must agree, so that a file that is half written is not read.
    """
    known: object = None  # a look at files that are as they were read
    before: object = None
    while True:
        await asyncio.sleep(_EVERY)
        seen = await asyncio.to_thread(sources.stats)
        if seen != known and seen == before:
            if await asyncio.to_thread(sources.now) != sources:
                return
            known = seen
        before = seen
