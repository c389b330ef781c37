"""Compressed responses, decompressed in bounded pieces."""

from __future__ import annotations

import gzip
import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol.content_coding import BadCoding, Inflater, is_identity
from gateway.protocol.http1_response import parse_response
from tests.conftest import CHAT, StartGateway, raw_upstream


def inflated(coding: bytes, pieces: list[bytes], most: int) -> list[bytes]:
    """Return the decompressed pieces, each of at most `most` bytes."""
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
    """For any cuts of the compressed bytes, and any limit on a piece."""
    packed = zlib.compress(body) if coding == b"deflate" else gzip.compress(body[:50]) + gzip.compress(body[50:])
    out = inflated(coding, [packed[place : place + cut] for place in range(0, len(packed), cut)], most)
    assert b"".join(out) == body
    assert max(map(len, out), default=0) <= most


def test_a_few_bytes_never_become_many_at_once() -> None:
    """A thousandfold expansion takes many pieces."""
    packed = gzip.compress(bytes(10_000_000))
    out = inflated(b"gzip", [packed], 16_384)
    assert sum(map(len, out)) == 10_000_000
    assert max(map(len, out)) == 16_384


@pytest.mark.parametrize(
    "packed",
    [gzip.compress(b"hello")[:-3], b"nonsense", gzip.compress(b"one") + b"garbage"],
    ids=["cut short", "nonsense", "garbage behind it"],
)
def test_broken_or_truncated_data_is_refused(packed: bytes) -> None:
    """It never passes for complete."""
    with pytest.raises(BadCoding):
        inflated(b"gzip", [packed], 100)


def test_no_data_is_an_empty_body() -> None:
    """Some servers announce compression, and send no bytes."""
    assert inflated(b"gzip", [], 10) == []


@pytest.mark.parametrize("coding", [b"br", b"zstd", b"gzip, br", b"gzip, gzip", b"x" * 100, b"\xff"])
def test_other_codings_are_refused_by_name(coding: bytes) -> None:
    """The message shows no more of the header than a name."""
    with pytest.raises(BadCoding) as refused:
        Inflater(coding)
    assert len(str(refused.value)) < 150


def test_identity_means_plain() -> None:
    """So does an empty header."""
    assert is_identity(b"identity")
    assert is_identity(b" ")
    assert not is_identity(b"gzip")


def test_empty_members_are_read_in_bounded_pieces() -> None:
    """Each member has a cost, whatever it holds: one call never reads thousands of them."""
    inflater, calls = Inflater(b"gzip"), 0
    inflater.feed(gzip.compress(b"") * 10_000 + gzip.compress(b"end"))
    out = b""
    while inflater.pending:
        out += inflater.read(16_384)
        calls += 1
    inflater.check_end()
    assert out == b"end"
    assert calls > 100


# -- through a gateway ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "encoding"),
    [
        ("gzip", b"gzip"),
        ("GZIP", b"GZIP"),
        ("br", b"br"),
        ("deflate, gzip", b"deflate, gzip"),
        ("identity", b""),
        ("", b""),
        ("utf-8", b""),
        ("brown", b""),
    ],
)
def test_which_responses_are_compressed(value: str, encoding: bytes) -> None:
    """Those with a registered coding; two header lines count as one."""
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {value}"
    assert parse_response(head.encode()).coding == encoding
    if encoding:
        twice = parse_response(f"{head}\r\nContent-Encoding: br".encode()).coding
        assert twice == encoding + b", br"


def packed_answer(
    body: bytes, *, encoding: str = "gzip", status: int = 200, chunked: bool = False, **more: str
) -> bytes:
    kind = more.get("kind", "application/json")
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Encoding: {encoding}\r\n"
    if chunked:
        pieces = b"".join(
            b"%x\r\n%b\r\n" % (len(body[at : at + 7]), body[at : at + 7]) for at in range(0, len(body), 7)
        )
        return head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


