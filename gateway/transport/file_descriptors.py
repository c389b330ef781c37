"""File descriptors: how many this process may have, and what clients are told when none is left.

Each connection of a client is a descriptor, and so is each connection to Azure. A process that has none left can open
no file and no connection: that is the gateway's own fault, so clients get 503 `overloaded`, and no deployment counts
as failing.
"""

from __future__ import annotations

import errno
import os
import resource
import time

from gateway.errors import ApiError
from gateway.logs import get_logger

__all__ = ("clients_allowed", "limit", "none_left", "overloaded", "raise_limit")

# Kept free for the log, the loop, the configuration's files and connections to other services than Azure.
_RESERVED = 32
# A client may need a second one, for its connection to Azure.
_PER_CLIENT = 2
# How often, in seconds, it is logged that none is left.
_LOG_EVERY = 10.0
_ERRNOS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS))

_logged_at = -_LOG_EVERY


def raise_limit() -> None:
    """Raise this process's limit to the most that it may have; the usual 1,024 is for programs with select(2)."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError):  # some systems allow less than they say
        get_logger().debug("the limit of descriptors stays as it is", limit=limit())


def limit() -> int:
    """Return how many descriptors this process may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def clients_allowed(descriptors: int) -> int:
    """Return how many clients these descriptors are enough for."""
    return max(1, (descriptors - _RESERVED) // _PER_CLIENT)


def none_left(exc: BaseException | None) -> bool:
    """Whether an exception, or one that led to it, came of a lack of descriptors."""
    seen: set[int] = set()
    asked = False
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        if isinstance(exc, OSError):
            if exc.errno in _ERRNOS:
                return True
            asked = True
        exc = exc.__cause__ or exc.__context__
    # A look-up or a TLS library that could open nothing says only that it failed.
    return asked and not _can_open()


def _can_open() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as exc:
        return exc.errno not in _ERRNOS
    return True


def overloaded() -> ApiError:
    """Return what a client is told when no descriptor is left; the log says it once in a while."""
    global _logged_at  # noqa: PLW0603 -- one for the process
    now = time.monotonic()
    if now - _logged_at >= _LOG_EVERY:
        _logged_at = now
        get_logger().error(
            "no file descriptor is left",
            limit=limit(),
            advice="raise the limit (ulimit -n, LimitNOFILE=), or lower limits.connections",
        )
    return ApiError(503, "the gateway has no file descriptor left; try again in a moment", code="overloaded")
