"""Log events: structlog, one JSON line each, or coloured text on a terminal.

aiohttp's own loggers print malformed header lines whole, keys and all, so nothing of theirs is shown but
the kind of the error.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO, cast

import msgspec
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

__all__ = ("configure", "get_logger", "masked", "quiet_logger")


def get_logger() -> FilteringBoundLogger:
    """Return the gateway's logger."""
    return cast(FilteringBoundLogger, structlog.get_logger("gateway"))


def configure(level: str = "info", form: str = "auto", stream: TextIO | None = None) -> None:
    """Set up logging for the process: `form` is `json`, `text`, or `auto` (text on a terminal)."""
    stream = stream or sys.stderr
    text = form == "text" or (form == "auto" and stream.isatty())
    processors: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if text:
        processors += [_printable, structlog.dev.ConsoleRenderer(colors=stream.isatty())]
    else:
        processors.append(structlog.processors.JSONRenderer(serializer=_to_json))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=_Sink(stream),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=logging.WARNING, stream=stream, format="%(levelname)s %(name)s: %(message)s")
    # asyncio warns of slow callbacks and broken sockets with reprs that may hold request data.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


class _Sink:
    """Writes lines to a stream. A line that cannot be written is lost: requests matter more than their log."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._buffer = getattr(stream, "buffer", None)

    def __call__(self, *_: object) -> WrappedLogger:
        return self

    def _write(self, line: bytes | str) -> None:
        if isinstance(line, str):
            line = line.encode("utf-8", "backslashreplace")
        try:
            if self._buffer is not None:
                self._buffer.write(line + b"\n")
                self._buffer.flush()
            else:
                self._stream.write(line.decode() + "\n")
                self._stream.flush()
        except (OSError, ValueError):
            return

    debug = info = warning = error = critical = msg = _write


def _to_json(event: EventDict, **_: object) -> bytes:
    try:
        return msgspec.json.encode(event, enc_hook=repr)
    except (ValueError, TypeError, RecursionError):
        # A lone surrogate, a key that is no text: the slow way takes everything.
        return json.dumps({str(key): value for key, value in event.items()}, default=repr).encode()


def _printable(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Keep control characters of a client's text from steering a terminal."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = ascii(value)
    return event


def quiet_logger() -> logging.Logger:
    """Return a standard logger for aiohttp's server that says nothing: its messages may hold header lines."""
    logger = logging.getLogger("gateway.aiohttp")
    logger.disabled = True
    return logger


def masked(facts: Mapping[str, Any], secrets: Sequence[str]) -> dict[str, Any]:
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
