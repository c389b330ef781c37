"""Responses as stages read and change them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from gateway import ApiError, Filter, Headers, Response, UpstreamError
from plugins.sse_newline import CompleteEvents


def test_the_media_type_follows_the_headers() -> None:
    """Even if they change after the first read."""
    response = Response(200, b"", {"x": "y"})
    seen = [response.is_event_stream]
    response.headers.set("content-type", "text/event-stream; charset=utf-8")
    seen.append(response.is_event_stream)
    response.headers.set("Content-Type", "application/json")
    seen.append(response.is_event_stream)
    response.headers.remove("content-type")
    seen.append(response.is_event_stream)
    response.headers.add("content-type", "TEXT/event-stream")
    seen.append(response.is_event_stream)
    response.headers = Headers({"content-type": "text/plain"})
    seen.append(response.is_event_stream)
    assert seen == [False, True, False, False, True, False]
    assert (response.media_type, Response().media_type) == ("text/plain", "")
    assert Response(200, b"", {"content-type": " Application/JSON ; charset=utf-8"}).media_type == "application/json"


def test_an_event_stream_is_recognized_by_its_media_type() -> None:
    """Not by the text of the header."""
    for value, expected in (
        ("text/event-stream", True),
        ("TEXT/event-stream ; charset=utf-8", True),
        ("application/json", False),
        ("", False),
    ):
        assert Response(200, b"", {"content-type": value}).is_event_stream is expected


async def test_a_failed_read_drops_the_filters() -> None:
    """The body that replaces it passes unchanged: a filter that has seen half a stream would garble it."""

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


async def test_reading_a_response_is_bounded() -> None:
    """A stage that buffers a response never buffers without a limit."""
    response = Response(200, b"x" * 100)
    response.pipe(Filter())
    with pytest.raises(ApiError) as caught:
        await response.read(limit=99)
    assert caught.value.status == 502


def test_a_response_is_bytes_or_a_stream() -> None:
    """A body of another type is the author's mistake and raises immediately."""
    with pytest.raises(TypeError, match="bytes or an async iterator"):
        Response(200, "text")  # type: ignore[arg-type]
