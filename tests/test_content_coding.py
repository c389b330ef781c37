"""Compressed responses, undone in bounded pieces."""

from __future__ import annotations

import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.content_coding import BadCoding, Inflater, is_identity


def inflated(coding: bytes, pieces: list[bytes], most: int) -> list[bytes]:
    """Return what comes out, piece by piece, each at most `most` bytes."""
    inflater, out = Inflater(coding), []
    for piece in pieces:
        inflater.feed(piece)
        while inflater.pending:
            out.append(inflater.read(most))
    inflater.check_end()
    return out


@given(
    st.binary(max_size=5000),
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([b"gzip", b" X-Gzip", b"deflate"]),
)
def test_any_body_comes_out_whole_in_bounded_pieces(body: bytes, cut: int, most: int, coding: bytes) -> None:
    """However the compressed bytes are cut, and however little may come out at once."""
    packed = zlib.compress(body) if coding == b"deflate" else gzip.compress(body[:50]) + gzip.compress(body[50:])
    out = inflated(coding, [packed[place : place + cut] for place in range(0, len(packed), cut)], most)
    assert b"".join(out) == body
    assert max(map(len, out), default=0) <= most


def test_a_few_bytes_never_become_many_at_once() -> None:
    """A thousandfold expansion comes out in as many pieces as it takes."""
    packed = gzip.compress(bytes(10_000_000))
    out = inflated(b"gzip", [packed], 16_384)
    assert sum(map(len, out)) == 10_000_000
    assert max(map(len, out)) == 16_384


@pytest.mark.parametrize(
    "packed",
    [gzip.compress(b"hello")[:-3], b"nonsense", gzip.compress(b"one") + b"garbage"],
    ids=["cut short", "nonsense", "garbage behind it"],
)
def test_what_is_broken_or_cut_short_is_refused(packed: bytes) -> None:
    """It is never taken for the whole."""
    with pytest.raises(BadCoding):
        inflated(b"gzip", [packed], 100)


def test_nothing_at_all_is_an_empty_body() -> None:
    """Some servers say that they compress, and send none."""
    assert inflated(b"gzip", [], 10) == []


@pytest.mark.parametrize("coding", [b"br", b"zstd", b"gzip, br", b"gzip, gzip", b"x" * 100, b"\xff"])
def test_other_codings_are_refused_by_name(coding: bytes) -> None:
    """With a message that shows no more of the header than a name."""
    with pytest.raises(BadCoding) as refused:
        Inflater(coding)
    assert len(str(refused.value)) < 150


def test_identity_is_no_coding() -> None:
    """And neither is an empty header."""
    assert is_identity(b"identity")
    assert is_identity(b" ")
    assert not is_identity(b"gzip")


def test_empty_members_are_read_in_bounded_pieces() -> None:
    """A member has a cost of its own, whatever it holds: one call never reads thousands of them."""
    inflater, calls = Inflater(b"gzip"), 0
    inflater.feed(gzip.compress(b"") * 10_000 + gzip.compress(b"end"))
    out = b""
    while inflater.pending:
        out += inflater.read(16_384)
        calls += 1
    inflater.check_end()
    assert out == b"end"
    assert calls > 100
