"""The server: accepts clients, turns each request into a `Request`, and answers what its pipeline returns.

A request's path is decided on once, in its raw form: `/{team's prefix}/v1/{operation}`. Nothing here knows
what stages do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any, cast

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from gateway.answer import CLOSE, ClientGone, closing_answer, write_answer
from gateway.azure import find_operation
from gateway.body import Body
from gateway.connection import Arrived, ClientBody, Connection
from gateway.errors import ApiError
from gateway.exchange import Exchange
from gateway.headers import Headers
from gateway.heads import check_head, client_address
from gateway.heads import request_id as request_id_of
from gateway.listener import Listener
from gateway.logs import get_logger, quiet_logger
from gateway.messages import Request, Response
from gateway.settings import Limits, Settings, Timeouts
from gateway.teams import Team, Teams
from gateway.upstream import Upstream

__all__ = ("Server", "serve")

# When the gateway stops, a connection without a request may send one more for so many seconds: a client that
# has begun to send it cannot know yet, and closing on it would fail it.
_LAST_REQUEST = 1.0
# How often, in seconds, a drain looks at what is left.
_DRAIN_CHECK = 0.02


class _AiohttpServer(web.Server):
    """aiohttp's low-level server, making our connections."""

    def __init__(self, handler: Any, limits: Limits, timeouts: Timeouts, **settings: Any) -> None:
        super().__init__(handler, request_factory=cast(Any, Arrived), handler_cancellation=True, **settings)
        self._limits = limits
        self._timeouts = timeouts

    def __call__(self) -> RequestHandler:
        return Connection(self, loop=self._loop, limits=self._limits, timeouts=self._timeouts, **self._kwargs)


