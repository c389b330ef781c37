"""Error bodies of Azure."""

from __future__ import annotations

import pytest

from gateway.azure.error_body import ErrorBody


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        (b'{"error": {"code": "TooManyRequests", "message": "slow down"}}', "slow down", "TooManyRequests"),
        (b'{"error": {"code": "429", "message": "slow down"}}', "slow down", None),
        (b'{"error": {"code": "404", "message": "m", "innererror": {"code": "Inner"}}}', "m", "Inner"),
        (b'{"error": {"message": "m", "inner_error": {"code": "Inner"}}}', "m", "Inner"),
        (b'{"statusCode": 429, "message": "Rate limit is exceeded."}', "Rate limit is exceeded.", None),
        (b'{"error": "no such path"}', "no such path", None),
        (b'{"error": {"code": 7, "message": 8, "detail": "d", "title": "t"}}', "d", None),
        (b'{"error": {}}', "", None),
        (b"upstream connect error", "upstream connect error", None),
        (b"[1]", "[1]", None),
        (b"<html>Bad Gateway</html>", "", None),
        (b"\xff", "\ufffd", None),
        (b"", "", None),
    ],
)
def test_message_and_code(body: bytes, message: str, code: str | None) -> None:
    """In each shape; a number is not a code, and a page has no message."""
    error = ErrorBody(body)
    assert (error.message, error.code) == (message, code)


def test_text_is_the_beginning_of_a_body_that_is_not_a_json_object() -> None:
    """Of a page, too, for logs; JSON objects have none."""
    assert ErrorBody(b" <html>" + 2000 * b"x").text == "<html>" + 994 * "x"
    assert ErrorBody(b'{"error": {}}').text == ""


def test_numbers_that_json_does_not_have_are_null() -> None:
    """Nor does a deep nesting break the reader."""
    assert ErrorBody(b'{"error": {"a": NaN, "b": 1e999, "c": 2.5}}').fields == {"a": None, "b": None, "c": 2.5}
    assert ErrorBody(b"[" * 100_000).content is None
