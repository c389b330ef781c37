"""HTTP/1.1 as bytes: heads that are read in one way only, and chunks at every cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import ApiError
from gateway.protocol import http1
from gateway.protocol.headers import Field
from gateway.protocol.http1 import (
    FRAMING_OF_REQUESTS,
    ChunkedDecoder,
    HeadCheck,
    HeadReader,
    MalformedMessage,
    parse_request,
    parse_response,
)

MIB = 1024 * 1024
LINE = b"POST /v1/chat/completions HTTP/1.1\r\n"
SDK = (
    b"Host: gw.test\r\nAuthorization: Bearer secret-key\r\nContent-Length: %d\r\nX-Stainless-Lang: python\r\n"
    b"User-Agent: OpenAI/Python 3.54.0"
)


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def cuts(data: bytes) -> list[list[bytes]]:
    """Return `data` whole, cut in two at every place, and byte by byte."""
    return [
        [data],
        *([data[:place], data[place:]] for place in range(1, len(data))),
        [data[place : place + 1] for place in range(len(data))],
    ]


def feed_all(chunks: ChunkedDecoder, pieces: list[bytes]) -> None:
    for piece in pieces:
        chunks.feed(piece)
        while chunks.unread:
            chunks.feed(chunks.unread)


# -- requests ------------------------------------------------------------------------------------------


def test_a_request_s_head() -> None:
    """Method, path and query, the length, and the fields with their names in lower case."""
    head = parse_request(b"POST /v1/embeddings?a=b HTTP/1.1\r\nHost: gw.test:80\r\nContent-Length: 005", MIB)
    assert (head.method, head.path, head.query, head.old, head.length) == ("POST", "/v1/embeddings", "a=b", False, 5)
    assert [field.name for field in head.headers.fields] == [b"host", b"content-length"]
    assert not head.close
    assert parse_request(b"GET / HTTP/1.0", MIB).close, "HTTP/1.0: the connection ends with the answer"
    assert parse_request(LINE + b"Host: a\r\nTransfer-Encoding: CHUNKED", MIB).length is None


def test_what_connection_names_ends_here() -> None:
    """No stage, and not Azure, sees a field that the client's own hop was to keep (RFC 9110, 7.6.1)."""
    head = parse_request(
        LINE + b"Host: a\r\nConnection: close, X-Mine\r\nconnection: x-other\r\nx-mine: 1\r\nX-Other: 2", 1
    )
    assert head.close
    assert [field.name for field in head.headers.fields] == [b"host", b"connection", b"connection"]
    answer = parse_response(b"HTTP/1.1 200 OK\r\nConnection: X-Mine\r\nx-mine: 1\r\nContent-Length: 0")
    assert [field.name for field in answer.fields] == [b"connection", b"content-length"]
    assert not answer.close


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (LINE + b"Host: a\r\nContent-Length: 5\r\nContent-Length: 5", 400),
        (LINE + b"Host: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked", 400),
        (LINE + b"Host: a\r\nContent-Length: +5", 400),
        (LINE + b"Host: a\r\nContent-Length: \xb2", 400),
        (LINE + b"Host: a\r\nContent-Length: 99999999999999999999", 400),
        (LINE + b"Host: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked", 400),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked", 400),
        (LINE + b"Content-Length: 5", 400),
        (LINE + b"Host: a\r\nHost: a", 400),
        (LINE + b"Host: a\nX: b", 400),
        (LINE + b"Host: a\r\n folded", 400),
        (LINE + b"Host: a\r\nX: " + b"a" * 17_000, 431),
        (b"GET /" + b"a" * 17_000 + b" HTTP/1.1\r\nHost: a", 414),
        (LINE + b"Host: a" + b"\r\nX: b" * 128, 431),
        (LINE + b"Host: a\r\nTransfer-Encoding: chunked \t", 400),
        (b"CONNECT / HTTP/1.1\r\nHost: a\r\nContent-Length: 5", 400),
        (b"CONNECT gw.test:443 HTTP/1.1\r\nHost: gw.test:443", 400),
        (LINE + b"Host: a\r\nExpect: something", 417),
        (LINE + b"Host: a\r\nContent-Encoding: gzip", 415),
        (LINE + b"Host: a\r\nContent-Length: 1048577", 413),
    ],
)
def test_heads_that_no_gateway_may_pass_on(head: bytes, status: int) -> None:
    """Two lengths, two hosts, none, a line that is none, more than there may be: refused, each with its status."""
    with pytest.raises(ApiError) as caught:
        parse_request(head, MIB)
    assert caught.value.status == status
    with pytest.raises(ApiError):
        HeadReader().read(head, MIB)


@pytest.mark.parametrize(
    ("head", "names"),
    [
        (LINE + b"Host: a\r\nX: " + b"a" * 17_000, "16384"),
        (LINE + b"Host: a" + b"\r\nX: b" * 128, "128"),
        (b"GET /" + b"a" * 17_000 + b" HTTP/1.1\r\nHost: a", "16384"),
    ],
)
def test_a_head_above_a_limit_is_told_which(head: bytes, names: str) -> None:
    """Whole, or while it comes."""
    with pytest.raises(ApiError, match=names) as whole:
        parse_request(head, MIB)
    with pytest.raises(ApiError, match=names) as begun:
        HeadCheck().check(head + b"\r\n")
    assert whole.value.status == begun.value.status


