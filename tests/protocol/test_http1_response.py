"""Heads of HTTP/1.1 responses: one reading only, and where a body ends."""

from __future__ import annotations

import pytest

from gateway.protocol.http1_fields import MalformedMessage
from gateway.protocol.http1_response import ResponseHeadReader, parse_response


def test_how_a_response_s_body_ends() -> None:
    """By its length, by its last chunk, or with the connection; some statuses have none (RFC 9112, 6.3)."""
    assert parse_response(b"HTTP/1.1 200 OK\r\nContent-Length: 7").length == 7
    assert parse_response(b"HTTP/1.1 200\r\nTransfer-Encoding: chunked").chunked
    until_close = parse_response(b"HTTP/1.1 200 OK")
    assert (until_close.length, until_close.chunked) == (None, False)
    for status in (100, 204, 304):
        assert parse_response(b"HTTP/1.1 %d X\r\nContent-Length: 7" % status).length == 0
    assert parse_response(b"HTTP/1.0 200 OK\r\nContent-Length: 7").close


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 20 OK",
        b"HTTP/2 200",
        b"ICY 200 OK",
        b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nTransfer-Encoding: chunked",
        b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nContent-Length: 8",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\t",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked",
        b"HTTP/1.1 200 OK\r\nX : y",
        b"HTTP/1.1 200 OK\r\nX: a\rb",
        b"HTTP/1.1 200 OK" + b"\r\nX: y" * 129,
    ],
)
def test_malformed_responses(head: bytes) -> None:
    """Heads that two readers could read differently, or that are not HTTP/1.1."""
    with pytest.raises(MalformedMessage):
        parse_response(head)


# -- as they arrive ------------------------------------------------------------------------------------


@pytest.mark.parametrize("upgrade", [False, True])
def test_a_head_is_read_at_every_cut(upgrade: bool) -> None:
    """Interim responses are skipped; the bytes after the final head are returned with it."""
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    final = b"HTTP/1.1 101 Switching\r\nUpgrade: websocket" if upgrade else b"HTTP/1.1 200 OK\r\nContent-Length: 2"
    message = interim + final + b"\r\n\r\n"
    for cut in range(len(message)):
        reader = ResponseHeadReader()
        assert cut == 0 or reader.read(message[:cut], upgrade) is None
        assert reader.read(message[cut:] + b"{}", upgrade) == (parse_response(final), b"{}")
        assert reader.unparsed == b""


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 101 Switching\r\n\r\n",
        b"HTTP/1.1 600 Odd\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 17,
        b"hello",
        b"HTTP/1.1 200 OK\nA: b",
        b"HTTP/1.1 200 OK\r\nA: \x00",
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 40_000,
    ],
)
def test_a_head_that_can_never_be_one_is_malformed_at_once(head: bytes) -> None:
    """An upgrade that the request did not ask for, interim responses without end, and bytes that are no head."""
    with pytest.raises(MalformedMessage):
        ResponseHeadReader().read(head, upgrade=False)
