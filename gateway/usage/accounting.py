"""What an exchange used: told by Azure, or, where an answer broke off or tells nothing, made out from what was seen."""

from __future__ import annotations

import re
from io import StringIO
from typing import Annotated, TypeAlias

import msgspec

from gateway.errors import ApiError
from gateway.protocol.json_fields import raw_fields
from gateway.usage.response_text import text_of_events, texts_of_json
from gateway.usage.tokenizer import COUNTED_AT_ONCE, Source, count_tokens, most_output, prompt_tokens

__all__ = ("METERED", "PROMPTED", "UNTOLD", "Usage", "UsageMeter", "UsageReader")

# What has a prompt of text; and all that uses tokens. Not all that has a `usage` in its answer does: a file may hold
# thousands, and a stored answer has an old one.
PROMPTED = frozenset({"chat.completions", "completions", "responses", "embeddings"})
METERED = PROMPTED | {
    "audio.speech",
    "audio.transcriptions",
    "audio.translations",
    "images.edits",
    "images.generations",
    "realtime.connect",
    "responses.compact",
    "responses.connect",
    "threads.create_and_run",
    "threads.runs.create",
    "threads.runs.submit_tool_outputs",
}

# What uses tokens that no answer here tells: it is worked on later, or elsewhere. (A session's secret and a call's SDP
# let a client talk to Azure directly.)
UNTOLD = frozenset({
    "batches.create",
    "evals.runs.create",
    "fine_tuning.alpha.graders.run",
    "fine_tuning.jobs.create",
    "realtime.calls.create",
    "realtime.client_secrets.create",
    "realtime.sessions.create",
    "realtime.transcription_sessions.create",
    "realtime.translations.client_secrets.create",
    "threads.create_and_run",
    "threads.runs.create",
    "threads.runs.submit_tool_outputs",
    "videos.create",
    "videos.edit",
    "videos.extend",
    "videos.remix",
})  # fmt: skip

_KEY = b'"usage"'
_OPENS = b":{"
_NONE = b":null"  # of nearly every event of a stream that is asked for its usage
_VALUE = re.compile(rb"\s*:\s*(?:([{n])|[^\s{n])")
# A usage holds details, one level deep, and no text.
_OBJECT = re.compile(rb"\{[^{}]*+(?:\{[^{}]*+\}[^{}]*+)*+\}")
_MOST_USAGE = 4096
# How much may come before it is looked at, and how much is kept of an answer that is no stream, and of a line of one.
_KEPT = 4 * 1024
_KEPT_WHOLE = 64 * 1024
_KEPT_LINE = 1024 * 1024
# How much text is kept before its tokens are counted. A token that lies across the end of such a piece is counted as
# two or a few: some in 8,000. (Some texts take half a second for a megabyte, and so 16 ms for a piece.)
_KEPT_TEXT = 32 * 1024
# What a response in the background is taken for that bounds its answer by nothing.
_BACKGROUND = 4096
# How much tells a stream from another answer, and what a stream begins with.
_TOLD = 6
_BEGINNINGS = (b"data:", b"event:", b":", b"\xef\xbb\xbf", b"id:", b"retry:")