NEVER_HEADS = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(400),  # TLS
    b"PRI * HTTP/2.0\r\n",
    b"GET / HTTP/1.1\n",
    b"GET / HTTP/1.1\r\nHost: x\n",
    b"GET / HTTP/1.1\rHost",
    b"GET /\r\n",
    b"GET /\x00",
    b"GET / HTTP/1.1\r\nX: \x00",
    b"GET / HTTP/1.1\r\nX: \x7f",
    b"GET / HTTP/1.1\r\nHost: x\r\nA b: c\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nA b",
    b"GET / HTTP/1.1\r\nHost: x\r\nA : c",
    b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nnocolon\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n folded",
    b"GET / HTTP/1.1\r\nHost: x\r\n: c",
    b"GET / HTTP/1.1\r\nHost: x y\r\n",
    b"GET / HTTP/1.1\r\nContent-Length: x\r\n",
    b"GET / HTTX",
    b"GET / FTP",
    b"GET  /",
    b"GET / HTTP/1.1 \r\n",
    b"GET http://x/ HTTP/1.1\r\n",
    b"hello, how are you",
    b'{"model": "gpt-4o"}',
    b"\r\n\x01",
    b"\rX",
]


@pytest.mark.parametrize("begun", NEVER_HEADS)
def test_a_head_that_can_never_become_one_is_refused_at_once(begun: bytes) -> None:
    """With the byte that makes it one, however it is cut; no byte later, and nothing before it is refused."""
    with pytest.raises(ApiError) as caught:
        HeadCheck().check(begun)
    assert caught.value.status == 400
    check, refused_at = HeadCheck(), 0
    for place in range(1, len(begun) + 1):
        try:
            check.check(begun[:place])
        except ApiError:
            refused_at = place
            break
    assert refused_at, "byte by byte it is refused, too"
    with pytest.raises(ApiError):
        HeadCheck().check(begun[:refused_at])


@given(
    st.sampled_from([b"GET", b"POST", b"M-SEARCH"]),
    st.text(alphabet="abc/%20?=&", max_size=300),
    st.lists(st.tuples(st.sampled_from([b"X-A", b"Accept"]), st.binary(max_size=300)), max_size=10),
    st.lists(st.integers(1, 60), min_size=1, max_size=5),
)
def test_a_head_that_is_taken_whole_is_taken_in_parts(
    method: bytes, target: str, fields: list[tuple[bytes, bytes]], sizes: list[int]
) -> None:
    """The check refuses nothing that the reader takes."""
    lines = [b"%b /%b HTTP/1.1" % (method, target.encode()), b"Host: a"]
    lines += [b"%b: %b" % field for field in fields]
    head = b"\r\n".join(lines)
    try:
        parse_request(head, MIB)
    except ApiError:
        return
    check, whole, place = HeadCheck(), head + b"\r\n\r", 0
    for size in itertools.cycle(sizes):
        place += size
        check.check(whole[:place])
        if place >= len(whole):
            return


def test_a_head_in_many_parts_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line is read when it ends, and never again."""
    read: list[bytes] = []
    take = http1._request_fields

    def counted(lines: list[bytes]) -> list[Field]:
        read.extend(lines)
        return take(lines)

    monkeypatch.setattr(http1, "_request_fields", counted)
    head = b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(100))
    check = HeadCheck()
    for place in range(1, len(head) + 1):
        check.check(head[:place])
    assert len(read) == 100


def test_the_same_head_again_is_the_same_request_but_for_its_length() -> None:
    """What a connection's last head said is used again; the new length is the new request's own."""
    reader = HeadReader()
    for length in (10, 10, 2000, 7):
        head = LINE + SDK % length
        read, anew = reader.read(head, MIB), parse_request(head, MIB)
        assert read.length == length
        assert read.headers.fields == anew.headers.fields
        assert read.headers.up() == anew.headers.up()
        assert read._replace(headers=anew.headers) == anew
    with pytest.raises(ApiError, match="larger"):
        reader.read(LINE + SDK % (MIB + 1), MIB)


def test_a_stage_s_changes_stay_with_their_request() -> None:
    """Headers that a stage set or removed are not those of the connection's next request."""
    reader = HeadReader()
    for _ in range(4):
        headers = reader.read(LINE + SDK % 5, MIB).headers
        assert headers.get("x-mine") is None
        assert headers.get("x-stainless-lang") == "python"
        assert b"mine" not in headers.up()
        headers.set("x-mine", "1")
        headers.remove("x-stainless-lang")
        assert b"x-mine: 1" in headers.up()
        assert b"Stainless-Lang" not in headers.up()


