"""HTTP/1.1 as bytes, with no I/O: heads of requests and of responses, and bodies in chunks (RFC 9112).

Rule 1: one reading. What another program on the way might read otherwise is refused: bare CR or LF, folded
lines, spaces before a colon, several lengths, a length beside a transfer coding.
Rule 2: memory is bounded: a head by `MAX_HEAD` and `MAX_FIELDS`, the framing of chunks by what they carry.
Rule 3: no error shows what was sent: it may be a key.

Theory of operation: the lines of heads are the same from one message to the next, but for a few; so a line
that was read and found sound is kept, with all that is ever asked of it, and found again by its bytes.
"""

from __future__ import annotations

import re
from typing import NamedTuple, TypeVar

from gateway.errors import ApiError, GatewayError
from gateway.protocol.header_policy import FRAMING, OURS
from gateway.protocol.headers import TOKEN, Field, Headers, make_field

__all__ = (
    "FRAMING_OF_REQUESTS",
    "FRAMING_OF_RESPONSES",
    "HEAD_END",
    "MAX_HEAD",
    "MAX_LINE",
    "MOST_LINES",
    "ChunkedDecoder",
    "HeadCheck",
    "HeadReader",
    "MalformedMessage",
    "RequestHead",
    "ResponseHead",
    "is_never_head",
    "malformed_request",
    "parse_response",
    "too_large",
)

HEAD_END = b"\r\n\r\n"
MAX_HEAD = 32 * 1024
MAX_LINE = 16 * 1024
MAX_FIELDS = 128

# Lines that are kept: how many, and how long each may be.
_KEPT_LINES = 4096
_KEPT_LENGTH = 256
# Values of these are never kept: they are somebody's keys.
_SECRET = re.compile(rb"auth|key|cookie|secret|credential|principal|protocol|-token$", re.IGNORECASE)

_TOKEN = TOKEN.encode()
_FIELD = re.compile(rb"(%b):[ \t]*([\t -~\x80-\xff]*)" % _TOKEN)
_REQUEST_LINE = re.compile(rb"(%b) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])" % _TOKEN)
# The beginnings of lines that have not ended.
_REQUEST_LINE_BEGUN = re.compile(
    rb"%b(?: (?:[!-~\x80-\xff]+(?: (?:H|HT|HTT|HTTP|HTTP/|HTTP/[0-9]|HTTP/[0-9]\.|HTTP/[0-9]\.[0-9])?)?)?)?\r?" % _TOKEN
)
_FIELD_BEGUN = re.compile(rb"%b(?::[\t -~\x80-\xff]*)?\r?" % _TOKEN)
# How much of a line that has not ended is matched each time more of it comes, in bytes.
_BEGINNING = 256
# Bytes that no head has: control characters, and half a line break.
_NEVER_IN_HEAD = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?=[^\n])")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([0-9]{3})(?: [\t -~\x80-\xff]*)?")
_PATH = re.compile(r"/[!$&-;=@-Z_a-z~%]*")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})|%(0[0-9A-F]|1[0-9A-F]|2E|2F|5C|7F)", re.IGNORECASE)
_QUERY = re.compile(r"[!-\"$-~]*")
# The content codings that are registered (IANA). Some servers write other words (`utf-8`), which say nothing of a body.
_COMPRESSED = re.compile(
    rb"(?:^|[\s,])(?:(?:x-)?gzip|deflate|br|zstd|(?:x-)?compress|dcb|dcz|exi|pack200-gzip|aes128gcm)(?:$|[\s,;])",
    re.IGNORECASE,
)
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~-]*)(:[0-9]{1,5})?")
_Line = TypeVar("_Line", bound=tuple[object, ...])


class MalformedMessage(GatewayError):
    """What came is not HTTP/1.1, or might be read in two ways. The message never shows it."""


class LineTooLong(MalformedMessage):
    """A line of a head is longer than `MAX_LINE`."""

    def __init__(self) -> None:
        super().__init__(f"a line of the head is longer than {MAX_LINE} bytes")


