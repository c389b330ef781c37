"""`access_log`: one event for each exchange, at its end."""

from __future__ import annotations

from collections.abc import AsyncIterator

from structlog.testing import capture_logs

from gateway import ApiError, Next, Price, Request, Response, Stage
from gateway.testing import post, send
from plugins.access_log import AccessLog
from plugins.auth_passthrough import AuthPassthrough
from plugins.model_map import ModelMap
from tests.conftest import CHAT


async def test_one_event_with_the_facts_and_no_secret() -> None:
    """Caller by digest, operation, outcome and the notes of other stages; neither a key nor a body."""

    class Note(Stage):
        async def __call__(self, request: Request, call_next: Next) -> Response:
            request.notes.update(colour="red", status=1, event="x", team="y")
            return await call_next(request)

    with capture_logs() as events:
        await post(AccessLog(), AuthPassthrough(), Note(), ModelMap(), json=CHAT, headers={"api-key": "sk-1234567"})
    [event] = events
    assert {
        "event": "exchange",
        "team": "test",
        "operation": "chat.completions",
        "model": "gpt-4o",
        "colour": "red",
        "status": 200,
        "ended_by": "complete",
        "error": None,
    }.items() <= event.items()
    assert event["caller"].startswith("sha256:")
    assert {"first_byte_ms", "total_ms", "bytes", "request_id", "deployment", "resource"} <= set(event)
    assert "sk-1234567" not in str(event)
    assert "messages" not in str(event)


async def test_an_error_has_its_words_and_what_is_no_operation_its_path() -> None:
    """`reason` is the gateway's own message; for Azure's errors, the status is enough."""
    with capture_logs() as events:
        await post(AccessLog(), response=ApiError(502, "the host name of 'east' was not found", code="upstream_error"))
        await send([AccessLog()], "GET", "/nonsense/" + "x" * 300)
        await post(AccessLog(), response=Response(401, b"{}"))
    assert (events[0]["error"], events[0]["reason"]) == ("upstream_error", "the host name of 'east' was not found")
    assert (events[1]["operation"], events[1]["method"]) == (None, "GET")
    assert events[1]["path"] == "/nonsense/" + "x" * 190
    assert "reason" not in events[2]
    assert "path" not in events[2]


async def test_the_event_comes_when_the_stream_is_over() -> None:
    """Not when its head is sent: so the event tells a client that leaves from a complete response."""
    order: list[str] = []

    async def stream() -> AsyncIterator[bytes]:
        for piece in (b"a", b"b"):
            order.append(f"sent {piece.decode()}, {len(events)} events")
            yield piece

    with capture_logs() as events:
        await post(AccessLog(), response=lambda request: Response(200, stream()))
    assert order == ["sent a, 0 events", "sent b, 0 events"]
    with capture_logs() as events:
        await post(AccessLog(), response=lambda request: Response(200, stream()), leave_after=1)
    assert events[0]["ended_by"] == "client"
    with capture_logs() as events:
        await post(AccessLog(), response=ApiError(503, "down", code="down"))
    assert events[0]["status"] == 503


async def test_what_an_exchange_cost_is_logged_where_its_model_has_a_price() -> None:
    """In the currency of `prices`."""
    answer = Response.json({"choices": [], "usage": {"prompt_tokens": 1000, "completion_tokens": 500}})
    prices = {"gpt-4o": Price(input=2.5, output=10.0)}
    for model, cost in (("gpt-4o", 0.0075), ("o3", None)):
        with capture_logs() as events:
            await post(AccessLog(), Asks(), response=answer, json={"model": model}, prices=prices)
        assert events[0].get("cost") == cost
        assert events[0]["input_tokens"] == 1000


class Asks(Stage):
    """Reads the model, as `model_map` does."""

    async def __call__(self, request: Request, call_next: Next) -> Response:
        await request.model()
        return await call_next(request)


async def test_tokens_need_not_be_logged() -> None:
    """`usage: false` requests none."""
    answer = Response.json({"choices": [], "usage": {"prompt_tokens": 1000, "completion_tokens": 500}})
    with capture_logs() as events:
        await post(AccessLog(usage=False), response=answer, json={"model": "m"})
    assert "input_tokens" not in events[0]
