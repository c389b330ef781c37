"""Heads of HTTP/1.1 requests: one reading only, whole or in parts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import ApiError
from gateway.protocol import http1_fields, http1_request
from gateway.protocol.headers import Field
from gateway.protocol.http1_request import HeadCheck, HeadReader, parse_request
from gateway.protocol.http1_response import parse_response

MIB = 1024 * 1024
LINE = b"POST /v1/chat/completions HTTP/1.1\r\n"
SDK = (
    b"Host: gw.test\r\nAuthorization: Bearer secret-key\r\nContent-Length: %d\r\nX-Stainless-Lang: python\r\n"
    b"User-Agent: OpenAI/Python 3.54.0"
)


def test_a_request_s_head() -> None:
    """Method, path and query, the length, and the fields with their names in lower case."""
    head = parse_request(b"POST /v1/embeddings?a=b HTTP/1.1\r\nHost: gw.test:80\r\nContent-Length: 005", MIB)
    assert (head.method, head.path, head.query, head.http10, head.length) == ("POST", "/v1/embeddings", "a=b", False, 5)
    assert [field.name for field in head.headers.fields] == [b"host", b"content-length"]
    assert not head.close
    assert parse_request(b"GET / HTTP/1.0", MIB).close, "HTTP/1.0: the connection ends with the answer"
    assert parse_request(LINE + b"Host: a\r\nTransfer-Encoding: CHUNKED", MIB).length is None


def test_fields_named_by_connection_end_here() -> None:
    """They are hop-by-hop: neither a stage nor Azure sees them (RFC 9110, 7.6.1)."""
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
    """Two lengths, two hosts, no host, malformed lines, heads above a limit: refused, each with its status."""
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
def test_the_error_for_a_head_above_a_limit_names_the_limit(head: bytes, names: str) -> None:
    """Whether the head is whole or still arriving."""
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
    """With the first byte that makes it invalid, at any cut, and not before."""
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
def test_a_head_that_is_accepted_whole_is_accepted_in_parts(
    method: bytes, target: str, fields: list[tuple[bytes, bytes]], sizes: list[int]
) -> None:
    """The check refuses nothing that the reader accepts."""
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


def test_a_head_in_many_parts_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line is parsed when it ends, and never again."""
    read: list[bytes] = []
    take = http1_request._parse_request_fields

    def counted(lines: list[bytes]) -> list[Field]:
        read.extend(lines)
        return take(lines)

    monkeypatch.setattr(http1_request, "_parse_request_fields", counted)
    head = b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(100))
    check = HeadCheck()
    for place in range(1, len(head) + 1):
        check.check(head[:place])
    assert len(read) == 100


def test_the_same_head_again_is_the_same_request_but_for_its_length() -> None:
    """The connection's last head is used again, with the new length."""
    reader = HeadReader()
    for length in (10, 10, 2000, 7):
        head = LINE + SDK % length
        read, anew = reader.read(head, MIB), parse_request(head, MIB)
        assert read.length == length
        assert read.headers.fields == anew.headers.fields
        assert read.headers.lines_to_azure() == anew.headers.lines_to_azure()
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
        assert b"mine" not in headers.lines_to_azure()
        headers.set("x-mine", "1")
        headers.remove("x-stainless-lang")
        assert b"x-mine: 1" in headers.lines_to_azure()
        assert b"Stainless-Lang" not in headers.lines_to_azure()


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
def test_another_head_is_parsed_again(second: bytes) -> None:
    """If any byte except the length differs, nothing of the last head is used."""
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


def test_lines_with_keys_are_not_cached() -> None:
    """The cache of lines has no line that may hold a key."""
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
    kept = b"".join([*http1_fields._cached_fields, *http1_request._cached_request_lines])
    assert b"very-secret" not in kept
    assert b"Host: a" in kept


def test_the_cache_of_lines_is_bounded() -> None:
    """A client that never sends the same line twice does not fill the memory."""
    for number in range(http1_fields._MAX_CACHED_LINES + 10):
        parse_request(b"GET /%d HTTP/1.1\r\nHost: a\r\nX: %d" % (number, number), MIB)
    assert len(http1_fields._cached_fields) <= http1_fields._MAX_CACHED_LINES
    assert len(http1_request._cached_request_lines) <= http1_fields._MAX_CACHED_LINES
    assert parse_request(b"GET /1 HTTP/1.1\r\nHost: a\r\nX: 1", MIB).path == "/1"
