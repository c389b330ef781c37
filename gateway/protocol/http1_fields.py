"""HTTP/1.1 heads, requests and responses alike: limits, header lines, and a cache of lines (RFC 9112, 5).

Rule 1: one reading. Input that another program on the way might read otherwise is refused: a bare CR or LF, folded
lines, a space before a colon, several lengths, a length beside a transfer coding.
Rule 2: memory is bounded: a head by `MAX_HEAD` and `MAX_FIELDS`, the framing of chunks by the bytes they carry.
Rule 3: no error quotes the input: it may hold a key.

Theory of operation: most lines of a head are the same from one message to the next. A valid line is parsed once and
kept, with everything that is ever asked of it; its bytes are the key of the cache.
"""

from __future__ import annotations

import re
from typing import TypeVar

from gateway.errors import GatewayError
from gateway.protocol.header_policy import FRAMING
from gateway.protocol.headers import Field, make_field

__all__ = (
    "FIELD",
    "HEAD_END",
    "MAX_FIELDS",
    "MAX_HEAD",
    "MAX_LINE",
    "NEVER_IN_HEAD",
    "TOKEN",
    "LineTooLong",
    "MalformedMessage",
    "cache_line",
    "is_never_head",
    "parse_fields",
    "split_tokens",
)

HEAD_END = b"\r\n\r\n"
# Limits of one head: bytes, bytes in a line, and number of fields.
MAX_HEAD = 32 * 1024
MAX_LINE = 16 * 1024
MAX_FIELDS = 128

# The cache of lines: number of lines, and bytes in a line.
_MAX_CACHED_LINES = 4096
_MAX_CACHED_LENGTH = 256
# Lines with these names are never cached: their values may be keys.
_SECRET = re.compile(rb"auth|key|cookie|secret|credential|principal|protocol|-token$", re.IGNORECASE)

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
FIELD = re.compile(rb"(%b):[ \t]*([\t -~\x80-\xff]*)" % TOKEN)
# Bytes that no head has: control characters, and half a line break.
NEVER_IN_HEAD = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?=[^\n])")
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~-]*)(:[0-9]{1,5})?")
_Line = TypeVar("_Line", bound=tuple[object, ...])


class MalformedMessage(GatewayError):
    """The bytes are not HTTP/1.1, or two readers might read them differently. The message never quotes them."""


class LineTooLong(MalformedMessage):
    """A line of a head is longer than `MAX_LINE`."""

    def __init__(self) -> None:
        super().__init__(f"a line of the head is longer than {MAX_LINE} bytes")


_cached_fields: dict[bytes, Field] = {}


def cache_line(cache: dict[bytes, _Line], line: bytes, value: _Line) -> None:
    """Keep the parsed value of a line, if the line is short. A full cache is emptied first."""
    if len(line) <= _MAX_CACHED_LENGTH:
        if len(cache) >= _MAX_CACHED_LINES:
            cache.clear()
        cache[line] = value


def _parse_field(line: bytes) -> Field:
    """Return the field of a line that is not in the cache. Raises MalformedMessage."""
    if len(line) > MAX_LINE:
        raise LineTooLong
    found = FIELD.fullmatch(line)
    if found is None:
        raise MalformedMessage("a line of the head is not a header field")
    name, value = found.groups()
    field = make_field(name, value.rstrip(b" \t"))
    name, value, _, flags = field
    if flags & FRAMING:
        # Check these values before the line is cached: a cached line is not checked again.
        if name == b"content-length" and not (value.isdigit() and len(value) <= 19):
            raise MalformedMessage("the Content-Length is not one number")
        if name == b"transfer-encoding" and b"\t" in found.group(2):
            # RFC 9112 allows the tab, but llhttp reads it as a part of the coding's name.
            raise MalformedMessage("a tab follows the transfer coding")
        if name == b"host" and not _HOST.fullmatch(value):
            raise MalformedMessage("the Host is not one host name")
    if _SECRET.search(name) is None:
        cache_line(_cached_fields, line, field)
    return field


def parse_fields(lines: list[bytes]) -> list[Field]:
    """Return the fields of a head's lines. Raises MalformedMessage."""
    cached = _cached_fields.get
    return [cached(line) or _parse_field(line) for line in lines]


def is_never_head(data: bytes) -> bool:
    """Whether the bytes hold what no head may have: a control character, or half a line break."""
    return NEVER_IN_HEAD.search(data) is not None


def split_tokens(value: bytes) -> list[bytes]:
    """Return the tokens of a list such as `Connection` has, in lower case."""
    return [token.strip() for token in value.lower().split(b",")]
