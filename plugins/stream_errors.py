"""`stream_errors`: an error that Azure sends inside a stream of status 200 is an error to clients, too."""

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any

from gateway import Event, EventFilter, Meta, Next, Request, Response, Stage, UpstreamError

# What Azure and OpenAI call errors that have a status of their own, where the error names no status.
STATUS = {
    "content_filter": 400, "context_length_exceeded": 400, "invalid_request_error": 400, "invalid_api_key": 401,
    "unauthorized": 401, "permissiondenied": 403, "deploymentnotfound": 404, "model_not_found": 404,
    "timeout": 408, "rate_limit_exceeded": 429, "toomanyrequests": 429, "insufficient_quota": 429, "requests": 429,
    "tokens": 429, "internalservererror": 500, "server_error": 500, "serviceunavailable": 503,
    "service_unavailable": 503, "no_capacity": 503, "engine_overloaded": 503,
}  # fmt: skip
FIELDS = ("type", "param", "code")
END = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r(?!\n))")


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

    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        if response.status != 200 or response.error is not None or not response.event_stream:
            return response
        begun = await response.peek(has_begun, self.wait)
        for event in events_of(begun):
            if (error := error_in(event)) is not None:
                request.count(self.id)
                return as_answer(response, error)
            if not says_nothing(event):
                break
        response.pipe(BreakOff(request, self.id))
        return response


class BreakOff(EventFilter):
    """Ends a stream at an error."""

    finds = (b'"error"',)

    def __init__(self, request: Request, name: str) -> None:
        self._request = request
        self._name = name

    def event(self, event: Event) -> Event:
        error = error_in(event)
        if error is None:
            return event
        self._request.count(self._name)
        kind, param, code = (value if isinstance(value := error.get(name), str) else None for name in FIELDS)
        raise UpstreamError(message_of(error), type=kind, param=param, code=code or "upstream_error")


def has_begun(data: bytes) -> bool:
    """Whether these first bytes of a stream tell how it goes on: by an error, or by an event with something in it."""
    return any(not says_nothing(event) for event in events_of(data))


def events_of(data: bytes) -> list[Event]:
    """Return the events that are whole in some bytes."""
    events, start = [], 0
    for found in END.finditer(data):
        events.append(Event(data[start : found.end()]))
        start = found.end()
    return events


def says_nothing(event: Event) -> bool:
    """Whether an event is a comment, or Azure's first chunk, which has no choices."""
    content = event.json()
    if content is None:
        return not event.data.strip()
    return isinstance(content, dict) and content.get("choices") == [] and not content.get("error")


def error_in(event: Event) -> dict[str, Any] | None:
    """Return the error that an event is, None where it is none."""
    content = event.json()
    # (Events of the Responses API have a type, and errors of their own, which their clients read.)
    if not isinstance(content, dict) or not content.get("error") or "type" in content or content.get("choices"):
        return None
    error = content["error"]
    return error if isinstance(error, dict) else {"message": str(error)}


def message_of(error: dict[str, Any]) -> str:
    """Return an error's message."""
    message = error.get("message")
    return message if isinstance(message, str) and message else "Azure ended the stream with an error and no reason"


def status_of(error: dict[str, Any]) -> int:
    """Return the status that an error means: its own, or what its code or type stands for."""
    for name in ("status", "statusCode", "code", "type"):
        value = str(error.get(name)).lower()
        if re.fullmatch("[45][0-9][0-9]", value):
            return int(value)
        if (known := STATUS.get(value)) is not None:
            return known
    return 500


def as_answer(response: Response, error: dict[str, Any]) -> Response:
    """Return the answer that an error in a stream would have been."""
    answer = Response(status_of(error), json.dumps({"error": error}).encode(), response.headers.copy())
    answer.headers.remove("content-length")
    answer.headers.remove("content-encoding")
    answer.headers.set("content-type", "application/json")
    return answer
