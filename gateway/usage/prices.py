"""Prices of input, cached, output and audio tokens: the operator's price list, in any currency."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import translate
from typing import Annotated

from msgspec import Meta

from gateway.usage.usage_fields import Usage

__all__ = ("Price", "Prices")

# Maximum number of cached look-ups: a client can invent any number of model names.
_MAX_CACHED = 4096


@dataclass(frozen=True)
class Price:
    """The price of a model: per million tokens of each kind, and per request."""

    input: Annotated[float, Meta(ge=0, description="Price of a million input (prompt) tokens.")]
    output: Annotated[float, Meta(ge=0, description="Price of a million output tokens, reasoning included.")] = 0.0
    cached_input: Annotated[
        float | None, Meta(ge=0, description="Price of a million cached input tokens. Default: `input`.")
    ] = None
    audio_input: Annotated[
        float | None, Meta(ge=0, description="Price of a million audio input tokens. Default: `input`.")
    ] = None
    audio_output: Annotated[
        float | None, Meta(ge=0, description="Price of a million audio output tokens. Default: `output`.")
    ] = None
    request: Annotated[float, Meta(ge=0, description="Price of each request, in addition to its tokens.")] = 0.0

    def cost(self, usage: Usage) -> int:
        """Return the cost of a usage, in millionths of the currency unit, rounded up."""
        audio_in, audio_out = usage.audio_input_tokens, usage.audio_output_tokens
        cached = min(usage.cached_tokens, max(0, usage.input_tokens - audio_in))
        # (The price of a million tokens is the same number of millionths per token.)
        total = (
            max(0, usage.input_tokens - cached - audio_in) * self.input
            + cached * (self.input if self.cached_input is None else self.cached_input)
            + audio_in * (self.input if self.audio_input is None else self.audio_input)
            + max(0, usage.output_tokens - audio_out) * self.output
            + audio_out * (self.output if self.audio_output is None else self.audio_output)
            + self.request * 1_000_000
        )
        return -int(-total // 1)


class Prices:
    """Prices by the model names that clients use. Exact names win, then globs in their order.

    Case and dots are ignored, as Azure ignores them: another spelling has the same price.
    """

    def __init__(self, listed: Mapping[str, Price] | None = None) -> None:
        self._exact = {_normalized(name): price for name, price in (listed or {}).items()}
        self._globs = [
            (re.compile(translate(name)), price)
            for name, price in self._exact.items()
            if any(sign in name for sign in "*?[")
        ]
        self._cache: dict[str, Price | None] = {}

    def __bool__(self) -> bool:
        return bool(self._exact)

    def of(self, model: str) -> Price | None:
        """Return the price of a model. Returns None if it has none."""
        if model in self._cache:
            return self._cache[model]
        name = _normalized(model)
        found = self._exact.get(name) or next((price for glob, price in self._globs if glob.fullmatch(name)), None)
        if len(self._cache) >= _MAX_CACHED:
            self._cache.clear()
        self._cache[model] = found
        return found


def _normalized(name: str) -> str:
    return name.lower().replace(".", "")
