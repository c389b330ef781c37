"""Heads of HTTP/1.1 responses, as bytes and without I/O (RFC 9112, 4). The rules are those of `http1_fields.py`."""

from __future__ import annotations

import re
from typing import NamedTuple

from gateway.protocol.header_policy import FRAMING
from gateway.protocol.headers import Field
from gateway.protocol.http1_fields import (
    HEAD_END,
    MAX_FIELDS,
    MAX_HEAD,
    MalformedMessage,
    cache_line,
    is_never_head,
    parse_fields,
    split_tokens,
)

__all__ = ("ResponseHead", "ResponseHeadReader", "parse_response")

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([0-9]{3})(?: [\t -~\x80-\xff]*)?")
# The registered content codings (IANA). Some servers write other words (`utf-8`), which say nothing about a body.
_COMPRESSED = re.compile(
    rb"(?:^|[\s,])(?:(?:x-)?gzip|deflate|br|zstd|(?:x-)?compress|dcb|dcz|exi|pack200-gzip|aes128gcm)(?:$|[\s,;])",
    re.IGNORECASE,
)
# Interim responses (1xx) before the final one.
_MAX_INTERIM = 16


class ResponseHead(NamedTuple):
    """A response's head, without the fields that `Connection` names.

    `length` is None if the body lasts until the connection closes, or if it is `chunked`. `coding` is the compression
    of the content, or b"".
    """

    status: int
    fields: list[Field]
    length: int | None
    chunked: bool
    close: bool
    coding: bytes = b""


_cached_status_lines: dict[bytes, tuple[int, bool]] = {}


class ResponseHeadReader:
    """Reads the heads of one connection's responses, however they arrive; skips interim responses."""

    __slots__ = ("interim", "unparsed")

    def __init__(self) -> None:
        self.unparsed = b""
        """The beginning of a head."""
        self.interim = 0
        """Number of interim responses so far; the caller resets it for each request."""

    def read(self, data: bytes, upgrade: bool) -> tuple[ResponseHead, bytes] | None:
        """Return the final head and the bytes after it; None if it is incomplete. Raises MalformedMessage.

        A 101 is final if the request asked for an `upgrade`, and malformed if not.
        """
        if self.unparsed:
            data, self.unparsed = self.unparsed + data, b""
        while True:
            end = data.find(HEAD_END)
            if end < 0 or end > MAX_HEAD:
                if not data.startswith(b"HTTP/1."[: len(data)]):
                    raise MalformedMessage("it has no status line")
                if len(data) > MAX_HEAD:
                    raise MalformedMessage(f"its head is larger than {MAX_HEAD} bytes")
                if is_never_head(data):
                    raise MalformedMessage("its head has a control character or half a line break")
                self.unparsed = data
                return None
            head = parse_response(data[:end])
            data = data[end + 4 :]
            if 200 <= head.status <= 599 or (head.status == 101 and upgrade):
                return head, data
            self.interim += 1
            if head.status == 101 or not 100 <= head.status < 200 or self.interim > _MAX_INTERIM:
                raise MalformedMessage(f"its status {head.status} does not fit the request")


def parse_response(head: bytes) -> ResponseHead:
    """Parse a response's head, without the empty line that ends it. Raises MalformedMessage."""
    line, *lines = head.split(b"\r\n")
    status, http10 = _cached_status_lines.get(line) or _parse_status_line(line)
    if len(lines) > MAX_FIELDS:
        raise MalformedMessage(f"it has more than {MAX_FIELDS} header fields")
    fields = parse_fields(lines)
    length: int | None = None
    chunked, close, coding = False, http10, b""
    hop_by_hop: set[bytes] = set()
    for name, value, _, flags in fields:
        if not flags & FRAMING:
            continue
        if name == b"content-length":
            if length is not None:
                raise MalformedMessage("it has several Content-Length headers")
            length = int(value)
        elif name == b"connection":
            hop_by_hop.update(split_tokens(value))
        elif name == b"transfer-encoding":
            if chunked or http10 or value.lower() != b"chunked":
                raise MalformedMessage("its Transfer-Encoding is not chunked")
            chunked = True
        elif name == b"content-encoding" and _COMPRESSED.search(value):
            coding = coding + b", " + value if coding else value
    if chunked and length is not None:
        raise MalformedMessage("it has both a Content-Length and a Transfer-Encoding")
    if hop_by_hop:
        close = close or b"close" in hop_by_hop
        fields = [field for field in fields if field[0] not in hop_by_hop]
    if status < 200 or status in (204, 304):
        length, chunked = 0, False
    return ResponseHead(status, fields, length, chunked, close, coding)


def _parse_status_line(line: bytes) -> tuple[int, bool]:
    found = _STATUS_LINE.fullmatch(line)
    if found is None:
        raise MalformedMessage("it has no status line")
    parsed = int(found.group(2)), found.group(1) == b"0"
    cache_line(_cached_status_lines, line, parsed)
    return parsed
