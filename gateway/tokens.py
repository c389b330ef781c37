"""How many tokens a text is: counted where the extra `tokens` is installed, else estimated. Nothing is downloaded.

What counts them is loaded when it is first needed, in the background; until it is there, they are estimated.

The estimate is a quarter of the text's bytes in UTF-8: near for English, too many for JSON and most other languages,
too few for digits and rare scripts. A picture is taken for 765 tokens and a second of speech for 10, as OpenAI counts
a picture of 1024 x 1024 and speech (platform.openai.com/docs/guides/images-vision, .../guides/realtime-costs).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import msgspec

from gateway.errors import ApiError
from gateway.jsonbody import decoded_json

try:
    import toktok
except ImportError:
    toktok = None

__all__ = ("Source", "count_tokens", "load_encodings", "most_output", "prompt_tokens")

Source: TypeAlias = Literal["reported", "counted", "estimated"]

# Above this many bytes a prompt is estimated by its length: decoding it would keep other requests waiting.
_MOST_COUNTED = 4 * 1024 * 1024
_IMAGE = 765
# Bytes of base64 for a token of speech: 24,000 samples of 2 bytes a second, 10 tokens a second.
_SPEECH = 24_000 * 2 // 10 * 4 // 3
# What a message costs beside its text (the OpenAI cookbook's "How to count tokens").
_MESSAGE = 4

# Where the text of a prompt is.
_PROMPT = ("messages", "input", "prompt", "instructions", "tools", "functions", "response_format", "text")


@lru_cache(maxsize=256)
def _encoding(model: str) -> str:
    """Return the encoding of a model by its name; that of the newer ones where the name does not tell."""
    old = model.startswith(("gpt-4", "gpt-3", "text-embedding", "davinci", "babbage"))
    newer = model.startswith(("gpt-4o", "gpt-4.", "gpt-4-1"))
    return "cl100k_base" if old and not newer else "o200k_base"


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


def prompt_tokens(body: bytes, model: str | None) -> tuple[int, Source]:
    """Return how many tokens a request's JSON body is as a prompt, and how that is known."""
    if len(body) > _MOST_COUNTED or (toktok is None and b";base64," not in body and b'"input_audio"' not in body):
        return -(-len(body) // 4), "estimated"
    try:
        fields = decoded_json(body, msgspec.json.decode)
    except ApiError:
        fields = None
    if not isinstance(fields, dict):
        return -(-len(body) // 4), "estimated"
    texts: list[str] = []
    more = 0
    for name in _PROMPT:
        for part in _parts(fields.get(name)):
            if isinstance(part, str):
                texts.append(part)
            else:
                more += part
    count, source = count_tokens("\n".join(texts), model)
    return count + more, source


def _parts(value: Any, key: str = "") -> Iterator[str | int]:
    """Yield the texts in a part of a prompt, and what else is in it as a number of tokens."""
    if isinstance(value, str):
        if value.startswith("data:") or key in ("url", "image_url"):
            yield _IMAGE
        elif key == "data":
            yield len(value) // _SPEECH
        else:
            yield value
    elif isinstance(value, dict):
        if "role" in value:
            yield _MESSAGE
        for name, inner in value.items():
            if name not in ("role", "type", "detail", "format", "id", "call_id"):
                yield from _parts(inner, name)
    elif isinstance(value, list):
        if value and all(isinstance(each, int) for each in value):  # tokens already
            yield len(value)
        else:
            for inner in value:
                yield from _parts(inner, key)


class _Asked(msgspec.Struct):
    """The fields by which a request bounds its answer."""

    max_completion_tokens: Any = None
    max_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None


_asked = msgspec.json.Decoder(_Asked)


def most_output(body: bytes) -> int | None:
    """Return how many tokens an answer may have at most, all choices together; None where the request does not say."""
    try:
        asked = decoded_json(body, _asked.decode)
    except ApiError:
        return None
    if not isinstance(asked, _Asked):
        asked = _Asked(**{name: asked.get(name) for name in _Asked.__struct_fields__})
    each = [asked.max_completion_tokens, asked.max_tokens, asked.max_output_tokens]
    given = [number for number in each if isinstance(number, int) and number > 0]
    if not given:
        return None
    return max(given) * (asked.n if isinstance(asked.n, int) and 0 < asked.n <= 128 else 1)