class RequestHead(NamedTuple):
    """A request's head. Its headers are without the fields that `Connection` names: they end here (RFC 9110, 7.6.1).

    `length` is None for a chunked body; `close` says that the connection ends with the answer.
    """

    method: str
    path: str
    query: str
    old: bool  # HTTP/1.0
    headers: Headers
    length: int | None
    close: bool
    expects: bool  # `100 Continue` is awaited
    given_id: bytes | None  # `X-Request-ID`
    upgrade: bool = False  # a WebSocket is asked for


class ResponseHead(NamedTuple):
    """A response's head, without the fields that `Connection` names.

    `length` is None if the body lasts until the connection closes, unless it is `chunked`. `coding` is how its
    content is compressed, b"" where it has none.
    """

    status: int
    fields: list[Field]
    length: int | None
    chunked: bool
    close: bool
    coding: bytes = b""


_fields: dict[bytes, Field] = {}
_request_lines: dict[bytes, tuple[str, str, str, bool]] = {}
_status_lines: dict[bytes, tuple[int, bool]] = {}


def _keep(lines: dict[bytes, _Line], line: bytes, value: _Line) -> None:
    if len(line) <= _KEPT_LENGTH:
        if len(lines) >= _KEPT_LINES:
            lines.clear()
        lines[line] = value


def _read_field(line: bytes) -> Field:
    """Return the field of a line that is not kept. Raises Malformed."""
    if len(line) > MAX_LINE:
        raise LineTooLong
    found = _FIELD.fullmatch(line)
    if found is None:
        raise MalformedMessage("a line of the head is no header field")
    name, value = found.groups()
    field = make_field(name, value.rstrip(b" \t"))
    name, value, _, bits = field
    if bits & FRAMING:
        # Sound once is sound for ever: what these may say is looked at before the line is kept.
        if name == b"content-length" and not (value.isdigit() and len(value) <= 19):
            raise MalformedMessage("the Content-Length is not one number")
        if name == b"transfer-encoding" and b"\t" in found.group(2):
            # Sound by RFC 9112, but llhttp takes the tab for a part of the coding's name.
            raise MalformedMessage("a tab follows the transfer coding")
        if name == b"host" and not _HOST.fullmatch(value):
            raise MalformedMessage("the Host is not one host name")
    if _SECRET.search(name) is None:
        _keep(_fields, line, field)
    return field


def _read_fields(lines: list[bytes]) -> list[Field]:
    known = _fields.get
    return [known(line) or _read_field(line) for line in lines]


# -- requests ------------------------------------------------------------------------------------------


def malformed_request(why: str = "") -> ApiError:
    """Return the error for bytes that are no HTTP/1.1 request; `why` must not quote them."""
    message = "this is not a valid HTTP/1.1 request"
    return ApiError(400, f"{message}: {why}" if why else message, code="malformed_request")


def too_large(limit: int) -> ApiError:
    """Return the error for a body above the limit."""
    return ApiError(413, f"the body is larger than the {limit} bytes this gateway takes", code="body_too_large")


def _field_too_long() -> ApiError:
    return ApiError(431, f"a line of the request's head is longer than {MAX_LINE} bytes", code="head_too_large")


def _too_many_fields() -> ApiError:
    return ApiError(431, f"the request has more than {MAX_FIELDS} header fields", code="head_too_large")


def is_never_head(data: bytes) -> bool:
    """Whether bytes hold what no head of a message can have: a control character, or half a line break."""
    return _NEVER_IN_HEAD.search(data) is not None


class HeadCheck:
    """Checks the beginning of a head that comes in several reads: what can never become a head is refused at once.

    Each byte is looked at once, but for the first `_BEGINNING` of a line that has not ended.
    """

    __slots__ = ("_fields", "_line", "_seen")

    def __init__(self) -> None:
        self._line = 0  # where the line begins that has not ended
        self._seen = 0  # bytes that were checked for control characters
        self._fields = 0

    def check(self, head: bytes) -> None:
        """Check all that has come of the head so far. Raises ApiError 400, 414 or 431."""
        if head in (b"\r", b"\r\n"):
            return  # RFC 9112, 2.2: an empty line before a request is ignored
        # (The last byte is looked at again, with its successor.)
        if _NEVER_IN_HEAD.search(head, max(0, self._seen - 1)):
            raise malformed_request()
        self._seen = len(head)
        while (end := head.find(b"\r\n", self._line)) >= 0:
            line = head[self._line : end]
            if not self._line:
                _request_lines.get(line) or _read_request_line(line)
            else:
                self._fields += 1
                if self._fields > MAX_FIELDS:
                    raise _too_many_fields()
                _request_fields([line])
            self._line = end + 2
        if len(head) - self._line > MAX_LINE + 1:
            raise _field_too_long() if self._line else _target_too_long()
        begun = head[self._line : self._line + _BEGINNING]
        if begun and not (_FIELD_BEGUN if self._line else _REQUEST_LINE_BEGUN).fullmatch(begun) and begun != b"\r":
            raise malformed_request()


