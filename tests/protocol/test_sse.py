"""Server-sent events: their data as JSON, and the end of an open one. `test_filters.py` splits streams into events."""

from __future__ import annotations

import pytest

from gateway import Event
from gateway.protocol.sse import unfinished_event


def test_json_of_an_event_is_lazy_and_none_if_it_is_no_json() -> None:
    """`[DONE]` and broken JSON are None; a BOM before the first event does not hide it."""
    assert Event(b'\xef\xbb\xbfdata: {"a":1}\n\n').json() == {"a": 1}
    assert Event(b"data: [DONE]\n\n").json() is None
    assert Event(b"data: {\n\n").json() is None
    assert Event(b'data: {"a":\ndata: [1]}\n\n').json() == {"a": [1]}


def test_half_a_surrogate_pair_is_json() -> None:
    """As JavaScript writes it; it is encoded as it was received."""
    event = Event(rb'data: {"a":"\ud83d"}' + b"\n\n")
    content = event.json()
    event.set_json({**content, "b": 1})
    assert event.raw == rb'data: {"a": "\ud83d", "b": 1}' + b"\n\n"


@pytest.mark.parametrize(
    ("tail", "ending"),
    [
        (b"", b""),
        (b"a\n\n", b""),
        (b"\r\n\r\n", b""),
        (b"a\r\r", b""),
        (b"\r\n\r", b""),
        (b"a\n", b"\n"),
        (b"a\r\n", b"\n"),
        (b"a\r", b"\n\n"),
        (b"a", b"\n\n"),
    ],
)
def test_the_bytes_that_end_an_open_event(tail: bytes, ending: bytes) -> None:
    """The open event of a broken stream is ended, so that the error event after it is separate."""
    assert ending == unfinished_event(tail)
