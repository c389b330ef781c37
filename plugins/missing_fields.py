"""`missing_fields`: every chunk of a stream has the id, object, time and model that clients go by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import time
from typing import Any

from gateway import Event, EventFilter, Next, Request, Response, Stage

FIELDS = ("id", "object", "created", "model")
OBJECTS = {"chat.completions": "chat.completion.chunk", "completions": "text_completion"}
# What is empty, however the chunk is written: inside a text, two quotes are never neighbours. (`created` is 0 only
# where the others are empty.)
EMPTY = (b'""',)
# How many chunks wait for the first one that has an id. They have nothing to show.
MOST = 16


@dataclass
class MissingFields(Stage):
    """Fill an empty `id`, `object`, `created` or `model` of a chunk with what the stream's other chunks say.

    Azure's first chunk, and those of its asynchronous filter, have them empty. The first one waits for the next
    chunk, which tells them; it has nothing to show meanwhile. Where none ever does they are made up.
    """

    must_precede = ("events",)

    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        kind = OBJECTS.get(request.operation or "")
        if kind is not None and response.is_event_stream:
            made_up = {
                "id": f"chatcmpl-{request.id}" if kind == "chat.completion.chunk" else f"cmpl-{request.id}",
                "object": kind,
                "created": int(time()),
                "model": request.notes.get("model") or request.target.deployment or "",
            }
            response.pipe(Fill(partial(request.count, self.id), made_up))
        return response


class Fill(EventFilter):
    """Fills empty fields."""

    def __init__(self, count: Callable[[], None], made_up: dict[str, Any]) -> None:
        self._count = count
        self._made_up = made_up
        self._known: dict[str, Any] | None = None
        self._held: list[Event] = []
        self.contains: Sequence[bytes] = EventFilter.contains  # until the stream has told its id

    def event(self, event: Event) -> Event | list[Event] | None:
        chunk = event.json()
        if not isinstance(chunk, dict) or not isinstance(chunk.get("choices"), list):
            # A comment tells nothing; an error or the end tells that nothing more is to be waited for.
            return [*self.close(), event] if event.data.strip() else event
        if chunk.get("id"):
            if self._known is None or self._known is self._made_up:
                self._known = {name: chunk.get(name) or self._made_up[name] for name in FIELDS}
                self.contains = EMPTY
        elif self._known is None:
            if not shows(chunk) and len(self._held) < MOST:
                self._held.append(event)
                return None
            self._known = self._made_up
        held, self._held = self._held, []
        return [self._filled(each) for each in (*held, event)]

    def close(self) -> list[Event]:
        held, self._held = self._held, []
        if held and self._known is None:
            self._known = self._made_up
        return [self._filled(each) for each in held]

    def _filled(self, event: Event) -> Event:
        known, chunk = self._known or self._made_up, event.json()
        empty = [name for name in FIELDS if name in chunk and not chunk[name]]
        if empty:
            self._count()
            event.set_json({**chunk, **{name: known[name] for name in empty}})
        return event


def shows(chunk: dict[str, Any]) -> bool:
    """Whether a chunk has anything that a user would wait for."""
    return bool(chunk.get("usage")) or any(
        isinstance(each, dict) and (each.get("delta") or each.get("text") or each.get("finish_reason"))
        for each in chunk["choices"]
    )
