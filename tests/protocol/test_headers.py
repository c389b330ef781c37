"""Header fields: found in any case, kept in order, safe on the connection."""

from __future__ import annotations

import pytest

from gateway import Headers


def test_headers_are_case_insensitive_and_ordered() -> None:
    """Several fields may have one name; values do not appear in the repr."""
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
    """A line break or NUL in a header raises in the code that sets it."""
    with pytest.raises(ValueError, match="line break"):
        Headers().set(name, value)
