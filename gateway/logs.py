"""Log events: structlog, one JSON line each, or colored text on a terminal; `log_events.py` lists their names.

Events are written in batches (see `_BatchWriter`): one write for each would cost more than all stages of a request.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO, cast

import msgspec
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

__all__ = ("configure", "exception_fields", "get_logger", "redacted")


def get_logger() -> FilteringBoundLogger:
    """Return the gateway's logger."""
    return cast(FilteringBoundLogger, structlog.get_logger("gateway"))


def configure(level: str = "info", form: str = "auto", stream: TextIO | None = None) -> None:
    """Set up logging for the process: `form` is `json`, `text`, or `auto` (text on a terminal)."""
    stream = stream or sys.stderr
    text = form == "text" or (form == "auto" and stream.isatty())
    processors: list[structlog.typing.Processor] = [_add_level_and_time]
    if text:
        processors += [_printable, structlog.dev.ConsoleRenderer(colors=stream.isatty())]
    else:
        processors.append(_to_json)
    structlog.configure(
        processors=processors,
        wrapper_class=_with_fast_info(structlog.make_filtering_bound_logger(getattr(logging, level.upper()))),
        logger_factory=_BatchWriter(stream),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=logging.WARNING, stream=stream, format="%(levelname)s %(name)s: %(message)s")
    # asyncio warns about slow callbacks and broken sockets with reprs that may contain request data.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _with_fast_info(filtering: type[Any]) -> type[Any]:
    """Return a bound logger whose `info` only queues the event, because an access log uses it for each request."""
    if not filtering(None, [], {}).is_enabled_for(logging.INFO):
        return filtering

    class FastInfoLogger(filtering):  # type: ignore[misc] # structlog makes the class
        """structlog's filtering logger; events of `info` are encoded as JSON in batches."""

        def info(self, event: str, *args: Any, **facts: Any) -> Any:
            if not args and self._processors[-1] is _to_json:
                self._logger.queue({**self._context, **facts, "event": event})
                return None
            return super().info(event, *args, **facts)

    return FastInfoLogger


class _BatchWriter:
    """Writes lines to a stream. A line that cannot be written is lost: requests matter more than their log.

    The first event after a pause is written immediately. Events of `debug` and `info` in the next 50 ms are queued,
    then encoded and written together, which takes a third of the time; 256 of them are written earlier. Warnings and
    errors are written immediately, after all queued events. When the process ends, the queue is flushed.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._buffer = getattr(stream, "buffer", None)
        self._queue: list[EventDict | bytes] = []
        self._timer: asyncio.TimerHandle | None = None
        atexit.register(self.flush)

    def __call__(self, *_: object) -> WrappedLogger:
        return self

    def queue(self, event: EventDict) -> None:
        """Queue an event of `info` with the current time."""
        event["level"] = "info"
        event["timestamp"] = time.time()
        self._add(event)

    def info(self, line: bytes | str) -> None:
        self._add(line.encode("utf-8", "backslashreplace") if isinstance(line, str) else line)

    def error(self, line: bytes | str) -> None:
        self.info(line)
        self.flush()

    debug = msg = info
    warning = critical = error

    def _add(self, event: EventDict | bytes) -> None:
        self._queue.append(event)
        if self._timer is None:
            self.flush()
            with contextlib.suppress(RuntimeError):  # no event loop: nothing is queued
                self._timer = asyncio.get_running_loop().call_later(_BATCH_SECONDS, self._on_timer)
        elif len(self._queue) >= _MAX_BATCH:
            self.flush()

    def _on_timer(self) -> None:
        self._timer = None
        self.flush()

    def flush(self) -> None:
        """Write all queued events."""
        if not self._queue:
            return
        events, self._queue = self._queue, []
        text = b"\n".join(_lines(events)) + b"\n"
        try:
            if self._buffer is not None:
                self._buffer.write(text)
                self._buffer.flush()
            else:
                self._stream.write(text.decode())
                self._stream.flush()
        except (OSError, ValueError):
            return


# The maximum delay of a queued event, in seconds, and the maximum number of queued events.
_BATCH_SECONDS = 0.05
_MAX_BATCH = 256


def _lines(events: Sequence[EventDict | bytes]) -> Iterator[bytes]:
    for event in events:
        if isinstance(event, bytes):
            yield event
        else:
            event["timestamp"] = _timestamp(event["timestamp"])
            yield _json(event)


_second = (0, "")


def _timestamp(now: float) -> str:
    """Return a time in UTC, to the microsecond."""
    global _second  # noqa: PLW0603 -- a cache of the process, renewed once a second
    whole = int(now)
    if whole != _second[0]:
        _second = whole, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))
    return f"{_second[1]}.{int((now - whole) * 1_000_000):06d}Z"


def _add_level_and_time(_: WrappedLogger, level: str, event: EventDict) -> EventDict:
    """Add the level and the time."""
    event["level"] = level
    event["timestamp"] = _timestamp(time.time())
    return event


_encode = msgspec.json.Encoder(enc_hook=repr).encode


def _json(event: EventDict) -> bytes:
    try:
        return _encode(event)
    except (ValueError, TypeError, RecursionError):
        # A lone surrogate, or a key that is not text: `json` with `repr` encodes everything.
        return json.dumps({str(key): value for key, value in event.items()}, default=repr).encode()


def _to_json(_: WrappedLogger, __: str, event: EventDict) -> bytes:
    return _json(event)


def _printable(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Escape control characters in a client's text, which could control a terminal."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = ascii(value)
    return event


def redacted(facts: Mapping[str, Any], secrets: Sequence[str]) -> dict[str, Any]:
    """Return `facts` with every occurrence of a secret in their text replaced by `***`."""

    def mask(value: Any) -> Any:
        if isinstance(value, str):
            for secret in secrets:
                value = value.replace(secret, "***")
            return value
        if isinstance(value, list):
            return [mask(item) for item in value]
        return value

    return {key: mask(value) for key, value in facts.items()}


def exception_fields(exc: BaseException) -> dict[str, object]:
    """Describe an exception for the log, without the values of variables, which could contain a key."""
    frames: list[str] = []
    traceback = exc.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        frames.append(f"{code.co_filename}:{traceback.tb_lineno} {code.co_name}")
        traceback = traceback.tb_next
    return {"error": type(exc).__name__, "message": str(exc), "frames": frames[-8:]}
