"""A pipeline without sockets: sends one request through stages, and returns the result."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.auth.credentials import ListedKey
from gateway.auth.oidc import Claims, Identity, TokenVerification
from gateway.azure.operations import find_operation
from gateway.azure.resources import Pool, Resource, Target
from gateway.body.request_body import Body
from gateway.errors import ApiError
from gateway.exchange import Exchange, Outcome
from gateway.limits.memory_counters import MemoryCounters
from gateway.protocol.filters import EventFilter, Filter, FilterFailed, chain_filters, run_filters
from gateway.protocol.headers import Headers
from gateway.protocol.sse import Event
from gateway.request import Request
from gateway.response import Response
from gateway.response_writer import note_end
from gateway.services import Services, Shared
from gateway.stage import Next, Stage, compile_pipeline
from gateway.transport.upstream_connection import UpstreamConnection
from gateway.transport.websocket_handshake import WebSocket
from gateway.transport.websocket_messages import MessageEvent, error_event
from gateway.usage.accounting import UsageMeter
from gateway.usage.metered_operations import METERED
from gateway.usage.prices import Price, Prices
from gateway.usage.usage_scanner import UsageScanner

__all__ = ("Conversation", "Running", "Sent", "every_split", "post", "running", "send", "talk")

CannedResponse = Response | Exception | Callable[[Request], "Response | Awaitable[Response]"]


@dataclass
class Sent:
    """The result of one request: the client's response, the outcome, and the request that reached Azure.

    `reached` is the request at the end of the pipeline, None if a stage responded itself.
    """

    status: int
    headers: Headers
    body: bytes
    outcome: Outcome
    reached: Request | None
    response: Response

    def json(self) -> Any:
        """Return the body as JSON."""
        return msgspec.json.decode(self.body)


@dataclass
class Conversation:
    """The result of a WebSocket's messages: those to Azure, those to the client, and the handshake as `sent`."""

    to_azure: list[Any]
    to_client: list[Any]
    sent: Sent


class Running:
    """Started stages; returned by `running`."""

    def __init__(self, pipeline: Next, response: list[CannedResponse], target: Target) -> None:
        self._pipeline = pipeline
        self._metered = False
        self._response = response
        self._target = target
        self._reached: Request | None = None

    def respond_with(self, response: CannedResponse) -> None:
        """Change the response at the end of the pipeline."""
        self._response[0] = response

    async def _end(self, request: Request) -> Response:
        self._reached = request
        meter = request._exchange.meter
        reader = None
        if meter is not None and request.operation in METERED:
            reader = meter.watch(request.operation, await request.body(), request._model)
            reader.sent = True
        response = await self._respond(request)
        if reader is not None:
            reader.status = response.status
            if isinstance(response.body, bytes):
                reader.feed(response.body)
            elif not isinstance(response.body, WebSocket):
                response.body = _read_by(response.body, reader)
        return response

    async def _respond(self, request: Request) -> Response:
        response = self._response[0]
        if isinstance(response, Exception):
            raise response
        if isinstance(response, Response):
            return Response(response.status, response.body, response.headers.copy())
        result = response(request)
        return result if isinstance(result, Response) else await result

    async def post(self, json: object = None, **more: Any) -> Sent:
        """Send a chat completion, with `json` as its body; see `send`."""
        return await self.send("POST", "/chat/completions", json=json, **more)

    async def send(
        self,
        method: str = "POST",
        path: str = "/chat/completions",
        *,
        json: object = None,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        query: str = "",
        team: str = "test",
        client: str = "127.0.0.1",
        identity: Identity | str | None = None,
        leave_after: int | None = None,
    ) -> Sent:
        """Send one request through the stages. `path` is the part after `/v1`.

        `identity` is the verified identity of its token or, as text, why verification fails.
        With `leave_after`, the client disconnects after that many bytes of the response.
        """
        if json is not None:
            body = msgspec.json.encode(json)
        exchange = Exchange()
        if self._metered:
            exchange.meter = UsageMeter()
        outcomes: list[Outcome] = []
        exchange.defer(outcomes.append)
        request = Request(
            id="req_test",
            operation=find_operation(method, path),
            method="GET" if method == "WS" else method,
            path=path,
            query=query,
            headers=Headers(headers or {}),
            body=Body(body),
            team=team,
            target=self._target,
            exchange=exchange,
            address=lambda: client,
            verification=TokenVerification(reason=identity)
            if isinstance(identity, str)
            else TokenVerification(identity),
        )
        exchange.request = request
        self._reached = None
        try:
            response = await self._pipeline(request)
            received = await self._receive(response, exchange, leave_after)
        finally:
            exchange.finish()
        return Sent(response.status, response.headers, received, outcomes[0], self._reached, response)

    async def _receive(self, response: Response, exchange: Exchange, leave_after: int | None) -> bytes:
        """Collect the response's bytes as the server would write them."""
        linked = chain_filters(response.filters, response.headers.get("content-encoding"))
        received = bytearray()
        exchange.status = response.status
        exchange.first_byte_at = time.monotonic()
        try:
            try:
                if isinstance(response.body, bytes):
                    received += linked.feed(response.body)
                elif not isinstance(response.body, WebSocket):
                    async for chunk in response.body:
                        received += linked.feed(chunk)
                        if leave_after is not None and len(received) >= leave_after:
                            return bytes(received[:leave_after])
                received += linked.close()
            except FilterFailed as exc:
                received += exc.left
                raise exc.cause from None
            note_end(exchange, response.error)
        except ApiError as exc:
            exchange.ended_by = "upstream"
            exchange.error = exc.code
        finally:
            exchange.sent = len(received)
        return bytes(received)


