"""The corpus: valid requests and responses, and the rows of `tests/data`."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ("KEY", "REQUESTS", "RESPONSES", "SOUND_REQUESTS", "UPLOADS", "chunked", "request")

KEY = "fuzz-client-key-4711"
"""The client's key: it must not appear in a response to a client or in a log."""

_DATA = Path(__file__).parent.parent / "data"
_CHAT = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
_FORM = (
    b'--cut\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n'
    b'--cut\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
    b"Content-Type: audio/wav\r\n\r\nRIFF\x00\x01\r\n--cu\r\n--cut--\r\n"
)


def request(
    path: str = "/v1/chat/completions",
    body: bytes | None = None,
    *,
    method: str = "POST",
    fields: Sequence[bytes] = (),
    chunks: Sequence[int] = (),
    version: bytes = b"1.1",
) -> bytes:
    """Return the bytes of a request; with `chunks`, its body is in chunks of these sizes."""
    lines = [b"%b %b HTTP/%b" % (method.encode(), path.encode(), version), b"Host: gw.test"]
    lines += [b"Authorization: Bearer " + KEY.encode(), *fields]
    if body is None:
        return b"\r\n".join(lines) + b"\r\n\r\n"
    if not any(line.lower().startswith(b"content-type") for line in fields):
        lines.append(b"Content-Type: application/json")
    if chunks:
        return b"\r\n".join([*lines, b"Transfer-Encoding: chunked"]) + b"\r\n\r\n" + chunked(body, chunks)
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body)]) + b"\r\n\r\n" + body


def chunked(body: bytes, sizes: Sequence[int], *, extension: bytes = b"", trailers: bytes = b"") -> bytes:
    """Return a body in chunks of these sizes; the last size repeats."""
    out = b""
    offset = number = 0
    while offset < len(body):
        size = max(1, sizes[min(number, len(sizes) - 1)])
        piece = body[offset : offset + size]
        out += b"%x%b\r\n%b\r\n" % (len(piece), extension, piece)
        offset += size
        number += 1
    return out + b"0\r\n" + trailers + b"\r\n"


_FILE = (
    b'--cut\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nassistants\r\n'
    b'--cut\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
    + b"0123456789" * 40
    + b"\r\n--cut--\r\n"
)


def _rows(name: str) -> list[bytes]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (_DATA / name).read_text().splitlines()]
    return [row["raw"].encode("latin-1").replace(b"{KEY}", KEY.encode()) for row in rows if row["raw"]]


def _chat(**more: object) -> bytes:
    return json.dumps({**_CHAT, **more}).encode()


_FORM_TYPE = b"Content-Type: multipart/form-data; boundary=cut"

_SOUND = (
    request(body=_chat()),
    request(body=_chat(stream=True)),
    request(body=_chat(), chunks=[7]),
    request(body=_chat(user="x" * 3000), chunks=[1, 200, 3]),
    request("/full/v1/chat/completions", _chat()),
    request("/full/v1/chat/completions", _chat(stream=True, n=2)),
    request("/v1/embeddings", b'{"model":"text-embedding-3-small","input":["a","b"]}'),
    request("/v1/audio/transcriptions", _FORM, fields=[_FORM_TYPE]),
    request("/v1/audio/transcriptions", _FORM, fields=[_FORM_TYPE], chunks=[16]),
    request("/v1/files", _FILE, fields=[_FORM_TYPE]),
    request("/v1/files", _FILE, fields=[_FORM_TYPE], chunks=[1, 50, 9]),
    request("/v1/models", method="GET"),
    request("/v1/files?limit=3", method="GET"),
    request("/v1/files/file-abc", method="DELETE"),
    request("/v1/responses", b'{"model":"gpt-4o","input":"hi"}'),
    request("/healthz", method="GET"),
    request("/readyz", method="HEAD"),
    request(body=_chat(), fields=[b"Expect: 100-continue"]),
    request(body=_chat(), fields=[b"Connection: close"]),
    request(body=_chat(), version=b"1.0"),
    request(
        "/v1/realtime?model=gpt-4o",
        method="GET",
        fields=[
            b"Connection: Upgrade",
            b"Upgrade: websocket",
            b"Sec-WebSocket-Version: 13",
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        ],
    ),
)

