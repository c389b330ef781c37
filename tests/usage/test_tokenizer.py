"""Tokens: counted if there is a tokenizer, and otherwise estimated."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

import pytest

from gateway.usage import tokenizer as tokens
from gateway.usage.tokenizer import (
    count_tokens,
    expected_prompt_tokens,
    load_encodings,
    max_output_tokens,
    prompt_tokens,
)


@pytest.fixture(autouse=True, scope="module")
def _tokenizer() -> None:
    """Load the encodings, as the gateway does when they are first needed."""
    load_encodings()


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "gpt-4o", **fields}).encode()


@pytest.fixture
def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without the extra `tokens`."""
    monkeypatch.setattr(tokens, "toktok", None)


@pytest.mark.parametrize(
    ("model", "count"), [("gpt-4o", 8), ("gpt-4.1-mini", 8), ("o3", 8), (None, 8), ("gpt-4", 10), ("gpt-35-turbo", 10)]
)
def test_text_is_counted_in_the_encoding_of_its_model(model: str | None, count: int) -> None:
    """An unknown name has the encoding of newer models."""
    assert count_tokens("Grüße aus Köln, 你好", model) == (count, "counted")


@pytest.mark.usefixtures("no_tokenizer")
def test_without_a_tokenizer_a_quarter_of_the_bytes() -> None:
    """And the source says so."""
    assert count_tokens("abcde", "gpt-4o") == (2, "estimated")
    assert count_tokens("é" * 4, "gpt-4o") == (2, "estimated")
    assert prompt_tokens(b"x" * 401, None) == (101, "estimated")


def test_lone_surrogates_are_counted() -> None:
    """A text that was cut inside a surrogate pair is counted, too."""
    assert count_tokens("a\ud83d", "gpt-4o")[0] > 0
    assert prompt_tokens(b'{"messages":[{"role":"user","content":"\\ud83d"}]}', "gpt-4o")[0] > 0


