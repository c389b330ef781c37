"""The watchdog: a thread that detects code which blocks the event loop, and logs it.

The loop serves all requests. A stage that calls `time.sleep`, `requests.get` or a slow regular expression blocks all of
them, and nothing else in the log would name it. The watchdog checks the loop's thread eight times a second while
exchanges run, and once a second otherwise. If the thread is not idle, the watchdog schedules a heartbeat on the loop.
If the heartbeat does not run within `LIMIT` seconds, the watchdog logs where the thread is.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import selectors
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import CodeType, CoroutineType, FrameType
from typing import Any

from gateway import stage
from gateway.logs import get_logger
from gateway.request import Request
from gateway.transport.client_connection import ClientConnection

__all__ = ("LIMIT", "Watchdog")

LIMIT = 0.25
"""How long, in seconds, the event loop may be blocked. Code that blocks for `LIMIT` + 0.125 s is always detected."""
# Check intervals, in seconds: while exchanges run, and while none runs.
_INTERVAL, _INTERVAL_IDLE = 0.125, 1.0
# Number of checks without an exchange until the watchdog slows down.
_QUIET_CHECKS = 10
# The minimum interval, in seconds, between two events for one function, and how many functions are remembered.
_LOG_INTERVAL, _MAX_FUNCTIONS = 10.0, 256

_PATHS = sysconfig.get_paths()
_LIBRARIES = tuple(
    {f"{Path(_PATHS[name]).resolve()}/" for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {f"{_PATHS[name]}/" for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
_GATEWAY = f"{Path(__file__).resolve().parent}/"
# The innermost Python frame of a loop that waits for events: asyncio's own is in its selector, uvloop's in the runner.
_IDLE = (selectors.__file__, asyncio.runners.__file__, asyncio.base_events.__file__)
# The code of the function that runs one stage: the locals of its frame have the stage's name and the request.
_STAGE_CODE = next(
    each for each in stage._link.__code__.co_consts if isinstance(each, CodeType) and each.co_name == "linked"
)


class Watchdog:
    """Watches the loop on which `start` is called. `running` are the running exchanges; if none, it checks less."""

    def __init__(self, running: Collection[object]) -> None:
        self.asleep = False
        """Whether it checks only once a second; the server then calls `wake` when an exchange begins."""
        self._running = running
        self._wake = threading.Event()
        self._heartbeat_seen = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._logged: dict[str, float] = {}  # function -> time of its last event

    def start(self) -> None:
        """Start to watch the running loop, which runs in this thread."""
        # (CLOCK_THREAD_CPUTIME_ID of another thread: see pthread_getcpuclockid(3).)
        clock = time.pthread_getcpuclockid(threading.get_ident()) if hasattr(time, "pthread_getcpuclockid") else None
        used = (lambda: time.clock_gettime(clock)) if clock is not None else time.process_time
        self._thread = threading.Thread(
            target=self._watch,
            args=(asyncio.get_running_loop(), threading.get_ident(), used),
            name="watchdog",
            daemon=True,
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(1.0)
            self._thread = None

    def wake(self) -> None:
        """Check often again."""
        self.asleep = False
        self._wake.set()

    def _watch(self, loop: asyncio.AbstractEventLoop, ident: int, used: Callable[[], float]) -> None:
        quiet = 0
        scheduled: float | None = None  # when the heartbeat was scheduled that has not run yet
        now, used_now = time.monotonic(), used()
        while not self._stopping:
            pause = _INTERVAL_IDLE if self.asleep else _INTERVAL
            if self.asleep:
                self._wake.wait(pause)
            else:
                time.sleep(pause)  # (costs half of waiting for an event)
            slept_at, now = now, time.monotonic()
            used_before, used_now = used_now, used()
            quiet = 0 if self._running else quiet + 1
            self.asleep = quiet >= _QUIET_CHECKS
            self._wake.clear()
            if self.asleep and self._running:  # an exchange began just now, before `asleep` was set
                self.asleep = False
            if scheduled is not None and not self._heartbeat_seen:
                if now - scheduled >= LIMIT:
                    self._report(ident)
                    scheduled = math.inf  # log each block once
                continue
            scheduled = None
            if _is_idle(ident):
                continue
            if now - slept_at - pause > LIMIT and used_now - used_before > LIMIT:
                # A C function held the GIL, so this thread could not run either.
                self._report(ident)
                continue
            scheduled, self._heartbeat_seen = now, False
            try:
                loop.call_soon_threadsafe(self._heartbeat)
            except RuntimeError:  # the loop is closed
                return

    def _heartbeat(self) -> None:
        self._heartbeat_seen = True

    def _report(self, ident: int) -> None:
        """Log where a thread is, unless that function was logged recently."""
        frames = list(_frames(ident))
        if not frames:
            return
        # The innermost frame of a plugin, or else of the gateway, or else of all.
        culprit = (
            next((each for each in frames if not _is_library(each) and not _is_gateway(each)), None)
            or next((each for each in frames if not _is_library(each)), None)
            or frames[0]
        )
        function, now = _function(culprit), time.monotonic()
        if now - self._logged.get(function, -_LOG_INTERVAL) < _LOG_INTERVAL:
            return
        if len(self._logged) >= _MAX_FUNCTIONS:
            self._logged.clear()
        self._logged[function] = now
        facts = _facts(frames)
        if culprit is not frames[0]:
            facts["inside"] = _location(frames[0])
        with contextlib.suppress(Exception):  # a failure to log must not stop the watchdog
            get_logger().warning(
                "event_loop_blocked",
                at=_location(culprit),
                **facts,
                limit=LIMIT,
                advice="all requests wait meanwhile; use await, or asyncio.to_thread",
            )


def _is_idle(ident: int) -> bool:
    """Whether the loop of a thread waits for events."""
    frame = sys._current_frames().get(ident)
    return frame is None or frame.f_code.co_filename in _IDLE


def _frames(ident: int) -> Iterator[FrameType]:
    """Yield the frames of a thread, the innermost first."""
    frame = sys._current_frames().get(ident)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_library(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith((*_LIBRARIES, "<frozen "))


def _is_gateway(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_GATEWAY)


def _function(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename} {frame.f_code.co_qualname}"


def _location(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"


def _facts(frames: list[FrameType]) -> dict[str, Any]:
    """Return the stage that runs in these frames, and its request, as far as they show."""
    facts: dict[str, Any] = {}
    for frame in frames:
        if frame.f_code is _STAGE_CODE:  # the innermost stage: outer ones wait for it
            request = frame.f_locals["request"]
            return {"stage": frame.f_locals["name"], "team": request.team, "request_id": request.id}
        if not facts and (found := _request(frame)) is not None:
            facts.update(team=found.team, request_id=found.id)
    # Outside a stage's call, such as in a filter or a deferred callback: the module is the stage's.
    names = (str(each.f_globals.get("__name__", "")) for each in frames)
    name = next((name for name in names if name.startswith(("plugins.", "gateway_plugins_path."))), None)
    return facts if name is None else {"stage": name.rpartition(".")[2], **facts}


def _request(frame: FrameType) -> Request | None:
    """Return the request that a frame handles, if it runs a stage or writes a response."""
    names = frame.f_code.co_varnames
    if "request" in names and isinstance(request := frame.f_locals.get("request"), Request):
        return request
    if frame.f_code.co_filename.startswith(_GATEWAY) and "self" in names:
        connection = getattr(frame.f_locals.get("self"), "connection", None)
        if isinstance(connection, ClientConnection) and connection.task is not None:
            return _awaited(connection.task.get_coro())
    return None


def _awaited(coroutine: Any) -> Request | None:
    """Return the request in the locals of a coroutine, or of one that it awaits."""
    while isinstance(coroutine, CoroutineType):
        frame = coroutine.cr_frame
        request = frame.f_locals.get("request") if frame is not None else None
        if isinstance(request, Request):
            return request
        coroutine = coroutine.cr_await
    return None
