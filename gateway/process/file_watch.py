"""Watching the configuration's files for changes: polls them every second, in a thread.

Polling works where notifications do not: on network file systems, in containers, for symbolic links that are switched.
"""

from __future__ import annotations

import asyncio

from gateway.config.sources import Sources
from gateway.logs import get_logger

__all__ = ("wait_for_change",)

# Poll interval, in seconds.
_INTERVAL = 1.0


async def wait_for_change(sources: Sources) -> None:
    """Return when the files' content differs from `sources`, and the files are no longer being written.

    Two polls in a row must agree, so that a half-written file is not read.
    """
    unchanged: object = None  # the poll result whose content equals `sources`
    previous: object = None
    failing = False
    while True:
        await asyncio.sleep(_INTERVAL)
        try:
            stats = await asyncio.to_thread(sources.stats)
            if stats != unchanged and stats == previous:
                if await asyncio.to_thread(sources.now) != sources:
                    return
                unchanged = stats
        except (OSError, RuntimeError) as exc:  # no descriptor is left, or no thread: that passes
            if not failing:
                failing = True
                get_logger().warning("file_watch_failed", reason=str(exc))
            previous = None
            continue
        failing = False
        previous = stats
