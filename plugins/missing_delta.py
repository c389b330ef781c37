"""`missing_delta`: a `delta` for the chunks in which Azure's asynchronous content filter reports its results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from gateway import Event, EventFilter, Meta, Next, Request, Response, Services, Stage

# The empty id of a chunk of filter results. (Of several choices, only one may lack its delta.)
EMPTY = (b'""',)


@dataclass
class MissingDelta(Stage):
    """Give every choice of a streamed chat completion a `delta`, and its chunk the stream's id.

    With the asynchronous filter, Azure sends chunks with filter results alone: their choices have no `delta` and
    their id is empty. Programs that read `choices[0].delta.content` fail on them.
    """

    choice: Annotated[
        Literal["complete", "drop", "keep"],
        Meta(description="choices without a delta: complete with an empty one, drop, or keep unchanged"),
    ] = "complete"

    must_precede = ("events",)

    async def start(self, services: Services) -> None:
        self.idle = self.choice == "keep"

    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        if response.is_event_stream and request.operation == "chat.completions":
            response.pipe(Deltas(partial(request.count, self.id), drop=self.choice == "drop"))
        return response


class Deltas(EventFilter):
    """Completes or drops choices without a delta."""

    lacks = (b'"delta"',)

    def __init__(self, count: Callable[[], None], *, drop: bool) -> None:
        self._count = count
        self._drop = drop
        self._id: str | None = None
        self.contains: Sequence[bytes] = EventFilter.contains  # until the stream's id is known

    def event(self, event: Event) -> Event | None:
        chunk = event.json()
        if not isinstance(chunk, dict) or not isinstance(choices := chunk.get("choices"), list):
            return event
        if self._id is None and isinstance(own := chunk.get("id"), str) and own:
            self._id = own
            self.contains = EMPTY
        if not any(lacks_delta(choice) for choice in choices):
            return event
        self._count()
        # A choice with a finish_reason is never dropped.
        kept = [each for each in choices if not (self._drop and lacks_delta(each) and not each.get("finish_reason"))]
        if not kept and not chunk.get("usage"):
            return None
        fixed = {**chunk, "choices": [{**each, "delta": {}} if lacks_delta(each) else each for each in kept]}
        if not fixed.get("id") and self._id is not None:
            fixed["id"] = self._id
        event.set_json(fixed)
        return event


def lacks_delta(choice: Any) -> bool:
    """Whether a choice has no `delta`."""
    return isinstance(choice, dict) and not isinstance(choice.get("delta"), dict)
