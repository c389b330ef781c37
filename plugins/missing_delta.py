"""`missing_delta`: the chunks in which Azure's filter tells its findings have the `delta` that clients read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from gateway import Event, EventFilter, Meta, Next, Request, Response, Services, Stage

# The empty id of a chunk of findings: one with several choices may lack a delta in one of them alone.
EMPTY = (b'""',)


@dataclass
class MissingDelta(Stage):
    """Give every choice of a streamed chat completion its `delta`, and its chunk the stream's id.

    With the asynchronous filter Azure sends chunks of findings alone, whose choices have no `delta` and whose
    id is empty; programs that read `choices[0].delta.content` fail on them.
    """

    choice: Annotated[
        Literal["complete", "drop", "keep"],
        Meta(description="what becomes of a choice without one: it gets an empty one, is dropped, or left as it is"),
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
    """Completes choices, or drops them."""

    lacks = (b'"delta"',)

    def __init__(self, count: Callable[[], None], *, drop: bool) -> None:
        self._count = count
        self._drop = drop
        self._id: str | None = None
        self.contains: Sequence[bytes] = EventFilter.contains  # until the stream has told its id

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
        # A choice that says why it ends is never dropped.
        kept = [each for each in choices if not (self._drop and lacks_delta(each) and not each.get("finish_reason"))]
        if not kept and not chunk.get("usage"):
            return None
        made = {**chunk, "choices": [{**each, "delta": {}} if lacks_delta(each) else each for each in kept]}
        if not made.get("id") and self._id is not None:
            made["id"] = self._id
        event.set_json(made)
        return event


def lacks_delta(choice: Any) -> bool:
    """Whether something is a choice without a `delta`."""
    return isinstance(choice, dict) and not isinstance(choice.get("delta"), dict)