SOUND_REQUESTS = tuple(
    raw.replace(b"\r\n", b"\r\nX-Nonce: sound-%d\r\n" % number, 1) for number, raw in enumerate(_SOUND)
)

REQUESTS = (*SOUND_REQUESTS * 6, *_rows("hostile_requests.jsonl"), *_rows("gateway_inputs.jsonl"))
"""The valid ones have a weight of six: a mutant of a request that is refused anyway finds less."""

UPLOADS = tuple(
    (request(path, fields=[b"X-Nonce: upload", _FORM_TYPE, b"Transfer-Encoding: chunked"]), body)
    for path, body in (("/v1/files", _FILE), ("/v1/audio/transcriptions", _FORM))
)
"""Heads of chunked uploads, and their bodies."""

_COMPLETION = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_714_036_974,
        "model": "gpt-4o-2024-11-20",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello"},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
        "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": {}}],
    }
).encode()


def _event(choices: list[Any], **more: Any) -> bytes:
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o", "choices": choices}
    return b"data: " + json.dumps({**chunk, **more}).encode() + b"\n\n"


_STREAM = (
    _event([], prompt_filter_results=[{"prompt_index": 0, "content_filter_results": {}}])
    + _event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    + _event([{"index": 0, "delta": {"content": "h\u00e9llo"}, "finish_reason": None}])
    + _event([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    + _event([], usage={"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12})
    + b"data: [DONE]\n\n"
)
_ERROR = b'{"error":{"code":"429","message":"Requests have exceeded the limit. Please retry after 3 seconds."}}'


def _response(
    status: str = "200 OK", kind: str = "application/json", body: bytes = _COMPLETION, *lines: bytes, sized: bool = True
) -> bytes:
    length = [b"Content-Length: %d" % len(body)] if sized else []
    head = [f"HTTP/1.1 {status}".encode(), f"Content-Type: {kind}".encode(), *length, *lines]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def _answer_in_chunks(kind: str, body: bytes, sizes: Sequence[int], *lines: bytes, extension: bytes = b"") -> bytes:
    return _response(
        "200 OK", kind, chunked(body, sizes, extension=extension), b"Transfer-Encoding: chunked", *lines, sized=False
    )


_SSE = "text/event-stream; charset=utf-8"
_INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"

RESPONSES = (
    _response(),
    _response(),
    _response(sized=False),
    _answer_in_chunks("application/json", _COMPLETION, [100]),
    _answer_in_chunks("application/json", _COMPLETION, [1], extension=b";a=b"),
    _answer_in_chunks(_SSE, _STREAM, [len(_STREAM)]),
    _answer_in_chunks(_SSE, _STREAM, [90, 1, 200]),
    _answer_in_chunks(_SSE, _STREAM.replace(b"\n", b"\r\n"), [50]),
    _response("200 OK", _SSE, _STREAM),
    _response("200 OK", _SSE, _STREAM, sized=False),
    _response("200 OK", "application/json", gzip.compress(_COMPLETION, mtime=0), b"Content-Encoding: gzip"),
    _answer_in_chunks(_SSE, gzip.compress(_STREAM, mtime=0), [40], b"Content-Encoding: gzip"),
    _response("429 Too Many Requests", "application/json", _ERROR, b"Retry-After: 3", b"retry-after-ms: 2500"),
    _response("400 Bad Request", "application/json", _ERROR),
    _response("404 Not Found", "text/plain", b""),
    _response("500 Internal Server Error", "text/html", b"<html>oh</html>"),
    _response("302 Found", "text/html", b"", b"Location: http://127.0.0.1:1/steal"),
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
    _INTERIM + _response(),
    _INTERIM + _answer_in_chunks(_SSE, _STREAM, [300]),
    _response("200 OK", "audio/mpeg", bytes(range(256)) * 8),
    *_rows("upstream_answers.jsonl"),
)
