"""What tokens cost: the operator's price list, in whatever currency it is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import translate
from typing import Annotated

from msgspec import Meta

from gateway.usage.accounting import Usage

__all__ = ("Price", "Prices")

# Of models whose price was looked up; a client can make up any number of names.
_MAX_KNOWN = 4096


@dataclass(frozen=True)
class Price:
    """What a model costs: for a million tokens of each kind, and for each request."""

    input: Annotated[float, Meta(ge=0, description="a million tokens of the prompt")]
    output: Annotated[float, Meta(ge=0, description="a million tokens of the answer, reasoning included")] = 0.0
    cached_input: Annotated[
        float | None, Meta(ge=0, description="a million cached tokens of the prompt; as `input` if it is left out")
    ] = None
    audio_input: Annotated[
        float | None, Meta(ge=0, description="a million tokens of sound in the prompt; as `input` if left out")
    ] = None
    audio_output: Annotated[
        float | None, Meta(ge=0, description="a million tokens of sound in the answer; as `output` if left out")
    ] = None
    request: Annotated[float, Meta(ge=0, description="each request, whatever it uses")] = 0.0

    def cost(self, usage: Usage) -> int:
        """Return what a usage costs, in millionths of the currency's unit, rounded up."""
        audio_in, audio_out = usage.audio_input_tokens, usage.audio_output_tokens
        cached = min(usage.cached_tokens, max(0, usage.input_tokens - audio_in))
        # (A price for a million tokens is as many millionths for one.)
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
    """Prices by the names that clients use: exact ones win, then globs in their order.

    Neither case nor dots count, as they do not for Azure: another spelling is no other price.
    """

    def __init__(self, listed: Mapping[str, Price] | None = None) -> None:
        self._exact = {_plain(name): price for name, price in (listed or {}).items()}
        self._globs = [
            (re.compile(translate(name)), price)
            for name, price in self._exact.items()
            if any(sign in name for sign in "*?[")
        ]
        self._known: dict[str, Price | None] = {}

    def __bool__(self) -> bool:
        return bool(self._exact)

    def of(self, model: str) -> Price | None:
        """Return a model's price; None where it has none."""
        if model in self._known:
            return self._known[model]
        name = _plain(model)
        found = self._exact.get(name) or next((price for glob, price in self._globs if glob.fullmatch(name)), None)
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[model] = found
        return found


def _plain(name: str) -> str:
    return name.lower().replace(".", "")
