"""Errors that quote the key of the resource are redacted."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.azure.key_redaction import redact_chunks, redact_headers
from gateway.protocol.headers import Headers
from tests.conftest import CHAT, KEY, StartGateway, raw_upstream

SECRET = "0123456789abcdef-the-key-of-the-resource"
STORED = """
resources: {azure: {endpoint: "${ENDPOINT}", api_key: SECRET}}
auth: none
pipeline: [access_log, model_map: {unmapped: own_name_without_dots}, api_version: VERSION]
""".replace("SECRET", SECRET)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["ab", "abab", "a", "b", "c", "bab"]), max_size=30))
def test_a_secret_split_across_chunks_is_redacted(pieces: list[str]) -> None:
    """As if the body had come in one chunk; nothing else changes."""
    import asyncio

    async def cut() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece.encode()

    async def read() -> bytes:
        return b"".join([piece async for piece in redact_chunks(cut(), b"abc")])

    whole = "".join(pieces).encode()
    assert asyncio.run(read()) == whole.replace(b"abc", b"***")


def test_header_fields_are_masked() -> None:
    """Only fields with the secret change."""
    headers = Headers({"www-authenticate": f"Bearer error={SECRET}", "x-other": "stays"})
    redact_headers(headers, SECRET.encode())
    assert dict(headers) == {"www-authenticate": "Bearer error=***", "x-other": "stays"}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("status", [400, 401, 403, 500])
async def test_an_error_that_quotes_the_stored_key(status: int, chunked: bool, start_gateway: StartGateway) -> None:
    """Neither the client nor the log gets it, whichever stages there are."""
    body = json.dumps({"error": {"message": f"the key {SECRET} is not valid ({SECRET})", "code": str(status)}}).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nX-Detail: key={SECRET}\r\n"
    if chunked:
        parts = b"".join(b"%x\r\n%b\r\n" % (len(body[at : at + 9]), body[at : at + 9]) for at in range(0, len(body), 9))
        raw = head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + parts + b"0\r\n\r\n"
    else:
        raw = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    async with raw_upstream(raw) as upstream:
        gateway = await start_gateway(upstream.endpoint, STORED.replace("VERSION", "2024-10-21"))
        async with gateway.post(json=CHAT, key=None) as answer:
            text = await answer.text()
    assert answer.status == status
    assert json.loads(text)["error"]["message"] == "the key *** is not valid (***)"
    assert answer.headers["x-detail"] == "key=***"
    assert SECRET not in json.dumps(gateway.events, default=str)


async def test_the_client_s_own_key_is_not_redacted(start_gateway: StartGateway) -> None:
    """The client may read the key that it sent."""
    body = json.dumps({"error": {"message": f"the key {KEY} is not valid"}}).encode()
    raw = b"HTTP/1.1 401 X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    async with raw_upstream(raw) as upstream:
        gateway = await start_gateway(upstream.endpoint)
        async with gateway.post(json=CHAT) as answer:
            assert KEY in await answer.text()


async def test_a_refused_handshake_that_quotes_the_key(start_gateway: StartGateway) -> None:
    """The response to a WebSocket handshake is an error like any other."""
    body = json.dumps({"error": {"message": f"the key {SECRET} is not valid"}}).encode()
    raw = b"HTTP/1.1 401 X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    async with raw_upstream(raw) as upstream:
        gateway = await start_gateway(upstream.endpoint, STORED.replace("VERSION", "2025-04-01-preview"))
        headers = {
            "connection": "upgrade",
            "upgrade": "websocket",
            "sec-websocket-version": "13",
            "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
        }
        url = f"{gateway.url}/v1/realtime?model=gpt-4o"
        async with gateway.session.get(url, headers=headers) as answer:
            text = await answer.text()
    assert answer.status == 401
    assert "***" in text
    assert SECRET not in text


STREAMS = """
resources: {azure: {endpoint: "${ENDPOINT}", api_key: SECRET}}
auth: none
pools: {p: [azure/m]}
pipeline:
  - access_log
  - stream_errors
  - model_map: {models: {gpt-4o: "MODEL"}, unmapped: refuse}
  BALANCE
  - api_version: 2024-10-21
""".replace("SECRET", SECRET)


@pytest.mark.parametrize(("model", "balance"), [("azure/m", ""), ("pool:p", "- balance: {wait: 0}")])
async def test_an_error_at_the_beginning_of_a_stream(model: str, balance: str, start_gateway: StartGateway) -> None:
    """A stage or a pool turns it into an error response, which is redacted like any other; so is the log."""
    error = {"error": {"message": f"the key {SECRET} has no quota", "code": "429", "type": "requests"}}
    event = b"data: " + json.dumps(error).encode() + b"\n\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(event)
    async with raw_upstream(head + event) as upstream:
        yaml = STREAMS.replace("MODEL", model).replace("BALANCE", balance)
        gateway = await start_gateway(upstream.endpoint, yaml)
        async with gateway.post(json={**CHAT, "stream": True}, key=None) as answer:
            text = await answer.text()
    assert answer.status == 429
    assert "the key *** has no quota" in text
    assert SECRET not in text + json.dumps(gateway.events, default=str)
