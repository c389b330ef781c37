"""Requests, responses and headers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from gateway import ApiError, Headers, Request, Response, UpstreamError
from gateway.auth.credentials import key_digest
from gateway.azure.operations import BY_NAME
from gateway.azure.resources import Target
from gateway.body.request_body import Body
from gateway.exchange import Exchange
from plugins.sse_newline import CompleteEvents


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


def test_what_kind_of_answer_it_is_follows_its_headers() -> None:
    """However they are changed after it was asked."""
    response = Response(200, b"", {"x": "y"})
    seen = [response.event_stream]
    response.headers.set("content-type", "text/event-stream; charset=utf-8")
    seen.append(response.event_stream)
    response.headers.set("Content-Type", "application/json")
    seen.append(response.event_stream)
    response.headers.remove("content-type")
    seen.append(response.event_stream)
    response.headers.add("content-type", "TEXT/event-stream")
    seen.append(response.event_stream)
    response.headers = Headers({"content-type": "text/plain"})
    seen.append(response.event_stream)
    assert seen == [False, True, False, False, True, False]
    assert (response.media_type, Response().media_type) == ("text/plain", "")
    assert Response(200, b"", {"content-type": " Application/JSON ; charset=utf-8"}).media_type == "application/json"


def test_headers_are_found_without_regard_to_case_and_keep_their_order() -> None:
    """A light list of pairs: the wire's bytes, several fields of one name."""
    headers = Headers([(b"X-A", b"1"), (b"x-b", b"2"), (b"x-a", b"3")])
    assert (headers.get("x-A"), headers.getall("X-a"), headers.get("no", "d")) == ("1", ["1", "3"], "d")
    assert "X-B" in headers
    headers.set("x-a", "4")
    assert list(headers) == [("x-b", "2"), ("x-a", "4")]
    twin = headers.copy()
    twin.remove("X-B")
    assert (len(headers), len(twin)) == (2, 1)
    assert "4" not in repr(headers)


@pytest.mark.parametrize(("name", "value"), [("a", "b\r\nc: d"), ("a", "b\n"), ("a", "\0"), ("a\r\n", "b"), ("", "b")])
def test_nothing_breaks_out_of_a_header(name: str, value: str) -> None:
    """A line break in what becomes a header is an error of whoever sets it."""
    with pytest.raises(ValueError, match="line break"):
        Headers().set(name, value)


async def test_json_is_decoded_once_and_shared() -> None:
    """Every stage gets the same object; `set_json` sends another."""
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
async def test_what_is_no_json_object_is_a_400(body: bytes) -> None:
    """Whatever it is; never a failure of the gateway."""
    with pytest.raises(ApiError) as caught:
        await request(body).json()
    assert caught.value.status == 400
    with pytest.raises(ApiError) as caught:
        await request(body).model()
    assert caught.value.status == 400


def test_event_stream_is_told_by_the_media_type() -> None:
    """Not by the header's text."""
    for value, expected in (
        ("text/event-stream", True),
        ("TEXT/event-stream ; charset=utf-8", True),
        ("application/json", False),
        ("", False),
    ):
        assert Response(200, b"", {"content-type": value}).event_stream is expected


def test_digests_are_sha256() -> None:
    """As `match: {keys: ...}` has them."""
    assert key_digest("test") == "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


async def test_an_answer_that_cannot_be_read_leaves_no_filter_behind() -> None:
    """What takes its place is told as it is: a filter that has seen half of a stream would garble it."""

    async def breaks_off() -> AsyncIterator[bytes]:
        yield b"data: [DONE]"
        raise UpstreamError("Azure's answer broke off before its end")

    response = Response(503, breaks_off(), {"content-type": "text/event-stream"})
    response.pipe(CompleteEvents())
    with pytest.raises(UpstreamError):
        await response.read()
    response.body = b'{"error": {}}'
    assert response.filters == ()
    assert await response.read() == b'{"error": {}}'


async def test_reading_an_answer_is_bounded() -> None:
    """A stage that keeps an answer whole does not keep one without end."""
    response = Response(200, b"x" * 100)
    from gateway import Filter

    response.pipe(Filter())
    with pytest.raises(ApiError) as caught:
        await response.read(limit=99)
    assert caught.value.status == 502


async def test_half_a_surrogate_pair_is_json_too() -> None:
    """JavaScript sends it where a text was cut in the wrong place; the body passes as it is."""
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


def test_a_response_is_bytes_or_a_stream() -> None:
    """A body of another kind is the author's mistake, said where it was made."""
    with pytest.raises(TypeError, match="bytes or an async iterator"):
        Response(200, "text")  # type: ignore[arg-type]


async def test_fields_can_be_changed_one_by_one() -> None:
    """The others keep their bytes; a copy is changed apart, and what `set_json` set is seen."""
    one = request(b'{"model": "m", "a": 1.50, "b": {"c" : 1e400}}')
    twin = one.copy()
    twin.set_fields({name: value for name, value in (await one.fields()).items() if name != "a"})
    assert (await twin.body(), await twin.model()) == (b'{"model":"m","b":{"c" : 1e400}}', "m")
    assert await one.fields("a", "z") == {"a": b"1.50"}
    one.set_json({"model": "n"})
    assert await one.fields() == {"model": b'"n"'}


def test_what_was_adapted_is_noted_once() -> None:
    """Also where a stage tries again with a copy."""
    one = request()
    for _ in range(2):
        one.copy().adapted("temperature: dropped")
    assert one.notes == {"adapted": ["temperature: dropped"]}
