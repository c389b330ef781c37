"""The contract of a stage: the onion, errors as responses, calling twice, the end of an exchange, deadlines."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from gateway import ApiError, Filter, Next, Outcome, Request, Response, Services, Stage
from gateway.azure.resources import Target
from gateway.errors import StartError
from gateway.teams import Team, Teams
from gateway.testing import FakeAzure, Seen, post, running, send
from tests.conftest import CHAT, Gateway, RawUpstream, StartGateway, chat_request, raw_request, until

pytestmark = pytest.mark.both_loops


@dataclass
class Tag(Stage):
    """Record when it sees the request and the response."""

    name: str
    trace: list[str]

    async def __call__(self, request: Request, call_next: Next) -> Response:
        self.trace.append(f"{self.name} down")
        response = await call_next(request)
        self.trace.append(f"{self.name} up {response.status}")
        return response


async def test_the_first_stage_sees_the_request_first_and_the_response_last() -> None:
    """An onion."""
    trace: list[str] = []
    await post(Tag("a", trace), Tag("b", trace))
    assert trace == ["a down", "b down", "b up 200", "a up 200"]


class Refuse(Stage):
    async def __call__(self, request: Request, call_next: Next) -> Response:
        raise ApiError(403, "not you", code="nope", param="model", headers={"x-why": "because"})


async def test_stages_above_a_refusal_get_a_response() -> None:
    """An ApiError becomes a response in OpenAI's shape at the link that raised it."""
    trace: list[str] = []
    sent = await post(Tag("a", trace), Refuse(), Tag("never", trace))
    assert trace == ["a down", "a up 403"]
    assert sent.json()["error"] == {
        "message": "not you",
        "type": "invalid_request_error",
        "param": "model",
        "code": "nope",
    }
    assert sent.headers.get("x-why") == "because"
    assert isinstance(sent.response.error, ApiError)
    assert sent.reached is None


class Bug(Stage):
    async def __call__(self, request: Request, call_next: Next) -> Response:
        raise KeyError(request.headers.get("authorization"))


class Nothing(Stage):
    async def __call__(self, request: Request, call_next: Next) -> Response:
        return None  # type: ignore[return-value] # what an author forgets


@pytest.mark.parametrize("stage", [Bug(), Nothing()])
async def test_a_bug_is_a_500_without_details_for_the_client(stage: Stage) -> None:
    """The log has the stage, the file and the line, with the key redacted; the client gets a request id to report."""
    trace: list[str] = []
    with capture_logs() as events:
        sent = await post(Tag("a", trace), stage, headers={"Authorization": "Bearer sk-secret-1"})
    assert trace == ["a down", "a up 500"]
    assert "req_test" in sent.json()["error"]["message"]
    assert type(stage).__name__ not in sent.body.decode()
    assert [type(stage).__name__] == [event["stage"] for event in events]
    assert "sk-secret-1" not in str(events)


async def test_defer_runs_once_last_registered_first() -> None:
    """Callbacks get the outcome; one that fails does not stop the others."""
    order: list[object] = []

    class Register(Stage):
        async def __call__(self, request: Request, call_next: Next) -> Response:
            def fail(outcome: Outcome) -> None:
                raise ValueError("broken callback")

            request.defer(lambda outcome: order.append(("first", outcome.status, outcome.ended_by)))
            request.defer(fail)
            request.defer(lambda outcome: order.append("last"))
            response = await call_next(request)
            order.append("after call_next")
            return response

    await post(Register())
    assert order == ["after call_next", "last", ("first", 200, "complete")]


async def test_registering_after_the_end_is_an_error() -> None:
    """A callback that could never run raises an error."""
    kept: list[Request] = []

    class Keep(Stage):
        async def __call__(self, request: Request, call_next: Next) -> Response:
            kept.append(request)
            return await call_next(request)

    await post(Keep())
    with pytest.raises(RuntimeError, match="the exchange has ended"):
        kept[0].defer(lambda outcome: None)


