"""JSON bodies: decoded as clients really send them, and written anew with as few changes as can be."""

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

# The most values that JSON may be decoded into. A small object takes some 70 bytes for 3 bytes of JSON; text is cheap.
_MOST_VALUES = 1_000_000
_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def decode_json(data: bytes, decode: Callable[[bytes], Any], *, skips: bool = False) -> Any:
    r"""Return what `decode` makes of JSON.

    Raises ApiError 400 if it is none, and 413 where it has more values than may be decoded, unless `decode` `skips`
    what it was not asked for: values in it are decoded into nothing.

    msgspec refuses half of a surrogate pair (`"\ud83d"`), which JSON allows (RFC 8259, 8.2) and JavaScript
    sends where a program has cut a text in the wrong place: such a body is decoded the slow way.
    """
    if not skips and len(data) > _MOST_VALUES:
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
    """Raise ApiError 413 for JSON that may have more values than are decoded.

    Each value follows one of these signs. Those in texts count, too: to tell them apart would be to decode it.
    """
    values = 0
    for sign in b",:[{":
        values += data.count(sign)
        if values > _MOST_VALUES:
            raise ApiError(
                413,
                f"the JSON has more than {_MOST_VALUES} values (signs , : [ and {{), the most that are decoded; "
                "send less at once",
                code="body_too_large",
            )


def encode_json(content: object) -> bytes:
    """Return JSON; half of a surrogate pair is written as it came."""
    try:
        return msgspec.json.encode(content)
    except UnicodeEncodeError:
        return json.dumps(content).encode()
    except RecursionError:
        raise ApiError(400, "the JSON is nested too deeply") from None


def _number(text: str) -> float:
    """Return a number that JSON can say again. Raises ValueError for `NaN`, `Infinity` and what is as large."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number that can be sent on")
    return number


def with_field(body: bytes, name: str, value: str | bytes | None) -> bytes:
    """Return a JSON object's bytes with another field `name`; every other value keeps its bytes.

    `value` is text, or JSON already in bytes, or None for no such field.
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
    """Return the fields of a JSON object, each value as the bytes it has there; only those named, if any are.

    Of a doubled field it is the last one, as all readers of JSON at hand have it. Raises ApiError 400 where the body
    is no JSON object.
    """
    if names:
        decode, none = _named(names)
        found = decode_json(body, decode, skips=True)
        if found == none:  # nearly always
            return {}
    else:
        found = _all_fields(body)
    if isinstance(found, msgspec.Struct):
        values = zip(names, msgspec.structs.astuple(found), strict=True)
        return {name: bytes(value) for name, value in values if value is not None}
    if not isinstance(found, dict):
        raise ApiError(400, "the body is not a JSON object")
    return {name: _bytes(found[name]) for name in names or found if name in found}


def _all_fields(body: bytes) -> Any:
    """Decode the fields of a JSON object, whose values stay bytes. Raises ApiError 400, and 413 for too many fields."""
    if len(body) > _MOST_VALUES and body.count(b":") > _MOST_VALUES:
        check_values(body)
    return decode_json(body, _raw_fields.decode, skips=True)


def encode_fields(fields: Mapping[str, bytes]) -> bytes:
    """Return the JSON object of fields whose values are JSON already."""
    try:
        return msgspec.json.encode({name: msgspec.Raw(value) for name, value in fields.items()})
    except UnicodeEncodeError:  # half of a surrogate pair in a name
        return b"{%b}" % b",".join(json.dumps(name).encode() + b":" + value for name, value in fields.items())


def _bytes(value: object) -> bytes:
    return bytes(value) if isinstance(value, msgspec.Raw) else json.dumps(value).encode()


@lru_cache(maxsize=256)
def _named(names: tuple[str, ...]) -> tuple[Callable[[bytes], Any], msgspec.Struct]:
    """Return what decodes the bytes of these fields and skips the others unread, and what it returns of none."""
    places = {f"f{place}": name for place, name in enumerate(names)}
    kind = msgspec.defstruct("_Named", [(place, msgspec.Raw, None) for place in places], rename=places)
    return msgspec.json.Decoder(kind).decode, kind()
