"""Log events: structlog, one JSON line each, or colored text on a terminal; `EVENTS` lists their names.

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

__all__ = ("EVENTS", "configure", "exception_fields", "get_logger", "redacted")

EVENTS: dict[str, str] = {
    "connection_failed": "A bug ended a client's connection; report it with `error` and `frames`.",
    "counters": "At the stop: totals of the counters of stages, such as repairs.",
    "deferred_callback_failed": "A stage failed at the end of an exchange; fix the stage.",
    "deployment_recovered": "A deployment whose circuit was open responds again; nothing to do.",
    "deployment_unavailable": (
        "A deployment of a pool gets no requests for `seconds`, because of a 429 or failures; if it repeats, "
        "raise the quota or check the deployment."
    ),
    "draining": "The gateway waits for running exchanges, at most `grace` seconds.",
    "entra_token_fetch_failed": (
        "No Entra token for Azure could be fetched; the current one is used for `kept_for` more seconds, and "
        "the gateway retries. Check the identity and the reason."
    ),
    "event_loop_blocked": "Code without `await` blocked all requests for over `limit` seconds; fix the code at `at`.",
    "exchange": (
        "One exchange is over: caller, operation, target, outcome, duration and tokens (stage access_log). "
        "Nothing to do."
    ),
    "exchanges_cancelled": (
        "The grace period ended with exchanges still running; their clients got an error `shutting_down` (a "
        "WebSocket: close code 1001). Raise `timeouts.grace` if it happens often."
    ),
    "file_descriptor_limit_unchanged": "The system did not allow the process to raise its descriptor limit.",
    "file_descriptors_exhausted": (
        "No file descriptor is left; requests get 503 `overloaded`. Logged at most every 10 s. Raise the "
        "limit, or lower `limits.connections`."
    ),
    "file_descriptors_low": (
        "The process has too few file descriptors for `limits.connections`; `enough_for` clients fit. Raise "
        "the limit, or lower `limits.connections`."
    ),
    "file_watch_failed": (
        "The configuration's files cannot be checked for changes (no descriptor or thread left); they are "
        "checked again."
    ),
    "filter_failed": (
        "A filter raised an exception on a whole response (500 for the client) or on a WebSocket message "
        "(closed with 1011). Fix the stage."
    ),
    "first_byte_deadline_exceeded": "`timeouts.first_byte` passed while `stage` was running; the client got a 504.",
    "go_proxy_configuration": (
        "The configuration file is azure-openai-proxy's; convert it as `advice` says, and check `differences`."
    ),
    "health_sharing_failed": (
        "The Redis of `store` is unavailable, so each gateway uses only what it sees itself; check Redis."
    ),
    "health_sharing_restored": "Health of deployments is shared through Redis again; nothing to do.",
    "issuer_keys_fetch_failed": (
        "The signing keys of a token issuer could not be fetched; the cached ones are used for `kept_for` "
        "more seconds. Check the issuer's URL and the network."
    ),
    "issuer_without_usable_keys": (
        "The issuer publishes no key with which tokens can be verified; its tokens are rejected. Check the issuer."
    ),
    "limit_store_available": "The Redis of `store:` responds again, after this many seconds. Nothing to do.",
    "limit_store_key_conflict": (
        "A key of the counters holds another kind of value. Give the gateways a `prefix` of their own in `store:`."
    ),
    "limit_store_settlements_lost": (
        "The gateway stopped before it could settle these charges; they count until their period ends. Nothing to do."
    ),
    "limit_store_unavailable": (
        "The Redis of `store:` does not respond; `on_error` of `rate_limit` decides about requests meanwhile. "
        "Check Redis; the gateway retries once per second."
    ),
    "limit_table_full": (
        "The table of the workers' counters is full, and some limits start from zero. Limit fewer distinct "
        "names (`per: model`, `per: client`), or use `store:`."
    ),
    "listening": "The gateway listens on `address`; nothing to do.",
    "pool_failed": (
        "No deployment of the pool could serve a request, and its client got an error; `attempts` has each "
        "attempt, `stopped` why there were no more, `resting` the unavailable deployments."
    ),
    "probe_failed": "A bug in an active probe (`health: probe`); report it.",
    "rate_limiting_unavailable": (
        "At the start of a stage the store of counters is unavailable; `consequence` says how requests are "
        "handled. Check `store:`."
    ),
    "reload_crashed": "A bug, or no thread is left; requests and later reloads go on. Report it.",
    "reload_failed": "The current configuration stays; correct each of `mistakes`.",
    "reload_loop_ended": (
        "A bug ended the reload loop; requests go on, and only a restart applies changes. Report it."
    ),
    "reload_socket_available": "`gateway reload` can reach this gateway again; nothing to do.",
    "reload_socket_unavailable": (
        "`gateway reload` cannot reach this gateway; send SIGHUP, and end the process that `reason` names."
    ),
    "reload_unchanged": "A reload was asked for and the files have not changed; nothing to do.",
    "reloaded": "The new configuration serves; `changes` lists the differences.",
    "request_rejected": (
        "A request was rejected before its team's pipeline ran: invalid head, unknown path, body or "
        "connection limit. Look at `error` and `reason`; bytes of the request are never logged."
    ),
    "restart_ignored": "SIGUSR2 has no effect on a single process; a rolling restart needs `--workers 2` or more.",
    "restart_needed": "A reload changed a setting that needs a restart of the gateway.",
    "rolling_restart": "A rolling restart begins; nothing to do.",
    "rolling_restart_failed": (
        "The new workers could not serve and the old ones stay; correct `reason` and send SIGUSR2 again."
    ),
    "stage_failed": "A stage raised an exception and the client got a 500; fix the stage.",
    "stage_stop_failed": "A stage failed or took too long to stop; its resources may not be released.",
    "stopped": "The gateway has stopped.",
    "stopping": "The gateway got SIGTERM or SIGINT and begins to drain; a second signal stops it immediately.",
    "stream_failed": (
        "A filter or a stage's stream raised an exception while a response was streaming; the client got an "
        "`error` event. Fix the stage."
    ),
    "systemd_notify_failed": "A notification to systemd (NOTIFY_SOCKET) failed.",
    "worker_died": (
        "A worker ended unexpectedly; another starts after `restart_in` seconds. Look at `exit` and at the "
        "lines before it."
    ),
    "worker_ready": "A worker serves; nothing to do.",
    "worker_reload_late": (
        "A worker does not confirm a prepared reload in time; it does when it can. If it stays, look for code "
        "that blocks it."
    ),
    "workers_differ": (
        "Workers have read different files because one was replaced after a change; all are reloaded, nothing to do."
    ),
    "workers_ready": "All workers serve; nothing to do.",
}
"""The name of each log event, and its meaning for an operator."""


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