class Server:
    """One gateway: teams, the pool to Azure, and the listening socket."""

    def __init__(self, teams: Teams, settings: Settings | None = None, upstream: Upstream | None = None) -> None:
        self.teams = teams
        self.settings = settings or Settings()
        self.upstream = upstream or Upstream(self.settings.timeouts)
        self.draining = False
        self.ready = False
        self._http: _AiohttpServer | None = None
        self._servers: list[asyncio.Server] = []
        self._listener: Listener | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._all_done = asyncio.Event()
        self._stopped = False
        self.address = self.settings.listen
        """Where the server listens: the true port, once it does, where 0 was asked for."""

    # -- life ------------------------------------------------------------------------------------------

    async def start(self, listener: Listener | None = None) -> None:
        """Start the stages and listen, on sockets that exist already if `listener` is given.

        Raises StartError where a stage cannot start, or the address cannot be had.
        """
        timeouts, limits = self.settings.timeouts, self.settings.limits
        await self.upstream.start()
        try:
            await self.teams.start(self.upstream)
        except BaseException:
            await self.upstream.close()
            raise
        self._http = _AiohttpServer(
            self._handle,
            limits,
            timeouts,
            keepalive_timeout=timeouts.keep_alive,
            access_log=None,
            logger=quiet_logger(),
            auto_decompress=False,
            read_bufsize=64 * 1024,
        )
        try:
            await self._listen(listener)
        except BaseException:
            self._http = None  # there is nothing left to stop
            await self.teams.stop()
            await self.upstream.close()
            raise
        self.ready = True

    async def _listen(self, given: Listener | None) -> None:
        """Listen. Raises StartError where the address cannot be had."""
        loop = asyncio.get_running_loop()
        self._listener = given or Listener.open(self.settings.listen)
        self.address = self._listener.address
        for sock in self._listener.sockets:
            self._servers.append(await loop.create_server(cast(Any, self._http), sock=sock, backlog=1024))

    async def stop(self, *, now: asyncio.Event | None = None) -> None:
        """Stop: not ready at once, no new clients after `drain_delay`, running exchanges end within `grace`.

        A connection without a request may send one more, for a second. Setting `now` ends the waiting at once.
        """
        http = self._http
        if self._stopped or http is None:
            return  # stopped already, or never started
        self._stopped = True
        timeouts = self.settings.timeouts
        now = now or asyncio.Event()
        self.ready = False
        await _wait_either(now, timeouts.drain_delay)
        self.draining = True
        for server in self._servers:
            server.close()
        if self._running and not now.is_set():
            get_logger().info("draining", exchanges=len(self._running), grace=timeouts.grace)
        await self._drain(http, now)
        for task in list(self._running):
            task.cancel()
        if self._running:
            get_logger().warning("exchanges cut off", exchanges=len(self._running))
            await asyncio.wait(list(self._running), timeout=5)
        await http.shutdown(timeout=1)
        if self._listener is not None:
            self._listener.remove()
        await self.teams.stop()
        await self.upstream.close()

    async def _drain(self, http: _AiohttpServer, now: asyncio.Event) -> None:
        """Wait until the last connection has ended, the grace period is over, or `now` is set.

        An answer says `connection: close` by now; one that began before did not, so its connection, too, may
        send one more request.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self.settings.timeouts.grace
        idle_since: dict[RequestHandler, float] = {}
        while not now.is_set() and loop.time() < end:
            await _wait_either(now, _DRAIN_CHECK)  # before the first look, too: the last one accepted is not there yet
            if not http.connections:
                return
            for connection in http.connections:
                if not cast(Connection, connection).idle:
                    idle_since.pop(connection, None)
                elif loop.time() - idle_since.setdefault(connection, loop.time()) >= _LAST_REQUEST:
                    connection.force_close()

    # -- one request -----------------------------------------------------------------------------------

    async def _handle(self, arrived: Arrived) -> web.StreamResponse:
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._running.add(task)
        self._all_done.clear()
        exchange = Exchange()
        try:
            return await self._exchange(arrived, exchange)
        except ClientGone:
            exchange.ended_by = "client"
            return CLOSE
        except asyncio.CancelledError:
            # The client left, or the grace period is over.
            transport = arrived.connection.transport
            exchange.ended_by = "client" if transport is None else "gateway"
            if transport is not None and exchange.first_byte_at is None:
                stopped = ApiError(503, "the gateway is stopping; try again", code="shutting_down")
                exchange.status, exchange.error = stopped.status, stopped.code
                transport.write(closing_answer(stopped))
            raise
        except Exception as exc:
            arrived.connection.log_exception(exc_info=exc)
            if arrived.connection.transport is not None:
                arrived.connection.transport.abort()
            exchange.ended_by = "gateway"
            return CLOSE
        finally:
            try:
                exchange.finish()
            finally:
                self._running.discard(task)
                if not self._running:
                    self._all_done.set()

    async def _exchange(self, arrived: Arrived, exchange: Exchange) -> web.StreamResponse:
        message = arrived.message
        headers = Headers(message.raw_headers)
        request_id = request_id_of(headers)
        close = False
        try:
            path, _, query = message.path.partition("?")
            length, expects = check_head(arrived, path, query, self.settings.limits.body)
            if path in ("/healthz", "/readyz"):
                response = self._probe(message.method, path)
            else:
                body = ClientBody(
                    arrived,
                    length=length,
                    expects=expects,
                    limit=self.settings.limits.body,
                    timeout=self.settings.timeouts.client,
                )
                team, rest = self._team(path, headers)
                response = await self._answer(arrived, exchange, team, rest, query, headers, request_id, body)
        except ApiError as exc:
            response = Response.from_error(exc)
            # What follows a head that was refused might be anything.
            close = exc.status in (400, 413, 417, 431)
            get_logger().info("refused before any team", status=exc.status, error=exc.code, request_id=request_id)
        if not arrived.payload.is_eof() and "expect" in headers:
            close = True  # nobody knows whether the body comes
        return await write_answer(
            arrived,
            response,
            exchange,
            request_id=request_id,
            close=close or self.draining,
            patience=self.settings.timeouts.client,
        )

    def _probe(self, method: str, path: str) -> Response:
        if method not in ("GET", "HEAD"):
            raise ApiError(405, f"{method} is not allowed on {path}; use GET", headers={"allow": "GET"})
        if path == "/healthz":
            return Response.json({"status": "alive"})
        if self.ready:
            return Response.json({"status": "ready"})
        return Response.json({"status": "draining"}, 503)

    def _team(self, path: str, headers: Headers) -> tuple[Team, str]:
        """Return the team of a path and what follows its `/v1`."""
        place = path.find("/v1/")
        if place < 0:
            raise ApiError(404, f"there is nothing at {path}; the API begins with /v1/", code="unknown_url")
        prefix = path[:place]
        host = (headers.get("host") or "").rpartition(":")
        team = self.teams.find(prefix, (host[0] if host[2].isdigit() else "".join(host)).lower(), headers)
        if team is None:
            raise ApiError(404, f"no team's API is at {prefix}/v1", code="unknown_url")
        return team, path[place + 3 :]

    async def _answer(
        self,
        arrived: Arrived,
        exchange: Exchange,
        team: Team,
        path: str,
        query: str,
        headers: Headers,
        request_id: str,
        body: ClientBody,
    ) -> Response:
        operation = find_operation(arrived.message.method, path)
        request = Request(
            id=request_id,
            operation=operation.name if operation is not None else None,
            has_model=operation is not None and operation.has_model,
            method=arrived.message.method,
            path=path,
            query=query,
            headers=headers,
            body=Body(body),
            team=team.name,
            target=team.target,
            exchange=exchange,
            address=lambda: client_address(arrived.connection.transport, headers, self.settings.trusted_proxies),
        )
        exchange.set_deadline(self.settings.timeouts.first_byte)
        try:
            assert team.pipeline is not None, "the team was not started"  # noqa: S101 -- a bug of ours
            return await team.pipeline(request)
        finally:
            exchange.stop_deadline()


async def _wait_either(event: asyncio.Event, seconds: float) -> None:
    if seconds > 0:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), seconds)


def _obey_signals(stop: asyncio.Event, now: asyncio.Event) -> None:
    """Set `stop` at the first SIGTERM or SIGINT, `now` at the second."""

    def signalled() -> None:
        (now if stop.is_set() else stop).set()

    def restart() -> None:
        get_logger().warning("nothing was restarted: a rolling restart needs --workers 2 or more", pid=os.getpid())

    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, signalled)
    loop.add_signal_handler(signal.SIGUSR2, restart)


async def serve(
    server: Server,
    ready: Callable[[], None] | None = None,
    *,
    stopping: Callable[[], None] | None = None,
    listener: Listener | None = None,
    obey: Callable[[asyncio.Event, asyncio.Event], None] = _obey_signals,
) -> None:
    """Run a server until SIGTERM or SIGINT, then drain it; a second signal ends it at once.

    `ready` is called when it listens (on `listener`, if given), `stopping` when the drain begins. `obey` is
    given the two events that stop it, and sees to it that they are set. Raises StartError where it cannot be
    started.
    """
    stop, now = asyncio.Event(), asyncio.Event()
    obey(stop, now)
    log = get_logger().bind(pid=os.getpid())
    starting = asyncio.create_task(server.start(listener))
    asked = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((starting, asked), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            # A stage that hangs while it starts must not keep the gateway from being stopped.
            starting.cancel()
            await asyncio.wait((starting,), timeout=5)
            return
        await starting
        log.info("listening", address=str(server.address), teams=len(server.teams.all))
        if ready is not None:
            ready()
        await asked
        log.info("stopping")
        if stopping is not None:
            stopping()
    finally:
        asked.cancel()
        await server.stop(now=now)
    log.info("stopped")
