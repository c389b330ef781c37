"""The status line and `date` of a response, and the whole response of an error that closes its connection."""

from __future__ import annotations

import time
from email.utils import formatdate
from http import HTTPStatus

from gateway.errors import ApiError

__all__ = ("closing_response", "date_line", "status_line")

_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}".encode() for status in HTTPStatus}
_date_line = (0, b"")


def closing_response(error: ApiError) -> bytes:
    """Return the bytes of an error response with `connection: close`."""
    body = error.body()
    fields = "".join([f"{name}: {value}\r\n" for name, value in error.headers.items()])
    return b"%b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%b%b\r\nconnection: close\r\n\r\n%b" % (
        status_line(error.status),
        len(body),
        fields.encode(),
        date_line(),
        body,
    )


def status_line(status: int) -> bytes:
    """Return the status line, without its line end."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d " % status


def date_line() -> bytes:
    """Return the `date` header, without its line end."""
    global _date_line  # noqa: PLW0603 -- one value for the process, updated once a second
    now = int(time.time())
    if _date_line[0] != now:
        _date_line = (now, b"date: " + formatdate(now, usegmt=True).encode())
    return _date_line[1]
