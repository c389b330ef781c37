"""The bytes of the traffic: requests as openai-python sends them, and Azure's responses."""

from __future__ import annotations

import functools
import json

MODEL, KEY = "gpt-4o", "0123456789abcdef0123456789abcdef"
DEPLOYMENT, API_VERSION = "bench", "2024-10-21"
CHAT = "/v1/chat/completions"
AZURE_CHAT = f"/openai/deployments/{DEPLOYMENT}/chat/completions?api-version={API_VERSION}"

_TEXT = "It moves the key to its own field, writes the path anew, and adds the version that Azure asks for. "


def body(size: int, *, model: str = MODEL, stream: bool = False) -> bytes:
    """Return the body of a chat request, filled up to `size` bytes by its message."""
    question = {"role": "user", "content": ""}
    wanted: dict[str, object] = {
        "model": model,
        "messages": [{"role": "system", "content": "Answer briefly."}, question],
    }
    if stream:
        wanted["stream"] = True
    question["content"] = _fill(size - len(json.dumps(wanted)))
    return json.dumps(wanted).encode()


def request(content: bytes, path: str = CHAT, key: str = KEY) -> bytes:
    """Return a complete request of a client."""
    return _request(path, f"Authorization: Bearer {key}", content)


def team_key(team: int, number: int) -> str:
    """Return one of a team's keys."""
    return f"{team:016x}{number:016x}"


def request_to_azure(content: bytes) -> bytes:
    """Return the same request in Azure's form, to be sent to the upstream directly."""
    return _request(AZURE_CHAT, f"api-key: {KEY}", content)


def _request(path: str, key: str, content: bytes) -> bytes:
    head = f"""\
POST {path} HTTP/1.1
Host: 127.0.0.1
Accept-Encoding: gzip, deflate
Connection: keep-alive
Accept: application/json
Content-Type: application/json
User-Agent: OpenAI/Python 1.109.1
X-Stainless-Lang: python
X-Stainless-Package-Version: 1.109.1
X-Stainless-OS: Linux
X-Stainless-Arch: x64
X-Stainless-Runtime: CPython
X-Stainless-Runtime-Version: 3.11.2
{key}
X-Stainless-Async: false
x-stainless-retry-count: 0
x-stainless-read-timeout: 600
Content-Length: {len(content)}

"""
    return head.replace("\n", "\r\n").encode() + content


def answer(size: int = 815) -> bytes:
    """Return the body of a plain response."""
    message = {"role": "assistant", "content": ""}
    whole = {
        "id": "chatcmpl-AAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "gpt-4o-2024-08-06",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 220, "completion_tokens": 110, "total_tokens": 330},
    }
    message["content"] = _fill(size - len(json.dumps(whole)))
    return json.dumps(whole).encode()


def event(size: int = 250) -> bytes:
    """Return one event of a stream."""
    encoded = functools.partial(json.dumps, separators=(",", ":"))  # as Azure does
    delta = {"content": ""}
    chunk = {
        "id": "chatcmpl-AAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "gpt-4o-2024-08-06",
        "choices": [{"index": 0, "finish_reason": None, "delta": delta}],
    }
    delta["content"] = _fill(size - len(f"data: {encoded(chunk)}\n\n"))
    return f"data: {encoded(chunk)}\n\n".encode()


def _fill(size: int) -> str:
    assert size >= 0, "there is more than that already"
    return (_TEXT * (size // len(_TEXT) + 1))[:size]
