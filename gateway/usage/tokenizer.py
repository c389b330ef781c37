"""Counts the tokens of texts and prompts if the extra `tokens` is installed, and estimates them otherwise.

Nothing is downloaded. An encoding is loaded in the background when it is first needed; until then the gateway
estimates.

The estimate is a quarter of the text's bytes in UTF-8: close for English, too high for JSON and most other languages,
too low for digits and rare scripts. A picture counts as 765 tokens and a second of speech as 10, as OpenAI counts a
picture of 1024 x 1024 and speech (platform.openai.com/docs/guides/images-vision, .../guides/realtime-costs).
"""

from __future__ import annotations

import asyncio
import itertools
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import msgspec

from gateway.errors import ApiError
from gateway.protocol.json_fields import decode_json, encode_json

try:
    import toktok
except ImportError:
    toktok = None

__all__ = (
    "COUNTED_AT_ONCE",
    "Source",
    "count_tokens",
    "expected_prompt_tokens",
    "load_encodings",
    "max_output_tokens",
    "prompt_tokens",
)

Source: TypeAlias = Literal["reported", "counted", "estimated"]

# Estimate a prompt above this size, in bytes, by its length: decoding it would keep other requests waiting.
_MAX_COUNTED = 1024 * 1024
# Count a prompt above this size, in bytes, in another thread, or estimate it if the caller cannot wait: a megabyte can
# take half a second.
COUNTED_AT_ONCE = 64 * 1024
# Maximum number of pictures to search for in a body that is not decoded.
_MAX_PICTURES = 1000
_PICTURE_TOKENS = 765
# Bytes of base64 per token of speech: 24,000 samples of 2 bytes a second, 10 tokens a second.
_SPEECH_BYTES = 24_000 * 2 // 10 * 4 // 3
# Bytes of base64 per token of a document: a page of text with its picture is some 100 KB and 1,000 tokens.
_FILE_BYTES = 100
_NO_TEXT = frozenset({"role", "type", "id", "call_id"})
# Sound in a body that is not decoded.
_SOUND = re.compile(rb'"data"\s*:\s*"[A-Za-z0-9+/=]{1000,}"')
# Tokens of a message in addition to its text (the OpenAI cookbook's "How to count tokens").
_MESSAGE_TOKENS = 4

# Limits of plausible requests: output tokens, and choices (128 is OpenAI's maximum).
_MAX_OUTPUT, _MAX_CHOICES = 10**12, 128

# Fields that hold the text of a prompt.
_TEXT_FIELDS = ("messages", "input", "prompt", "instructions", "prediction", "suffix")
_SCHEMA_FIELDS = ("tools", "functions", "response_format", "text")


@lru_cache(maxsize=256)
def _encoding(model: str) -> str:
    """Return the encoding of a model by its name. An unknown name gets the encoding of newer models."""
    old = model.startswith(("gpt-4", "gpt-3", "text-embedding", "davinci", "babbage"))
    newer = model.startswith(("gpt-4o", "gpt-4.", "gpt-4-1"))
    return "cl100k_base" if old and not newer else "o200k_base"


# A single thread: long prompts wait for each other, and take no more than one CPU from other requests.
_counting_thread = ThreadPoolExecutor(1, thread_name_prefix="counting tokens")
_loaded: set[str] = set()
_loading: dict[str, threading.Thread] = {}


def load_encodings(*names: str) -> None:
    """Load the named encodings, or all: some 60 MB and half a second each, once per process."""
    for name in names or ("o200k_base", "cl100k_base"):
        if toktok is not None and name not in _loaded:
            toktok.batch_count([""], name)
            _loaded.add(name)


def _is_ready(name: str) -> bool:
    """Whether an encoding is loaded. If not, start to load it in the background."""
    if name not in _loaded and name not in _loading:
        _loading[name] = threading.Thread(target=load_encodings, args=(name,), name=f"load {name}", daemon=True)
        _loading[name].start()
    return name in _loaded


