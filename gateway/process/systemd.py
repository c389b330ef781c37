"""systemd: readiness notification (sd_notify) and socket activation (sd_listen_fds), without its library.

Both remove their variables from the environment, so that child processes do not use them.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping

from gateway.errors import StartError
from gateway.logs import get_logger

__all__ = ("Notifier", "listen_fds")

_LISTEN_FDS_START = 3  # SD_LISTEN_FDS_START


class Notifier:
    """Reports the service's state to the service manager; does nothing without one."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        self._address = environment.pop("NOTIFY_SOCKET", "")

    def ready(self) -> None:
        """Report that the service serves, at first or after a reload."""
        self._send("READY=1")

    def reloading(self) -> None:
        """Report that a reload or a rolling restart begins; `ready` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """Report that the drain begins."""
        self._send("STOPPING=1")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        # A leading @ is the zero byte of an abstract name.
        name = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(1)
                sock.sendto(state.encode(), name)
        except OSError as exc:
            get_logger().warning("systemd_notify_failed", state=state, error=str(exc))


def listen_fds(environment: MutableMapping[str, str]) -> list[int]:
    """Return the descriptor of the socket from socket activation, or an empty list without one.

    Raises StartError if there are several.
    """
    pid, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or count in ("", "0"):
        return []  # none, or meant for a parent of this process
    if count != "1":
        raise StartError(
            f"LISTEN_FDS={count}: the gateway takes one socket; leave one ListenStream= in its .socket unit"
        )
    return [_LISTEN_FDS_START]