class HeadReader:
    """Reads the heads of one connection's requests.

    A client that keeps its connection sends the same head again and again, but for the length of its body.
    What was read of the last one is therefore used again where all other bytes are the same.
    """

    __slots__ = ("_head", "_length_at", "_same")

    def __init__(self) -> None:
        self._same: bytes | None = None  # the last head, without its length
        self._head: RequestHead | None = None
        self._length_at = 0  # which field is the length

    def read(self, head: bytes, limit: int) -> RequestHead:
        """Read a head, without the empty line that ends it; see `parse_request`."""
        start = head.find(b"ength: ") + 7
        if start < 7:
            return parse_request(head, limit)
        end = head.find(b"\r\n", start)
        digits = head[start:end] if end > 0 else head[start:]
        same = head[:start] + head[end:] if end > 0 else head[:start]
        last = self._head
        if same == self._same and last is not None and digits.isdigit() and len(digits) <= 19:
            length = int(digits)
            if length > limit:
                raise too_large(limit)
            headers = last.headers
            fields = headers.fields.copy()
            name, _, line, bits = fields[self._length_at]
            fields[self._length_at] = Field(name, digits, line[:16] + digits, bits)
            method, path, query, old, _, _, close, expects, given_id, upgrade = last
            headers = Headers.of(fields, headers.up(), headers.presenting())
            return RequestHead(method, path, query, old, headers, length, close, expects, given_id, upgrade)
        read = parse_request(head, limit)
        self._same = None
        for place, field in enumerate(read.headers.fields):
            if field[0] == b"content-length":
                # Only where what was found is this field, written plainly, and says nothing about expectations.
                plain = head[start - 18 : start - 7].lower() == b"\r\ncontent-l" and field[1] == digits
                if plain and not read.expects and not read.upgrade:
                    fields = read.headers.fields.copy()  # stages may change the other list
                    self._same, self._length_at = same, place
                    self._head = read._replace(headers=Headers.of(fields))
                break
        return read


def parse_request(head: bytes, limit: int) -> RequestHead:
    """Read a request's head, without the empty line that ends it; `limit` is the largest body's.

    Raises ApiError for what no gateway may pass on.
    """
    line, *lines = head.split(b"\r\n")
    method, path, query, old = _request_lines.get(line) or _read_request_line(line)
    if len(lines) > MAX_FIELDS:
        raise _too_many_fields()
    fields = _request_fields(lines)
    host = chunked = close = expects = upgrade = False
    length: int | None = None
    given_id: bytes | None = None
    named: set[bytes] = set()
    for name, value, _, bits in fields:
        if not bits & OURS:
            continue
        if name == b"host":
            if host:
                raise ApiError(400, "there must be one Host header", code="malformed_request")
            host = True
        elif name == b"content-length":
            if length is not None:
                raise ApiError(400, "there must be one Content-Length header", code="malformed_request")
            length = int(value)
        elif name == b"connection":
            if value != b"keep-alive":
                named.update(_tokens(value))
        elif name == b"transfer-encoding":
            if chunked or old or value.lower() != b"chunked":
                raise ApiError(400, "the only Transfer-Encoding is chunked, and it needs HTTP/1.1")
            chunked = True
        elif name == b"expect":
            if value.lower() != b"100-continue":
                raise ApiError(417, "the only expectation met is 100-continue")
            expects = not old
        elif name == b"x-request-id":
            given_id = value
        elif name == b"upgrade":
            upgrade = upgrade or (b"websocket" in _tokens(value) and method == "GET" and not old)
        elif name == b"content-encoding" and value.lower() not in (b"", b"identity"):
            raise ApiError(415, "the body must not be compressed; leave Content-Encoding out")
    if not host and not old:
        raise ApiError(400, "an HTTP/1.1 request needs a Host header", code="malformed_request")
    if chunked and length is not None:
        raise ApiError(400, "a body has a Content-Length or a Transfer-Encoding, not both", code="malformed_request")
    if length is not None and length > limit:
        raise too_large(limit)
    if named:
        close = b"close" in named
        fields = [field for field in fields if field[0] not in named]
    upgrade = upgrade and b"upgrade" in named
    if upgrade and (chunked or length):
        raise ApiError(400, "a request for a WebSocket has no body", code="malformed_request")
    expects = expects and (chunked or bool(length))
    return RequestHead(
        method,
        path,
        query,
        old,
        Headers.of(fields),
        None if chunked else length or 0,
        close or old,
        expects,
        given_id,
        upgrade,
    )