@pytest.mark.parametrize(
    "second",
    [
        LINE + SDK.replace(b"secret-key", b"other-key!") % 10,
        LINE + SDK.replace(b"%d", b"1%%") % (),
        LINE + SDK.replace(b"%d", b"") % (),
        LINE + SDK.replace(b"%d", b"10\r\nContent-Length: 10") % (),
        LINE + SDK.replace(b"Content-Length: %d", b"X-Length: 10") % (),
        LINE + b"X-Length: 3\r\n" + SDK % 10,
        LINE + SDK % 10 + b"\r\nTransfer-Encoding: chunked",
    ],
)
def test_another_head_is_read_anew(second: bytes) -> None:
    """One byte more or other than the length, and nothing of the last head counts: as if it were the first."""
    reader = HeadReader()
    reader.read(LINE + SDK % 10, MIB)
    try:
        anew = parse_request(second, MIB)
    except ApiError as exc:
        with pytest.raises(ApiError) as caught:
            reader.read(second, MIB)
        assert caught.value.status == exc.status  # noqa: PT017 -- the two readings are compared
    else:
        read = reader.read(second, MIB)
        assert read.headers.fields == anew.headers.fields
        assert read._replace(headers=anew.headers) == anew


def test_keys_are_not_among_the_lines_that_are_kept() -> None:
    """Lines of heads are kept to be found again, but no line that may hold a key."""
    for name in (
        b"Authorization",
        b"api-key",
        b"X-Api-Key",
        b"Cookie",
        b"Proxy-Authorization",
        b"x-amz-security-token",
    ):
        parse_request(LINE + b"Host: a\r\n" + name + b": Bearer very-secret", MIB)
    parse_request(b"GET /v1/models?api-key=very-secret HTTP/1.1\r\nHost: a", MIB)
    kept = b"".join([*http1._fields, *http1._request_lines])
    assert b"very-secret" not in kept
    assert b"Host: a" in kept


def test_lines_that_are_kept_are_bounded() -> None:
    """A client that never sends the same line twice fills nothing up."""
    for number in range(http1._KEPT_LINES + 10):
        parse_request(b"GET /%d HTTP/1.1\r\nHost: a\r\nX: %d" % (number, number), MIB)
    assert len(http1._fields) <= http1._KEPT_LINES
    assert len(http1._request_lines) <= http1._KEPT_LINES
    assert parse_request(b"GET /1 HTTP/1.1\r\nHost: a\r\nX: 1", MIB).path == "/1"


# -- responses -----------------------------------------------------------------------------------------


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
def test_responses_that_cannot_be_believed(head: bytes) -> None:
    """What could be read in two ways, or is no HTTP/1.1, is malformed."""
    with pytest.raises(MalformedMessage):
        parse_response(head)


# -- chunks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wire", "body"),
    [
        (chunked(b"hello", b" ", b"world\r\n"), b"hello world\r\n"),
        (b'5;a=b\r\nhello\r\n1 ;c="d"\r\n!\r\n000\r\nX-Trailer: y\r\n\r\n', b"hello!"),
        (b"0\r\n\r\n", b""),
        (chunked(b"x" * 300), b"x" * 300),
    ],
)
def test_chunks_at_every_cut(wire: bytes, body: bytes) -> None:
    """The body is the same however the wire's bytes are cut, and what follows its end is told apart."""
    for pieces in cuts(wire + b"next"):
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
    "wire",
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
def test_chunks_that_are_none(wire: bytes) -> None:
    """Bare line ends, signs, wrong sizes, framing without end: malformed, at whatever byte they are cut."""
    for pieces in cuts(wire) if len(wire) < 100 else ([wire], [wire[:3000], wire[3000:]]):
        with pytest.raises(MalformedMessage):
            feed_all(ChunkedDecoder(), pieces)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.lists(st.integers(1, 30), max_size=20))
def test_chunks_of_any_body(pieces: list[bytes], sizes: list[int]) -> None:
    """Whatever the body, whatever the cuts: what comes out is what went in."""
    wire = chunked(*pieces)
    chunks = ChunkedDecoder()
    out = []
    for size in [*sizes, len(wire)]:
        out.append(chunks.feed(wire[:size]))
        wire = wire[size:]
        if not wire:
            break
    assert b"".join(out) == b"".join(pieces)
    assert chunks.done


def test_one_call_reads_a_bounded_number_of_chunks() -> None:
    """What is above the bound stays unread, in order, and nothing is lost over the calls."""
    chunks = ChunkedDecoder()
    wire, out, calls = b"1\r\nx\r\n" * 1000 + b"0\r\n\r\nnext", b"", 0
    while not chunks.done:
        piece = chunks.feed(wire, 10)
        out, wire, calls = out + piece, chunks.unread, calls + 1
        assert len(piece) <= 5
    assert (out, chunks.extra) == (b"x" * 1000, b"next")
    assert calls > 200


def test_a_body_that_is_mostly_framing_is_refused() -> None:
    """More than the allowance and two bytes of framing for each byte; a response may have more."""
    tiny, small = b"1\r\nx\r\n" * 5000, b"3\r\nxyz\r\n" * 5000
    with pytest.raises(MalformedMessage):
        feed_all(ChunkedDecoder(FRAMING_OF_REQUESTS), [tiny])
    feed_all(ChunkedDecoder(FRAMING_OF_REQUESTS), [small])
    feed_all(ChunkedDecoder(), [tiny])
