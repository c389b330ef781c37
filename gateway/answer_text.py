"""The text of an answer, as a model has made it: what there is to count where Azure tells no tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

__all__ = ("texts_of_event", "texts_of_json")


class _Delta(msgspec.Struct):
    content: Any = None
    refusal: Any = None
    reasoning_content: Any = None
    tool_calls: Any = None
    function_call: Any = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None


class _Event(msgspec.Struct):
    """What adds text to an answer, of an event of chat and completions, or of the Responses API."""

    choices: list[_Choice] = []
    type: str = ""
    delta: str | None = None


_event = msgspec.json.Decoder(_Event)


def texts_of_event(data: bytes) -> Iterator[str]:
    """Yield the text that one event of a stream adds to the answer."""
    try:
        event = _event.decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return  # [DONE], or an event that did not come whole
    if event.delta is not None and not event.type.endswith("audio.delta"):
        yield event.delta
    for choice in event.choices:
        if choice.text is not None:
            yield choice.text
        if (delta := choice.delta) is not None:
            for text in (delta.content, delta.refusal, delta.reasoning_content):
                if isinstance(text, str):
                    yield text
            if delta.tool_calls is not None or delta.function_call is not None:
                yield from _texts_of([delta.tool_calls, delta.function_call])


def texts_of_json(data: bytes) -> Iterator[str]:
    """Yield the texts of an answer that is no stream; of one that broke off, all there is of it."""
    try:
        answer = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError):
        yield data.decode("utf-8", "replace")
        return
    if not isinstance(answer, dict):
        return
    for choice in answer.get("choices") or () if isinstance(answer.get("choices"), list) else ():
        if isinstance(choice, dict):
            yield from _texts_of(choice.get("message"))
            if isinstance(choice.get("text"), str):
                yield choice["text"]
    yield from _texts_of(answer.get("output"))


def _texts_of(value: Any) -> Iterator[str]:
    """Yield the texts of a message, or of a part of one."""
    if isinstance(value, list):
        for each in value:
            yield from _texts_of(each)
    elif isinstance(value, dict):
        for name in ("content", "refusal", "reasoning_content", "arguments", "text", "name"):
            if isinstance(value.get(name), str):
                yield value[name]
        for name in ("content", "tool_calls", "function", "function_call", "summary"):
            if isinstance(value.get(name), dict | list):
                yield from _texts_of(value[name])
