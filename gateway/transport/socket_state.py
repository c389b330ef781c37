"""The state of a TCP socket as Linux reports it: unacknowledged bytes, and whether the peer has closed."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import sys
import termios

__all__ = ("peer_closed", "unsent_socket_bytes")

# States of a TCP connection that the peer has not closed (linux/tcp_states.h).
_ESTABLISHED, _SYN_RECEIVED = 1, 3


def unsent_socket_bytes(sock: socket.socket | None) -> int:
    """Return the number of bytes in a socket's send buffer, or 0 if the system does not report it."""
    if sock is not None:
        with contextlib.suppress(OSError, ValueError):
            return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    return 0


def peer_closed(sock: socket.socket | None) -> bool:
    """Whether the peer has closed a TCP connection, even if bytes are unread; always False except on Linux."""
    tcp_info = getattr(socket, "TCP_INFO", None)
    if sock is None or tcp_info is None or sock.family == socket.AF_UNIX:
        return False
    try:
        state = sock.getsockopt(socket.IPPROTO_TCP, tcp_info, 1)[0]
    except OSError:
        return True
    return state not in (_ESTABLISHED, _SYN_RECEIVED)
