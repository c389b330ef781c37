"""JSON bodies: decoded as clients really send them, and edited with as few changes as possible."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import msgspec

from gateway.errors import ApiError

__all__ = ("decode_json", "encode_fields", "encode_json", "raw_fields", "with_field")

# Maximum number of values to decode. A small object takes some 70 bytes for 3 bytes of JSON; text is cheap.
_MAX_VALUES = 1_000_000
_raw_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def decode_json(data: bytes, decode: Callable[[bytes], Any], *, skips: bool = False) -> Any:
    r"""Decode JSON with `decode`.

    Raises ApiError 400 if it is not JSON, and 413 if it has too many values. With `skips`, `decode` skips most values
    without decoding them, and there is no limit.

    msgspec rejects half of a surrogate pair (`"\ud83d"`). JSON allows it (RFC 8259, 8.2), and JavaScript sends it if a
    program has cut a text in the wrong position: such a body is decoded the slow way.
    """
    if not skips and len(data) > _MAX_VALUES:
        check_values(data)
    try:
        return decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError) as exc:
        if b"\\ud" in data or b"\\uD" in data:
            check_values(data)
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(data, parse_float=_number, parse_constant=_number)
        detail = "it is nested too deeply" if isinstance(exc, RecursionError) else str(exc)
        raise ApiError(400, f"the body is not a JSON object: {detail}") from None


def check_values(data: bytes) -> None:
    """Raise ApiError 413 for JSON that may have too many values.

    Each value follows one of these signs. Signs inside texts count, too: only decoding could tell them apart.
    """
    values = 0
    for sign in b",:[{":
        values += data.count(sign)
        if values > _MAX_VALUES:
            raise ApiError(
                413,
                f"the JSON has more than {_MAX_VALUES} values (signs , : [ and {{); send a smaller body",
                code="body_too_large",
            )


def encode_json(content: object) -> bytes:
    """Encode JSON; half of a surrogate pair is written as it was received."""
    try:
        return msgspec.json.encode(content)
    except UnicodeEncodeError:
        return json.dumps(content).encode()
    except RecursionError:
        raise ApiError(400, "the JSON is nested too deeply") from None


def _number(text: str) -> float:
    """Return a finite number. Raises ValueError for `NaN`, `Infinity` and numbers too large for a float."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def with_field(body: bytes, name: str, value: str | bytes | None) -> bytes:
    """Set one field of a JSON object, given and returned as bytes; every other value keeps its bytes.

    `value` is text, or encoded JSON as bytes, or None to remove the field.
    """
    fields = _all_fields(body)
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is not a JSON object")
    if not all(isinstance(field, msgspec.Raw) for field in fields.values()):
        fields.pop(name, None)
        if value is not None:
            fields[name] = value if isinstance(value, str) else json.loads(value)
        return json.dumps(fields).encode()
    if value is None:
        fields.pop(name, None)
    else:
        fields[name] = msgspec.Raw(value if isinstance(value, bytes) else msgspec.json.encode(value))
    return msgspec.json.encode(fields)


def raw_fields(body: bytes, names: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Return the fields of a JSON object, each value as its bytes; with `names`, only those.

    If a field is repeated, the last one counts, as in all common JSON readers. Raises ApiError 400 if the body is not a
    JSON object.
    """
    if names:
        decode, empty = _named_decoder(names)
        found = decode_json(body, decode, skips=True)
        if found == empty:  # nearly always
            return {}
    else:
        found = _all_fields(body)
    if isinstance(found, msgspec.Struct):
        values = zip(names, msgspec.structs.astuple(found), strict=True)
        return {name: bytes(value) for name, value in values if value is not None}
    if not isinstance(found, dict):
        raise ApiError(400, "the body is not a JSON object")
    return {name: _encoded(found[name]) for name in names or found if name in found}


def _all_fields(body: bytes) -> Any:
    """Decode the fields of a JSON object; the values stay bytes. Raises ApiError 400, and 413 for too many fields."""
    if len(body) > _MAX_VALUES and body.count(b":") > _MAX_VALUES:
        check_values(body)
    return decode_json(body, _raw_decoder.decode, skips=True)


def encode_fields(fields: Mapping[str, bytes]) -> bytes:
    """Encode a JSON object; the values are encoded already."""
    try:
        return msgspec.json.encode({name: msgspec.Raw(value) for name, value in fields.items()})
    except UnicodeEncodeError:  # half of a surrogate pair in a name
        return b"{%b}" % b",".join(json.dumps(name).encode() + b":" + value for name, value in fields.items())


def _encoded(value: object) -> bytes:
    return bytes(value) if isinstance(value, msgspec.Raw) else json.dumps(value).encode()


@lru_cache(maxsize=256)
def _named_decoder(names: tuple[str, ...]) -> tuple[Callable[[bytes], Any], msgspec.Struct]:
    """Return a decoder that skips all fields but these, and its result for an object with none of them."""
    attributes = {f"f{index}": name for index, name in enumerate(names)}
    struct = msgspec.defstruct("_Named", [(each, msgspec.Raw, None) for each in attributes], rename=attributes)
    return msgspec.json.Decoder(struct).decode, struct()
