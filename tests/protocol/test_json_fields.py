"""JSON bodies, edited with as few changes as possible."""

from __future__ import annotations

import msgspec
import pytest

from gateway import ApiError
from gateway.protocol.json_fields import decode_json, encode_fields, encode_json, raw_fields, with_field

BODY = b'{"x":1.0e2,"model":"a","n":123456789012345678901234567890,"o":{"b":1,"a":[1.50]},"model":"b"}'


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("d", b'{"x":1.0e2,"model":"d","n":123456789012345678901234567890,"o":{"b":1,"a":[1.50]}}'),
        (b'{"a": 1}', b'{"x":1.0e2,"model":{"a": 1},"n":123456789012345678901234567890,"o":{"b":1,"a":[1.50]}}'),
        (None, b'{"x":1.0e2,"n":123456789012345678901234567890,"o":{"b":1,"a":[1.50]}}'),
    ],
)
def test_other_values_keep_their_bytes(value: str | bytes | None, expected: bytes) -> None:
    """Numbers keep their digits, nested objects their order; a repeated field becomes one, or none."""
    assert with_field(BODY, "model", value) == expected


def test_a_missing_field_is_added() -> None:
    """At the end."""
    assert with_field(b'{"a":1}', "model", "d") == b'{"a":1,"model":"d"}'


def test_half_a_surrogate_pair_survives() -> None:
    """JavaScript may cut a text there; the body is then encoded the slow way."""
    body = b'{"model": "m", "t": "\\ud83d"}'
    assert with_field(body, "model", "d") == b'{"t": "\\ud83d", "model": "d"}'
    assert b"model" not in with_field(body, "model", None)


@pytest.mark.parametrize("number", [b"1e400", b"NaN", b"-Infinity"])
def test_the_slow_way_refuses_infinite_numbers(number: bytes) -> None:
    """Python would encode them as text that is not JSON."""
    with pytest.raises(ApiError, match="not a JSON object"):
        with_field(b'{"t": "\\ud83d", "n": %b}' % number, "model", "d")


def test_a_body_that_is_no_object_is_refused() -> None:
    """With the position of the mistake."""
    with pytest.raises(ApiError, match="not a JSON object"):
        with_field(b"[1]", "model", "d")


def test_fields_keep_their_bytes() -> None:
    """All fields, or only those named; the last one of a repeated field."""
    assert raw_fields(BODY, ("x", "o", "no")) == {"x": b"1.0e2", "o": b'{"b":1,"a":[1.50]}'}
    assert raw_fields(BODY, ("model",)) == {"model": b'"b"'}
    assert raw_fields(BODY, ("no",)) == {}
    assert list(raw_fields(BODY)) == ["x", "model", "n", "o"]
    assert (
        encode_fields(raw_fields(BODY)) == BODY.replace(b'"model":"a"', b'"model":"b"')[: -len(b',"model":"b"}')] + b"}"
    )


def test_a_name_in_escapes_and_a_null_are_found() -> None:
    """As in any JSON reader."""
    assert raw_fields(b'{"\\u0074emperature": null}', ("temperature",)) == {"temperature": b"null"}


def test_fields_next_to_half_a_surrogate_pair() -> None:
    """Decoded the slow way; a name may hold one too."""
    body = b'{"t": "\\ud83d", "n": 1, "\\ud83d": [2]}'
    assert raw_fields(body, ("n", "t", "no")) == {"n": b"1", "t": b'"\\ud83d"'}
    assert encode_fields(raw_fields(body)) == b'{"t":"\\ud83d","n":1,"\\ud83d":[2]}'


@pytest.mark.parametrize("body", [b"[1]", b'["\\ud83d"]', b"", b"{", b'{"a": NaN}', b'{"a": 1} x', b"null"])
@pytest.mark.parametrize("names", [(), ("a",)])
def test_fields_of_a_body_that_is_no_object_are_a_400(body: bytes, names: tuple[str, ...]) -> None:
    """Whatever else it is."""
    with pytest.raises(ApiError, match="not a JSON object"):
        raw_fields(body, names)


MANY = 1_000_001


@pytest.mark.parametrize(
    "values",
    [b"[" + b"[]," * 600_000 + b"[]]", b'{"a":[' + b"{}," * 600_000 + b"{}]}", b"[" + b"1," * MANY + b"1]"],
    ids=["lists", "objects", "numbers"],
)
def test_small_values_are_not_decoded_without_bound(values: bytes) -> None:
    """Each takes many times its bytes: above a number of signs that begin a value, it is a 413."""
    asked: list[bytes] = []
    with pytest.raises(ApiError) as refused:
        decode_json(values, asked.append)
    assert (refused.value.status, refused.value.code) == (413, "body_too_large")
    assert not asked


def test_long_text_is_decoded_however_long_it_is() -> None:
    """It takes no more than its bytes; values that a decoder skips do not count either."""
    text = b'{"a":"' + b"x" * 20_000_000 + b'"}'
    assert len(decode_json(text, msgspec.json.decode)["a"]) == 20_000_000
    tokens = b'{"model":"m","input":[' + b"1," * MANY + b"1]}"
    assert raw_fields(tokens, ("model",)) == {"model": b'"m"'}
    assert with_field(tokens, "model", "d").startswith(b'{"model":"d","input":[1,1')


def test_the_slow_way_has_the_same_limit() -> None:
    """Half a surrogate pair does not bypass it, even with a decoder that skips."""
    body = b'{"model":"\\ud83d","x":[' + b"[]," * 600_000 + b"[]]}"
    with pytest.raises(ApiError) as refused:
        decode_json(body, msgspec.json.Decoder(dict[str, str]).decode, skips=True)
    assert refused.value.status == 413


def test_fields_are_bounded_too() -> None:
    """A million field names take more than their bytes."""
    body = b"{" + b",".join(b'"%x":0' % number for number in range(MANY)) + b"}"
    for work in (lambda: raw_fields(body), lambda: with_field(body, "model", "d")):
        with pytest.raises(ApiError) as refused:
            work()
        assert refused.value.status == 413


@pytest.mark.parametrize("depth", [200, 400, 600, 800, 900, 950, 990, 1000, 100_000])
def test_deep_nesting_is_a_client_error(depth: int) -> None:
    """At any depth: JSON that can be decoded can be encoded again, or it is a 400; the gateway never fails."""
    refused: ApiError | None = None
    try:
        content = decode_json(b"[" * depth + b"]" * depth, msgspec.json.decode)
        for _ in range(20):
            content = [content]
        assert encode_json(content).startswith(b"[" * depth)
    except ApiError as exc:
        refused = exc
    assert refused is None or (refused.status == 400 and "nested too deeply" in refused.message)
    assert refused is not None or depth < 1000
