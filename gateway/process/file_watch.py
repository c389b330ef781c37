"""Waiting until the files of a configuration have changed: they are looked at every second, in a thread.

Looking works where notifications do not: on network file systems, in containers, for links that are switched.
"""

from __future__ import annotations

import asyncio

from gateway.config.sources import Sources
from gateway.logs import get_logger

__all__ = ("wait_for_change",)

# How often, in seconds, the files are looked at.
_EVERY = 1.0


async def wait_for_change(sources: Sources) -> None:
    """Return when the files' content is another than what `sources` were read with, and no longer being written.

    Two looks in a row must agree, so that a file that is half written is not read.
    """
    known: object = None  # a look at files that are as they were read
    before: object = None
    away = False  # they cannot be looked at
    while True:
        await asyncio.sleep(_EVERY)
        try:
            seen = await asyncio.to_thread(sources.stats)
            if seen != known and seen == before:
                if await asyncio.to_thread(sources.now) != sources:
                    return
                known = seen
        except (OSError, RuntimeError) as exc:  # no descriptor is left, or no thread can be had: that passes
            if not away:
                away = True
                get_logger().warning("the configuration's files cannot be looked at; they are again", reason=str(exc))
            before = None
            continue
        away = False
        before = seen
