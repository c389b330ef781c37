"""A strict HTTP client parser for the gateway's responses, independent of the parsers in `gateway/protocol/`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ("BadResponse", "Response", "read_responses")

_HEAD = re.compile(rb"HTTP/1\.1 ([1-5][0-9]{2}) [\t -~\x80-\xff]*")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?([\t -~\x80-\xff]*)")


class BadResponse(Exception):
    """The gateway wrote invalid HTTP."""


@dataclass
class Response:
    """One final response."""

    status: int
    fields: dict[bytes, bytes]
    body: bytes
    whole: bool

    @property
    def closes(self) -> bool:
        """Whether the response has `Connection: close`."""
        return self.fields.get(b"connection", b"").lower() == b"close"


def read_responses(data: bytes, methods: Sequence[str], *, ended: bool) -> list[Response]:
    """Return the responses in `data` to requests with these methods; `ended` means that the connection ended cleanly.

    Raises BadResponse.
    """
    responses: list[Response] = []
    while data:
        head, end, rest = data.partition(b"\r\n\r\n")
        if not end:
            if not data.startswith(b"HTTP/1.1 "[: len(data)]):
                raise BadResponse(f"bytes after a response: {data[:80]!r}")
            break
        first, *lines = head.split(b"\r\n")
        found = _HEAD.fullmatch(first)
        if found is None:
            raise BadResponse(f"a status line: {first[:80]!r}")
        status = int(found.group(1))
        fields: dict[bytes, bytes] = {}
        for line in lines:
            named = _FIELD.fullmatch(line)
            if named is None:
                raise BadResponse(f"a line of a head: {line[:80]!r}")
            name = named.group(1).lower()
            if name in fields and name in (b"content-length", b"transfer-encoding", b"connection", b"x-request-id"):
                raise BadResponse(f"a field twice: {name!r}")
            fields[name] = named.group(2).strip()
        framed = [name for name in (b"content-length", b"transfer-encoding") if name in fields]
        if len(framed) == 2 or (framed and (status < 200 or status == 204)):
            raise BadResponse(f"a {status} with {framed}")
        data = rest
        if status < 200 and status != 101:
            continue
        response = Response(status, fields, b"", whole=True)
        responses.append(response)
        method = methods[len(responses) - 1] if len(responses) <= len(methods) else "GET"
        if status == 101:
            break
        if status in (204, 304) or (method == "HEAD" and not (response.closes and data)):
            continue
        if b"transfer-encoding" in fields:
            response.body, data, response.whole = _in_chunks(data)
        elif b"content-length" in fields:
            length = int(fields[b"content-length"])
            response.body, data = data[:length], data[length:]
            response.whole = len(response.body) == length
        else:
            response.body, data, response.whole = data, b"", ended
        if not response.whole:
            break
    return responses


def _in_chunks(data: bytes) -> tuple[bytes, bytes, bool]:
    body = b""
    while True:
        line, end, rest = data.partition(b"\r\n")
        if not end:
            return body, b"", False
        if not re.fullmatch(rb"[0-9a-f]+", line):
            raise BadResponse(f"a chunk's size: {line[:80]!r}")
        size = int(line, 16)
        if size == 0:
            if rest[:2] not in (b"\r\n", b"\r", b""):
                raise BadResponse(f"a trailer: {rest[:80]!r}")
            return body, rest[2:], len(rest) >= 2
        body += rest[:size]
        if len(rest) < size + 2:
            return body, b"", False
        if rest[size : size + 2] != b"\r\n":
            raise BadResponse(f"a chunk's end: {rest[size : size + 80]!r}")
        data = rest[size + 2 :]
