"""Compressed answers: read as plain ones are, in bounded pieces, or refused."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import UpstreamError
from gateway.http1 import parse_response
from gateway.inflate import Inflater, inflated
from tests.conftest import CHAT, StartGateway, raw_upstream

PIECE = 64 * 1024


def fed(inflater: Inflater, *pieces: bytes) -> list[bytes]:
    return [made for piece in pieces for made in inflater.feed(piece)]


@settings(deadline=None)
@given(st.lists(st.binary(max_size=200), min_size=1, max_size=3), st.integers(1, 50), st.booleans())
def test_whatever_the_cuts_the_text_is_the_same(members: list[bytes], cut: int, gzipped: bool) -> None:
    """Of several gzip members, too; a body that ends too early is broken."""
    packed = b"".join(map(gzip.compress, members)) if gzipped else zlib.compress(members[0])
    inflater = Inflater()
    pieces = fed(inflater, *(packed[at : at + cut] for at in range(0, len(packed), cut)))
    inflater.close()
    assert b"".join(pieces) == (b"".join(members) if gzipped else members[0])
    early = Inflater()
    fed(early, packed[:-1])
    with pytest.raises(UpstreamError):
        early.close()


def test_a_small_body_that_becomes_a_large_one_comes_in_small_pieces() -> None:
    """A hundred kilobytes of gzip that are a hundred megabytes: none of its pieces is larger than 64 KiB."""
    size = 100_000_000
    packed = gzip.compress(bytes(size))
    assert len(packed) < 120_000
    lengths = [len(piece) for piece in Inflater().feed(packed)]
    assert sum(lengths) == size
    assert max(lengths) == PIECE


@pytest.mark.parametrize(
    "data",
    [b"no gzip at all", gzip.compress(b"x") + b"garbage", gzip.compress(b"xyz")[:-6] + b"zzzzzz"],
    ids=["none", "garbage-after-it", "wrong-checksum"],
)
def test_what_is_broken_is_an_error_of_azure(data: bytes) -> None:
    """And not one of the gateway's own."""
    with pytest.raises(UpstreamError) as caught:
        fed(Inflater(), data)
    assert caught.value.fault == "encoding"


async def test_the_watch_sees_plain_text_before_its_reader_does() -> None:
    """It is taken as it is read: nothing is inflated for a reader that does not read."""
    seen: list[bytes] = []

    async def pieces() -> AsyncIterator[bytes]:
        yield gzip.compress(bytes(10 * PIECE))

    body = inflated(pieces(), seen.append)
    await anext(body)
    assert [len(each) for each in seen] == [PIECE]
    async for _ in body:
        pass
    assert b"".join(seen) == bytes(10 * PIECE)


@pytest.mark.parametrize(
    ("value", "encoding"),
    [
        ("gzip", b"gzip"),
        ("GZIP", b"gzip"),
        ("br", b"br"),
        ("deflate, gzip", b"deflate, gzip"),
        ("identity", None),
        ("", None),
        ("utf-8", None),
        ("brown", None),
    ],
)
def test_which_answers_are_compressed(value: str, encoding: bytes | None) -> None:
    """By the codings that are registered; two lines are as one."""
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {value}"
    assert parse_response(head.encode()).encoding == encoding
    if encoding is not None:
        twice = parse_response(f"{head}\r\nContent-Encoding: br".encode()).encoding
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
    """What is missing in it is put in, and its tokens are counted, as of a plain one."""
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
    """And its events are filtered as those of a plain one."""
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
    """A 404 for a deployment that is not there says so in OpenAI's words."""
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
    """What it says, or that it is not to be read, or a redirect, is a failure of the deployment: another is asked."""
    good: bytes = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    async with raw_upstream(first) as upstream, raw_upstream(good) as other:
        gateway = await start_gateway(upstream.endpoint, POOL, env={"OTHER": other.endpoint})
        async with gateway.post(json=CHAT, key=None) as answer:
            assert (answer.status, await answer.read()) == (200, b"{}")
        await gateway.idle()
        assert [each["reason"] for each in gateway.exchanges()[0]["attempts"][:1]] == [reason]


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress"])
async def test_other_codings_are_refused(encoding: str, start_gateway: StartGateway) -> None:
    """Nothing here could read them, and a client did not ask for them."""
    async with raw_upstream(packed_answer(b"12345", encoding=encoding)) as upstream:
        gateway = await start_gateway(upstream.endpoint, METERED)
        async with gateway.post(json=CHAT, key=None) as answer:
            error = (await answer.json())["error"]
    assert (answer.status, error["code"]) == (502, "unsupported_encoding")
    assert encoding in error["message"]


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_broken_one_is_never_taken_for_whole(chunked: bool, start_gateway: StartGateway) -> None:
    """A 502, or a body that is cut off."""
    import aiohttp

    async with raw_upstream(packed_answer(gzip.compress(b"{}" * 9000)[:-9], chunked=chunked)) as upstream:
        gateway = await start_gateway(upstream.endpoint)
        try:
            async with gateway.post(json=CHAT) as answer:
                await answer.read()
                assert answer.status == 502
        except aiohttp.ClientPayloadError:
            pass


async def test_a_file_that_is_kept_compressed_keeps_its_bytes(start_gateway: StartGateway) -> None:
    """A gzip file is no content encoding: it passes."""
    data = gzip.compress(b"a file")
    raw = b"HTTP/1.1 200 OK\r\nContent-Type: application/gzip\r\nContent-Length: %d\r\n\r\n" % len(data)
    async with raw_upstream(raw + data) as upstream:
        gateway = await start_gateway(upstream.endpoint)
        async with gateway.session.get(f"{gateway.url}/v1/files/file-1/content", headers={"api-key": "k"}) as answer:
            assert await answer.read() == data
