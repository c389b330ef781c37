"""How many tokens a text is: counted where the extra `tokens` is installed, else estimated. Nothing is downloaded.

What counts them is loaded when it is first needed, in the background; until it is there, they are estimated.

The estimate is a quarter of the text's bytes in UTF-8: near for English, too many for JSON and most other languages,
too few for digits and rare scripts. A picture is taken for 765 tokens and a second of speech for 10, as OpenAI counts
a picture of 1024 x 1024 and speech (platform.openai.com/docs/guides/images-vision, .../guides/realtime-costs).
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
    "most_output",
    "prompt_tokens",
)

Source: TypeAlias = Literal["reported", "counted", "estimated"]

# Above this many bytes a prompt is estimated by its length: decoding it would keep other requests waiting.
_MOST_COUNTED = 1024 * 1024
# Above this, it is counted in a thread of its own, or estimated where nothing can be waited for: some texts take half a
# second for a megabyte.
COUNTED_AT_ONCE = 64 * 1024
# How many pictures a body is searched for that is not decoded.
_MOST_PICTURES = 1000
_IMAGE = 765
# Bytes of base64 for a token of speech: 24,000 samples of 2 bytes a second, 10 tokens a second.
_SPEECH = 24_000 * 2 // 10 * 4 // 3
# Bytes of base64 for a token of a document: a page of text with its picture is some 100 KB and 1,000 tokens.
_FILE = 100
_NO_TEXT = frozenset({"role", "type", "id", "call_id"})
# What stands for sound in a body that is not decoded.
_SOUND = re.compile(rb'"data"\s*:\s*"[A-Za-z0-9+/=]{1000,}"')
# What a message costs beside its text (the OpenAI cookbook's "How to count tokens").
_MESSAGE = 4

# What nobody can ask for: an answer's tokens, and its choices (128 is OpenAI's most).
_MOST, _MOST_CHOICES = 10**12, 128

# Where the text of a prompt is.
_PROMPT = ("messages", "input", "prompt", "instructions", "prediction", "suffix")
_SCHEMAS = ("tools", "functions", "response_format", "text")


@lru_cache(maxsize=256)
def _encoding(model: str) -> str:
    """Return the encoding of a model by its name; that of the newer ones where the name does not tell."""
    old = model.startswith(("gpt-4", "gpt-3", "text-embedding", "davinci", "babbage"))
    newer = model.startswith(("gpt-4o", "gpt-4.", "gpt-4-1"))
    return "cl100k_base" if old and not newer else "o200k_base"


# One at a time: whoever sends long prompts waits for their own kind, and keeps no other request from its CPU.
_aside = ThreadPoolExecutor(1, thread_name_prefix="counting tokens")
_loaded: set[str] = set()
_loading: dict[str, threading.Thread] = {}


def load_encodings(*names: str) -> None:
    """Load the encodings of all models, or these: some 60 MB and half a second each, once for the process."""
    for name in names or ("o200k_base", "cl100k_base"):
        if toktok is not None and name not in _loaded:
            toktok.batch_count([""], name)
            _loaded.add(name)


def _is_ready(name: str) -> bool:
    """Whether an encoding is loaded; else it is being loaded from now on, and nobody waits for it."""
    if name not in _loaded and name not in _loading:
        _loading[name] = threading.Thread(target=load_encodings, args=(name,), name=f"load {name}", daemon=True)
        _loading[name].start()
    return name in _loaded


def count_tokens(text: str, model: str | None) -> tuple[int, Source]:
    """Return how many tokens a text is for a model, and how that is known."""
    if toktok is None or not _is_ready(_encoding(model or "")):
        return -(-len(text.encode("utf-8", "replace")) // 4), "estimated"
    return toktok.batch_count([text.encode("utf-8", "replace").decode()], _encoding(model or ""))[0], "counted"


async def expected_prompt_tokens(body: bytes, model: str | None) -> int:
    """Return how many tokens a request's JSON body is as a prompt; a long one is counted aside, one after another."""
    if len(body) <= COUNTED_AT_ONCE or len(body) > _MOST_COUNTED or toktok is None:
        return prompt_tokens(body, model, COUNTED_AT_ONCE)[0]
    loop = asyncio.get_running_loop()
    return (await loop.run_in_executor(_aside, prompt_tokens, body, model))[0]


