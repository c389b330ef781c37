"""`stream_errors`: an error that Azure sends inside a stream of status 200 is an error to clients, too."""

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any

from gateway import ApiError, Event, EventFilter, Meta, Next, Request, Response, Stage, UpstreamError

# What Azure and OpenAI call errors that have a status of their own, where the error names no status.
STATUS = {
    "content_filter": 400, "context_length_exceeded": 400, "invalid_request_error": 400, "invalid_api_key": 401,
    "unauthorized": 401, "permissiondenied": 403, "deploymentnotfound": 404, "model_not_found": 404,
    "timeout": 408, "rate_limit_exceeded": 429, "toomanyrequests": 429, "insufficient_quota": 429, "requests": 429,
    "tokens": 429, "too_many_requests": 429, "internalservererror": 500, "server_error": 500, "serviceunavailable": 503,
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

    above = ("events",)  # it, too, reads whole events
    provides = ("errors",)

    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        if response.status != 200 or response.error is not None or not response.event_stream:
            return response
        if (response.headers.get("content-encoding") or "identity").strip().lower() == "identity":
            beginning = Beginning()
            begun = await response.peek(beginning.is_enough, self.wait)
            if (error := beginning.error_in(begun)) is not None:
                request.count(self.id)
                return as_answer(response, error)
        response.pipe(BreakOff(request, self.id))
        return response


class Beginning:
    """Looks through the first bytes of a stream, each event once, for an error before anything that is shown."""

    def __init__(self) -> None:
        self._place = 0  # where the first event begins that was not looked at
        self._scan = 0  # no event ends before this place
        self._told: Event | None = None  # the first that says something

    def is_enough(self, data: bytes) -> bool:
        """Whether these first bytes tell how the stream goes on."""
        while self._told is None and (found := END.search(data, max(self._place, self._scan))) is not None:
            event = Event(data[self._place : found.end()])
            self._place = found.end()
            if not says_nothing(event):
                self._told = event
        self._scan = max(0, len(data) - 3)
        return self._told is not None

    def error_in(self, data: bytes) -> dict[str, Any] | None:
        """Return the error with which the stream begins, also where no blank line ends it."""
        if self.is_enough(data):
            return error_of(self._told.json()) if self._told is not None else None
        rest = data[self._place :].removeprefix(b"\xef\xbb\xbf")
        if Event(rest).data.strip():
            return error_of(Event(rest).json())
        # (Some gateways send an error as plain JSON, whatever they call it.)
        return error_of(Event(b"data: " + b" ".join(rest.splitlines())).json())


class BreakOff(EventFilter):
    """Ends a stream at an error."""

    finds = (b'"error"', b'"statusCode"')

    def __init__(self, request: Request, name: str) -> None:
        self._request = request
        self._name = name

    def event(self, event: Event) -> Event:
        error = error_of(event.json())
        if error is None:
            return event
        self._request.count(self._name)
        kind, param, code = (None if error.get(name) is None else str(error[name]) for name in FIELDS)
        kind = kind or ApiError(status_of(error), "").type
        raise UpstreamError(message_of(error), type=kind, param=param, code=code or "upstream_error")


def says_nothing(event: Event) -> bool:
    """Whether an event is a comment, or Azure's first chunk, which has no choices."""
    content = event.json()
    if content is None:
        return not event.data.strip()
    return isinstance(content, dict) and content.get("choices") == [] and not content.get("error")


def error_of(content: Any) -> dict[str, Any] | None:
    """Return the error that an event's content is, None where it is none."""
    # (Events of the Responses API have a type, and errors of their own, which their clients read.)
    if not isinstance(content, dict) or "type" in content or content.get("choices"):
        return None
    error = content.get("error")
    if not error:
        # As API Management writes it.
        return content if "statusCode" in content and "message" in content else None
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
