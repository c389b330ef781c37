"""`missing_message`: a completion that the filter withheld gets a message."""

from __future__ import annotations

import json

import pytest

from gateway import Response
from gateway.testing import post, send
from plugins.missing_message import MissingMessage

JSON = {"content-type": "application/json", "content-length": "1"}
WITHHELD = {"content_filter_results": {}, "finish_reason": "content_filter", "index": 0, "logprobs": None}
SAID = {"finish_reason": "stop", "index": 1, "message": {"role": "assistant", "content": "Hi"}}


async def test_a_withheld_choice_gets_an_empty_message() -> None:
    """Its finish_reason stays, and so do the other choices."""
    content = {"choices": [WITHHELD, SAID], "id": "chatcmpl-1", "usage": {"total_tokens": 3}}
    sent = await post(MissingMessage(), response=Response(200, json.dumps(content).encode(), JSON), json={})
    message = {"role": "assistant", "content": "", "refusal": None}
    assert sent.json() == {**content, "choices": [{**WITHHELD, "message": message}, SAID]}
    assert "content-length" not in sent.headers
    assert dict(sent.outcome.counts) == {"MissingMessage": 1}


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("/chat/completions", 200, b'{"choices":[{"finish_reason":"content_filter","message":{"content":"cut"}}]}'),
        ("/chat/completions", 200, b'{ "choices" : [ {"finish_reason":"stop"} ] }'),
        ("/chat/completions", 200, b'{"choices":[1,null],"content_filter":1} "content_filter"'),
        ("/chat/completions", 200, b'["content_filter"]'),
        ("/chat/completions", 400, b'{"error":{"code":"content_filter"},"choices":[{}]}'),
        ("/completions", 200, b'{"choices":[{"finish_reason":"content_filter","text":""}]}'),
    ],
)
async def test_everything_else_keeps_its_bytes(path: str, status: int, body: bytes) -> None:
    """A choice with a message, one that was not withheld, another operation, or invalid JSON."""
    sent = await send([MissingMessage()], path=path, response=Response(status, body, JSON))
    assert (sent.body, sent.outcome.counts) == (body, {})


async def test_an_answer_in_pieces_is_mended_too() -> None:
    """Azure's gateways may send one in chunks."""

    async def pieces() -> object:
        for byte in json.dumps({"choices": [WITHHELD]}).encode():
            yield bytes([byte])

    sent = await post(MissingMessage(), response=lambda _: Response(200, pieces(), JSON), json={})  # type: ignore[arg-type]
    assert sent.json()["choices"][0]["message"]["content"] == ""


@pytest.mark.parametrize("content_type", [None, "", "application/octet-stream", "text/event-stream"])
async def test_what_is_not_called_json_streams_on(content_type: str | None) -> None:
    """Streams have come without their type through API Management: they are not buffered."""

    async def pieces() -> object:
        yield b"data: 1"

    headers = {} if content_type is None else {"content-type": content_type}
    body = pieces()
    sent = await post(MissingMessage(), response=lambda _: Response(200, body, headers), json={})  # type: ignore[arg-type]
    assert (sent.response.body, sent.body) == (body, b"data: 1")


async def test_a_number_that_json_cannot_say_again_leaves_an_answer_alone() -> None:
    """It would become `Infinity`, which is not JSON."""
    body = b'{"choices":[{"finish_reason":"content_filter","score":1e400}]}'
    assert (await post(MissingMessage(), response=Response(200, body, JSON), json={})).body == body
