"""Readings of a connection's bytes: by `gateway/protocol/http1_*.py`, and by aiohttp's C parser (llhttp), the judge.

Both report the offsets at which heads and bodies end. If both accept a message, they must agree on these: a parser that
sees a boundary elsewhere lets a client smuggle a request past it, or gives one client the response of another.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParser, HttpResponseParser

from gateway.errors import ApiError
from gateway.protocol.http1_chunked import FRAMING_OF_REQUESTS, ChunkedDecoder
from gateway.protocol.http1_fields import HEAD_END, MAX_HEAD, MalformedMessage
from gateway.protocol.http1_request import HeadCheck, HeadReader
from gateway.protocol.http1_response import parse_response

__all__ = ("Difference", "Message", "Reading", "compare", "our_requests", "our_response", "requests", "response")

# Larger than any mutant, so that different limits of the parsers move no boundary.
_LIMIT = 1 << 20
_BODY = 100 * 1024 * 1024

End = Literal["open", "refused", "closed", "switched"]


@dataclass
class Message:
    """A message as one parser sees it: `head_end` and `end` are offsets; `end` is None while the body is unfinished."""

    start: tuple[str, ...]
    fields: list[tuple[bytes, bytes]]
    head_end: int
    body: bytes = b""
    end: int | None = None


@dataclass
class Reading:
    """The messages of a connection, and what the parser does after them: wait, refuse, close, or switch protocols."""

    messages: list[Message] = field(default_factory=list)
    end: End = "open"
    why: str = ""

    @property
    def whole(self) -> bool:
        """Whether every byte belongs to a complete message, as far as the parser reads."""
        return self.end != "refused" and bool(self.messages) and self.messages[-1].end is not None


@dataclass(frozen=True)
class Difference:
    """A difference between two readings. `moved`: both accept, but see another boundary or other fields."""

    kind: str
    moved: bool


# -- ours ----------------------------------------------------------------------------------------------


def our_requests(pieces: Sequence[bytes]) -> Reading:
    """Read requests as a client connection does; each piece is one read."""
    reading = Reading()
    heads = HeadReader()
    check: HeadCheck | None = None
    data, offset, came = b"", 0, 0  # unread bytes, the offset of their first, and the offset of their end
    body: ChunkedDecoder | int | None = None
    for piece in pieces:
        data += piece
        came += len(piece)
        while data and reading.end == "open":
            if body is not None:
                message = reading.messages[-1]
                try:
                    taken, data, done = _take(body, data)
                except MalformedMessage as exc:
                    return _refused(reading, str(exc))
                if isinstance(body, int):
                    body -= len(taken)
                message.body += taken
                if not done:
                    data = b""
                    break
                message.end = offset = came - len(data)
                body = None
            else:
                if data[:2] == b"\r\n":
                    data, offset = data[2:], offset + 2
                end = data.find(HEAD_END)
                if end < 0 or end > MAX_HEAD:
                    check = check or HeadCheck()
                    try:
                        check.check(data)
                    except ApiError as exc:
                        return _refused(reading, exc.message)
                    if len(data) > MAX_HEAD:
                        return _refused(reading, "the head is too large")
                    break
                check = None
                try:
                    head = heads.read(data[:end], _BODY)
                except ApiError as exc:
                    return _refused(reading, exc.message)
                offset += end + 4
                target = head.path + ("?" + head.query if head.query else "")
                message = Message((head.method, target), _ours(head.headers.fields), offset)
                reading.messages.append(message)
                data = data[end + 4 :]
                if head.length == 0:
                    message.end = offset
                else:
                    body = head.length or ChunkedDecoder(FRAMING_OF_REQUESTS)
                    if not data:
                        break
            if message.end is not None and (head.close or head.upgrade):
                reading.end = "switched" if head.upgrade else "closed"
    return reading


def our_response(pieces: Sequence[bytes], *, eof: bool) -> Reading:
    """Read one response to a GET or a POST as an upstream connection does, after interim responses."""
    reading = Reading()
    data, offset, came = b"", 0, 0
    body: ChunkedDecoder | int | None = None
    until_close = False
    for piece in pieces:
        data += piece
        came += len(piece)
        if reading.messages and reading.messages[0].end is not None:
            break
        while data:
            if reading.messages:
                message = reading.messages[0]
                try:
                    taken, data, done = _take(body, data) if body is not None else (data, b"", False)
                except MalformedMessage as exc:
                    return _refused(reading, str(exc))
                if isinstance(body, int):
                    body -= len(taken)
                message.body += taken
                if done:
                    message.end = came - len(data)
                    return reading
                data = b""
                break
            end = data.find(HEAD_END)
            if end < 0 or end > MAX_HEAD:
                if not data.startswith(b"HTTP/1."[: len(data)]) or len(data) > MAX_HEAD:
                    return _refused(reading, "no head")
                break
            try:
                head = parse_response(data[:end])
            except MalformedMessage as exc:
                return _refused(reading, str(exc))
            offset += end + 4
            data = data[end + 4 :]
            if head.status == 101 or head.status < 100 or head.status > 599:
                return _refused(reading, "the status is none that was asked for")
            if head.status < 200:
                continue
            message = Message((str(head.status),), _ours(head.fields), offset)
            reading.messages.append(message)
            if head.length == 0 and not head.chunked:
                message.end = offset
                return reading
            until_close = head.length is None and not head.chunked
            body = ChunkedDecoder() if head.chunked else head.length
    if eof and until_close:
        reading.messages[0].end = came
    if not reading.messages and re.search(rb"(?<!\r)\n", data):
        # This head can never become valid, but it is refused only at its end or at the timeout.
        return _refused(reading, "a bare LF in a head that has not ended")
    return reading


def _take(body: ChunkedDecoder | int, data: bytes) -> tuple[bytes, bytes, bool]:
    """Return bytes of the body, the bytes after its end, and whether it has ended. Raises MalformedMessage."""
    if isinstance(body, int):
        return data[:body], data[body:], len(data) >= body
    taken = body.feed(data)
    while body.unread:
        taken += body.feed(body.unread)
    return taken, body.extra, body.done


def _ours(fields: Sequence[Any]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value, _, _ in fields]


def _refused(reading: Reading, why: str) -> Reading:
    reading.end, reading.why = "refused", why
    return reading


# -- the judge's ---------------------------------------------------------------------------------------


def requests(pieces: Sequence[bytes], loop: asyncio.AbstractEventLoop) -> Reading:
    """Read requests with aiohttp's C parser, byte by byte, so that it shows where each part ends."""
    return _judged(pieces, loop, HttpRequestParser, lambda message: (message.method, message.path))


