"""Log events: structlog, one JSON line each, or coloured text on a terminal.

Events leave together (see `_Sink`): a write for each costs more than a request's whole way through the stages.
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
    processors: list[structlog.typing.Processor] = [_stamp]
    if text:
        processors += [_printable, structlog.dev.ConsoleRenderer(colors=stream.isatty())]
    else:
        processors.append(_to_json)
    structlog.configure(
        processors=processors,
        wrapper_class=_lean(structlog.make_filtering_bound_logger(getattr(logging, level.upper()))),
        logger_factory=_Sink(stream),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=logging.WARNING, stream=stream, format="%(levelname)s %(name)s: %(message)s")
    # asyncio warns of slow callbacks and broken sockets with reprs that may hold request data.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _lean(filtering: type[Any]) -> type[Any]:
    """Return a bound logger whose `info` only keeps the event: an access log writes a lot of it."""
    if not filtering(None, [], {}).is_enabled_for(logging.INFO):
        return filtering

    class Lean(filtering):  # type: ignore[misc] # structlog makes the class
        """structlog's filtering logger, but that events of `info` are written as JSON many at a time."""

        def info(self, event: str, *args: Any, **facts: Any) -> Any:
            if not args and self._processors[-1] is _to_json:
                self._logger.keep({**self._context, **facts, "event": event})
                return None
            return super().info(event, *args, **facts)

    return Lean


class _Sink:
    """Writes lines to a stream. A line that cannot be written is lost: requests matter more than their log.

    The first event of a quiet time leaves at once. Those of `debug` and `info` that come within 50 ms of it
    leave together then, or when they are many, and become JSON no sooner: many at once take a third of the
    time. Warnings and errors leave at once, with all before them, and so does everything when the process ends.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._buffer = getattr(stream, "buffer", None)
        self._waiting: list[EventDict | bytes] = []
        self._timer: asyncio.TimerHandle | None = None
        atexit.register(self.flush)

    def __call__(self, *_: object) -> WrappedLogger:
        return self

    def keep(self, event: EventDict) -> None:
        """Take an event of `info` whose time is now."""
        event["level"] = "info"
        event["timestamp"] = time.time()
        self._wait(event)

    def info(self, line: bytes | str) -> None:
        self._wait(line.encode("utf-8", "backslashreplace") if isinstance(line, str) else line)

    def error(self, line: bytes | str) -> None:
        self.info(line)
        self.flush()

    debug = msg = info
    warning = critical = error

    def _wait(self, event: EventDict | bytes) -> None:
        self._waiting.append(event)
        if self._timer is None:
            self.flush()
            with contextlib.suppress(RuntimeError):  # no loop runs: nothing waits
                self._timer = asyncio.get_running_loop().call_later(_TOGETHER, self._end_waiting)
        elif len(self._waiting) >= _MOST_TOGETHER:
            self.flush()

    def _end_waiting(self) -> None:
        self._timer = None
        self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        text = b"\n".join(_lines(waiting)) + b"\n"
        try:
            if self._buffer is not None:
                self._buffer.write(text)
                self._buffer.flush()
            else:
                self._stream.write(text.decode())
                self._stream.flush()
        except (OSError, ValueError):
            return


# How long, in seconds, events may wait for each other, and how many of them.
_TOGETHER = 0.05
_MOST_TOGETHER = 256


def _lines(waiting: Sequence[EventDict | bytes]) -> Iterator[bytes]:
    for event in waiting:
        if isinstance(event, bytes):
            yield event
        else:
            event["timestamp"] = _text(event["timestamp"])
            yield _json(event)


_second = (0, "")


def _text(now: float) -> str:
    """Return a time in UTC, to the microsecond."""
    global _second  # noqa: PLW0603 -- one value for the process, made once a second
    whole = int(now)
    if whole != _second[0]:
        _second = whole, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))
    return f"{_second[1]}.{int((now - whole) * 1_000_000):06d}Z"


def _stamp(_: WrappedLogger, level: str, event: EventDict) -> EventDict:
    """Add the level and the time."""
    event["level"] = level
    event["timestamp"] = _text(time.time())
    return event


_encode = msgspec.json.Encoder(enc_hook=repr).encode


def _json(event: EventDict) -> bytes:
    try:
        return _encode(event)
    except (ValueError, TypeError, RecursionError):
        # A lone surrogate, a key that is no text: the slow way takes everything.
        return json.dumps({str(key): value for key, value in event.items()}, default=repr).encode()


def _to_json(_: WrappedLogger, __: str, event: EventDict) -> bytes:
    return _json(event)


def _printable(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Keep control characters of a client's text from steering a terminal."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = ascii(value)
    return event


def redacted(facts: Mapping[str, Any], secrets: Sequence[str]) -> dict[str, Any]:
    """Return `facts` with every occurrence of a secret in its text replaced by `***`."""

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
    """Describe an exception for the log, without values of variables that could hold a key."""
    frames: list[str] = []
    traceback = exc.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        frames.append(f"{code.co_filename}:{traceback.tb_lineno} {code.co_name}")
        traceback = traceback.tb_next
    return {"error": type(exc).__name__, "message": str(exc), "frames": frames[-8:]}