def _request_fields(lines: list[bytes]) -> list[Field]:
    """Return the fields of a request's lines. Raises ApiError."""
    try:
        return _read_fields(lines)
    except LineTooLong:
        raise _field_too_long() from None
    except MalformedMessage as exc:
        raise malformed_request(str(exc)) from None


def _target_too_long() -> ApiError:
    return ApiError(414, f"the request's first line is longer than {MAX_LINE} bytes", code="target_too_long")


def _read_request_line(line: bytes) -> tuple[str, str, str, bool]:
    if len(line) > MAX_LINE:
        raise _target_too_long()
    found = _REQUEST_LINE.fullmatch(line)
    if found is None:
        raise malformed_request()
    method, target, major, minor = found.groups()
    if major != b"1":
        raise ApiError(400, "the gateway speaks HTTP/1.1", code="malformed_request")
    if method == b"CONNECT":
        # It has no content, whatever its fields say (RFC 9110, 9.3.6): a proxy on the way may read on as a tunnel.
        raise ApiError(400, "the gateway is no forward proxy; send the request itself, without CONNECT")
    path, mark, query = target.decode("latin-1").partition("?")
    if not _PATH.fullmatch(path) or _BAD_ESCAPE.search(path) or not _QUERY.fullmatch(query):
        raise ApiError(400, "the request's target must be a plain path, such as /v1/chat/completions")
    if "/." in path and any(segment in (".", "..") for segment in path.split("/")):
        raise ApiError(400, "the request's path must not have dot segments")
    read = (method.decode("ascii"), path, query, minor == b"0")
    if not mark:  # a query may hold a key
        _keep(_request_lines, line, read)
    return read


# -- responses -----------------------------------------------------------------------------------------


def parse_response(head: bytes) -> ResponseHead:
    """Read a response's head, without the empty line that ends it. Raises Malformed."""
    line, *lines = head.split(b"\r\n")
    status, old = _status_lines.get(line) or _read_status_line(line)
    if len(lines) > MAX_FIELDS:
        raise MalformedMessage("there are too many header fields")
    fields = _read_fields(lines)
    length: int | None = None
    chunked, close, coding = False, old, b""
    named: set[bytes] = set()
    for name, value, _, bits in fields:
        if not bits & FRAMING:
            continue
        if name == b"content-length":
            if length is not None:
                raise MalformedMessage("there are several lengths")
            length = int(value)
        elif name == b"connection":
            named.update(_tokens(value))
        elif name == b"transfer-encoding":
            if chunked or old or value.lower() != b"chunked":
                raise MalformedMessage("the transfer coding is another one than chunked")
            chunked = True
        elif name == b"content-encoding" and _COMPRESSED.search(value):
            coding = coding + b", " + value if coding else value
    if chunked and length is not None:
        raise MalformedMessage("there is a Content-Length beside a transfer coding")
    if named:
        close = close or b"close" in named
        fields = [field for field in fields if field[0] not in named]
    if status < 200 or status in (204, 304):
        length, chunked = 0, False
    return ResponseHead(status, fields, length, chunked, close, coding)


def _read_status_line(line: bytes) -> tuple[int, bool]:
    found = _STATUS_LINE.fullmatch(line)
    if found is None:
        raise MalformedMessage("there is no status line")
    read = int(found.group(2)), found.group(1) == b"0"
    _keep(_status_lines, line, read)
    return read