def response(pieces: Sequence[bytes], loop: asyncio.AbstractEventLoop, *, eof: bool) -> Reading:
    """Read a response with aiohttp's C parser, after interim responses."""
    return _judged(pieces, loop, HttpResponseParser, lambda message: (str(message.code),), eof=eof)


def _judged(
    pieces: Sequence[bytes],
    loop: asyncio.AbstractEventLoop,
    parser_class: Any,
    start: Callable[[Any], tuple[str, ...]],
    *,
    eof: bool = False,
) -> Reading:
    reading = Reading()
    responses = parser_class is HttpResponseParser
    more = {"read_until_eof": True} if responses else {}
    parser = parser_class(
        BaseProtocol(loop),
        loop,
        _LIMIT,
        max_line_size=_LIMIT,
        max_field_size=_LIMIT,
        max_headers=1000,
        auto_decompress=False,
        **more,
    )
    payload: Any = None
    current: Message | None = None
    closing = False
    data = b"".join(pieces)
    for offset in range(len(data)):
        try:
            messages, switched, _ = parser.feed_data(data[offset : offset + 1])
        except Exception as exc:
            if closing and current is None:
                reading.end = "closed"
                return reading
            return _refused(reading, f"{type(exc).__name__}: {str(exc).partition(chr(10))[0]}")
        for message, content in messages:
            if responses and message.code < 200 and message.code != 101:
                continue
            fields = [(name.lower(), value.strip(b" \t")) for name, value in message.raw_headers]
            current, payload = Message(start(message), fields, offset + 1), content
            closing = message.should_close
            reading.messages.append(current)
        if current is not None and payload is not None:
            if payload.exception() is not None:
                return _refused(reading, str(payload.exception()))
            if payload.is_eof():
                current.body, current.end = _content(payload), offset + 1
                current = payload = None
                if responses:
                    return reading
        if switched:
            reading.end = "switched"
            return reading
    if current is not None and payload is not None:
        current.body = _content(payload)
        if eof:
            try:
                parser.feed_eof()
            except Exception as exc:
                reading.why = str(exc)
                return reading
            if payload.is_eof():
                current.end = len(data)
    elif closing:
        reading.end = "closed"
    return reading


def _content(payload: Any) -> bytes:
    return b"".join(getattr(payload, "_buffer", ()))


# -- both ----------------------------------------------------------------------------------------------


def compare(ours: Reading, theirs: Reading) -> Difference | None:
    """Return how two readings of the same bytes differ, or None.

    Our parser may be stricter: after it refuses, the judge's further messages do not count.
    """
    for index, (mine, judged) in enumerate(zip(ours.messages, theirs.messages, strict=False)):
        last = index + 1 == min(len(ours.messages), len(theirs.messages))
        if mine.start != judged.start:
            return Difference("the start lines differ", moved=True)
        if mine.head_end != judged.head_end:
            return Difference("the heads end at different bytes", moved=True)
        if mine.end != judged.end:
            if last and ours.end == "refused" and mine.end is None:
                return Difference(f"ours refuses the body: {ours.why}", moved=False)
            if last and theirs.end == "refused" and judged.end is None:
                return Difference(f"only the judge refuses the body: {theirs.why}", moved=False)
            return Difference("the bodies end at different bytes", moved=True)
        if mine.body != judged.body and mine.end is not None:
            return Difference("the bodies differ", moved=True)
        fields = _but_hops(judged.fields)
        if index:  # the judge puts the trailers of a body among the fields of the next message
            fields = fields[len(fields) - len(mine.fields) :]
        if mine.fields != fields:
            return Difference("the header fields differ", moved=True)
    if len(ours.messages) == len(theirs.messages):
        if ours.end == theirs.end:
            return None
        if ours.end == "refused":
            return Difference(f"ours refuses: {ours.why}", moved=False)
        if theirs.end == "refused":
            return Difference(f"only the judge refuses: {theirs.why}", moved=False)
        return Difference(f"ours is {ours.end}, the judge {theirs.end}", moved=False)
    if len(ours.messages) < len(theirs.messages):
        if ours.end == "refused":
            return Difference(f"ours refuses: {ours.why}", moved=False)
        if ours.end != "open":
            return Difference(f"ours is {ours.end}, the judge goes on", moved=False)
        return Difference("ours still waits, the judge has one message more", moved=True)
    if theirs.end == "refused":
        return Difference(f"only the judge refuses: {theirs.why}", moved=False)
    if theirs.end != "open":
        return Difference(f"the judge is {theirs.end}, ours goes on", moved=theirs.end == "closed")
    return Difference("ours has one message more, the judge still waits", moved=True)


def _but_hops(fields: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the fields without the hop-by-hop fields that `Connection` names; ours removes them."""
    names = {token.strip() for name, value in fields if name == b"connection" for token in value.lower().split(b",")}
    return [each for each in fields if each[0] not in names]
