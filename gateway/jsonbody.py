"""JSON bodies: decoded as clients really send them, and written anew with as few changes as can be."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from typing import Any

import msgspec

from gateway.errors import ApiError

__all__ = ("decoded_json", "with_field")

_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def decoded_json(data: bytes, decode: Callable[[bytes], Any]) -> Any:
    r"""Return what `decode` makes of JSON. Raises ApiError 400 where it is none.

    msgspec refuses half of a surrogate pair (`"\ud83d"`), which JSON allows (RFC 8259, 8.2) and JavaScript
    sends where a program has cut a text in the wrong place: such a body is decoded the slow way.
    """
    try:
        return decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError) as exc:
        if b"\\ud" in data or b"\\uD" in data:
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(data, parse_float=_number, parse_constant=_number)
        detail = "it is nested too deeply" if isinstance(exc, RecursionError) else str(exc)
        raise ApiError(400, f"the body is not a JSON object: {detail}") from None


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
    fields = decoded_json(body, _raw_fields.decode)
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
