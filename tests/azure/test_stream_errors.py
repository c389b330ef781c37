"""Errors inside streams of status 200, and the events before them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.azure.stream_errors import StreamBeginning, StreamError
from tests.chunks import PLAIN, PROMPT, event

CREATED = {"type": "response.created", "response": {"id": "resp_1", "status": "in_progress"}}
FAILED = {"type": "response.failed", "response": {"error": {"code": "rate_limit_exceeded", "message": "slow down"}}}
ERROR = {"type": "error", "code": "server_error", "message": "oh", "param": None}
NESTED = {"type": "error", "error": {"type": "too_many_requests", "code": "too_many_requests", "message": "no"}}
DELTA = {"type": "response.output_text.delta", "delta": "Hi"}
LIMIT = {"error": {"code": "429", "message": "Try again in 2 seconds."}}


def found(*events: Any, responses: bool = False) -> tuple[bool, int | None]:
    """Return whether these events are enough to decide, and the status of the error at their beginning."""
    data = b"".join(event(each) for each in events)
    beginning = StreamBeginning(responses=responses)
    enough = beginning.is_enough(data)
    error = beginning.error_in(data)
    return enough, error.status if error is not None else None


@pytest.mark.parametrize(
    ("events", "responses", "told"),
    [
        ([PROMPT], False, (False, None)),
        ([PROMPT, PLAIN], False, (True, None)),
        ([PROMPT, LIMIT], False, (True, 429)),
        ([CREATED], False, (True, None)),
        ([CREATED], True, (False, None)),
        ([CREATED, DELTA], True, (True, None)),
        ([CREATED, FAILED], True, (True, 429)),
        ([CREATED, FAILED], False, (True, None)),
        ([ERROR], True, (True, 500)),
        ([NESTED], True, (True, 429)),
        ([ERROR], False, (True, None)),
        ([LIMIT], True, (True, 429)),
        ([CREATED, {"type": "response.failed", "response": {"error": {"code": "invalid_prompt"}}}], True, (True, 400)),
    ],
)
def test_the_beginning_of_a_stream(events: list[Any], responses: bool, told: tuple[bool, int | None]) -> None:
    """Filter results and events that only announce a response are skipped; errors are found."""
    assert found(*events, responses=responses) == told


def test_it_does_not_depend_on_how_the_stream_is_split() -> None:
    """Fed byte by byte, with any of the line endings."""
    for newline in (b"\n", b"\r\n", b"\r"):
        data = (event(CREATED) + event(FAILED)).replace(b"\n", newline)
        beginning = StreamBeginning(responses=True)
        for end in range(len(data) + 1):
            beginning.is_enough(data[:end])
        error = beginning.error_in(data)
        assert error is not None
        assert (error.status, error.message) == (429, "slow down")


def test_an_error_without_a_blank_line_is_found() -> None:
    """Even if a gateway in between sends plain JSON, whatever its Content-Type."""
    for data in (b"data: " + json.dumps(LIMIT).encode(), json.dumps(LIMIT, indent=1).encode()):
        error = StreamBeginning().error_in(data)
        assert error is not None
        assert error.error == LIMIT["error"]


def test_an_empty_error_gets_a_message() -> None:
    """Its status is 500."""
    error = StreamError.from_response_event({"type": "response.failed", "response": {"error": None}})
    assert error is not None
    assert (error.status, error.message) == (500, "Azure ended the stream with an error and no reason")
