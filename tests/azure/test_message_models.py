"""Models in the messages of a WebSocket: each becomes its deployment."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from gateway.azure.message_models import MessageModels
from gateway.azure.resources import Resource, Target
from gateway.errors import ApiError
from gateway.protocol.sse import Event


class Mapping:
    """A request whose WebSocket is open to one resource, and its model map."""

    def __init__(self) -> None:
        self.notes: dict[str, object] = {}
        self.last_target = Target(resource=Resource("azure", "https://azure.test"))

    def find(self, model: str) -> Target:
        if model != "mine":
            raise ApiError(404, f"no model {model}", code="model_not_found")
        return self.last_target.replace(deployment="prod-4o")


def mapped(message: bytes) -> bytes:
    request: Any = Mapping()
    return MessageModels(request, request.find).event(Event(message)).raw


MANY = b'"many":{%b"last":0}' % (b'"k":0,' * 200_000)


@pytest.mark.parametrize("more", [b'"input":"a, \\u00e9: 1.50"', MANY], ids=["few fields", "many fields"])
@pytest.mark.parametrize(
    "message",
    [
        b'{"type":"response.create","model":"mine",MORE}',
        b'{MORE,"type":"response.create","model":  "mine"}',
        b'{"response":{"model":"mine","n":1e2},MORE}',
        b'{MORE,"response":{"n":1e2,"model":"mine"}}',
    ],
)
def test_the_model_of_a_message_is_mapped_and_the_rest_keeps_its_bytes(message: bytes, more: bytes) -> None:
    """At the top level or in `response`, before or after other fields, however many there are."""
    sent = message.replace(b"MORE", more)
    assert mapped(sent).replace(b"  ", b"") == sent.replace(b"mine", b"prod-4o").replace(b"  ", b"")


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (b'{"model":"forbidden","model":"mine"}', b'{"model":"prod-4o"}'),
        (b'{"response":{"model":"forbidden"},"response":{}}', b'{"response":{}}'),
        (b'{"response":{"model":"forbidden"},"r\\u0065sponse":{"model":"mine"}}', b'{"response":{"model":"prod-4o"}}'),
        (b'{"response":{"model":"forbidden","mod\\u0065l":"mine"}}', b'{"response":{"model":"prod-4o"}}'),
        (b'{"x":{"model":"theirs"}}', b'{"x":{"model":"theirs"}}'),
        (b'{"response":["model"]}', b'{"response":["model"]}'),
    ],
)
def test_a_duplicate_key_is_sent_once(message: bytes, wanted: bytes) -> None:
    """Of two equal keys, Azure could read the unchecked one. With very many fields the message is refused instead."""
    assert mapped(message) == wanted
    with_many = message[:-1] + b"," + MANY + b"}"
    if wanted == message:
        assert mapped(with_many) == with_many
    else:
        with pytest.raises(ApiError) as caught:
            mapped(with_many)
        assert caught.value.status == 400


def test_a_lone_surrogate_in_a_message_is_sent_unchanged() -> None:
    """In a value, and in a key; JavaScript sends one if a text was cut inside a pair."""
    sent = rb'{"x":"\ud83d","\ud83d":1,"model":"mine"}'
    assert mapped(sent) == sent.replace(b"mine", b"prod-4o")


@pytest.mark.parametrize("model", [b"5", b"null", b'["mine"]', b'"%b"' % (b"m" * 3000), b'"other"'])
def test_an_invalid_model_is_refused_in_any_message(model: bytes) -> None:
    """By an ApiError, which is sent to the client."""
    for more in (b'"x":1', MANY):
        for message in (b'{"model":%b,%b}', b'{"response":{"model":%b},%b}'):
            with pytest.raises(ApiError):
                mapped(message % (model, more))


def test_a_large_message_is_not_decoded() -> None:
    """A million empty lists in a message do not become objects: memory stays below a few copies of the bytes."""
    message = b'{"type":"response.create","model":"mine","x":[' + b"[]," * 1_000_000 + b"[]]}"
    tracemalloc.start()
    try:
        assert len(mapped(message)) == len(message) + 3
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(message)
