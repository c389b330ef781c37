"""Errors inside a stream of status 200: in an event, or as plain JSON in place of one."""

from __future__ import annotations

import re
from typing import Any

from gateway.protocol.sse import Event

__all__ = ("StreamBeginning", "StreamError")

# The status of an error that has none, by its code or type, as Azure and OpenAI name them.
_STATUS = {
    "content_filter": 400, "context_length_exceeded": 400, "invalid_request_error": 400, "invalid_api_key": 401,
    "unauthorized": 401, "permissiondenied": 403, "deploymentnotfound": 404, "model_not_found": 404,
    "timeout": 408, "rate_limit_exceeded": 429, "toomanyrequests": 429, "insufficient_quota": 429, "requests": 429,
    "tokens": 429, "too_many_requests": 429, "internalservererror": 500, "server_error": 500, "serviceunavailable": 503,
    "service_unavailable": 503, "no_capacity": 503, "engine_overloaded": 503,
}  # fmt: skip
_END = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r(?!\n))")
# Events of the Responses API that precede any content.
_ANNOUNCEMENTS = frozenset({"response.created", "response.queued", "response.in_progress"})


class StreamError:
    """An error inside a stream: Azure's object, its message, and the status that it stands for."""

    __slots__ = ("error", "from_responses_api", "message", "status")

    def __init__(self, error: dict[str, Any], *, from_responses_api: bool = False) -> None:
        self.error = error
        self.from_responses_api = from_responses_api
        """Whether it is an event of the Responses API, which has created a response by then."""
        message = error.get("message")
        self.message = message if isinstance(message, str) and message else _NO_REASON
        self.status = _status_of(error, 400 if from_responses_api and error.get("code") else 500)

    @classmethod
    def from_event(cls, content: Any) -> StreamError | None:
        """Return the error in the JSON content of an event, or None.

        Events of the Responses API, which have a `type`, are ignored: their clients read these errors themselves.
        """
        if not isinstance(content, dict) or "type" in content or content.get("choices"):
            return None
        error = content.get("error")
        if not error:
            # The shape of API Management.
            return cls(content) if "statusCode" in content and "message" in content else None
        return cls(error if isinstance(error, dict) else {"message": str(error)})

    @classmethod
    def from_response_event(cls, content: Any) -> StreamError | None:
        """Return the error in an event of the Responses API, `error` or `response.failed`, or None."""
        if not isinstance(content, dict):
            return None
        if content.get("type") == "response.failed":
            response = content.get("response")
            error = response.get("error") if isinstance(response, dict) else None
            return cls(error if isinstance(error, dict) else {}, from_responses_api=True)
        if content.get("type") == "error":
            inner = content.get("error")
            # `type` is the event's type here, not the error's.
            return cls(inner if isinstance(inner, dict) else {**content, "type": None}, from_responses_api=True)
        return None


_NO_REASON = "Azure ended the stream with an error and no reason"


def _status_of(error: dict[str, Any], default: int) -> int:
    """Return the status of an error: its own, or that of its code or type, or `default`.

    Of the Responses API's codes, all but the known ones are errors of the client, hence a default of 400 there.
    """
    for name in ("status", "statusCode", "code", "type"):
        value = str(error.get(name)).lower()
        if re.fullmatch("[45][0-9][0-9]", value):
            return int(value)
        if (known := _STATUS.get(value)) is not None:
            return known
    return default


class StreamBeginning:
    """Searches the first bytes of a stream, each event once, for an error before any content.

    With `responses`, it skips events of the Responses API that only announce the response, and knows its errors.
    """

    def __init__(self, *, responses: bool = False) -> None:
        self._responses = responses
        self._offset = 0  # of the first event that is not parsed yet
        self._scanned = 0  # no event ends before this offset
        self._first: Event | None = None  # the first event with content

    def is_enough(self, data: bytes) -> bool:
        """Whether these first bytes contain the first event with content, or an error."""
        while self._first is None and (found := _END.search(data, max(self._offset, self._scanned))) is not None:
            event = Event(data[self._offset : found.end()])
            self._offset = found.end()
            if not self._has_no_content(event):
                self._first = event
        self._scanned = max(0, len(data) - 3)
        return self._first is not None

    def error_in(self, data: bytes) -> StreamError | None:
        """Return the error at the beginning of the stream, even if no blank line ends it."""
        if self.is_enough(data):
            return self._error_of(self._first.json()) if self._first is not None else None
        rest = data[self._offset :].removeprefix(b"\xef\xbb\xbf")
        if Event(rest).data.strip():
            return self._error_of(Event(rest).json())
        # Some gateways send an error as plain JSON, whatever their Content-Type.
        return self._error_of(Event(b"data: " + b" ".join(rest.splitlines())).json())

    def _error_of(self, content: Any) -> StreamError | None:
        return StreamError.from_event(content) or (
            StreamError.from_response_event(content) if self._responses else None
        )

    def _has_no_content(self, event: Event) -> bool:
        """Whether an event is a comment, or Azure's first chunk, which has no choices."""
        content = event.json()
        if content is None:
            return not event.data.strip()
        if not isinstance(content, dict):
            return False
        if self._responses and content.get("type") in _ANNOUNCEMENTS:
            return True
        return content.get("choices") == [] and not content.get("error")
