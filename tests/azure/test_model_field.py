"""The model in a JSON body. Forms, paths and queries are in test_deployment_field, with the deployment's name."""

from __future__ import annotations

import json

import pytest

from gateway.azure.model_field import model_in
from gateway.azure.operations import BY_NAME
from gateway.testing import send
from plugins.model_map import ModelMap


@pytest.mark.parametrize(
    "value",
    [
        b'"' + b"a" * 2047 + b'"',
        b"[" + b"[]," * 100_000 + b"[]]",
        b"[" + b"[]," * 700_000 + b"[]]",
        b'{"a":' * 100 + b"1" + b"}" * 100,
        b"[1]",
        b"17",
    ],
    ids=["long", "lists", "more lists", "deep", "short list", "number"],
)
@pytest.mark.parametrize("body", [b'{"model":%b}', b'{"x":"\\ud83d","model":%b}'], ids=["plain", "half a pair"])
async def test_a_model_is_read_as_bytes_and_never_decoded_into_objects(value: bytes, body: bytes) -> None:
    """At most the first 2 KB of a value are read; a value that is not short text is refused."""
    sent = await send([ModelMap(unmapped="own_name")], body=body % value)
    assert sent.status in ({400} if len(value) < 1_000_000 else {400, 413})
    assert sent.reached is None


@pytest.mark.parametrize("name", ["gpt-4o", "\u00e9" * 256, 'a"b'])
async def test_an_escaped_name_is_the_name(name: str) -> None:
    """However it is written: 256 characters take at most six bytes each."""
    for ensure_ascii in (True, False):
        body = json.dumps({"model": name}, ensure_ascii=ensure_ascii).encode()
        assert model_in(body, BY_NAME["chat.completions"]) == name
