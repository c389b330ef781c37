"""`prompt_filter_chunk`: Azure's first chunk, which has no choices, no longer breaks `choices[0]`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from gateway import Event, EventFilter, Meta, Next, Request, Response, Services, Stage

# Filter results of the prompt; before api-version 2023-07-01-preview they were called `prompt_annotations`.
RESULTS = ("prompt_filter_results", "prompt_annotations")


@dataclass
class PromptFilterChunk(Stage):
    """Remove the chunk with the content filter's results for the prompt, which has no choices.

    Programs that read `chunk.choices[0].delta` of every chunk fail on it. The chunk with the usage has no choices
    either; OpenAI sends that one too, so it stays.
    """

    chunk: Annotated[
        Literal["drop", "merge", "keep"],
        Meta(description="the chunk: drop, merge its results into the next chunk with choices, or keep unchanged"),
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
        if not prompt_results(event.json()):
            return event
        self._count()
        return None


class Merge(EventFilter):
    """Merges the chunk's results into the next chunk that has choices."""

    def __init__(self, count: Callable[[], None]) -> None:
        self._count = count
        self._held: list[Event] = []
        self.contains: Sequence[bytes] = Drop.contains

    def event(self, event: Event) -> Event | list[Event] | None:
        chunk = event.json()
        if prompt_results(chunk):
            self._held.append(event)
            self.contains = EventFilter.contains  # the next event, whatever it is
            return None
        if not event.data.strip():
            return event  # a comment: wait for the next event
        held, self._held = self._held, []
        self.contains = Drop.contains
        if not isinstance(chunk, dict) or not chunk.get("choices"):
            return [*held, event]  # an error, or the end: no chunk to merge into
        merged: dict[str, list[Any]] = {}
        for each in held:
            for name, results in prompt_results(each.json()).items():
                merged.setdefault(name, []).extend(results)
            self._count()
        if merged:
            event.set_json({**chunk, **merged})
        return event

    def close(self) -> list[Event]:
        held, self._held = self._held, []
        return held


def prompt_results(chunk: Any) -> dict[str, list[Any]]:
    """Return the filter results of a chunk that holds nothing else, else nothing."""
    if not isinstance(chunk, dict) or chunk.get("choices") != [] or chunk.get("usage") or chunk.get("error"):
        return {}
    return {name: chunk[name] for name in RESULTS if isinstance(chunk.get(name), list)}
