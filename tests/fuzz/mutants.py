"""Mutants: valid messages, changed in ways that have broken HTTP implementations before.

`make(seed, number)` always returns the same mutant, so these two numbers reproduce it.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from tests.fuzz.corpus import REQUESTS, RESPONSES, UPLOADS, chunked

__all__ = ("Mutant", "make", "without")

# Longer ones find nothing new, and the judge reads byte by byte.
_MOST = 8 * 1024
_LONG = (1000, 4097, 8191)

Kind = Literal["request", "response"]
Ending = Literal["keep", "close", "reset"]


_ENDINGS: tuple[Ending, ...] = ("keep", "keep", "keep", "close", "reset")


@dataclass(frozen=True)
class Mutant:
    """Bytes that a client or Azure sends, cut into writes at `cuts`.

    For a response: `ending` says how Azure's connection ends, `asked` chooses the request, and `late` are bytes after
    the response.
    """

    kind: Kind
    data: bytes
    cuts: tuple[int, ...] = ()
    ending: Ending = "keep"
    asked: int = 0
    late: bytes = b""

    @property
    def pieces(self) -> list[bytes]:
        """The writes."""
        offsets = sorted({0, len(self.data), *(cut for cut in self.cuts if cut < len(self.data))})
        return [self.data[a:b] for a, b in itertools.pairwise(offsets)]


def make(seed: int, number: int) -> Mutant:
    """Return a mutant: of a request if `number` is even, else of a response."""
    rng = random.Random(f"{seed}:{number}")
    if number % 2 == 0 and rng.random() < 0.04:
        return _upload(rng)
    if number % 2 == 0:
        data = b"".join(
            _changed(rng, rng.choice(REQUESTS), REQUESTS, _REQUEST_LINES, _request_line)
            for _ in range(rng.choice((1, 1, 1, 2, 3)))
        )
        return Mutant("request", data, _cuts(rng, data))
    data = _changed(rng, rng.choice(RESPONSES), RESPONSES, _RESPONSE_LINES, _status_line)
    late = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison" if rng.random() < 0.1 else b""
    ending = rng.choice(_ENDINGS)
    return Mutant("response", data, _cuts(rng, data), ending, rng.randrange(1 << 16), late)


def _upload(rng: random.Random) -> Mutant:
    """Return a valid chunked upload, cut so that many reads have only framing."""
    head, body = rng.choice(UPLOADS)
    data = head + chunked(body, [rng.choice((1, 2, 5, 40, 200, 400)) for _ in range(6)])
    lines = [found.end() for found in re.finditer(rb"[0-9a-f]+\r\n|\r\n", data)]
    cuts = {offset for offset in lines if offset > len(head) and rng.random() < 0.5}
    cuts |= {offset - 2 for offset in lines if offset > len(head) and rng.random() < 0.3}
    return Mutant("request", data, tuple(sorted(cuts)))


def _cuts(rng: random.Random, data: bytes) -> tuple[int, ...]:
    size = len(data)
    if size < 2 or rng.random() < 0.5:
        return ()
    if rng.random() < 0.15 and size <= 600:
        return tuple(range(1, size))
    offsets = [rng.randrange(1, size) for _ in range(rng.randrange(1, 6))]
    # Parsers fail at reads that end within a line break, or after the framing of a chunk.
    marks = [found.start() for found in re.finditer(rb"\r\n", data)]
    if marks:
        offsets += [rng.choice(marks) + rng.choice((0, 1, 2)) for _ in range(rng.randrange(4))]
    return tuple(sorted({offset for offset in offsets if 0 < offset < size}))


def _changed(
    rng: random.Random,
    data: bytes,
    others: tuple[bytes, ...],
    lines: tuple[bytes, ...],
    first_line: Callable[[random.Random, bytes], bytes],
) -> bytes:
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 5))):
        roll = rng.random()
        if roll < 0.40:
            data = _in_head(rng, data, lambda head: _line_changed(rng, head, lines))
        elif roll < 0.52:
            data = _in_head(rng, data, lambda head: [first_line(rng, head[0]), *head[1:]])
        elif roll < 0.80:
            data = _body_changed(rng, data)
        elif roll < 0.95:
            data = _bytes_changed(rng, data)
        else:
            other = rng.choice(others)
            data = data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]
    return data[:_MOST]


# -- anywhere ------------------------------------------------------------------------------------------

_ODD = (
    b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\n\n", b"\0", b" ", b"\t", b"\x0b", b"\x0c", b"\x85", b"\xa0", b"\xff",
    b":", b";", b",", b'"', b"-", b"+", b"0", b"0x", b"%0d%0a", b"\xe2\x80\xa8", b"HTTP/1.1", b"0\r\n\r\n", b"/../",
)  # fmt: skip


def _bytes_changed(rng: random.Random, data: bytes) -> bytes:
    offset = rng.randrange(len(data) + 1)
    end = min(len(data), offset + rng.choice((1, 1, 2, 5, 40)))
    way = rng.randrange(7)
    if way == 0:
        return data[:offset] + rng.choice(_ODD) + data[offset:]
    if way == 1:
        return data[:offset] + rng.choice(_ODD) + data[end:]
    if way == 2:
        return data[:offset] + data[end:]
    if way == 3:
        return data[:end] + data[offset:end] + data[end:]
    if way == 4:
        return data[:offset]
    if way == 5:
        return data + rng.choice((*_ODD, b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison", b"GET / HTTP/1.1\r\n"))
    return data[:offset] + bytes([rng.randrange(256)]) + data[end:]


# -- the head ------------------------------------------------------------------------------------------


def _in_head(rng: random.Random, data: bytes, change: Callable[[list[bytes]], list[bytes]]) -> bytes:
    head, end, body = data.partition(b"\r\n\r\n")
    return b"\r\n".join(change(head.split(b"\r\n"))) + end + body


def _line_changed(rng: random.Random, head: list[bytes], lines: tuple[bytes, ...]) -> list[bytes]:
    index = rng.randrange(1, len(head)) if len(head) > 1 else 0
    line = head[index]
    name, colon, value = line.partition(b":")
    way = rng.randrange(16)
    if way < 6:
        new = rng.choice(lines)
        if new.endswith(b"%LONG"):
            new = new[:-5] + b"a" * rng.choice(_LONG)
        at = rng.randrange(1, len(head) + 1)
        return [*head[:at], new, *head[at:]]
    if index == 0:
        return head
    changed: list[bytes]
    if way == 6:
        changed = [line, line]
    elif way == 7:
        changed = []
    elif way == 8:
        changed = [name.swapcase() + colon + value]
    elif way == 9:
        changed = [name + rng.choice((b" ", b"\t", b"\0", b"\r", b"\n")) + colon + value]
    elif way == 10:
        changed = [name + colon + rng.choice((b"\t", b"  ", b"", b"\x0b", b"\r\n ", b"\r\n\t", b"\n ")) + value.strip()]
    elif way == 11:
        changed = [line + rng.choice((b" ", b"\t", b"\r", b"\n", b"\0", b",", b", ", b"\x0c", b"\xa0"))]
    elif way == 12:
        changed = [rng.choice((b" ", b"\t", b"\r", b"\n")) + line]
    elif way == 13:
        changed = [line, b"Connection: " + rng.choice((name, name + b", close", b"keep-alive, " + name))]
    elif way == 14:
        changed = [name + colon + value[: rng.randrange(len(value) + 1)] + rng.choice(_ODD) + value]
    else:
        other = rng.randrange(1, len(head))
        head = head.copy()
        head[index], head[other] = head[other], head[index]
        return head
    return [*head[:index], *changed, *head[index + 1 :]]


_FRAMING = (
    b"Content-Length: 0", b"Content-Length: 1", b"Content-Length: 5", b"Content-Length: 61",
    b"Content-Length: 99999999",
    b"Content-Length: +5", b"Content-Length: -1", b"Content-Length: 005", b"Content-Length: 0x5",
    b"Content-Length: 5_0",
    b"Content-Length: 5, 5", b"Content-Length:", b"Content-Length: 5 5", b"Content-Length: 18446744073709551616",
    b"Content-Length: 9223372036854775808", b"Content-Length: \xd9\xa5", b"content-length:5",
    b"Content-Length : 5", b"Content_Length: 5", b"Content-Length\0: 5",
    b"Transfer-Encoding: chunked", b"transfer-encoding:CHUNKED", b"Transfer-Encoding: identity", b"Transfer-Encoding:",
    b"Transfer-Encoding: chunked, chunked", b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: chunked, gzip",
    b"Transfer-Encoding: xchunked", b"Transfer-Encoding: chunked\x0b", b"Transfer-Encoding: \x00chunked",
    b"Transfer-Encoding : chunked", b"Transfer_Encoding: chunked", b'Transfer-Encoding: "chunked"',
    b"Transfer-Encoding: chunked;a=b", b"Transfer-Encoding:\r\n chunked", b"Transfer-Encoding: chun\r\n ked",
    b"Trailer: X-Late", b"TE: trailers",
    b"Connection: close", b"Connection: keep-alive", b"Connection: Keep-Alive, close", b"Connection: Transfer-Encoding",
    b"Connection: Content-Length", b"Connection: content-type", b"Connection: ,", b"Connection:",
    b"Keep-Alive: timeout=1",
    b"Connection: Upgrade", b"Upgrade: websocket", b"Upgrade: h2c", b"Upgrade: websocket, h2c",
    b"Content-Encoding: gzip", b"Content-Encoding: identity", b"Content-Encoding: br", b"Content-Encoding: deflate",
    b"Content-Type: text/event-stream", b"Content-Type: application/json", b"Content-Type: \xff", b"Content-Type:",
    b"X: %LONG", b"X-Empty:", b": no-name", b"no-colon", b"X@y: 1", b"\xe9: 1", b"X: a\x01b", b"Date: Thu",
    b"X-Request-ID: abc", b"X-Request-ID: \xff\"'<>", b"X-Request-ID: %LONG",
)  # fmt: skip
_REQUEST_LINES = (
    *_FRAMING,
    b"Expect: 100-continue", b"Expect: 100-Continue", b"Expect: 200-ok", b"Expect:",
    b"Host: other.test", b"Host:", b"Host: a b", b"Host: gw.test:99999", b"host: gw.test", b"Host: [::1]",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Version: 8",
    b"HTTP2-Settings: AAMAAABkAAQAAP__", b"X-HTTP-Method-Override: DELETE", b"X-Original-URL: /admin",
    b"Cookie: %LONG", b"Range: bytes=0-1", b"Accept-Encoding: gzip", b"Proxy-Connection: keep-alive",
    b"X-Forwarded-For: 1.2.3.4, \xff", b"Forwarded: for=_hidden", b"Origin: null", b"x-stainless-retry-count: -1",
)  # fmt: skip
_RESPONSE_LINES = (
    *_FRAMING,
    b"Location: http://127.0.0.1:1/steal", b"Set-Cookie: a=b", b"Retry-After: -1", b"Retry-After: \xff",
    b"Retry-After: 9e9",
    b"retry-after-ms: nan", b"x-ratelimit-remaining-tokens: -5", b"x-ratelimit-reset-tokens: \x80",
    b"Sec-WebSocket-Accept: x", b"x-ms-region: a", b"apim-request-id: %LONG", b"Strict-Transport-Security: max-age=1",
    b"Cache-Control: no-store", b"Transfer-Encoding: gzip", b"Content-Range: bytes 0-1/2", b"Vary: *",
)  # fmt: skip

_METHODS = (
    b"GET", b"POST", b"HEAD", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE", b"CONNECT", b"PRI", b"get", b"Post",
    b"", b"GET\t", b"\r\nGET", b"\r\n\r\nPOST", b"\nPOST", b"P\xc3\x96ST", b"SOURCE", b"QUERY", b"M" * 300,
)  # fmt: skip
_TARGETS = (
    b"/", b"*", b"", b"/v1", b"/v1/chat/completions", b"/full/v1/chat/completions", b"//v1/chat/completions",
    b"http://gw.test/v1/chat/completions", b"http://evil.test/", b"gw.test:80", b"/v1/../healthz", b"/v1/files/..;/x",
    b"/v1/files/%2e%2e", b"/v1/files/%252e", b"/v1/files/%3F", b"/v1/files/%c0%ae", b"/v1/files/a%00b", b"/v1/x#frag",
    b"/v1/chat/completions?api-version=1", b"/v1/chat/completions?a=\"<>", b"/v1/files/\xff", b"/v1/files/a\x7fb",
    b"/healthz", b"/readyz?x", b"/v1/models/gpt-4o", b"/v1/realtime?model=gpt-4o", b"/v1/responses/resp_1/cancel",
    b"/v1/files/" + b"a" * 3000,
)  # fmt: skip
_VERSIONS = (
    b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.2", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.10", b"http/1.1", b"HTTP/11", b"",
    b"HTTP/1.1 ",
    b"HTTP/1.1\r", b"HTTP /1.1", b"HTTP/+1.1",
)  # fmt: skip
_STATUSES = (
    b"200", b"201", b"202", b"204", b"205", b"206", b"301", b"302", b"304", b"307", b"400", b"401", b"404", b"408",
    b"409",
    b"429", b"499", b"500", b"502", b"503", b"529", b"100", b"101", b"102", b"103", b"199", b"099", b"000", b"600",
    b"999", b"1000",
    b"20", b"+200", b"2e2", b"-1", b"", b" 200",
)  # fmt: skip


def _request_line(rng: random.Random, line: bytes) -> bytes:
    method, _, rest = line.partition(b" ")
    target, _, version = rest.rpartition(b" ")
    way = rng.randrange(4)
    if way == 0:
        method = rng.choice(_METHODS)
    elif way == 1:
        target = rng.choice(_TARGETS)
    elif way == 2:
        version = rng.choice(_VERSIONS)
    else:
        return rng.choice((b"  ", b"\t", b" \r ", b"\0")).join((method, target, version))
    return b" ".join((method, target, version))


def _status_line(rng: random.Random, line: bytes) -> bytes:
    version, _, rest = line.partition(b" ")
    status, _, reason = rest.partition(b" ")
    way = rng.randrange(5)
    if way < 2:
        status = rng.choice(_STATUSES)
    elif way == 2:
        version = rng.choice(_VERSIONS)
    elif way == 3:
        reason = rng.choice((b"", b"OK\0", b"\xff", b"a" * 3000, b"O\rK", b"OK\t"))
    else:
        return (
            rng.choice((b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 102 P\r\nX: y\r\n\r\n", b"\r\n", b"\n", b"x"))
            + line
        )
    return b" ".join((version, status, reason))


# -- the body ------------------------------------------------------------------------------------------

_SIZES = (
    b"0", b"00", b"0000000000", b"-1", b"+5", b" 5", b"5 ", b"5\t", b"0x5", b"5_", b"g", b"FFFFFFFFFFFFFFFF",
    b"FFFFFFFFFFFFFFFFF",
    b"7FFFFFFFFFFFFFFF", b"5;", b"5;a", b"5;a=b", b'5;a="b;c"', b'5;a="\r"', b"5 ;a=b", b"5;\xff", b"5;\n", b"05",
    b"5\r", b"5,5", b"",
    b"5;" + b"x" * 300, b"\xd9\xa5",
)  # fmt: skip
_TRAILERS = (
    b"X-Late: 1\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"no-colon\r\n", b": x\r\n",
    b" fold\r\n",
    b"X: a\nY: b\r\n", b"X : y\r\n", b"X: \0\r\n", b"X: " + b"a" * 900 + b"\r\n", b"\n", b"\r",
)  # fmt: skip


def _body_changed(rng: random.Random, data: bytes) -> bytes:
    head, end, body = data.partition(b"\r\n\r\n")
    way = rng.randrange(8)
    if way == 0:  # a wrong length
        body_length = len(body) + rng.choice((-2, -1, 1, 2, 7))
        head = re.sub(rb"(?i)(content-length: *)\d+", lambda found: found.group(1) + b"%d" % max(0, body_length), head)
    elif way in (1, 2):  # chunks of many sizes
        lines = [
            line for line in head.split(b"\r\n") if not line.lower().startswith((b"content-length", b"transfer-enc"))
        ]
        head = b"\r\n".join([*lines, b"Transfer-Encoding: chunked"])
        sizes = [rng.choice((1, 1, 2, 3, 10, 100, 1000)) for _ in range(4)]
        extension = rng.choice((b"", b"", b"", b";a=b", b" ;x", b";" + b"y" * 100))
        trailers = rng.choice((b"", b"", *_TRAILERS))
        body = chunked(body[:600], sizes, extension=extension, trailers=trailers)
    elif way == 3:  # an odd size line
        found = list(re.finditer(rb"(?:^|\r\n)([0-9a-fA-F]+)(?=\r\n|;)", body))
        if found:
            chosen = rng.choice(found)
            body = body[: chosen.start(1)] + rng.choice(_SIZES) + body[chosen.end(1) :]
    elif way == 4:  # an odd line break
        found = list(re.finditer(rb"\r\n", body))
        if found:
            chosen = rng.choice(found)
            body = (
                body[: chosen.start()]
                + rng.choice((b"\n", b"\r", b"", b"\r\r\n", b"\n\r", b" \r\n"))
                + body[chosen.end() :]
            )
    elif way == 5:
        body += rng.choice((b"x", b"\r\n", b"0\r\n\r\n", b"GET /smuggled HTTP/1.1\r\nHost: gw.test\r\n\r\n", body))
    elif way == 6:
        body = body[: rng.randrange(len(body) + 1)]
    else:  # a length and chunks
        head += rng.choice((b"\r\nTransfer-Encoding: chunked", b"\r\nContent-Length: %d" % len(body)))
    return head + end + body


def without(mutant: Mutant, start: int, end: int) -> Mutant:
    """Return a mutant without some of its bytes; its cuts stay between the same bytes."""
    data = mutant.data[:start] + mutant.data[end:]
    cuts = {cut if cut <= start else max(start, cut - (end - start)) for cut in mutant.cuts}
    return replace(mutant, data=data, cuts=tuple(sorted(cut for cut in cuts if 0 < cut < len(data))))
