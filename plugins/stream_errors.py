"""`stream_errors`: an error that Azure sends inside a stream of status 200 is an error to clients, too."""

from dataclasses import dataclass
from typing import Annotated

from gateway import ApiError, Event, EventFilter, Meta, Next, Request, Response, Stage, StreamError, UpstreamError

FIELDS = ("type", "param", "code")


@dataclass
class StreamErrors(Stage):
    """Answer with the error's own status where a stream begins with an error, and break off where one follows later.

    Azure's content filter and its limits may end a stream that has begun with status 200 by an object
    `{"error": ...}`. At the beginning, before anything that a client would show, it becomes a plain answer with
    the status that it means, so that clients raise, wait and try again as they do. Later it ends the stream as
    a broken one, with the error as its last event.
    """

    wait: Annotated[
        float,
        Meta(ge=0, le=60, description="seconds for which the head of an answer waits for its first event"),
    ] = 10.0

    must_precede = ("events",)  # it, too, reads whole events
    provides = ("errors",)

    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        if response.status != 200 or response.error is not None or not response.is_event_stream:
            return response
        if (error := await response.opening_error(self.wait)) is not None:
            request.count(self.id)
            return response.error_response(error)
        response.pipe(BreakOff(request, self.id))
        return response


class BreakOff(EventFilter):
    """Ends a stream at an error."""

    contains = (b'"error"', b'"statusCode"')

    def __init__(self, request: Request, name: str) -> None:
        self._request = request
        self._name = name

    def event(self, event: Event) -> Event:
        found = StreamError.from_event(event.json())
        if found is None:
            return event
        self._request.count(self._name)
        kind, param, code = (None if found.error.get(name) is None else str(found.error[name]) for name in FIELDS)
        kind = kind or ApiError(found.status, "").type
        raise UpstreamError(found.message, type=kind, param=param, code=code or "upstream_error")
