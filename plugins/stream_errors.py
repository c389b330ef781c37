"""`stream_errors`: an error inside a stream with status 200 reaches clients as an error."""

from dataclasses import dataclass
from typing import Annotated

from gateway import ApiError, Event, EventFilter, Meta, Next, Request, Response, Stage, StreamError, UpstreamError

FIELDS = ("type", "param", "code")


@dataclass
class StreamErrors(Stage):
    """Turn an error at the beginning of a stream into a response with its status; a later one ends the stream.

    Azure's content filter and its limits may end a stream with status 200 by an object `{"error": ...}`. Before any
    content, it becomes an ordinary error response, so that clients raise and retry as usual. Later it is the last
    event, and the stream ends as a broken one.
    """

    wait: Annotated[
        float,
        Meta(ge=0, le=60, description="seconds that the response's head waits for the first event"),
    ] = 10.0

    must_precede = ("events",)  # reads whole events
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
