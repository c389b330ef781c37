"""The usage in the bytes of a response or a stream: found if Azure reports it, or else counted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.usage import tokenizer as tokens
from gateway.usage.response_text import text_of_events
from gateway.usage.tokenizer import count_tokens, load_encodings
from gateway.usage.usage_fields import Usage
from gateway.usage.usage_scanner import _TEXT_SIZE, UsageScanner
from tests.chunks import event as sse

WORD = sse({"choices": [{"delta": {"content": " word"}}]})
CHAT_USAGE = (
    b'{"completion_tokens":13,"completion_tokens_details":{"accepted_prediction_tokens":0,"audio_tokens":2,'
    b'"reasoning_tokens":5,"rejected_prediction_tokens":0},"prompt_tokens":12,"prompt_tokens_details":'
    b'{"audio_tokens":1,"cached_tokens":4},"total_tokens":25}'
)
WHOLE = Usage(12, 13, 4, 5, 1, 2)
RESPONSES = b"""event: response.created
data: {"response":{"tools":[{"parameters":{"properties":{"usage":{"type":"string"}}}}],"usage":null}}

event: response.completed
data: {"response":{"usage":{"input_tokens":7,"input_tokens_details":{"cached_tokens":3},"output_tokens":9,\
"output_tokens_details":{"reasoning_tokens":8},"total_tokens":16}}}