@contextlib.asynccontextmanager
async def running(
    *stages: Stage,
    response: CannedResponse | None = None,
    clock: Callable[[], float] = time.monotonic,
    resources: Mapping[str, Resource] | None = None,
    resource: str | None = None,
    pools: Mapping[str, Pool] | None = None,
    shared: Shared | None = None,
    keys: Sequence[ListedKey] = (),
    prices: Mapping[str, Price] | None = None,
    claims: Claims | None = None,
    now: Callable[[], float] = time.time,
) -> AsyncIterator[Running]:
    """Check and start stages, with a canned `response` (a Response, an error or a function) in place of Azure.

    `resource` names the team's resource if there are several `resources`. `pools` are the models' pools. The team is
    `test`; `keys` and `claims` are the team's. Raises AssertionError for mistakes that stages find in their settings.
    """
    resources = resources or {"azure": Resource("azure", "https://azure.invalid")}
    only = next(iter(resources.values())) if len(resources) == 1 else None
    chosen = resources[resource] if resource is not None else only
    shared = shared or Shared(MemoryCounters(now))
    started: list[Stage] = []
    services: dict[int, Services] = {}
    for stage in stages:
        stage.id = stage.id or type(stage).__name__
        stage_services = Services(
            team="test",
            stage=stage.id,
            resources=resources,
            resource=chosen,
            pools=pools or {},
            keys={key.digest: key for key in keys},
            prices=Prices(prices),
            claims=claims or {},
            clock=clock,
            now=now,
            shared=shared,
            reachable=resources,
        )
        services[id(stage)] = stage_services
        mistakes = [f"{'.'.join(map(str, path))}: {message}" for path, message in stage.check(stage_services)]
        assert not mistakes, f"stage {stage.id}: {mistakes}"
    current: list[CannedResponse] = [response if response is not None else Response.json({"object": "chat.completion"})]
    target = Target(resource=chosen)
    run = Running(_unset, current, target)
    try:
        for stage in stages:
            started.append(stage)
            await stage.start(services[id(stage)])
        run._metered = any(stage.needs_usage for stage in stages)
        run._pipeline = compile_pipeline([(stage.id, stage) for stage in stages if not stage.idle], run._end)
        yield run
    finally:
        for stage in reversed(started):
            await stage.stop()
        await shared.close()


async def _read_by(body: AsyncIterator[bytes], reader: UsageScanner) -> AsyncIterator[bytes]:
    async for chunk in body:
        reader.feed(chunk)
        yield chunk


async def _unset(_: Request) -> Response:
    raise RuntimeError("the stages are not started")


async def send(stages: Sequence[Stage], method: str = "POST", path: str = "/chat/completions", **more: Any) -> Sent:
    """Start stages, send one request through them, stop them; see `Running.send` and `running`."""
    names = ("response", "clock", "now", "resources", "resource", "pools", "shared", "keys", "prices", "claims")
    around = {name: more.pop(name) for name in names if name in more}
    async with running(*stages, **around) as run:
        return await run.send(method, path, **more)


async def post(*stages: Stage, json: object = None, **more: Any) -> Sent:
    """Start stages, send one chat completion through them, stop them; see `send`."""
    return await send(stages, json=json, **more)


async def talk(
    stages: Sequence[Stage],
    *,
    up: Sequence[object] = (),
    down: Sequence[object] = (),
    path: str = "/realtime",
    query: str = "model=gpt-4o",
    **more: Any,
) -> Conversation:
    """Open a WebSocket through stages, and send messages, as JSON: `up` by the client, `down` by Azure.

    An ApiError of an up filter becomes a message to the client, as in the gateway. Other exceptions of filters are
    raised, and AssertionError if the stages reject the handshake.
    """
    sent = await send(stages, "WS", path, query=query, response=lambda _: Response(101, _opened()), **more)
    socket = sent.response.body
    assert isinstance(socket, WebSocket), f"the handshake failed with {sent.status}: {sent.body!r}"
    to_azure: list[Event] = []
    to_client: list[Event] = []
    for content in up:
        message = msgspec.json.encode(content)
        try:
            to_azure += run_filters(socket.up, MessageEvent(message))
        except ApiError as exc:
            to_client.append(MessageEvent(error_event(exc, message)))
    filters = [each for each in sent.response.filters if isinstance(each, EventFilter)]
    for content in down:
        to_client += run_filters(filters, MessageEvent(msgspec.json.encode(content)))
    return Conversation([each.json() for each in to_azure], [each.json() for each in to_client], sent)


def _opened() -> WebSocket:
    return WebSocket(UpstreamConnection(asyncio.get_running_loop()))


def every_split(data: bytes, make: Callable[[], Filter | EventFilter]) -> Iterator[tuple[list[bytes], bytes]]:
    """Yield (pieces, output) for `data` in one piece, split in two at every position, and byte by byte."""
    splits = [[data]]
    splits += [[data[:position], data[position:]] for position in range(1, len(data))]
    splits.append([data[position : position + 1] for position in range(len(data))])
    for pieces in splits:
        linked = chain_filters([make()])
        out = b"".join([linked.feed(piece) for piece in pieces])
        yield pieces, out + linked.close()
