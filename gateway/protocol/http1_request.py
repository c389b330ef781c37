"""Heads of HTTP/1.1 requests, as bytes and without I/O (RFC 9112, 3). The rules are those of `http1_fields.py`."""

from __future__ import annotations

import re
from typing import NamedTuple

from gateway.errors import ApiError
from gateway.protocol.header_policy import PARSED
from gateway.protocol.headers import Field, Headers
from gateway.protocol.http1_fields import (
    MAX_FIELDS,
    MAX_LINE,
    NEVER_IN_HEAD,
    TOKEN,
    LineTooLong,
    MalformedMessage,
    cache_line,
    parse_fields,
    split_tokens,
)

__all__ = ("HeadCheck", "HeadReader", "RequestHead", "malformed_request", "parse_request", "too_large")

_REQUEST_LINE = re.compile(rb"(%b) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])" % TOKEN)
# The beginnings of lines that have not ended.
_PARTIAL_REQUEST_LINE = re.compile(
    rb"%b(?: (?:[!-~\x80-\xff]+(?: (?:H|HT|HTT|HTTP|HTTP/|HTTP/[0-9]|HTTP/[0-9]\.|HTTP/[0-9]\.[0-9])?)?)?)?\r?" % TOKEN
)
_PARTIAL_FIELD = re.compile(rb"%b(?::[\t -~\x80-\xff]*)?\r?" % TOKEN)
# Bytes of an unfinished line that are matched again with each read.
_PARTIAL_LENGTH = 256
_PATH = re.compile(r"/[!$&-;=@-Z_a-z~%]*")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})|%(0[0-9A-F]|1[0-9A-F]|2E|2F|5C|7F)", re.IGNORECASE)
_QUERY = re.compile(r"[!-\"$-~]*")


class RequestHead(NamedTuple):
    """A request's head, without the fields that `Connection` names: they end at this hop (RFC 9110, 7.6.1).

    `length` is None for a chunked body. `close` closes the connection after the response.
    """

    method: str
    path: str
    query: str
    http10: bool  # HTTP/1.0
    headers: Headers
    length: int | None
    close: bool
    expects: bool  # the client waits for `100 Continue`
    given_id: bytes | None  # `X-Request-ID`
    upgrade: bool = False  # to a WebSocket


_cached_request_lines: dict[bytes, tuple[str, str, str, bool]] = {}


# -- errors --------------------------------------------------------------------------------------------


def malformed_request(why: str = "") -> ApiError:
    """Return the error for bytes that are not an HTTP/1.1 request; `why` must not quote them."""
    message = "the request is not valid HTTP/1.1"
    return ApiError(400, f"{message}: {why}" if why else message, code="malformed_request")


def too_large(limit: int) -> ApiError:
    """Return the error for a body above the limit."""
    return ApiError(413, f"the body is larger than {limit} bytes, the limit of this gateway", code="body_too_large")


def _field_too_long() -> ApiError:
    return ApiError(431, f"a header line of the request is longer than {MAX_LINE} bytes", code="head_too_large")


def _too_many_fields() -> ApiError:
    return ApiError(431, f"the request has more than {MAX_FIELDS} header fields", code="head_too_large")


def _target_too_long() -> ApiError:
    return ApiError(414, f"the request line is longer than {MAX_LINE} bytes", code="target_too_long")


# -- incomplete heads ----------------------------------------------------------------------------------


class HeadCheck:
    """Checks a head that arrives in several reads, and refuses it as soon as it can no longer be valid.

    Each byte is checked once, except for the first `_PARTIAL_LENGTH` bytes of the unfinished line.
    """

    __slots__ = ("_checked", "_fields", "_line_start")

    def __init__(self) -> None:
        self._line_start = 0  # of the unfinished line
        self._checked = 0  # bytes already checked for control characters
        self._fields = 0

    def check(self, head: bytes) -> None:
        """Check all bytes of the head so far. Raises ApiError 400, 414 or 431."""
        if head in (b"\r", b"\r\n"):
            return  # RFC 9112, 2.2: an empty line before a request is ignored
        # (The last byte is checked again, with its successor.)
        if NEVER_IN_HEAD.search(head, max(0, self._checked - 1)):
            raise malformed_request()
        self._checked = len(head)
        while (end := head.find(b"\r\n", self._line_start)) >= 0:
            line = head[self._line_start : end]
            if not self._line_start:
                _cached_request_lines.get(line) or _parse_request_line(line)
            else:
                self._fields += 1
                if self._fields > MAX_FIELDS:
                    raise _too_many_fields()
                _parse_request_fields([line])
            self._line_start = end + 2
        start = self._line_start
        if len(head) - start > MAX_LINE + 1:
            raise _field_too_long() if start else _target_too_long()
        partial = head[start : start + _PARTIAL_LENGTH]
        if partial and not (_PARTIAL_FIELD if start else _PARTIAL_REQUEST_LINE).fullmatch(partial) and partial != b"\r":
            raise malformed_request()


# -- whole heads ---------------------------------------------------------------------------------------