def test_a_prompt_is_all_text_that_the_model_reads() -> None:
    """Messages in either form, instructions, input, tools."""
    hello = count_tokens("hello", "gpt-4o")[0]
    for fields in (
        {"messages": [{"role": "user", "content": "hello"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]},
    ):
        assert prompt_tokens(body(**fields), "gpt-4o") == (hello + 4, "counted")
    assert prompt_tokens(body(input="hello"), "gpt-4o") == (hello, "counted")
    assert prompt_tokens(body(prompt=[[1, 2, 3], [4]]), "gpt-4o") == (4, "counted")
    assert prompt_tokens(body(input=[1, 2, 3]), "gpt-4o")[0] == 3
    tools = [{"type": "function", "function": {"name": "weather", "description": "of a town"}}]
    assert prompt_tokens(body(input="hello", tools=tools), "gpt-4o")[0] > hello


@pytest.mark.parametrize("tokenizer", [True, False])
def test_a_picture_is_not_counted_by_its_bytes(tokenizer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is sound."""
    if not tokenizer:
        monkeypatch.setattr(tokens, "toktok", None)
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    content = [{"type": "text", "text": "what is this?"}, picture]
    assert 765 < prompt_tokens(body(messages=[{"role": "user", "content": content}]), "gpt-4o")[0] < 850
    sound = {"type": "input_audio", "input_audio": {"data": "A" * 640_000, "format": "wav"}}
    assert 90 < prompt_tokens(body(messages=[{"role": "user", "content": [sound]}]), "gpt-4o")[0] < 150


def test_text_that_looks_like_a_picture_is_text() -> None:
    """Text that the model reads as text counts as text."""
    text = "data:image/png;base64," + " word" * 5000
    assert prompt_tokens(body(messages=[{"role": "user", "content": text}]), "gpt-4o")[0] > 5000


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"url": "TEXT"}}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"data": "TEXT"}}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"format": "TEXT"}}}}]},
        {"prediction": {"type": "content", "content": "TEXT"}},
        {"messages": [{"role": "user", "content": "TEXT", "url": "x"}]},
        {"messages": [{"role": "user", "name": "TEXT", "content": ""}]},
        {"input": [{"type": "function_call_output", "output": "TEXT"}]},
        {"messages": [{"role": "user", "type": "input_audio", "content": "TEXT"}]},
        {"input": [1, {"role": "user", "content": "TEXT"}]},
    ],
)
@pytest.mark.parametrize("text", [" word", "data:image/png;base64,", "url"])
def test_no_text_hides_from_the_count(fields: dict[str, Any], text: str) -> None:
    """Whatever the field's name and the content are."""
    sent = body(**fields).replace(b"TEXT", (text + " word" * 5000).encode())
    assert prompt_tokens(sent, "gpt-4o")[0] >= 5000


def test_a_large_body_is_estimated_without_its_pictures() -> None:
    """Without decoding it."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5_000_000}}
    count, source = prompt_tokens(body(messages=[{"role": "user", "content": [picture, {"text": "hello"}]}]), "gpt-4o")
    assert (count < 850, source) == (True, "estimated")


def test_a_deeply_nested_prompt_is_counted() -> None:
    """As deeply as the JSON decoder allows."""
    deep = b'{"input":' + b"[" * 900 + b'"hello"' + b"]" * 900 + b"}"
    assert prompt_tokens(deep, "gpt-4o") == (count_tokens("hello", "gpt-4o")[0], "counted")


def test_other_bodies_than_json_objects_are_estimated() -> None:
    """Another part rejects it."""
    for data in (b"[1,2]", b"{", b"nothing "):
        assert prompt_tokens(data, None) == (-(-len(data) // 4), "estimated")


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({}, None),
        ({"max_tokens": 10}, 10),
        ({"max_completion_tokens": 10, "max_tokens": 5}, 10),
        ({"max_output_tokens": 7}, 7),
        ({"max_tokens": 10, "n": 3}, 30),
        ({"max_tokens": 10, "n": 1000}, 10),
        ({"max_tokens": "10"}, None),
        ({"max_tokens": -1}, None),
        ({"max_tokens": None}, None),
        ({"max_tokens": True}, None),
        ({"max_tokens": 10.0}, 10),
        ({"max_tokens": 10**400}, 10**12),
        ({"max_tokens": 10, "best_of": 5, "n": 2}, 50),
        ({"max_tokens": 10, "prompt": ["a", "b", "c"]}, 30),
        ({"max_tokens": 10, "prompt": [1, 2, 3]}, 10),
        ({"max_tokens": 10, "n": 3.0}, 30),
        ({"max_tokens": 10, "prompt": [[1, 2], [3]]}, 20),
    ],
)
def test_the_maximum_number_of_output_tokens(fields: dict[str, Any], most: int | None) -> None:
    """All choices together."""
    assert max_output_tokens(body(**fields)) == most


def test_an_invalid_body_sets_no_maximum() -> None:
    """Another part rejects it."""
    assert max_output_tokens(b"{") is None


def test_no_request_waits_while_an_encoding_is_loaded() -> None:
    """Loading takes half a second: until then tokens are estimated."""
    code = """
from gateway.usage import tokenizer as tokens
print(tokens.count_tokens("hello there", "gpt-4o"))
tokens._loading["o200k_base"].join()
print(tokens.count_tokens("hello there", "gpt-4o"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.splitlines() == ["(3, 'estimated')", "(2, 'counted')"]


async def test_a_long_prompt_is_counted_in_a_thread() -> None:
    """Some texts take long: other requests continue meanwhile."""
    sent = body(input="-" * 900_000)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    going = asyncio.create_task(others())
    assert await expected_prompt_tokens(sent, "gpt-4o") == prompt_tokens(sent, "gpt-4o")[0]
    going.cancel()
    assert turns > 10
    assert (
        await expected_prompt_tokens(body(input="-" * 2_000_000), "gpt-4o") == prompt_tokens(sent, "x", 10)[0] + 275_000
    )


@pytest.mark.usefixtures("no_tokenizer")
def test_the_search_for_pictures_is_bounded() -> None:
    """Everything after the thousandth picture counts as text."""
    assert prompt_tokens(b',"data:x;base64,A"' * 100_000, None)[0] > 400_000


def test_a_bomb_of_prompts_is_not_decoded() -> None:
    """The number of commas bounds the number of prompts; other fields are numbers or ignored."""
    bomb = b"[" + b"[]," * 1_000_000 + b"[]]"
    assert max_output_tokens(b'{"max_tokens":3,"prompt":%b}' % bomb) == 3 * 1_000_001
    assert max_output_tokens(b'{"max_tokens":%b}' % bomb) is None
    assert max_output_tokens(b'{"max_tokens":3,"n":%b}' % bomb) == 3
