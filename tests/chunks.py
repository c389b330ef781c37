"""Chunks as Azure streams them, regular and odd, for tests of the stages that repair them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from gateway import EventFilter, Filter
from gateway.protocol.filters import chain_filters

FOUND = [{"prompt_index": 0, "content_filter_results": {"hate": {"filtered": False, "severity": "safe"}}}]
EMPTY = {"id": "", "object": "", "created": 0, "model": ""}
NAMED = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1714036974, "model": "gpt-4o-2024-11-20"}

PROMPT = {"choices": [], **EMPTY, "prompt_filter_results": FOUND}
OLD_PROMPT = {**EMPTY, "prompt_annotations": FOUND, "choices": []}
USAGE = {"choices": [], **NAMED, "usage": {"completion_tokens": 3, "prompt_tokens": 9, "total_tokens": 12}}


def chunk(content: str | None = None, finish: str | None = None, index: int = 0, **delta: Any) -> dict[str, Any]:
    """Return a chunk with visible content."""
    if content is not None:
        delta["content"] = content
    choice = {"content_filter_results": {}, "delta": delta, "finish_reason": finish, "index": index, "logprobs": None}
    return {"choices": [choice], **NAMED, "system_fingerprint": None}


def findings(finish: str | None = None, index: int = 0) -> dict[str, Any]:
    """Return a chunk of the asynchronous filter: its choice has no delta, and the chunk has no id or model."""
    choice = {
        "content_filter_offsets": {"check_offset": 44, "start_offset": 44, "end_offset": 198},
        "content_filter_results": {"hate": {"filtered": False, "severity": "safe"}},
        "finish_reason": finish,
        "index": index,
    }
    return {"choices": [choice], **EMPTY}


def event(content: object) -> bytes:
    """Return an event as Azure writes it."""
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
PLAIN = (chunk("", role="assistant"), chunk("Hello"), chunk(' "delta" and ""'), chunk(finish="stop"))


def stream(*chunks: object, done: bytes = DONE) -> bytes:
    """Return a whole stream."""
    return b"".join(map(event, chunks)) + done


def contents(data: bytes) -> list[Any]:
    """Return the JSON of each event."""
    return [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {")]


def fed(pieces: list[bytes], *filters: Filter | EventFilter) -> bytes:
    """Return the output of filters for a stream that arrives in pieces."""
    linked = chain_filters(filters)
    return b"".join([linked.feed(piece) for piece in pieces]) + linked.close()


class Count:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


def streams(*odd: object) -> st.SearchStrategy[bytes]:
    """Return streams with odd chunks anywhere among regular ones."""
    return st.lists(st.sampled_from([*PLAIN, USAGE, *odd]), max_size=8).map(lambda chunks: stream(*chunks))


def cuts(data: bytes, places: list[int]) -> list[bytes]:
    """Return data cut at some offsets."""
    found = sorted({0, len(data), *(place % (len(data) or 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(found)]


def same_however_it_is_cut(data: bytes, places: list[int], make: Callable[[], EventFilter]) -> bytes:
    """Return a filter's output for a stream. Raises AssertionError if it depends on the boundaries of reads."""
    whole = fed([data], make())
    assert whole == fed(cuts(data, places), make())
    return whole