def count_tokens(text: str, model: str | None) -> tuple[int, Source]:
    """Return the number of tokens of a text for a model, and whether it is counted or estimated."""
    if toktok is None or not _is_ready(_encoding(model or "")):
        return -(-len(text.encode("utf-8", "replace")) // 4), "estimated"
    return toktok.batch_count([text.encode("utf-8", "replace").decode()], _encoding(model or ""))[0], "counted"


async def expected_prompt_tokens(body: bytes, model: str | None) -> int:
    """Return the number of prompt tokens of a JSON request body. Long ones are counted in a thread, one at a time."""
    if len(body) <= COUNTED_AT_ONCE or len(body) > _MAX_COUNTED or toktok is None:
        return prompt_tokens(body, model, COUNTED_AT_ONCE)[0]
    loop = asyncio.get_running_loop()
    return (await loop.run_in_executor(_counting_thread, prompt_tokens, body, model))[0]


def prompt_tokens(body: bytes, model: str | None, max_counted: int = _MAX_COUNTED) -> tuple[int, Source]:
    """Return the number of prompt tokens of a JSON request body, and whether it is counted or estimated.

    A body above `max_counted` bytes is estimated.
    """
    if len(body) > max_counted or toktok is None:
        return _estimate(body), "estimated"
    try:
        fields = decode_json(body, msgspec.json.decode)
    except ApiError:
        fields = None
    if not isinstance(fields, dict):
        return _estimate(body), "estimated"
    try:
        texts = [encode_json(fields[name]).decode("utf-8", "replace") for name in _SCHEMA_FIELDS if fields.get(name)]
    except ApiError:  # nested too deeply
        return _estimate(body), "estimated"
    other_tokens = 0
    for name in _TEXT_FIELDS:
        for part in _parts(fields.get(name)):
            if isinstance(part, str):
                texts.append(part)
            else:
                other_tokens += part
    count, source = count_tokens("\n".join(texts), model)
    return count + other_tokens, source


def _estimate(body: bytes) -> int:
    """Return a quarter of the bytes, apart from pictures and sound, which have their own rates."""
    if b"base64," not in body and b'"data"' not in body:
        return -(-len(body) // 4)
    size, tokens, at = len(body), 0, 0
    for _ in range(_MAX_PICTURES):
        at = body.find(b"base64,", at)
        if at < 0:
            break
        end = body.find(b'"', at)
        size, tokens = size - max(0, end - at), tokens + _PICTURE_TOKENS
        at += 7
    for sound in itertools.islice(_SOUND.finditer(body), _MAX_PICTURES):
        size, tokens = size - len(sound.group()), tokens + len(sound.group()) // _SPEECH_BYTES
    return -(-max(0, size) // 4) + tokens


def _parts(value: Any) -> Iterator[str | int]:
    """Yield the texts in a part of a prompt, and the number of tokens of each part that is no text.

    Without recursion: a body can be nested as deeply as it is long.
    """
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            # (A part with a role is a message, whatever its type says.)
            kind = None if "role" in value else value.get("type")
            if kind in ("image_url", "input_image", "image_generation_call", "computer_screenshot"):
                yield _PICTURE_TOKENS
            elif kind in ("input_audio", "audio"):
                yield _length(value, "data") // _SPEECH_BYTES
            elif kind in ("file", "input_file"):
                yield max(_PICTURE_TOKENS, _length(value, "file_data") // _FILE_BYTES)
            else:
                if "role" in value:
                    yield _MESSAGE_TOKENS
                pending += [inner for name, inner in value.items() if name not in _NO_TEXT]
        elif isinstance(value, list):
            if value and all(type(each) is int for each in value):  # token ids
                yield len(value)
            else:
                pending += value


def _length(part: dict[str, Any], name: str) -> int:
    """Return the length of a text field in a part of a message, or in the object that has the name of its type."""
    for each in (part, part.get(part["type"])):
        if isinstance(each, dict) and isinstance(each.get(name), str):
            return len(each[name])
    return 0


_NULL = msgspec.Raw(b"null")
# Maximum length of a JSON number, in bytes. Longer ones are ignored.
_MAX_DIGITS = 1024


class _OutputLimits(msgspec.Struct):
    """The fields of a request that bound its output."""

    max_completion_tokens: msgspec.Raw = _NULL
    max_tokens: msgspec.Raw = _NULL
    max_output_tokens: msgspec.Raw = _NULL
    n: msgspec.Raw = _NULL
    best_of: msgspec.Raw = _NULL
    prompt: msgspec.Raw = _NULL


_output_limits = msgspec.json.Decoder(_OutputLimits)


def max_output_tokens(body: bytes) -> int | None:
    """Return the maximum number of output tokens, all choices together. Returns None if the request sets none."""
    try:
        limits = decode_json(body, _output_limits.decode, skips=True)
    except ApiError:
        return None
    if not isinstance(limits, _OutputLimits):
        names = _OutputLimits.__struct_fields__
        limits = _OutputLimits(**{name: msgspec.Raw(encode_json(limits.get(name))) for name in names})
    fields = (limits.max_completion_tokens, limits.max_tokens, limits.max_output_tokens)
    given = [min(int(number), _MAX_OUTPUT) for number in (_number(raw) for raw in fields) if number >= 1]
    if not given:
        return None
    choices = max([int(each) for each in (_number(limits.n), _number(limits.best_of), 1) if 1 <= each <= _MAX_CHOICES])
    return max(given) * choices * _prompts(bytes(limits.prompt))


def _number(raw: msgspec.Raw) -> float:
    """Return a number. Returns 0 if the JSON is none."""
    if raw is _NULL or len(raw) > _MAX_DIGITS:
        return 0
    try:
        value = decode_json(bytes(raw), msgspec.json.decode)
    except ApiError:
        return 0
    return value if type(value) in (int, float) else 0


def _prompts(raw: bytes) -> int:
    """Return the number of prompts of a completion, each with its own choices. A list of numbers is one prompt."""
    if not raw.startswith(b"["):
        return 1
    try:
        prompts = decode_json(raw, msgspec.json.decode)
    except ApiError:  # too many to decode; there are no more prompts than this
        return raw.count(b",") + 1
    return 1 if not prompts or type(prompts[0]) is int else len(prompts)