METERED = """
resources: {azure: {endpoint: "${ENDPOINT}", api_key: k}}
auth: none
pipeline:
  - access_log
  - openai_errors
  - model_map: {unmapped: own_name_without_dots}
  - api_version: 2024-10-21
  - missing_message
"""
COMPLETION = {
    "id": "x",
    "object": "chat.completion",
    "choices": [{"index": 0, "finish_reason": "content_filter"}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_usage_and_repairs_look_into_it(encoding: str, chunked: bool, start_gateway: StartGateway) -> None:
    """Missing fields are added and tokens are counted, as in a plain response."""
    text = json.dumps(COMPLETION).encode()
    packed = gzip.compress(text) if encoding == "gzip" else zlib.compress(text)
    async with raw_upstream(packed_answer(packed, encoding=encoding, chunked=chunked)) as upstream:
        gateway = await start_gateway(upstream.endpoint, METERED)
        async with gateway.post(json=CHAT, key=None) as answer:
            content = await answer.json()
        assert answer.status == 200, content
        assert "content-encoding" not in answer.headers
        assert content["choices"][0]["message"]["role"] == "assistant"
        await gateway.idle()
        (event,) = gateway.exchanges()
        assert (event["input_tokens"], event["usage_source"]) == (7, "reported")


async def test_a_stream_s_usage_is_found_in_it(start_gateway: StartGateway) -> None:
    """Its events are filtered as in a plain stream."""
    last = {"id": "x", "object": "chat.completion.chunk", "choices": [], "usage": COMPLETION["usage"]}
    text = b"data: " + json.dumps(last).encode() + b"\n\ndata: [DONE]\n\n"
    answer_ = packed_answer(gzip.compress(text), chunked=True, kind="text/event-stream")
    async with raw_upstream(answer_) as upstream:
        gateway = await start_gateway(upstream.endpoint, METERED)
        async with gateway.post(json={**CHAT, "stream": True}, key=None) as answer:
            received = await answer.read()
        assert received.endswith(b"data: [DONE]\n\n")
        await gateway.idle()
        (event,) = gateway.exchanges()
        assert (event["input_tokens"], event["usage_source"]) == (7, "reported")


@pytest.mark.parametrize("chunked", [False, True])
async def test_errors_are_read_in_it(chunked: bool, start_gateway: StartGateway) -> None:
    """A 404 for a missing deployment has OpenAI's words."""
    text = json.dumps({"error": {"code": "DeploymentNotFound", "message": "The API deployment does not exist."}})
    async with raw_upstream(packed_answer(gzip.compress(text.encode()), status=404, chunked=chunked)) as upstream:
        gateway = await start_gateway(upstream.endpoint, METERED)
        async with gateway.post(json=CHAT, key=None) as answer:
            error = (await answer.json())["error"]
    assert (answer.status, error["code"], error["param"]) == (404, "model_not_found", "model")


POOL = """
resources:
  azure: {endpoint: "${ENDPOINT}", api_key: k}
  other: {endpoint: "${OTHER}", api_key: k}
auth: none
pools: {p: [azure/m, {deployment: other/m, priority: 2}]}
pipeline: [access_log, {model_map: {models: {gpt-4o: "pool:p"}, unmapped: refuse}}, balance, api_version: 2024-10-21]
"""


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (
            packed_answer(gzip.compress(b'{"error":{"code":"DeploymentNotFound","message":"no"}}'), status=404),
            "no_deployment",
        ),
        (packed_answer(b"\x0b\x01\x80{}\x03", encoding="br"), "encoding"),
        (b"HTTP/1.1 302 F\r\nLocation: https://elsewhere.example\r\nContent-Length: 0\r\n\r\n", "redirect"),
    ],
    ids=["error", "brotli", "redirect"],
)
async def test_a_pool_looks_into_it(first: bytes, reason: str, start_gateway: StartGateway) -> None:
    """An error in it, an unreadable body or a redirect is a failure of the deployment: the gateway tries another."""
    good: bytes = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    async with raw_upstream(first) as upstream, raw_upstream(good) as other:
        gateway = await start_gateway(upstream.endpoint, POOL, env={"OTHER": other.endpoint})
        async with gateway.post(json=CHAT, key=None) as answer:
            assert (answer.status, await answer.read()) == (200, b"{}")
        await gateway.idle()
        assert [each["reason"] for each in gateway.exchanges()[0]["attempts"][:1]] == [reason]


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress"])
async def test_other_codings_are_refused(encoding: str, start_gateway: StartGateway) -> None:
    """The gateway cannot read them, and the client did not ask for them."""
    async with raw_upstream(packed_answer(b"12345", encoding=encoding)) as upstream:
        gateway = await start_gateway(upstream.endpoint, METERED)
        async with gateway.post(json=CHAT, key=None) as answer:
            error = (await answer.json())["error"]
    assert (answer.status, error["code"]) == (502, "unsupported_encoding")
    assert encoding in error["message"]


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_broken_one_never_passes_for_complete(chunked: bool, start_gateway: StartGateway) -> None:
    """It is a 502, or a truncated body."""
    import aiohttp

    async with raw_upstream(packed_answer(gzip.compress(b"{}" * 9000)[:-9], chunked=chunked)) as upstream:
        gateway = await start_gateway(upstream.endpoint)
        try:
            async with gateway.post(json=CHAT) as answer:
                await answer.read()
                assert answer.status == 502
        except aiohttp.ClientPayloadError:
            pass


async def test_a_compressed_file_keeps_its_bytes(start_gateway: StartGateway) -> None:
    """A gzip file has no content coding: it passes."""
    data = gzip.compress(b"a file")
    raw = b"HTTP/1.1 200 OK\r\nContent-Type: application/gzip\r\nContent-Length: %d\r\n\r\n" % len(data)
    async with raw_upstream(raw + data) as upstream:
        gateway = await start_gateway(upstream.endpoint)
        async with gateway.session.get(f"{gateway.url}/v1/files/file-1/content", headers={"api-key": "k"}) as answer:
            assert await answer.read() == data
