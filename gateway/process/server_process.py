"""The life of a server process: start, listen, run until a signal, drain, and stop."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

from gateway.logs import get_logger
from gateway.server import Server
from gateway.transport.file_descriptors import warn_if_low
from gateway.transport.listener import Listener

__all__ = ("serve",)


async def serve(
    server: Server,
    ready: Callable[[], None] | None = None,
    *,
    stopping: Callable[[], None] | None = None,
    listener: Listener | None = None,
    connect_signals: Callable[[asyncio.Event, asyncio.Event], None] | None = None,
    background: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Run a server until SIGTERM or SIGINT, then drain it; a second signal stops it immediately.

    `ready` is called when it listens (on `listener`, if given), `stopping` when the drain begins. `connect_signals`
    gets the two events to set: one to drain, one to stop immediately. `background` runs from when the server listens
    until the drain begins, and is then cancelled. Raises StartError if the server cannot start.
    """
    stop, now = asyncio.Event(), asyncio.Event()
    (connect_signals or _connect_signals)(stop, now)
    log = get_logger().bind(pid=os.getpid())
    starting = asyncio.create_task(server.start(listener))
    stop_requested = asyncio.create_task(stop.wait())
    background_task: asyncio.Task[None] | None = None
    try:
        await asyncio.wait((starting, stop_requested), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            # A stage that hangs in its start must not keep the gateway from stopping.
            starting.cancel()
            await asyncio.wait((starting,), timeout=5)
            return
        await starting
        server.watchdog.start()
        _tune_garbage_collector()
        admin = {"admin": str(server.admin.address)} if server.admin is not None else {}
        log.info("listening", address=str(server.address), teams=len(server.teams.all), **admin)
        warn_if_low(server.settings.limits.connections)
        if background is not None:
            background_task = asyncio.create_task(background())
            await asyncio.sleep(0)  # it must run before `ready`: a reload may be requested immediately after
        if ready is not None:
            ready()
        await stop_requested
        log.info("stopping")
        if stopping is not None:
            stopping()
    finally:
        stop_requested.cancel()
        if background_task is not None:
            background_task.cancel()
            await asyncio.wait((background_task,), timeout=5)
        await server.stop(now=now)
        server.watchdog.stop()
    log.info("stopped")


def _connect_signals(stop: asyncio.Event, now: asyncio.Event) -> None:
    """Set `stop` at the first SIGTERM or SIGINT, and `now` at the second."""

    def terminate() -> None:
        (now if stop.is_set() else stop).set()

    def restart() -> None:
        get_logger().warning("restart_ignored", pid=os.getpid(), advice="a rolling restart needs --workers 2 or more")

    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, terminate)
    loop.add_signal_handler(signal.SIGUSR2, restart)


def _tune_garbage_collector() -> None:
    """Reduce the work of the garbage collector.

    Objects from the start live as long as the process, and an exchange leaves no cycles. With Python's default
    thresholds, a collection after every 700 new objects took an eighth of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