"""
REALTIME = b"""{"type":"response.done","response":{"usage":{"total_tokens":30,"input_tokens":10,"output_tokens":20,
"input_token_details":{"text_tokens":4,"audio_tokens":6,"cached_tokens":2},
"output_token_details":{"text_tokens":5,"audio_tokens":15}}}}"""
STREAM = (
    b'data: {"choices":[{"delta":{"content":"hi"}}],"usage":null}\n\ndata: {"choices":[],"usage":'
    + CHAT_USAGE
    + b"}\n\ndata: [DONE]\n\n"
)
BODIES = {
    "chat": (b'{"choices":[{"message":{"content":"the \\"usage\\":{}"}}],"usage":' + CHAT_USAGE + b"}", WHOLE),
    "spaces": (b'{"choices": [], "usage" :\n ' + CHAT_USAGE.replace(b":", b" : ") + b"}", WHOLE),
    "stream": (STREAM, WHOLE),
    "responses": (RESPONSES, Usage(7, 9, 3, 8)),
    "embeddings": (b'{"data":[],"usage":{"prompt_tokens":5,"total_tokens":5}}', Usage(5)),
    "total alone": (b'{"data":[],"usage":{"total_tokens":5}}', Usage(5)),
    "realtime": (REALTIME, Usage(10, 20, 2, 0, 6, 15)),
    "duration": (b'{"text":"hi","usage":{"type":"duration","seconds":3}}', None),
    "no usage": (b'{"text":"hi","usage":null}', None),
    "junk": (b'{"usage":{"prompt_tokens":"many"},"usage":{', None),
}


@pytest.fixture(autouse=True, scope="module")
def _tokenizer() -> None:
    """Load the encodings, as the gateway does when they are first needed."""
    load_encodings()


@pytest.mark.parametrize("name", BODIES)
def test_the_usage_of_every_api_at_every_split(name: str) -> None:
    """However the response is split: with the names of each API, and never a text that only looks like usage."""
    body, expected = BODIES[name]
    for place in range(len(body) + 1):
        reader = UsageScanner()
        reader.feed(body[:place])
        reader.feed(body[place:])
        assert reader.reported == expected, place
    reader = UsageScanner()
    for place in range(len(body)):
        reader.feed(body[place : place + 1])
    assert reader.reported == expected


@given(st.lists(st.integers(1, 40)), st.sampled_from(sorted(BODIES)))
def test_the_usage_in_pieces_of_any_size(sizes: list[int], name: str) -> None:
    """The result does not depend on how the bytes arrive."""
    body, expected = BODIES[name]
    reader = UsageScanner()
    for size in sizes:
        reader.feed(body[:size])
        body = body[size:]
    reader.feed(body)
    assert reader.reported == expected


def test_the_responses_of_a_websocket_are_summed() -> None:
    """The usage of each of its responses counts; of a single response, the last one."""
    for each, expected in ((True, Usage(20, 40, 4, 0, 12, 30)), (False, Usage(10, 20, 2, 0, 6, 15))):
        reader = UsageScanner(each=each)
        reader.feed(BODIES["realtime"][0] * 2)
        assert reader.reported == expected


def test_the_description_of_a_tool_is_no_usage() -> None:
    """Otherwise a client could make its responses cheap by disconnecting before the end."""
    tools = [{"parameters": {"properties": {"usage": {"input_tokens": 0, "output_tokens": 0}}}}]
    created = sse({"type": "response.created", "response": {"tools": tools, "usage": None}})
    for place in range(len(created)):
        reader = UsageScanner()
        reader.feed(created[:place])
        reader.feed(created[place:])
        assert reader.reported is None


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("first", [1, 3, 5, 9])
def test_a_stream_is_one_however_it_begins(newline: bytes, first: int) -> None:
    """Whatever the first read contains, and whatever the lines end with."""
    data = (WORD * 3).replace(b"\n", newline)
    reader = UsageScanner()
    reader.feed(data[:first])
    reader.feed(data[first:])
    assert reader.output()[0] == count_tokens(" word" * 3, "gpt-4o")[0]


def test_a_picture_in_a_stream_is_not_kept() -> None:
    """The text after the picture counts."""
    reader = UsageScanner()
    reader.feed(b'data: {"type":"image_generation.partial_image","b64_json":"')
    for _ in range(500):
        reader.feed(b"A" * 16_384)
    assert sum(map(len, reader._kept)) < 1_100_000
    reader.feed(b'"}\n\n' + WORD)
    assert reader.output()[0] == count_tokens(" word", "gpt-4o")[0]


@pytest.mark.parametrize(
    ("deltas", "text"),
    [
        ([{"content": "Hel"}, {"content": "lo"}], "Hello"),
        ([{"content": 'a "quoted"\n\u20ac\\'}, {"content": "\U0001f600"}], 'a "quoted"\n\u20ac\\\U0001f600'),
        ([{"content": "a", "reasoning_content": "why"}, {"content": "b"}], "awhyb"),
        ([{"content": "a", "refusal": "no"}], "ano"),
        ([{"content": "a", "tool_calls": [{"function": {"arguments": '{"content":"x"}'}}]}], 'a{"content":"x"}'),
        ([{"content": "a"}, {"content": "", "reasoning_content": "why"}, {}], "awhy"),
        ([{"content": "data: {}"}, {"content": "b"}], "data: {}b"),
    ],
)  # fmt: skip
def test_the_text_of_a_stream_is_all_that_its_events_add(deltas: list[dict[str, Any]], text: str) -> None:
    """The fast path for plain text and the slow path have the same result."""
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    compact = [
        json.dumps(chunk, separators=(",", ":"), ensure_ascii=place % 2 == 0) for place, chunk in enumerate(chunks)
    ]
    events = [f"data: {chunk}\n\n" for chunk in compact]
    assert text_of_events("".join(events).encode()) == text


@pytest.mark.parametrize("counted", [True, False])
def test_a_long_stream_is_not_kept(counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its events nor its text: the tokens are counted or estimated piece by piece."""
    if not counted:
        monkeypatch.setattr(tokens, "toktok", None)
    reader, most, text = UsageScanner("gpt-4o"), 0, ""
    for number in range(20_000):
        word = f" word {number % 700}"
        text += word
        reader.feed(sse({"choices": [{"delta": {"content": word}}], "padding": "x" * 300}))
        most = max(most, reader._text.tell() + sum(map(len, reader._kept)))
    assert most < _TEXT_SIZE + 10_000
    assert len(text) > 5 * _TEXT_SIZE
    whole, source = count_tokens(text, "gpt-4o")
    found, how = reader.output()
    assert how == source
    assert whole <= found <= whole + 3 * len(text) // _TEXT_SIZE


def test_a_long_response_is_estimated_by_its_length() -> None:
    """The response broke off before the usage at its end."""
    reader = UsageScanner()
    for _ in range(100):
        reader.feed(b'{"data": "' + b"x" * 4000)
    assert sum(map(len, reader._kept)) < 70_000
    assert reader.output() == (100_250, "estimated")