class HeadReader:
    """Reads the heads of one connection's requests.

    A client that keeps its connection alive sends the same head again and again, except for the length of its body.
    If all other bytes are the same, the reader uses the last head again.
    """

    __slots__ = ("_last_head", "_last_without_length", "_length_index")

    def __init__(self) -> None:
        self._last_without_length: bytes | None = None  # the bytes of the last head
        self._last_head: RequestHead | None = None
        self._length_index = 0  # of the field `content-length`

    def read(self, head: bytes, limit: int) -> RequestHead:
        """Parse a head, without the empty line that ends it; see `parse_request`."""
        start = head.find(b"ength: ") + 7
        if start < 7:
            return parse_request(head, limit)
        end = head.find(b"\r\n", start)
        digits = head[start:end] if end > 0 else head[start:]
        without_length = head[:start] + head[end:] if end > 0 else head[:start]
        last = self._last_head
        if without_length == self._last_without_length and last is not None and digits.isdigit() and len(digits) <= 19:
            length = int(digits)
            if length > limit:
                raise too_large(limit)
            headers = last.headers
            fields = headers.fields.copy()
            name, _, line, flags = fields[self._length_index]
            fields[self._length_index] = Field(name, digits, line[:16] + digits, flags)
            method, path, query, http10, _, _, close, expects, given_id, upgrade = last
            headers = Headers.of(fields, headers.lines_to_azure(), headers.credential_fields())
            return RequestHead(method, path, query, http10, headers, length, close, expects, given_id, upgrade)
        parsed = parse_request(head, limit)
        self._last_without_length = None
        for index, field in enumerate(parsed.headers.fields):
            if field[0] == b"content-length":
                # Only if the match above is this field, written plainly, and no expectation depends on the length.
                plain = head[start - 18 : start - 7].lower() == b"\r\ncontent-l" and field[1] == digits
                if plain and not parsed.expects and not parsed.upgrade:
                    fields = parsed.headers.fields.copy()  # stages may change the other list
                    self._last_without_length, self._length_index = without_length, index
                    self._last_head = parsed._replace(headers=Headers.of(fields))
                break
        return parsed


def parse_request(head: bytes, limit: int) -> RequestHead:
    """Parse a request's head, without the empty line that ends it; `limit` is the largest body in bytes.

    Raises ApiError for a request that no gateway may pass on.
    """
    line, *lines = head.split(b"\r\n")
    method, path, query, http10 = _cached_request_lines.get(line) or _parse_request_line(line)
    if len(lines) > MAX_FIELDS:
        raise _too_many_fields()
    fields = _parse_request_fields(lines)
    host = chunked = close = expects = upgrade = False
    length: int | None = None
    given_id: bytes | None = None
    hop_by_hop: set[bytes] = set()
    for name, value, _, flags in fields:
        if not flags & PARSED:
            continue
        if name == b"host":
            if host:
                raise ApiError(400, "the request has more than one Host header", code="malformed_request")
            host = True
        elif name == b"content-length":
            if length is not None:
                raise ApiError(400, "the request has more than one Content-Length header", code="malformed_request")
            length = int(value)
        elif name == b"connection":
            if value != b"keep-alive":
                hop_by_hop.update(split_tokens(value))
        elif name == b"transfer-encoding":
            if chunked or http10 or value.lower() != b"chunked":
                raise ApiError(400, "the only Transfer-Encoding is chunked, and it requires HTTP/1.1")
            chunked = True
        elif name == b"expect":
            if value.lower() != b"100-continue":
                raise ApiError(417, "the only supported expectation is 100-continue")
            expects = not http10
        elif name == b"x-request-id":
            given_id = value
        elif name == b"upgrade":
            upgrade = upgrade or (b"websocket" in split_tokens(value) and method == "GET" and not http10)
        elif name == b"content-encoding" and value.lower() not in (b"", b"identity"):
            raise ApiError(415, "compressed bodies are not supported; omit Content-Encoding")
    if not host and not http10:
        raise ApiError(400, "an HTTP/1.1 request requires a Host header", code="malformed_request")
    if chunked and length is not None:
        raise ApiError(
            400, "the request has both a Content-Length and a Transfer-Encoding; send one", code="malformed_request"
        )
    if length is not None and length > limit:
        raise too_large(limit)
    if hop_by_hop:
        close = b"close" in hop_by_hop
        fields = [field for field in fields if field[0] not in hop_by_hop]
    upgrade = upgrade and b"upgrade" in hop_by_hop
    if upgrade and (chunked or length):
        raise ApiError(400, "a WebSocket request must not have a body", code="malformed_request")
    expects = expects and (chunked or bool(length))
    return RequestHead(
        method,
        path,
        query,
        http10,
        Headers.of(fields),
        None if chunked else length or 0,
        close or http10,
        expects,
        given_id,
        upgrade,
    )


def _parse_request_fields(lines: list[bytes]) -> list[Field]:
    """Return the fields of a request's lines. Raises ApiError."""
    try:
        return parse_fields(lines)
    except LineTooLong:
        raise _field_too_long() from None
    except MalformedMessage as exc:
        raise malformed_request(str(exc)) from None


def _parse_request_line(line: bytes) -> tuple[str, str, str, bool]:
    if len(line) > MAX_LINE:
        raise _target_too_long()
    found = _REQUEST_LINE.fullmatch(line)
    if found is None:
        raise malformed_request()
    method, target, major, minor = found.groups()
    if major != b"1":
        raise ApiError(400, "the gateway supports only HTTP/1.1", code="malformed_request")
    if method == b"CONNECT":
        # It has no content, whatever its fields say (RFC 9110, 9.3.6): a proxy on the way may read on as a tunnel.
        raise ApiError(400, "the gateway is not a forward proxy; send the request itself, without CONNECT")
    path, mark, query = target.decode("latin-1").partition("?")
    if not _PATH.fullmatch(path) or _BAD_ESCAPE.search(path) or not _QUERY.fullmatch(query):
        raise ApiError(400, "the request target must be a plain path, such as /v1/chat/completions")
    if "/." in path and any(segment in (".", "..") for segment in path.split("/")):
        raise ApiError(400, "the path must not contain dot segments (. or ..)")
    parsed = (method.decode("ascii"), path, query, minor == b"0")
    if not mark:  # a query may hold a key
        cache_line(_cached_request_lines, line, parsed)
    return parsed
