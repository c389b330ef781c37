"""`missing_fields`: every chunk of a stream has an id, object, creation time and model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import time
from typing import Any

from gateway import Event, EventFilter, Next, Request, Response, Stage

FIELDS = ("id", "object", "created", "model")
OBJECTS = {"chat.completions": "chat.completion.chunk", "completions": "text_completion"}
# An empty string, however the chunk is written: inside a text, two quotes are never neighbours. (`created` is 0 only
# if the others are empty.)
EMPTY = (b'""',)
# Maximum number of chunks, without content, that wait for the first chunk with an id.
MAX_HELD = 16


@dataclass
class MissingFields(Stage):
    """Fill an empty `id`, `object`, `created` or `model` of a chunk from the stream's other chunks.

    They are empty in Azure's first chunk and in those of its asynchronous filter. The first chunk, which has no
    content, waits for the next one. If no chunk has them, the stage generates them.
    """

    must_precede = ("events",)

    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        kind = OBJECTS.get(request.operation or "")
        if kind is not None and response.is_event_stream:
            generated = {
                "id": f"chatcmpl-{request.id}" if kind == "chat.completion.chunk" else f"cmpl-{request.id}",
                "object": kind,
                "created": int(time()),
                "model": request.notes.get("model") or request.target.deployment or "",
            }
            response.pipe(Fill(partial(request.count, self.id), generated))
        return response


class Fill(EventFilter):
    """Fills empty fields."""

    def __init__(self, count: Callable[[], None], generated: dict[str, Any]) -> None:
        self._count = count
        self._generated = generated
        self._known: dict[str, Any] | None = None
        self._held: list[Event] = []
        self.contains: Sequence[bytes] = EventFilter.contains  # until the stream's id is known

    def event(self, event: Event) -> Event | list[Event] | None:
        chunk = event.json()
        if not isinstance(chunk, dict) or not isinstance(chunk.get("choices"), list):
            # After an error or the end no chunk follows; after a comment one may.
            return [*self.close(), event] if event.data.strip() else event
        if chunk.get("id"):
            if self._known is None or self._known is self._generated:
                self._known = {name: chunk.get(name) or self._generated[name] for name in FIELDS}
                self.contains = EMPTY
        elif self._known is None:
            if not has_content(chunk) and len(self._held) < MAX_HELD:
                self._held.append(event)
                return None
            self._known = self._generated
        held, self._held = self._held, []
        return [self._filled(each) for each in (*held, event)]

    def close(self) -> list[Event]:
        held, self._held = self._held, []
        if held and self._known is None:
            self._known = self._generated
        return [self._filled(each) for each in held]

    def _filled(self, event: Event) -> Event:
        known, chunk = self._known or self._generated, event.json()
        empty = [name for name in FIELDS if name in chunk and not chunk[name]]
        if empty:
            self._count()
            event.set_json({**chunk, **{name: known[name] for name in empty}})
        return event


def has_content(chunk: dict[str, Any]) -> bool:
    """Whether a chunk has content that a user waits for."""
    return bool(chunk.get("usage")) or any(
        isinstance(each, dict) and (each.get("delta") or each.get("text") or each.get("finish_reason"))
        for each in chunk["choices"]
    )
