"""`prompt_filter_chunk`: Azure's first chunk, which has no choices, no longer breaks `choices[0]`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from gateway import Event, EventFilter, Meta, Next, Request, Response, Services, Stage

# What Azure found in the prompt; `prompt_annotations` was its name before api-version 2023-07-01-preview.
FOUND = ("prompt_filter_results", "prompt_annotations")


@dataclass
class PromptFilterChunk(Stage):
    """Take out the chunk with which Azure tells what its filter found in the prompt, and which has no choices.

    Programs that read `chunk.choices[0].delta` of every chunk fail on it. The chunk that tells the usage, which
    has no choices either, is as OpenAI sends it, and stays.
    """

    chunk: Annotated[
        Literal["drop", "merge", "keep"],
        Meta(description="what becomes of it: gone, its findings put into the chunk after it, or left as it is"),
    ] = "drop"

    must_precede = ("events",)

    async def start(self, services: Services) -> None:
        self.idle = self.chunk == "keep"

    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        if response.is_event_stream and request.operation in ("chat.completions", "completions"):
            count = partial(request.count, self.id)
            response.pipe(Drop(count) if self.chunk == "drop" else Merge(count))
        return response


class Drop(EventFilter):
    """Drops the chunk."""

    contains = (b'"prompt_',)

    def __init__(self, count: Callable[[], None]) -> None:
        self._count = count

    def event(self, event: Event) -> Event | None:
        if not found_in(event.json()):
            return event
        self._count()
        return None


class Merge(EventFilter):
    """Puts what the chunk tells into the next one that has choices."""

    def __init__(self, count: Callable[[], None]) -> None:
        self._count = count
        self._held: list[Event] = []
        self.contains: Sequence[bytes] = Drop.contains

    def event(self, event: Event) -> Event | list[Event] | None:
        chunk = event.json()
        if found_in(chunk):
            self._held.append(event)
            self.contains = EventFilter.contains  # whatever comes next
            return None
        if not event.data.strip():
            return event  # a comment: there is more to come
        held, self._held = self._held, []
        self.contains = Drop.contains
        if not isinstance(chunk, dict) or not chunk.get("choices"):
            return [*held, event]  # an error, or the end: there is nothing to put it into
        found: dict[str, list[Any]] = {}
        for each in held:
            for name, results in found_in(each.json()).items():
                found.setdefault(name, []).extend(results)
            self._count()
        if found:
            event.set_json({**chunk, **found})
        return event

    def close(self) -> list[Event]:
        held, self._held = self._held, []
        return held


def found_in(chunk: Any) -> dict[str, list[Any]]:
    """Return what a chunk tells about the prompt, if it tells nothing else."""
    if not isinstance(chunk, dict) or chunk.get("choices") != [] or chunk.get("usage") or chunk.get("error"):
        return {}
    return {name: chunk[name] for name in FOUND if isinstance(chunk.get(name), list)}
