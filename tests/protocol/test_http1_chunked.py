"""Chunked bodies, at every cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol.http1_chunked import FRAMING_OF_REQUESTS, ChunkedDecoder
from gateway.protocol.http1_fields import MalformedMessage


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def cuts(data: bytes) -> list[list[bytes]]:
    """Return `data` whole, cut in two at every offset, and byte by byte."""
    return [
        [data],
        *([data[:cut], data[cut:]] for cut in range(1, len(data))),
        [data[cut : cut + 1] for cut in range(len(data))],
    ]


def feed_all(chunks: ChunkedDecoder, pieces: list[bytes]) -> None:
    for piece in pieces:
        chunks.feed(piece)
        while chunks.unread:
            chunks.feed(chunks.unread)


@pytest.mark.parametrize(
    ("encoded", "body"),
    [
        (chunked(b"hello", b" ", b"world\r\n"), b"hello world\r\n"),
        (b'5;a=b\r\nhello\r\n1 ;c="d"\r\n!\r\n000\r\nX-Trailer: y\r\n\r\n', b"hello!"),
        (b"0\r\n\r\n", b""),
        (chunked(b"x" * 300), b"x" * 300),
    ],
)
def test_chunks_at_every_cut(encoded: bytes, body: bytes) -> None:
    """The body is the same at any cut, and the bytes after its end are separate."""
    for pieces in cuts(encoded + b"next"):
        chunks = ChunkedDecoder()
        out = extra = b""
        for piece in pieces:
            if chunks.done:
                extra += piece
            else:
                out += chunks.feed(piece)
                extra += chunks.extra
        assert (out, chunks.done, extra) == (body, True, b"next")


@pytest.mark.parametrize(
    "encoded",
    [
        b"\r\nhello",
        b"g\r\n",
        b"-5\r\n",
        b"+5\r\n",
        b"0x5\r\nhello",
        b"5_0\r\n",
        b"5\t\r\nhello\r\n",
        b"5\nhello\r\n",
        b"5\rhello",
        b"4\r\nhello\r\n",
        b"5\r\nhelloXX",
        b"5;a\x00\r\nhello",
        b"11111111111111111\r\n",
        b"0\r\nbad trailer\r\n\r\n",
        b"0\r\n\n",
        b"\xd9\xa5\r\nhello",
        b"1;" + b"x" * 5000,
        b"1;" + b"x" * 2000 + b"\r\na\r\n1;" + b"x" * 2000 + b"\r\na\r\n1;" + b"x" * 2000 + b"\r\na\r\n",
        b"0\r\n" + b"X-Trailer: y\r\n" * 1000,
    ],
)
def test_malformed_chunks(encoded: bytes) -> None:
    """Bare line ends, signs, wrong sizes, framing without end: malformed at any cut."""
    for pieces in cuts(encoded) if len(encoded) < 100 else ([encoded], [encoded[:3000], encoded[3000:]]):
        with pytest.raises(MalformedMessage):
            feed_all(ChunkedDecoder(), pieces)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.lists(st.integers(1, 30), max_size=20))
def test_chunks_of_any_body(pieces: list[bytes], sizes: list[int]) -> None:
    """For any body and any cuts, decoding reverses encoding."""
    encoded = chunked(*pieces)
    chunks = ChunkedDecoder()
    out = []
    for size in [*sizes, len(encoded)]:
        out.append(chunks.feed(encoded[:size]))
        encoded = encoded[size:]
        if not encoded:
            break
    assert b"".join(out) == b"".join(pieces)
    assert chunks.done


def test_one_call_reads_a_bounded_number_of_chunks() -> None:
    """Bytes above the limit stay unread, in order, and nothing is lost between calls."""
    chunks = ChunkedDecoder()
    encoded, out, calls = b"1\r\nx\r\n" * 1000 + b"0\r\n\r\nnext", b"", 0
    while not chunks.done:
        piece = chunks.feed(encoded, 10)
        out, encoded, calls = out + piece, chunks.unread, calls + 1
        assert len(piece) <= 5
    assert (out, chunks.extra) == (b"x" * 1000, b"next")
    assert calls > 200


def test_a_body_that_is_mostly_framing_is_refused() -> None:
    """More than the allowance and two bytes of framing for each byte of a request; a response may have more."""
    tiny, small = b"1\r\nx\r\n" * 5000, b"3\r\nxyz\r\n" * 5000
    with pytest.raises(MalformedMessage):
        feed_all(ChunkedDecoder(FRAMING_OF_REQUESTS), [tiny])
    feed_all(ChunkedDecoder(FRAMING_OF_REQUESTS), [small])
    feed_all(ChunkedDecoder(), [tiny])