def _tokens(connection: bytes) -> list[bytes]:
    return [token.strip() for token in connection.lower().split(b",")]


# -- chunks --------------------------------------------------------------------------------------------

_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t -~\x80-\xff]*)?")
_SIZE_BEGUN = re.compile(rb"[0-9A-Fa-f]{1,16}[ \t]*(;[\t -~\x80-\xff]*)?\r?")
# Limits on framing, in bytes: one line; all lines, an allowance and a share for each byte of the body.
_MAX_LINE = 4096
_FRAMING = 4096
FRAMING_OF_RESPONSES = 16
FRAMING_OF_REQUESTS = 2
"""A request body in chunks of two bytes is refused after some 4,000 of them; one in chunks of three never is."""
# Lines of framing that one call reads at most: two for each chunk.
MOST_LINES = 256
# What comes next, where it is not the rest of a chunk's bytes.
_AT_SIZE, _AT_END, _AT_TRAILER = 0, -1, -2

_sizes: dict[bytes, int] = {}


def _read_size(line: bytes) -> int:
    found = _SIZE.fullmatch(line)
    if found is None:
        raise MalformedMessage("a chunk's size is no number")
    size = int(found.group(1), 16)
    if len(line) <= 3 and line.isalnum():
        _sizes[line] = size
    return size


class ChunkedDecoder:
    """Undoes the chunked transfer coding (RFC 9112, 7.1).

    An empty result of `feed` says nothing about the end of the body: only `done` does, and `extra` then holds the
    bytes after it. One call reads at most `most` lines of framing; `unread` holds the bytes it did not get to, to be
    fed again in a later turn.
    """

    __slots__ = ("_framing", "_left", "_rest", "_share", "done", "extra", "unread")

    def __init__(self, share: int = FRAMING_OF_RESPONSES) -> None:
        """Refuse a body whose framing takes more than `share` bytes for each of its own."""
        self._share = share
        self.done = False
        self.extra = b""
        self.unread = b""
        self._left = _AT_SIZE
        self._rest = b""  # of a line that has not ended
        self._framing = _FRAMING  # the bytes that framing may still take

    def feed(self, data: bytes, most: int = MOST_LINES) -> bytes:
        """Return the body's bytes among the next bytes of the connection. Raises Malformed.

        The next call is given what `unread` holds, before anything newer.
        """
        self.unread = b""
        if self._rest:
            data, self._rest = self._rest + data, b""
        out: list[bytes] = []
        left, place, size = self._left, 0, len(data)
        while place < size:
            if left > 0:
                piece = data[place : place + left]
                out.append(piece)
                place += len(piece)
                left = left - len(piece) or _AT_END
                continue
            if not most:
                self.unread = data[place:]
                break
            end = data.find(b"\r\n", place)
            if end < 0:
                self._check_rest(data, place, left)
                break
            most -= 1
            line = data[place:end]
            place = end + 2
            self._framing -= len(line) + 2
            if left == _AT_SIZE:
                left = _sizes.get(line, -1)
                if left < 0:
                    left = _read_size(line)
                self._framing += self._share * left
                left = left or _AT_TRAILER
            elif left == _AT_END:
                if line:
                    raise MalformedMessage("a chunk is longer than its size")
                left = _AT_SIZE
            elif not line:
                self.done, self.extra = True, data[place:]
                break
            elif not _FIELD.fullmatch(line):
                raise MalformedMessage("a trailer is no header field")
            if self._framing < 0:
                raise MalformedMessage("the chunks are nearly all framing; send larger chunks")
        self._left = left
        return out[0] if len(out) == 1 else b"".join(out)

    def _check_rest(self, data: bytes, place: int, left: int) -> None:
        """Keep the beginning of a line, unless it can be none."""
        rest = data[place:]
        if b"\n" in rest or b"\r" in rest[:-1] or (left == _AT_END and rest != b"\r"):
            raise MalformedMessage("a line of the chunks' framing ends wrongly")
        if left == _AT_SIZE and not _SIZE_BEGUN.fullmatch(rest):
            raise MalformedMessage("a chunk's size is no number")
        if len(rest) > _MAX_LINE:
            raise MalformedMessage("a line of the chunks' framing is too long")
        self._rest = rest
