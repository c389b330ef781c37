"""The fields of reported usage: input, output, cached, reasoning and audio tokens that Azure reports."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from gateway.usage.tokenizer import Source

__all__ = ("SOURCES", "Usage", "decode_usage")

SOURCES = ("reported", "counted", "estimated")
"""From the most to the least reliable. A sum has the least reliable source of its parts."""


class Usage(msgspec.Struct, frozen=True):
    """The tokens of an exchange.

    `input_tokens` includes `cached_tokens` and `audio_input_tokens`; `output_tokens` includes `reasoning_tokens` and
    `audio_output_tokens`. `source` says whether Azure reported the tokens or the gateway counted or estimated them.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    audio_input_tokens: int = 0
    audio_output_tokens: int = 0
    source: Source = "reported"

    @property
    def total_tokens(self) -> int:
        """Input and output tokens together."""
        return self.input_tokens + self.output_tokens

    def __add__(self, other: Usage) -> Usage:
        sums = {name: getattr(self, name) + getattr(other, name) for name in _TOKEN_FIELDS}
        return Usage(**sums, source=max(self.source, other.source, key=SOURCES.index))


_TOKEN_FIELDS = tuple(name for name in Usage.__struct_fields__ if name != "source")


_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)] | None


class _ReportedDetails(msgspec.Struct):
    cached_tokens: _Count = None
    reasoning_tokens: _Count = None
    audio_tokens: _Count = None


class _ReportedUsage(msgspec.Struct):
    """A `usage` object of any of the APIs: each has names of its own for the same counts."""

    prompt_tokens: _Count = None
    completion_tokens: _Count = None
    input_tokens: _Count = None
    output_tokens: _Count = None
    total_tokens: _Count = None
    prompt_tokens_details: _ReportedDetails | None = None
    completion_tokens_details: _ReportedDetails | None = None
    input_tokens_details: _ReportedDetails | None = None
    output_tokens_details: _ReportedDetails | None = None
    input_token_details: _ReportedDetails | None = None
    output_token_details: _ReportedDetails | None = None


_decoder = msgspec.json.Decoder(_ReportedUsage)
_NO_DETAILS = _ReportedDetails()


def decode_usage(data: bytes) -> Usage | None:
    """Return the usage in a JSON object. Returns None if the object is no usage."""
    try:
        reported = _decoder.decode(data)
    except (msgspec.DecodeError, ValueError):
        return None
    input_tokens = reported.prompt_tokens if reported.prompt_tokens is not None else reported.input_tokens
    output_tokens = reported.completion_tokens if reported.completion_tokens is not None else reported.output_tokens
    if input_tokens is None and output_tokens is None:
        if reported.total_tokens is None:
            return None
        input_tokens = reported.total_tokens
    input_details = (
        reported.prompt_tokens_details or reported.input_tokens_details or reported.input_token_details or _NO_DETAILS
    )
    output_details = (
        reported.completion_tokens_details
        or reported.output_tokens_details
        or reported.output_token_details
        or _NO_DETAILS
    )
    return Usage(
        input_tokens or 0,
        output_tokens or 0,
        input_details.cached_tokens or 0,
        output_details.reasoning_tokens or 0,
        input_details.audio_tokens or 0,
        output_details.audio_tokens or 0,
    )
