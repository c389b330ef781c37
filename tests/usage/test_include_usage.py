"""`stream_options.include_usage`: requested by the gateway, and hidden from the client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol.filters import chain_filters
from gateway.testing import every_split
from gateway.usage.include_usage import HideUsage, request_stream_usage
from tests.chunks import event as sse

CHUNK: dict[str, Any] = {"choices": [{"delta": {"content": 'a "usage":null, {"usage":{'}}], "id": "c", "usage": None}
USAGE: dict[str, Any] = {"choices": [], "id": "c", "usage": {"prompt_tokens": 1, "details": {"cached_tokens": 0}}}
FIRST: dict[str, Any] = {"choices": [], "prompt_filter_results": [{"usage": 1}]}
DONE = b"data: [DONE]\n\n"


def ask(fields: dict[str, Any], version: str = "2024-10-21") -> Any:
    made = request_stream_usage(json.dumps(fields).encode(), version)
    return None if made is None else json.loads(made)


@pytest.mark.parametrize("version", ["2024-09-01-preview", "2024-10-21", "2025-04-01-preview", "v1"])
@pytest.mark.parametrize("options", [{}, {"stream_options": None}, {"stream_options": {"include_usage": False}}])
def test_the_usage_of_a_stream_is_requested(version: str, options: dict[str, Any]) -> None:
    """Unless the client requests it itself; the rest of the body stays."""
    body = {"model": "m", "stream": True, "messages": [], **options}
    assert ask(body, version) == {**body, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize("body", [b'{"str\\u0065am":true}', b'{"stream":true,"data_sources":null}'])
def test_usage_is_requested_however_the_body_is_spelled(body: bytes) -> None:
    """In every spelling that JSON allows."""
    asked = request_stream_usage(body, "v1")
    assert asked is not None
    assert json.loads(asked)["stream_options"] == {"include_usage": True}


def test_other_options_stay() -> None:
    """Unknown options stay, too."""
    body = {"stream": True, "stream_options": {"include_obfuscation": False}}
    assert ask(body) == {**body, "stream_options": {"include_obfuscation": False, "include_usage": True}}


@pytest.mark.parametrize(
    ("fields", "version"),
    [
        ({"stream": False}, "v1"),
        ({}, "v1"),
        ({"messages": "stream"}, "v1"),
        ({"stream": True}, "2024-08-01-preview"),
        ({"stream": True}, "2024-06-01"),
        ({"stream": True, "stream_options": {"include_usage": True}}, "v1"),
        ({"stream": True, "data_sources": []}, "v1"),
        ({"stream": True, "stream_options": "x"}, "v1"),
        ({"stream": "true"}, "v1"),
    ],
)
def test_usage_is_not_requested(fields: dict[str, Any], version: str) -> None:
    """No stream, an api-version or a request that rejects it, a client that requests it, and invalid bodies."""
    assert ask(fields, version) is None


@pytest.mark.parametrize("body", [b"", b"{", b'{"stream":true', b'["stream"]', b'"stream"', b'{"stream":true}}'])
def test_invalid_json_stays(body: bytes) -> None:
    """Azure reports the error."""
    assert request_stream_usage(body, "v1") is None


def test_the_rest_of_the_body_stays_byte_for_byte() -> None:
    """Numbers, spaces and escapes are unchanged."""
    body = b'{ "stream" : true, "seed": 12345678901234567890123, "x": 1.10, "s":"\\u00e9\\/" } \n'
    asked = request_stream_usage(body, "v1")
    assert asked is not None
    assert asked.startswith(body.rstrip()[:-1])
    assert json.loads(asked)["stream_options"] == {"include_usage": True}


STREAM = sse(FIRST) + sse(CHUNK) + sse(CHUNK) + sse(USAGE) + DONE
HIDDEN = sse(FIRST) + sse({"choices": CHUNK["choices"], "id": "c"}) * 2 + DONE


def test_the_usage_is_hidden_at_every_split() -> None:
    """The additional chunk and the field are removed; every other byte stays."""
    for pieces, out in every_split(STREAM, HideUsage):
        assert out == HIDDEN, pieces


@given(st.lists(st.integers(1, 200)))
def test_the_usage_is_hidden_in_pieces_of_any_size(sizes: list[int]) -> None:
    """However they arrive."""
    linked = chain_filters([HideUsage()])
    data, out = STREAM, b""
    for size in sizes:
        out += linked.feed(data[:size])
        data = data[size:]
    assert out + linked.feed(data) + linked.close() == HIDDEN


@pytest.mark.parametrize(
    "data",
    [
        sse({"choices": [{"delta": {"content": "x"}}]}) + DONE,
        sse({"choices": [{"finish_reason": "stop"}], "usage": {"prompt_tokens": 1}}),
        b'event: x\ndata: {"a":1}\n\n: comment\n\ndata: [DONE]\n',
        b"data: one\ndata: two\n\n\n\ndata: [DONE]",
        b"\n\n\n",
    ],
)
def test_everything_else_stays(data: bytes) -> None:
    """A usage next to text, other events, other line endings (Azure has none), and any end."""
    for pieces, out in every_split(data, HideUsage):
        assert out == data, pieces


def test_only_an_event_of_json_waits_for_its_end() -> None:
    """Other incomplete lines pass at once; after a break nothing is left over."""
    hidden = HideUsage()
    assert hidden.feed(b"data: [DONE]\n") == b"data: [DONE]\n"
    assert hidden.feed(b"\ndata: ") == b"\n"
    assert not hidden.between
    assert hidden.feed(b'{"choices":[') == b""
    assert hidden.cut() == b'data: {"choices":['


def test_a_usage_chunk_in_another_order_of_fields() -> None:
    """As other servers with the v1 API write it."""
    chunk = {"id": "c", "usage": {"prompt_tokens": 1}, "object": "chat.completion.chunk", "choices": []}
    assert chain_filters([HideUsage()]).whole(sse(chunk) + DONE) == DONE
    spaced = json.dumps(chunk).encode()
    assert chain_filters([HideUsage()]).whole(b"data: " + spaced + b"\n\n" + DONE) == DONE


@pytest.mark.parametrize("before", [b": comment\n", b"id: 7\n", b"\n", b"\xef\xbb\xbf", b"event: x\n"])
def test_a_usage_chunk_with_lines_before_it(before: bytes) -> None:
    """Of comments, ids and the like."""
    assert b'"usage"' not in chain_filters([HideUsage()]).whole(sse({"a": 1}) + before + sse(USAGE) + DONE)


def test_a_stream_that_breaks_after_the_usage_shows_none() -> None:
    """The blank line after it is missing."""
    hidden = HideUsage()
    out = hidden.feed(sse(CHUNK) + sse(USAGE).rstrip()) + hidden.cut()
    assert out == sse({"choices": CHUNK["choices"], "id": "c"})


@pytest.mark.parametrize("newline", [b"\r\n", b"\r"])
def test_the_usage_is_hidden_with_any_line_ending(newline: bytes) -> None:
    """A proxy may have changed the line endings."""
    data = STREAM.replace(b"\n", newline)
    for pieces, out in every_split(data, HideUsage):
        assert b'"usage":{"prompt' not in out, pieces
        assert out.count(b"usage") == out.count(b'\\"usage') + 1  # in the first chunk's findings
        assert out.endswith(DONE.replace(b"\n", newline))