async def test_a_second_call_after_buffering() -> None:
    """With a buffered body, a copy can be sent to another target; the original stays unchanged."""

    class Retry(Stage):
        async def __call__(self, request: Request, call_next: Next) -> Response:
            await request.buffer(1000)
            first = await call_next(request.copy(target=request.target.replace(deployment="one")))
            assert first.status == 500
            twin = request.copy(target=request.target.replace(deployment="two"))
            twin.headers.set("x-try", "2")
            assert "x-try" not in request.headers
            return await call_next(twin)

    targets: list[Target] = []

    async def answer(request: Request) -> Response:
        targets.append(request.target)
        assert await request.body() == b'{"model":"m"}'
        return Response.json({}, 500 if len(targets) == 1 else 200)

    sent = await post(Retry(), json={"model": "m"}, response=answer)
    assert sent.status == 200
    assert [target.deployment for target in targets] == ["one", "two"]


async def test_buffering_above_the_limit_is_a_413() -> None:
    """The stage sets the limit of what it buffers."""

    class Keep(Stage):
        async def __call__(self, request: Request, call_next: Next) -> Response:
            await request.buffer(10)
            return await call_next(request)

    assert (await post(Keep(), body=b"x" * 10)).status == 200
    assert (await post(Keep(), body=b"x" * 11)).status == 413


TWICE = """
from dataclasses import dataclass
from gateway import Next, Request, Response, Stage

@dataclass
class Twice(Stage):
    "Call the rest of the pipeline twice."
    buffer: bool = False
    provides = ("deployment",)
    async def __call__(self, request: Request, call_next: Next) -> Response:
        if self.buffer:
            await request.buffer(1_000_000)
        target = request.target.replace(deployment="gpt-4o")
        first = await call_next(request.copy(target=target))
        return await call_next(request.copy(target=target))
"""


@pytest.mark.parametrize("buffer", [True, False])
async def test_a_second_call_of_a_streamed_body_is_a_500(buffer: bool, start_gateway: StartGateway) -> None:
    """The body was not buffered: a bug of the stage's author. The connection of the first response is closed."""
    yaml = f"""
plugins_path: mine
resources: {{azure: {{endpoint: "${{ENDPOINT}}"}}}}
pipeline: [access_log, auth_passthrough, twice: {{buffer: {str(buffer).lower()}}}, api_version]
"""
    async with FakeAzure(words=["x"] * 500, delay=0.01) as azure:
        gateway = await start_gateway(azure.endpoint, yaml, {"mine/twice.py": TWICE})
        answer = await gateway.post(json={**CHAT, "stream": True})
        if buffer:
            assert answer.status == 200
            await answer.content.readany()
            await until(lambda: azure.streaming == 1)
            assert [seen.left for seen in azure.requests] == [True, False]
        else:
            assert answer.status == 500
            assert any("BodyConsumed" in str(event) for event in gateway.events)
        answer.close()
        await until(lambda: azure.streaming == 0)
        await gateway.idle()


HANG = """
import asyncio
import json
import sys
from dataclasses import dataclass
from gateway import Next, Request, Response, Stage

@dataclass
class Hang(Stage):
    "Wait for ever, on the way down or on the way up."
    where: str
    async def __call__(self, request: Request, call_next: Next) -> Response:
        if self.where == "down":
            await asyncio.sleep(3600)
        if self.where == "child":
            return await asyncio.wait_for(call_next(request), 60)
        if self.where == "group":
            async with asyncio.TaskGroup() as group:
                task = group.create_task(call_next(request))
            return task.result()
        response = await call_next(request)
        if self.where == "up":
            await asyncio.sleep(3600)
        if self.where == "swallow":
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                pass
        return response
"""


@pytest.mark.parametrize("where", ["down", "up"])
async def test_deadline_names_the_stage_that_hangs(where: str, start_gateway: StartGateway, azure: FakeAzure) -> None:
    """One deadline covers everything before the first byte; the stages above still see a response."""
    yaml = f"""
plugins_path: mine
resources: {{azure: {{endpoint: "${{ENDPOINT}}"}}}}
pipeline: [access_log, hang as stuck: {where}, auth_passthrough, model_map, api_version]
"""
    gateway = await start_gateway(azure.endpoint, yaml, {"mine/hang.py": HANG}, timeouts={"first_byte": 0.2})
    async with gateway.post() as answer:
        error = (await answer.json())["error"]
    assert answer.status == 504
    assert "'stuck'" in error["message"]
    [event] = gateway.exchanges()
    assert (event["status"], event["error"]) == (504, "deadline_exceeded")
    async with gateway.get("/healthz") as answer:
        assert answer.status == 200


