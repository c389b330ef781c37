"""Errors that Azure tells inside a stream of status 200: by an event, or by what stands in the place of one."""

from __future__ import annotations

import re
from typing import Any

from gateway.protocol.sse import Event

__all__ = ("StreamBeginning", "StreamError")

# What Azure and OpenAI call errors that have a status of their own, where the error names no status.
_STATUS = {
    "content_filter": 400, "context_length_exceeded": 400, "invalid_request_error": 400, "invalid_api_key": 401,
    "unauthorized": 401, "permissiondenied": 403, "deploymentnotfound": 404, "model_not_found": 404,
    "timeout": 408, "rate_limit_exceeded": 429, "toomanyrequests": 429, "insufficient_quota": 429, "requests": 429,
    "tokens": 429, "too_many_requests": 429, "internalservererror": 500, "server_error": 500, "serviceunavailable": 503,
    "service_unavailable": 503, "no_capacity": 503, "engine_overloaded": 503,
}  # fmt: skip
_END = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r(?!\n))")
# Events of the Responses API that come before it has begun to answer.
_BEFORE = frozenset({"response.created", "response.queued", "response.in_progress"})


class StreamError:
    """An error inside a stream: Azure's object, what it says, and the status that it means."""

    __slots__ = ("error", "message", "of_response_api", "status")

    def __init__(self, error: dict[str, Any], *, of_response: bool = False) -> None:
        self.error = error
        self.of_response_api = of_response
        """Whether it is an event of the Responses API, which has made something by then."""
        message = error.get("message")
        self.message = message if isinstance(message, str) and message else _NO_REASON
        self.status = _status_of(error, 400 if of_response and error.get("code") else 500)

    @classmethod
    def of(cls, content: Any) -> StreamError | None:
        """Return the error that an event's content is, None where it is none.

        Events of the Responses API have a type, and errors of their own, which their clients read: they are none.
        """
        if not isinstance(content, dict) or "type" in content or content.get("choices"):
            return None
        error = content.get("error")
        if not error:
            # As API Management writes it.
            return cls(content) if "statusCode" in content and "message" in content else None
        return cls(error if isinstance(error, dict) else {"message": str(error)})

    @classmethod
    def of_response(cls, content: Any) -> StreamError | None:
        """Return the error that an event of the Responses API tells: `error`, or `response.failed`."""
        if not isinstance(content, dict):
            return None
        if content.get("type") == "response.failed":
            response = content.get("response")
            error = response.get("error") if isinstance(response, dict) else None
            return cls(error if isinstance(error, dict) else {}, of_response=True)
        if content.get("type") == "error":
            inner = content.get("error")
            # (Its `type` is the event's, and no error's.)
            return cls(inner if isinstance(inner, dict) else {**content, "type": None}, of_response=True)
        return None


_NO_REASON = "Azure ended the stream with an error and no reason"


def _status_of(error: dict[str, Any], otherwise: int) -> int:
    """Return the status that an error means: its own, or what its code or type stands for.

    Of the Responses API's codes all but those few that are known are the client's own faults.
    """
    for name in ("status", "statusCode", "code", "type"):
        value = str(error.get(name)).lower()
        if re.fullmatch("[45][0-9][0-9]", value):
            return int(value)
        if (known := _STATUS.get(value)) is not None:
            return known
    return otherwise


class StreamBeginning:
    """Looks through the first bytes of a stream, each event once, for an error before anything that is shown.

    With `responses`, events of the Responses API that only say that it has begun are not taken for its answer, and its
    own errors are errors.
    """

    def __init__(self, *, responses: bool = False) -> None:
        self._responses = responses
        self._place = 0  # where the first event begins that was not looked at
        self._scan = 0  # no event ends before this place
        self._told: Event | None = None  # the first that says something

    def is_enough(self, data: bytes) -> bool:
        """Whether these first bytes tell how the stream goes on."""
        while self._told is None and (found := _END.search(data, max(self._place, self._scan))) is not None:
            event = Event(data[self._place : found.end()])
            self._place = found.end()
            if not self._says_nothing(event):
                self._told = event
        self._scan = max(0, len(data) - 3)
        return self._told is not None

    def error_in(self, data: bytes) -> StreamError | None:
        """Return the error with which the stream begins, also where no blank line ends it."""
        if self.is_enough(data):
            return self._error_of(self._told.json()) if self._told is not None else None
        rest = data[self._place :].removeprefix(b"\xef\xbb\xbf")
        if Event(rest).data.strip():
            return self._error_of(Event(rest).json())
        # (Some gateways send an error as plain JSON, whatever they call it.)
        return self._error_of(Event(b"data: " + b" ".join(rest.splitlines())).json())

    def _error_of(self, content: Any) -> StreamError | None:
        return StreamError.of(content) or (StreamError.of_response(content) if self._responses else None)

    def _says_nothing(self, event: Event) -> bool:
        """Whether an event is a comment, or Azure's first chunk, which has no choices."""
        content = event.json()
        if content is None:
            return not event.data.strip()
        if not isinstance(content, dict):
            return False
        if self._responses and content.get("type") in _BEFORE:
            return True
        return content.get("choices") == [] and not content.get("error")
