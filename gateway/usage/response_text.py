"""The text of an answer, as a model has made it: what there is to count where Azure tells no tokens."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

__all__ = ("text_of_events", "texts_of_json")


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
_OTHERS = (b"_call", b'"reasoning_content"', b'"refusal":"', b'"content":""')
_CONTENTS = re.compile(rb'"content":"((?:[^"\\]|\\.)*+)"')
_events = msgspec.json.Decoder(list[_Event])
_UNREADABLE = (msgspec.DecodeError, RecursionError, ValueError)


def text_of_events(data: bytes) -> str:
    """Return the text that events of a stream, each whole, add to the answer."""
    found = _CONTENTS.findall(data)
    if len(found) == data.count(b"data:") and not any(other in data for other in _OTHERS):
        # Nearly always: one piece of content in each, and no other text. That takes a third of what decoding takes.
        with contextlib.suppress(*_UNREADABLE):
            return msgspec.json.decode(b'"%b"' % b"".join(found), type=str)
    texts: list[str] = []
    for event in _decoded([line[5:] for line in data.splitlines() if line.startswith(b"data:")]):
        if event.delta is not None and not event.type.endswith("audio.delta"):
            texts.append(event.delta)
        for choice in event.choices:
            if choice.text is not None:
                texts.append(choice.text)
            if (delta := choice.delta) is not None:
                texts += [
                    text for text in (delta.content, delta.refusal, delta.reasoning_content) if isinstance(text, str)
                ]
                if delta.tool_calls is not None or delta.function_call is not None:
                    texts += _texts_of([delta.tool_calls, delta.function_call])
    return "".join(texts)


def _decoded(data: Sequence[bytes]) -> list[_Event]:
    """Return the events: read at once, at half the cost, where all can be read."""
    try:
        return _events.decode(b"[%b]" % b",".join(data))
    except _UNREADABLE:
        events = []
        for each in data:
            with contextlib.suppress(*_UNREADABLE):  # [DONE], or an event that did not come whole
                events.append(_event.decode(each))
        return events


def texts_of_json(data: bytes) -> Iterator[str]:
    """Yield the texts of an answer that is no stream; of one that broke off, all there is of it."""
    try:
        answer = msgspec.json.decode(data)
    except _UNREADABLE:
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