@pytest.mark.parametrize("where", ["child", "group"])
async def test_deadline_if_a_stage_calls_the_next_one_in_its_own_task(where: str, start_gateway: StartGateway) -> None:
    """With `wait_for`, task groups and the like the client still gets its 504."""

    async def silent(seen: Seen, request: web.BaseRequest) -> None:
        await asyncio.sleep(3600)

    yaml = f"""
plugins_path: mine
resources: {{azure: {{endpoint: "${{ENDPOINT}}"}}}}
pipeline: [access_log, hang: {where}, auth_passthrough, model_map, api_version]
"""
    async with FakeAzure(respond=silent) as azure:
        gateway = await start_gateway(azure.endpoint, yaml, {"mine/hang.py": HANG}, timeouts={"first_byte": 0.3})
        async with gateway.post() as answer:
            assert answer.status == 504
        await gateway.idle()
        await until(lambda: azure.connections == 0)


async def test_a_stage_that_swallows_cancellation_does_no_harm(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Its response is dropped if the client has disconnected, and its exchange still ends once."""
    yaml = """
plugins_path: mine
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline: [access_log, hang: swallow, auth_passthrough, model_map, api_version]
"""
    gateway = await start_gateway(azure.endpoint, yaml, {"mine/hang.py": HANG})
    task = asyncio.create_task(gateway.post().__aenter__())
    await until(lambda: len(azure.requests) == 1)
    await asyncio.sleep(0.05)
    task.cancel()
    await gateway.idle()
    assert len(gateway.exchanges()) == 1


async def test_filters_of_stages_run_from_azure_upwards() -> None:
    """The stage nearest to Azure adds its filter first, so that it runs first."""

    @dataclass
    class Add(Stage):
        text: bytes

        async def __call__(self, request: Request, call_next: Next) -> Response:
            response = await call_next(request)
            text = self.text

            class Append(Filter):
                def close(self) -> bytes:
                    return text

            response.pipe(Append())
            return response

    sent = await post(Add(b" top"), Add(b" below"), response=Response(200, b"azure", {"content-length": "5"}))
    assert sent.body == b"azure below top"
    assert "content-length" not in sent.response.headers


async def test_a_stage_may_read_and_replace_the_body() -> None:
    """`response.read()` gives the bytes through the filters so far."""

    class Shout(Stage):
        async def __call__(self, request: Request, call_next: Next) -> Response:
            response = await call_next(request)
            response.body = (await response.read()).upper()
            return response

    async def pieces() -> AsyncIterator[bytes]:
        yield b"a"
        yield b"b"

    assert (await post(Shout(), response=lambda request: Response(200, pieces()))).body == b"AB"


async def test_a_filter_that_fails_on_the_last_bytes_is_visible(start_gateway: StartGateway) -> None:
    """Even if the end of the stream arrived in the same read: the client must not wait forever."""
    stage = """
from gateway import Filter, Stage

class Broken(Filter):
    def feed(self, data):
        raise KeyError("choices")

class Breaks(Stage):
    "Put a broken filter on the answer."
    async def __call__(self, request, call_next):
        response = await call_next(request)
        response.pipe(Broken())
        return response
"""
    yaml = """
plugins_path: mine
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline: [access_log, breaks, auth_passthrough, model_map, api_version]
"""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upstream.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        await asyncio.sleep(0.05)
        writer.write(b"9\r\ndata: 1\n\n\r\n0\r\n\r\n")
        await reader.read()

    upstream = RawUpstream(script)
    async with upstream:
        gateway = await start_gateway(upstream.endpoint, yaml, {"mine/breaks.py": stage})
        received = await raw_request(gateway.port, chat_request(stream=True))
        assert b'data: {"error"' in received
        assert not received.endswith(b"0\r\n\r\n")
        await gateway.idle()
        [event] = gateway.exchanges()
        assert (event["ended_by"], event["error"]) == ("gateway", "KeyError")


@pytest.mark.parametrize("how", ["feed", "close", "generator"])
async def test_a_filter_that_fails_breaks_the_stream_visibly(how: str, start_gateway: StartGateway) -> None:
    """A filter's exception, or a stage's stream that raises, ends the stream with an `error` event."""
    stage = f"""
from dataclasses import dataclass
from gateway import Filter, Next, Request, Response, Stage

class Broken(Filter):
    def feed(self, data: bytes) -> bytes:
        if {how == "feed"} and b"there" in data:
            raise ValueError("no")
        return data
    def close(self) -> bytes:
        if {how == "close"}:
            raise ValueError("no")
        return b""

@dataclass
class Breaks(Stage):
    "Put a broken filter on the answer."
    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        response.pipe(Broken())
        if {how == "generator"}:
            body = response.body
            async def some():
                async for chunk in body:
                    yield chunk
                    raise ValueError("no")
            response.body = some()
        return response
"""
    yaml = """
plugins_path: mine
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline: [access_log, breaks, auth_passthrough, model_map, api_version]
"""
    async with FakeAzure(delay=0.01) as azure:
        gateway = await start_gateway(azure.endpoint, yaml, {"mine/breaks.py": stage})
        received = b""
        cut = False
        async with gateway.post(json={**CHAT, "stream": True}) as answer:
            try:
                while data := await answer.content.readany():
                    received += data
            except Exception:
                cut = True
        assert cut
        assert received.rstrip().split(b"\n\n")[-1].startswith(b'data: {"error"')
        await gateway.idle()
        await until(lambda: azure.streaming == 0)
    assert gateway.exchanges()[0]["ended_by"] == "gateway"


class Life(Stage):
    def __init__(self, name: str, trace: list[str], fails: str = "") -> None:
        self.id = name
        self.trace = trace
        self.fails = fails

    async def start(self, services: Services) -> None:
        self.trace.append(f"start {self.id}")
        if self.fails == "start":
            raise RuntimeError("cannot start")

    async def stop(self) -> None:
        self.trace.append(f"stop {self.id}")
        if self.fails == "stop":
            raise RuntimeError("cannot stop")


def team(name: str, *stages: Stage) -> Team:
    return Team(name, stages, Target(), services={stage.id: Services(name, stage.id) for stage in stages})


async def nowhere(request: Request) -> Response:
    return Response()


async def test_stages_start_in_order_and_stop_in_reverse() -> None:
    """If one fails to stop, the others still stop."""
    trace: list[str] = []
    teams = Teams(team("default", Life("a", trace), Life("b", trace, fails="stop"), Life("c", trace)))
    await teams.start(nowhere)
    await teams.stop()
    assert trace == ["start a", "start b", "start c", "stop c", "stop b", "stop a"]


async def test_stop_also_when_start_failed_half_way() -> None:
    """All started stages, and the one that failed to start, are stopped, in every team."""
    trace: list[str] = []
    teams = Teams(
        team("default", Life("a", trace)),
        [team("x", Life("b", trace), Life("c", trace, fails="start"), Life("d", trace))],
    )
    with pytest.raises(StartError, match="stage 'c' of team 'x' cannot start: RuntimeError: cannot start"):
        await teams.start(nowhere)
    assert trace == ["start a", "start b", "start c", "stop c", "stop b", "stop a"]


async def test_state_in_the_store_outlives_the_instance() -> None:
    """`services.store` is the same for every instance of a stage with this id in this team."""
    from gateway.services import Shared

    shared = Shared()

    class Count(Stage):
        async def start(self, services: Services) -> None:
            self.store = services.store

        async def __call__(self, request: Request, call_next: Next) -> Response:
            self.store["seen"] = self.store.get("seen", 0) + 1
            return Response.json(self.store["seen"])

    for expected in (b"1", b"2", b"3"):
        assert expected == (await post(Count(), shared=shared)).body


async def test_services_http_is_a_session_that_aioresponses_can_fake(aioresponses_314: object) -> None:
    """A stage calls other services through `services.http`; tests of it need no network."""
    from aioresponses import aioresponses

    class Ask(Stage):
        async def start(self, services: Services) -> None:
            self.http = services.http

        async def __call__(self, request: Request, call_next: Next) -> Response:
            async with self.http.get("https://keys.invalid/who") as answer:
                return Response.json({"who": await answer.text()})

    with aioresponses() as fake:
        fake.get("https://keys.invalid/who", body="research")
        assert (await post(Ask())).json() == {"who": "research"}


async def test_send_reaches_the_other_operations() -> None:
    """The test kit's `send` takes any method and path."""
    sent = await send([], "GET", "/models")
    assert sent.reached is not None
    assert sent.reached.operation == "models.list"
    async with running() as run:
        run.respond_with(ApiError(418, "teapot"))
        assert (await run.post()).status == 418


async def test_headers_after_the_stream_has_begun_are_too_late(start_gateway: StartGateway) -> None:
    """The trap of page one: code after `call_next` runs before the body streams; `defer` runs after it."""
    order: list[str] = []
    release = asyncio.Event()

    async def slow(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await release.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    stage = """
from dataclasses import dataclass
from gateway import Next, Request, Response, Stage

ORDER: list[str] = []

@dataclass
class Order(Stage):
    "Note what runs when."
    async def __call__(self, request: Request, call_next: Next) -> Response:
        request.defer(lambda outcome: ORDER.append("deferred"))
        response = await call_next(request)
        ORDER.append("after call_next")
        return response
"""
    yaml = """
plugins_path: mine
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline: [order, auth_passthrough, model_map, api_version]
"""
    async with FakeAzure(respond=slow) as azure:
        gateway = await start_gateway(azure.endpoint, yaml, {"mine/order.py": stage})
        import sys

        order = sys.modules["gateway_plugins_path.mine.order"].ORDER
        async with gateway.post(json={**CHAT, "stream": True}) as answer:
            assert order == ["after call_next"]
            release.set()
            await answer.read()
        await gateway.idle()
    assert order == ["after call_next", "deferred"]


async def test_a_task_that_outlives_its_exchange_cannot_open_a_connection() -> None:
    """Its connection is closed immediately."""
    from gateway.exchange import Exchange

    class Connection:
        closed = 0

        def abort(self) -> None:
            self.closed += 1

    exchange = Exchange()
    exchange.finish()
    late = Connection()
    exchange.own_upstream(late)
    assert late.closed == 1


async def test_a_log_that_cannot_be_written_stops_no_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots are released even if logging fails."""

    class Broken:
        def error(self, *args: object, **kwargs: object) -> None:
            raise OSError("no space left")

    monkeypatch.setattr("gateway.exchange.get_logger", Broken)
    done: list[int] = []

    class Register(Stage):
        async def __call__(self, request: Request, call_next: Next) -> Response:
            def fail(outcome: Outcome) -> None:
                raise ValueError("\udcff")

            request.defer(lambda outcome: done.append(1))
            request.defer(fail)
            return await call_next(request)

    assert (await post(Register())).status == 200
    assert done == [1]


async def test_secrets_of_stages_and_clients_stay_out_of_the_log(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """A failing callback is logged without its stage's settings, a failing filter's error without the key."""
    stage = """
from dataclasses import dataclass
from typing import Annotated
from gateway import Filter, Meta, Next, Outcome, Request, Response, Stage

@dataclass
class Leaky(Stage):
    "Fail with secrets at hand."
    token: Annotated[str, Meta(description="x", extra={"secret": True})]
    def done(self, outcome: Outcome) -> None:
        raise ValueError("no")
    async def __call__(self, request: Request, call_next: Next) -> Response:
        request.defer(self.done)
        response = await call_next(request)
        key = request.headers.get("authorization")
        class Broken(Filter):
            def feed(self, data: bytes) -> bytes:
                raise ValueError(key)
        response.pipe(Broken())
        return response
"""
    yaml = """
plugins_path: mine
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline: [leaky: STAGESECRET, auth_passthrough, model_map, api_version]
"""
    gateway = await start_gateway(azure.endpoint, yaml, {"mine/leaky.py": stage})
    for stream in (False, True):
        try:
            async with gateway.post(json={**CHAT, "stream": stream}) as answer:
                await answer.read()
        except Exception:
            assert stream
    await gateway.idle()
    logged = str(gateway.events)
    assert "Leaky" in logged
    assert "STAGESECRET" not in logged
    assert "azure-key" not in logged


async def test_an_idle_stage_is_skipped() -> None:
    """The stage decides in `start`; requests then have no cost for it."""

    class Perhaps(Stage):
        def __init__(self, *, idle: bool) -> None:
            self._wanted = not idle

        async def start(self, services: Services) -> None:
            self.idle = not self._wanted

        async def __call__(self, request: Request, call_next: Next) -> Response:
            request.notes["seen"] = True
            return await call_next(request)

    for idle in (False, True):
        sent = await post(Perhaps(idle=idle))
        assert sent.reached is not None
        assert ("seen" in sent.reached.notes) is not idle


ASKED_FIRST = """
from gateway import ApiError, Next, Request, Response, Stage

TRACE = []


class AskedFirst(Stage):
    async def before_body(self, request: Request) -> None:
        TRACE.append(f"{self.id} {request.caller is not None}")
        if request.headers.get("x-refuse") == self.id:
            raise ApiError(429, "not now")
        request.reservations[self.id] = len(TRACE)

    async def __call__(self, request: Request, call_next: Next) -> Response:
        request.notes[self.id] = request.reservations.get(self.id)
        return await call_next(request)
"""
ASKED_FIRST_YAML = """
plugins_path: [mine]
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline:
  - access_log
  - asked_first as one
  - auth_passthrough
  - model_map: {unmapped: own_name_without_dots}
  - asked_first as two
  - api_version: 2024-10-21
"""


async def late_body(port: int, body: bytes, head: str = "") -> bytes:
    """Send a request whose body follows its head after a while; only its first byte if it is refused."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer azure-key\r\nConnection: close\r\n"
        f"{head}Content-Length: {len(body)}\r\n\r\n".encode()
    )
    await asyncio.sleep(0.05)
    writer.write(body[:1] if head else body)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return answer


async def test_before_body_is_called_once(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """On all stages in order, before the first read of a body that has not arrived; never for one that has."""
    gateway = await start_gateway(azure.endpoint, ASKED_FIRST_YAML, {"mine/asked_first.py": ASKED_FIRST})
    trace = trace_of(gateway)
    assert (await raw_request(gateway.port, chat_request())).startswith(b"HTTP/1.1 200")
    assert trace == []
    assert (await late_body(gateway.port, json.dumps(CHAT).encode())).startswith(b"HTTP/1.1 200")
    assert trace == ["one True", "two True"]
    # The reader was model_map: the reservation of a stage below it exists when the request gets there.
    assert (gateway.exchanges()[-1].get("one"), gateway.exchanges()[-1]["two"]) == (None, 2)


async def test_a_stage_refuses_a_body_before_it_is_read(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """The client gets the error after sending one byte, and later stages are not called."""
    gateway = await start_gateway(azure.endpoint, ASKED_FIRST_YAML, {"mine/asked_first.py": ASKED_FIRST})
    trace = trace_of(gateway)
    answer = await late_body(gateway.port, json.dumps(CHAT).encode(), "x-refuse: one\r\n")
    assert answer.startswith(b"HTTP/1.1 429")
    assert trace == ["one True"]
    assert azure.requests == []


def trace_of(gateway: Gateway) -> list[str]:
    """Return the records of the stages of `ASKED_FIRST`."""
    stage = next(stage for stage in gateway.server.teams.default.stages if stage.id == "one")
    trace: list[str] = sys.modules[type(stage).__module__].TRACE
    trace.clear()
    return trace