class Usage(msgspec.Struct, frozen=True):
    """The tokens of an exchange.

    `cached_tokens` and `audio_input_tokens` are part of `input_tokens`; `reasoning_tokens` and
    `audio_output_tokens` of `output_tokens`. `source` says whether Azure reported them, or whether those that it did
    not report were counted, or estimated.
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
        """All of them."""
        return self.input_tokens + self.output_tokens

    def __add__(self, other: Usage) -> Usage:
        sums = {name: getattr(self, name) + getattr(other, name) for name in _NUMBERS}
        return Usage(**sums, source=max(self.source, other.source, key=_SOURCES.index))


_NUMBERS = tuple(name for name in Usage.__struct_fields__ if name != "source")
_SOURCES = ("reported", "counted", "estimated")


_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)] | None


class _Details(msgspec.Struct):
    cached_tokens: _Count = None
    reasoning_tokens: _Count = None
    audio_tokens: _Count = None


class _Told(msgspec.Struct):
    """A usage in the words of any of the APIs."""

    prompt_tokens: _Count = None
    completion_tokens: _Count = None
    input_tokens: _Count = None
    output_tokens: _Count = None
    total_tokens: _Count = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None
    input_token_details: _Details | None = None
    output_token_details: _Details | None = None


_told = msgspec.json.Decoder(_Told)
_NO_DETAILS = _Details()


def _usage(data: bytes) -> Usage | None:
    """Return the usage that an object of JSON tells; None where it is something else of that name."""
    try:
        told = _told.decode(data)
    except (msgspec.DecodeError, ValueError):
        return None
    taken = told.prompt_tokens if told.prompt_tokens is not None else told.input_tokens
    given = told.completion_tokens if told.completion_tokens is not None else told.output_tokens
    if taken is None and given is None:
        if told.total_tokens is None:
            return None
        taken = told.total_tokens
    before = told.prompt_tokens_details or told.input_tokens_details or told.input_token_details or _NO_DETAILS
    after = told.completion_tokens_details or told.output_tokens_details or told.output_token_details or _NO_DETAILS
    return Usage(
        taken or 0,
        given or 0,
        before.cached_tokens or 0,
        after.reasoning_tokens or 0,
        before.audio_tokens or 0,
        after.audio_tokens or 0,
    )


def _last(data: bytes, start: int) -> Usage | None:
    """Return the usage at a place if it is what an answer ends with, as nearly all do: found at half the cost."""
    end = data.rfind(b"}")
    return _usage(data[start:end]) if data.startswith(b"}", end - 1) and end - start < _MOST_USAGE else None


def _object(data: bytes, start: int) -> bytes | None:
    """Return the object that begins at a place; None where its end has not come."""
    found = _OBJECT.match(data, start)
    return found.group() if found is not None else None


_NO_TEXT = StringIO()


class UsageReader:
    """Sees one answer's bytes pass, and finds the usage in them. Of several in one answer the last one counts.

    Of a stream the tokens of its text are counted as it comes, piece by piece, in case it breaks off.
    """

    # One is made for each request, and most of these are never set: defaults of the class cost nothing.
    _found: Usage | None = None
    status = 0
    """The answer's; 0 as long as there is none."""
    sent = False
    """Whether the request was written to Azure."""
    _rest = b""  # what may be the beginning of a usage
    _events: bool | None = None  # whether it is a stream of events; None as long as nothing has come
    _size = 0  # of what came, and in a stream was not looked at yet
    _tokens = 0  # of the text that was counted already
    _source: Source = "reported"  # and how they are known

    def __init__(self, model: str | None = None, *, each: bool = False) -> None:
        self._model = model
        self._each = each  # of a WebSocket, which has many answers, all count
        self._came: list[bytes] = []  # and is to be looked at, together: at a fraction of the cost
        self._came_size = 0
        self._kept: list[bytes] = []
        self._text = _NO_TEXT

    def feed(self, data: bytes) -> None:
        """Take what came."""
        self._came.append(data)
        self._came_size += len(data)
        if self._came_size > _KEPT:
            self._look()

    @property
    def found(self) -> Usage | None:
        """The usage that was told so far."""
        if self._came:
            self._look()
        return self._found

    def _look(self) -> None:
        """Look at what came."""
        data = self._came[0] if len(self._came) == 1 else b"".join(self._came)
        self._came, self._came_size = [], 0
        if not self._each:
            self._keep(data)
        if self._rest:
            data, self._rest = self._rest + data, b""
        place = data.find(_KEY)
        while place >= 0:
            if data.startswith(_OPENS, place + 7) and (usage := _last(data, place + 8)) is not None:
                self._find(usage)
                return
            none = data.startswith(_NONE, place + 7)
            value = _VALUE.match(data, place + 7) if not none else None
            if none or (value is not None and value.group(1) == b"n"):
                # What came before it in a stream was none: a tool may be described by whatever its author likes.
                whole, self._found = b"", self._found if self._each else None
            elif value is None:
                whole = None
            elif value.group(1) is None:
                whole = b""
            else:
                whole = _object(data, value.start(1))
            if whole is None and len(data) - place < _MOST_USAGE:
                self._rest = data[place:]
                return
            if whole and (usage := _usage(whole)) is not None:
                self._find(usage)
            place = data.find(_KEY, place + 7)
        # (A read of a stream ends where an event does, nearly always.)
        if not data.endswith(b"\n") and (quote := data.rfind(b'"', max(0, len(data) - 6))) >= 0:
            tail = data[quote:]
            if _KEY.startswith(tail):
                self._rest = tail

    def _find(self, usage: Usage) -> None:
        self._found = self._found + usage if self._each and self._found is not None else usage

    def _keep(self, data: bytes) -> None:
        """Keep what may have to be counted: of a stream its text, of another answer its beginning."""
        self._size += len(data)
        if self._events is None:
            self._kept.append(data)
            if self._size >= _TOLD:
                self._events = b"".join(self._kept).startswith(_BEGINNINGS)
                if self._events:
                    self._text = StringIO()
        elif not self._events:
            if self._size <= _KEPT_WHOLE:
                self._kept.append(data)
        elif self._size <= _KEPT_LINE:
            self._kept.append(data)
            if b"\n" in data:
                self._take_text(last=False)
        elif b"\n" in data:  # the end of a line that is no text, but a picture
            rest = data[data.index(b"\n") :]
            self._kept, self._size = [rest], len(rest)

    def output(self) -> tuple[int, Source]:
        """Return how many tokens of an answer have come, and how that is known."""
        if self._came:
            self._look()
        if self._events is None:
            return 0, "estimated"
        if self._events:
            self._take_text(last=True)
        elif self._size > _KEPT_WHOLE:
            return -(-self._size // 4), "estimated"
        else:
            return count_tokens("".join(texts_of_json(b"".join(self._kept))), self._model)
        self._count_text()
        return self._tokens, self._source

    def _take_text(self, *, last: bool) -> None:
        """Take the text out of the events that are kept whole."""
        data = b"".join(self._kept)
        end = len(data) if last else data.rfind(b"\n") + 1
        self._kept, self._size = [data[end:]] if data[end:] else [], len(data) - end
        self._text.write(text_of_events(data[:end]))
        if self._text.tell() > _KEPT_TEXT:
            self._count_text()

    def _count_text(self) -> None:
        """Count the tokens of the text that is kept, and keep it no longer."""
        tokens, source = count_tokens(self._text.getvalue(), self._model)
        self._tokens += tokens
        self._source = max(self._source, source, key=_SOURCES.index)
        self._text = StringIO()


def _in_background(body: bytes) -> bool:
    try:
        return raw_fields(body, ("background",)).get("background") == b"true"
    except ApiError:
        return False


class UsageMeter:
    """What one exchange used, over all that Azure was asked for it."""

    __slots__ = ("_asked",)

    def __init__(self) -> None:
        self._asked: list[tuple[UsageReader, str, bytes | None, str | None]] = []

    def watch(self, operation: str, body: bytes | None, model: str | None) -> UsageReader:
        """Return what is to see the answer that Azure is now asked for, with this body."""
        watch = UsageReader(model, each=operation in ("realtime.connect", "responses.connect"))
        self._asked.append((watch, operation, body, model))
        return watch

    @property
    def asked(self) -> int:
        """How often Azure was asked so far."""
        return len(self._asked)

    def forget(self, asked: int) -> None:
        """Count nothing for what Azure was asked since it had been asked so often: it has failed."""
        del self._asked[asked:]

    def usage(self, *, abandoned: bool) -> Usage | None:
        """Return the sum of what was used; None where nothing was, as far as is known.

        `abandoned` says that it was the client that ended it: what Azure was at work on then, it has not told.
        """
        used: Usage | None = None
        for asked in self._asked:
            one = self._of(*asked, abandoned=abandoned)
            if one is not None:
                used = one if used is None else used + one
        return used

    def _of(
        self, watch: UsageReader, operation: str, body: bytes | None, model: str | None, *, abandoned: bool
    ) -> Usage | None:
        if watch.found is not None:
            return watch.found
        status = watch.status
        if operation not in PROMPTED or status >= 400 or (status == 0 and not (abandoned and watch.sent)):
            return None
        # (Nothing can wait here for a long one to be counted.)
        taken, source = prompt_tokens(body, model, COUNTED_AT_ONCE) if body else (0, "estimated")
        if operation == "embeddings" or status == 0:
            return Usage(taken, 0, source=source)
        if operation == "responses" and body is not None and _in_background(body):
            # It is answered before it is worked on, and what it uses is never told here.
            return Usage(taken, most_output(body) or _BACKGROUND, source="estimated")
        given, how = watch.output()
        return Usage(taken, given, source=max(source, how, key=_SOURCES.index))
