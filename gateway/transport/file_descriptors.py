"""File descriptors: how many this process may open, and the 503 when none is left.

Each client connection is a descriptor, and so is each connection to Azure. A process without a free descriptor can open
no file and no connection. That is the gateway's own fault: clients get 503 `overloaded`, and no deployment counts as
failing.
"""

from __future__ import annotations

import errno
import os
import resource
import time

from gateway.errors import ApiError
from gateway.logs import get_logger

__all__ = (
    "caused_by_exhaustion",
    "client_capacity",
    "descriptor_limit",
    "descriptors_exhausted",
    "raise_descriptor_limit",
    "warn_if_low",
)

# Reserved for the log, the event loop, configuration files and connections to other services than Azure.
_RESERVED = 32
# A client may need a second one, for its connection to Azure.
_PER_CLIENT = 2
# Interval of the log event, in seconds.
_LOG_INTERVAL = 10.0
_ERRNOS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS))
_ADVICE = "raise the limit (ulimit -n, LimitNOFILE=), or lower limits.connections"

_logged_at = -_LOG_INTERVAL


def raise_descriptor_limit() -> None:
    """Raise this process's soft limit to its hard limit; the usual 1,024 is for programs that use select(2)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # some systems allow less than they report
        get_logger().debug("file_descriptor_limit_unchanged", limit=descriptor_limit())


def descriptor_limit() -> int:
    """Return how many descriptors this process may open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def client_capacity(descriptors: int) -> int:
    """Return how many clients a number of descriptors suffices for."""
    return max(1, (descriptors - _RESERVED) // _PER_CLIENT)


def warn_if_low(connections: int) -> None:
    """Log a warning if this process may have too few descriptors for `limits.connections`."""
    capacity = client_capacity(descriptor_limit())
    if capacity < connections:
        get_logger().warning(
            "file_descriptors_low",
            connections=connections,
            descriptors=descriptor_limit(),
            enough_for=capacity,
            advice=_ADVICE,
        )


def caused_by_exhaustion(exc: BaseException | None) -> bool:
    """Whether a lack of descriptors caused an exception, directly or through a chain of exceptions."""
    seen: set[int] = set()
    system_error = False
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        if isinstance(exc, OSError):
            if exc.errno in _ERRNOS:
                return True
            system_error = True
        exc = exc.__cause__ or exc.__context__
    # A DNS lookup or a TLS library that could open no file reports only that it failed.
    return system_error and not _can_open()


def _can_open() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as exc:
        return exc.errno not in _ERRNOS
    return True


def descriptors_exhausted() -> ApiError:
    """Return the 503 for a client when no descriptor is left, and log it at most every 10 seconds."""
    global _logged_at  # noqa: PLW0603 -- one for the process
    now = time.monotonic()
    if now - _logged_at >= _LOG_INTERVAL:
        _logged_at = now
        get_logger().error("file_descriptors_exhausted", limit=descriptor_limit(), advice=_ADVICE)
    return ApiError(503, "the gateway has no file descriptor left; retry shortly", code="overloaded")
