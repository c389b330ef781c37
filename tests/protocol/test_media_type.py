"""The media type of a Content-Type."""

from __future__ import annotations

import pytest

from gateway.protocol.media_type import cached_media_type, media_type


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("application/json", "application/json"),
        (" Text/Event-Stream ; charset=utf-8", "text/event-stream"),
        ("multipart/form-data; boundary=A;b", "multipart/form-data"),
        ("", ""),
        (";", ""),
    ],
)
def test_media_type(content_type: str, expected: str) -> None:
    """Lower case, without parameters and spaces; the cached version agrees."""
    assert media_type(content_type) == expected
    assert cached_media_type(content_type.encode()) == expected
