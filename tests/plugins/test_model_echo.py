"""`model_echo`: responses name the model that the client requested."""

from __future__ import annotations

import json

from gateway import Response
from gateway.testing import FakeAzure, post
from plugins.model_echo import ModelEcho
from tests.conftest import CHAT, YAML, StartGateway

ECHOED = YAML.replace("{unmapped: own_name_without_dots}", "{models: {my-model: gpt-4o}}") + "  - model_echo\n"


async def test_json_and_streams_name_the_client_s_model(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """In place of Azure's `gpt-4o-2024-11-20`; the first chunk, which has no model, stays unchanged."""
    gateway = await start_gateway(azure.endpoint, ECHOED)
    async with gateway.post(json={**CHAT, "model": "my-model"}) as answer:
        content = await answer.json()
    assert content["model"] == "my-model"
    assert content["choices"][0]["message"]["content"] == "Hello there!"
    async with gateway.post(json={**CHAT, "model": "my-model", "stream": True}) as answer:
        text = await answer.text()
    chunks = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    assert [chunk["model"] for chunk in chunks] == ["", *["my-model"] * (len(chunks) - 1)]
    assert text.endswith("data: [DONE]\n\n")


async def test_events_of_the_responses_api() -> None:
    """They have the response in a field; the event's type stays."""
    stream = b'event: response.created\ndata: {"type":"response.created","response":{"id":"r","model":"d"}}\n\n'
    sent = await post(ModelEcho(), response=Response(200, stream, {"content-type": "text/event-stream"}), json=CHAT)
    expected = b'event: response.created\ndata: {"type":"response.created","response":{"id":"r","model":"gpt-4o"}}\n\n'
    assert sent.body == expected


async def test_large_answers_and_half_surrogates_are_no_trouble() -> None:
    """A body above 4 MiB passes; half of a surrogate pair stays as JSON has it."""
    large = b'{"model":"x","data":"' + b"A" * 5_000_000 + b'"}'
    for body, expected in (
        (large, large),
        (rb'{"model":"x","text":"\ud83d"}', rb'{"model": "gpt-4o", "text": "\ud83d"}'),
    ):
        sent = await post(ModelEcho(), response=Response(200, body, {"content-type": "application/json"}), json=CHAT)
        assert sent.body == expected


async def test_what_names_no_model_keeps_its_bytes() -> None:
    """So do errors, a body that is not a JSON object, and one that has the right name."""
    for status, body, kind in (
        (200, b'{ "a": 1.50 }', "application/json"),
        (200, b'{ "model": "gpt-4o" }', "application/json"),
        (200, b"[1]", "application/json"),
        (200, b"{", "application/json"),
        (200, b'{"model": "x"}', "text/plain"),
        (400, b'{"model": "x"}', "application/json"),
        (200, b'data: {"model": ""}\n\ndata: [DONE]\n\n', "text/event-stream"),
    ):
        sent = await post(ModelEcho(), response=Response(status, body, {"content-type": kind}), json=CHAT)
        assert sent.body == body
