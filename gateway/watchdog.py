"""The watchdog: a thread that names code which blocks the event loop.

The loop serves every request in turn. A stage that calls `time.sleep`, `requests.get` or a slow regular expression
keeps all of them waiting, and nothing else in the log would name it. The watchdog looks at the loop's thread eight
times a second while exchanges run, and once a second otherwise. If the thread is not idle, the watchdog asks the loop
for a sign of life; if none comes within `LIMIT` seconds, it logs where the thread is.
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
"""How long, in seconds, the event loop may be blocked. What blocks for `LIMIT` + 0.125 s is always seen."""
# How often, in seconds, the loop's thread is looked at: while exchanges run, and while none does.
_EVERY, _EVERY_IDLE = 0.125, 1.0
# Looks without an exchange until the watchdog slows down.
_QUIET_LOOKS = 10
# How long, in seconds, one function is not logged again, and how many functions are remembered.
_AGAIN, _MOST_PLACES = 10.0, 256

_PATHS = sysconfig.get_paths()
_LIBRARIES = tuple(
    {f"{Path(_PATHS[name]).resolve()}/" for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {f"{_PATHS[name]}/" for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
_GATEWAY = f"{Path(__file__).resolve().parent}/"
# The innermost Python frame of a loop that waits for events: asyncio's own is in its selector, uvloop's in the runner.
_IDLE = (selectors.__file__, asyncio.runners.__file__, asyncio.base_events.__file__)
# The frame that runs one stage: its locals name the stage and the request.
_LINKED = next(
    each for each in stage._link.__code__.co_consts if isinstance(each, CodeType) and each.co_name == "linked"
)


class Watchdog:
    """Watches the loop that `start` is called on. `running` are the exchanges that run: empty means little to watch."""

    def __init__(self, running: Collection[object]) -> None:
        self.asleep = False
        """Whether it looks once a second only; the server calls `wake` then when an exchange begins."""
        self._running = running
        self._wake = threading.Event()
        self._alive = False  # the sign of life has come
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._told: dict[str, float] = {}  # functions, and when they were logged

    def start(self) -> None:
        """Begin to watch the running loop, which runs in this thread."""
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
        """Watch no more."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(1.0)
            self._thread = None

    def wake(self) -> None:
        """Look often again."""
        self.asleep = False
        self._wake.set()

    def _watch(self, loop: asyncio.AbstractEventLoop, ident: int, used: Callable[[], float]) -> None:
        quiet = 0
        asked: float | None = None  # when the loop was asked for the sign of life that has not come
        now, used_now = time.monotonic(), used()
        while not self._stopping:
            pause = _EVERY_IDLE if self.asleep else _EVERY
            if self.asleep:
                self._wake.wait(pause)
            else:
                time.sleep(pause)  # (costs half of what waiting for an event does)
            slept_at, now = now, time.monotonic()
            used_before, used_now = used_now, used()
            quiet = 0 if self._running else quiet + 1
            self.asleep = quiet >= _QUIET_LOOKS
            self._wake.clear()
            if self.asleep and self._running:  # an exchange began just now, and may not have seen it
                self.asleep = False
            if asked is not None and not self._alive:
                if now - asked >= LIMIT:
                    self._tell(ident)
                    asked = math.inf  # once for each time
                continue
            asked = None
            if _is_idle(ident):
                continue
            if now - slept_at - pause > LIMIT and used_now - used_before > LIMIT:
                # A function in C kept the interpreter's lock, so this thread could not run either.
                self._tell(ident)
                continue
            asked, self._alive = now, False
            try:
                loop.call_soon_threadsafe(self._live)
            except RuntimeError:  # the loop is closed
                return

    def _live(self) -> None:
        self._alive = True

    def _tell(self, ident: int) -> None:
        """Log where a thread is, unless that was done a moment ago."""
        frames = list(_frames(ident))
        if not frames:
            return
        # Code of a plugin's author, else the gateway's own, else what is innermost.
        culprit = (
            next((each for each in frames if not _is_library(each) and not _is_gateway(each)), None)
            or next((each for each in frames if not _is_library(each)), None)
            or frames[0]
        )
        place, now = _function(culprit), time.monotonic()
        if now - self._told.get(place, -_AGAIN) < _AGAIN:
            return
        if len(self._told) >= _MOST_PLACES:
            self._told.clear()
        self._told[place] = now
        facts = _facts(frames)
        if culprit is not frames[0]:
            facts["inside"] = _place(frames[0])
        with contextlib.suppress(Exception):  # a log that fails must not end the watch
            get_logger().warning(
                "the event loop is blocked",
                at=_place(culprit),
                **facts,
                limit=LIMIT,
                advice="all requests wait meanwhile: await something, or use asyncio.to_thread",
            )


def _is_idle(ident: int) -> bool:
    """Whether a thread's loop waits for events."""
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


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"


def _facts(frames: list[FrameType]) -> dict[str, Any]:
    """Return the stage that runs in some frames, and its request, as far as they tell."""
    facts: dict[str, Any] = {}
    for frame in frames:
        if frame.f_code is _LINKED:  # the innermost one: those further out wait for it
            request = frame.f_locals["request"]
            return {"stage": frame.f_locals["name"], "team": request.team, "request_id": request.id}
        if not facts and (found := _request(frame)) is not None:
            facts.update(team=found.team, request_id=found.id)
    # In a filter or a deferred callback, for instance: its file is the stage's.
    names = (str(each.f_globals.get("__name__", "")) for each in frames)
    name = next((name for name in names if name.startswith(("plugins.", "gateway_plugins_path."))), None)
    return facts if name is None else {"stage": name.rpartition(".")[2], **facts}


def _request(frame: FrameType) -> Request | None:
    """Return the request that a frame is about, if it is a stage's or writes an answer."""
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
