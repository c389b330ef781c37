"""Error bodies of Azure: its own JSON, API Management's, plain text, or a page."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ("ErrorBody",)

# Longest text that is taken for an error's message, in characters.
_MAX_TEXT = 1000


class ErrorBody:
    """An error body of Azure, read from any of its shapes.

    `content` is the body as JSON, None if it is not JSON. `fields` are those of the error; an HTML page and an empty
    body have none. `text` is the beginning of a body that is not a JSON object.
    """

    __slots__ = ("content", "fields", "text")

    def __init__(self, body: bytes) -> None:
        self.content = content = _decoded(body)
        self.text = ""
        self.fields: dict[str, Any] = {}
        if not isinstance(content, dict):
            self.text = body.decode("utf-8", "replace").strip()[:_MAX_TEXT]
            if self.text and not self.text.startswith("<"):
                self.fields = {"message": self.text}
            return
        error = content.get("error", content)
        if not isinstance(error, dict):
            self.fields = {**content, "message": content.get("message") or str(error)}
        elif "inner_error" in error:  # the specification's spelling; Azure's own is `innererror`
            self.fields = {"innererror": error["inner_error"], **error}
        else:
            self.fields = error

    @property
    def message(self) -> str:
        """The error's message, "" if it has none."""
        texts = (self.fields.get(name) for name in ("message", "detail", "title"))
        return next((text for text in texts if isinstance(text, str) and text), "")

    @property
    def code(self) -> str | None:
        """The error's code, else that of its inner error. A number is a status, and not a code."""
        errors = (self.fields, self.fields.get("innererror"))
        codes = (each.get("code") for each in errors if isinstance(each, dict))
        return next((code for code in codes if isinstance(code, str) and not code.isdigit()), None)


def _decoded(body: bytes) -> Any:
    """Return JSON, None if it is not JSON. A number that JSON does not have, or that is too large, becomes None."""
    try:
        return json.loads(body, parse_constant=lambda _: None, parse_float=_finite)
    except (ValueError, RecursionError):
        return None


def _finite(text: str) -> float | None:
    return number if math.isfinite(number := float(text)) else None
