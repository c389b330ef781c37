"""Requests as stages read and change them."""

from __future__ import annotations

import pytest

from gateway import ApiError, Headers, Request
from gateway.auth.credentials import key_digest
from gateway.azure.operations import BY_NAME
from gateway.azure.resources import Target
from gateway.body.request_body import Body
from gateway.exchange import Exchange


def request(body: bytes = b"", headers: dict[str, str] | None = None) -> Request:
    return Request(
        id="r",
        operation=BY_NAME["chat.completions"],
        method="POST",
        path="/chat/completions",
        headers=Headers(headers or {}),
        body=Body(body),
        team="t",
        target=Target(),
        exchange=Exchange(),
    )


async def test_json_is_decoded_once_and_shared() -> None:
    """Every stage gets the same object; `set_json` replaces it."""
    one = request(b'{"model": "m", "a": 1.50}')
    assert await one.json() is await one.json()
    assert await one.body() == b'{"model": "m", "a": 1.50}'
    twin = one.copy()
    twin.set_json({"model": "n"})
    assert (await one.model(), await twin.model()) == ("m", "n")
    assert (await one.body(), await twin.body()) == (b'{"model": "m", "a": 1.50}', b'{"model":"n"}')


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"1", b"{", b"\xef\xbb\xbf{}", b'{"a":1}{"b":2}', b'"\xff"', b"[" * 100_000]
)
async def test_a_body_that_is_not_a_json_object_is_a_400(body: bytes) -> None:
    """Whatever it contains; never an internal error."""
    with pytest.raises(ApiError) as caught:
        await request(body).json()
    assert caught.value.status == 400
    with pytest.raises(ApiError) as caught:
        await request(body).model()
    assert caught.value.status == 400


async def test_a_lone_surrogate_is_valid_json() -> None:
    """JavaScript sends one if a text was cut inside a pair; the body passes unchanged."""
    body = b'{"model": "m", "messages": [{"role": "user", "content": "\\ud83d"}]}'
    one = request(body)
    assert (await one.model(), await one.body()) == ("m", body)
    content = await one.json()
    assert content["messages"][0]["content"] == "\ud83d"
    one.set_json({**content, "a": 1})
    assert b"\\ud83d" in await one.body()
    with pytest.raises(ApiError):
        await request(b'{"a": "\\ud83d", }').json()
    with pytest.raises(ApiError):
        await request(b'["\\ud83d"]').model()


async def test_fields_can_be_changed_one_by_one() -> None:
    """The others keep their bytes; a copy is independent, and `fields` sees the object of `set_json`."""
    one = request(b'{"model": "m", "a": 1.50, "b": {"c" : 1e400}}')
    twin = one.copy()
    twin.set_fields({name: value for name, value in (await one.fields()).items() if name != "a"})
    assert (await twin.body(), await twin.model()) == (b'{"model":"m","b":{"c" : 1e400}}', "m")
    assert await one.fields("a", "z") == {"a": b"1.50"}
    one.set_json({"model": "n"})
    assert await one.fields() == {"model": b'"n"'}


def test_an_adaptation_is_recorded_once() -> None:
    """Even if a stage retries with a copy."""
    one = request()
    for _ in range(2):
        one.copy().record_adaptation("temperature: dropped")
    assert one.notes == {"adapted": ["temperature: dropped"]}


def test_digests_are_sha256() -> None:
    """As in `match: {keys: ...}`."""
    assert key_digest("test") == "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
