"""Extracts the model's text from a response or stream: its tokens are counted if Azure reports no usage."""

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
    """The fields with text in an event of chat, completions or the Responses API."""

    choices: list[_Choice] = []
    type: str = ""
    delta: str | None = None


_event_decoder = msgspec.json.Decoder(_Event)
_OTHER_TEXT = (b"_call", b'"reasoning_content"', b'"refusal":"', b'"content":""')
_CONTENT = re.compile(rb'"content":"((?:[^"\\]|\\.)*+)"')
_events_decoder = msgspec.json.Decoder(list[_Event])
_UNREADABLE = (msgspec.DecodeError, RecursionError, ValueError)


def text_of_events(data: bytes) -> str:
    """Return the text in complete events of a stream."""
    found = _CONTENT.findall(data)
    if len(found) == data.count(b"data:") and not any(other in data for other in _OTHER_TEXT):
        # Nearly always: one `content` per event, and no other text. This takes a third of the time of decoding.
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
    """Return the events. Decoding them together costs half, but works only if all are valid."""
    try:
        return _events_decoder.decode(b"[%b]" % b",".join(data))
    except _UNREADABLE:
        events = []
        for each in data:
            with contextlib.suppress(*_UNREADABLE):  # [DONE], or an incomplete event
                events.append(_event_decoder.decode(each))
        return events


def texts_of_json(data: bytes) -> Iterator[str]:
    """Yield the texts of a non-streaming response. An incomplete one is yielded whole."""
    try:
        response = msgspec.json.decode(data)
    except _UNREADABLE:
        yield data.decode("utf-8", "replace")
        return
    if not isinstance(response, dict):
        return
    for choice in response.get("choices") or () if isinstance(response.get("choices"), list) else ():
        if isinstance(choice, dict):
            yield from _texts_of(choice.get("message"))
            if isinstance(choice.get("text"), str):
                yield choice["text"]
    yield from _texts_of(response.get("output"))


def _texts_of(value: Any) -> Iterator[str]:
    """Yield the texts of a message or of a part of one."""
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