def prompt_tokens(body: bytes, model: str | None, most: int = _MOST_COUNTED) -> tuple[int, Source]:
    """Return how many tokens a request's JSON body is as a prompt, and how that is known; above `most`, estimated."""
    if len(body) > most or toktok is None:
        return _estimated(body), "estimated"
    try:
        fields = decode_json(body, msgspec.json.decode)
    except ApiError:
        fields = None
    if not isinstance(fields, dict):
        return _estimated(body), "estimated"
    try:
        texts = [encode_json(fields[name]).decode("utf-8", "replace") for name in _SCHEMAS if fields.get(name)]
    except ApiError:  # nested too deeply
        return _estimated(body), "estimated"
    more = 0
    for name in _PROMPT:
        for part in _parts(fields.get(name)):
            if isinstance(part, str):
                texts.append(part)
            else:
                more += part
    count, source = count_tokens("\n".join(texts), model)
    return count + more, source


def _estimated(body: bytes) -> int:
    """Return a quarter of the bytes, but for those of pictures and sound."""
    if b"base64," not in body and b'"data"' not in body:
        return -(-len(body) // 4)
    size, more, place = len(body), 0, 0
    for _ in range(_MOST_PICTURES):
        place = body.find(b"base64,", place)
        if place < 0:
            break
        end = body.find(b'"', place)
        size, more = size - max(0, end - place), more + _IMAGE
        place += 7
    for sound in itertools.islice(_SOUND.finditer(body), _MOST_PICTURES):
        size, more = size - len(sound.group()), more + len(sound.group()) // _SPEECH
    return -(-max(0, size) // 4) + more


def _parts(value: Any) -> Iterator[str | int]:
    """Yield the texts in a part of a prompt, and what else is in it as a number of tokens.

    Without recursion: a body may be nested as deeply as it is long.
    """
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            # (A message is one, whatever type it names.)
            kind = None if "role" in value else value.get("type")
            if kind in ("image_url", "input_image", "image_generation_call", "computer_screenshot"):
                yield _IMAGE
            elif kind in ("input_audio", "audio"):
                yield _length(value, "data") // _SPEECH
            elif kind in ("file", "input_file"):
                yield max(_IMAGE, _length(value, "file_data") // _FILE)
            else:
                if "role" in value:
                    yield _MESSAGE
                waiting += [inner for name, inner in value.items() if name not in _NO_TEXT]
        elif isinstance(value, list):
            if value and all(type(each) is int for each in value):  # tokens already
                yield len(value)
            else:
                waiting += value


def _length(part: dict[str, Any], name: str) -> int:
    """Return how long a text in a part of a message is, or in the one thing that it is of."""
    for each in (part, part.get(part["type"])):
        if isinstance(each, dict) and isinstance(each.get(name), str):
            return len(each[name])
    return 0


_NULL = msgspec.Raw(b"null")
# The JSON of a number, in bytes; what is longer is none that counts.
_MOST_DIGITS = 1024


class _Asked(msgspec.Struct):
    """The fields by which a request bounds its answer."""

    max_completion_tokens: msgspec.Raw = _NULL
    max_tokens: msgspec.Raw = _NULL
    max_output_tokens: msgspec.Raw = _NULL
    n: msgspec.Raw = _NULL
    best_of: msgspec.Raw = _NULL
    prompt: msgspec.Raw = _NULL


_asked = msgspec.json.Decoder(_Asked)


def most_output(body: bytes) -> int | None:
    """Return how many tokens an answer may have at most, all choices together; None where the request does not say."""
    try:
        asked = decode_json(body, _asked.decode, skips=True)
    except ApiError:
        return None
    if not isinstance(asked, _Asked):
        asked = _Asked(**{name: msgspec.Raw(encode_json(asked.get(name))) for name in _Asked.__struct_fields__})
    given = [
        min(int(number), _MOST)
        for number in (_number(raw) for raw in (asked.max_completion_tokens, asked.max_tokens, asked.max_output_tokens))
        if number >= 1
    ]
    if not given:
        return None
    choices = max([int(each) for each in (_number(asked.n), _number(asked.best_of), 1) if 1 <= each <= _MOST_CHOICES])
    return max(given) * choices * _prompts(bytes(asked.prompt))


def _number(raw: msgspec.Raw) -> float:
    """Return a number; 0 if it is none."""
    if raw is _NULL or len(raw) > _MOST_DIGITS:
        return 0
    try:
        value = decode_json(bytes(raw), msgspec.json.decode)
    except ApiError:
        return 0
    return value if type(value) in (int, float) else 0


def _prompts(raw: bytes) -> int:
    """Return how many prompts a completion has, each with answers of its own; a list of numbers is one prompt."""
    if not raw.startswith(b"["):
        return 1
    try:
        prompts = decode_json(raw, msgspec.json.decode)
    except ApiError:  # too many to decode, and so at most as many as this
        return raw.count(b",") + 1
    return 1 if not prompts or type(prompts[0]) is int else len(prompts)
