"""The server: accepts clients, turns each request into a `Request`, and answers what its pipeline returns.

A request's path is decided on once, in its raw form: `/{team's prefix}/v1/{operation}`. Nothing here knows
what stages do.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, cast

from aiohttp.web_protocol import RequestHandler
from aiohttp.web_server import Server as AiohttpServer

from gateway.admin.listener import Admin
from gateway.auth.client_address import client_address
from gateway.auth.client_address import request_id as request_id_of
from gateway.auth.oidc import TokenVerification
from gateway.azure.operations import find_operation
from gateway.azure.urls import ClientPath, parse_client_path
from gateway.balancing.active_probes import ActiveProbes
from gateway.errors import ApiError
from gateway.exchange import Exchange
from gateway.limits.memory_budget import BUDGETS
from gateway.logs import get_logger
from gateway.protocol.headers import Headers
from gateway.request import Request
from gateway.response import Response
from gateway.response_writer import ClientDisconnected, write_response
from gateway.settings import Limits, Settings, Timeouts
from gateway.teams import Team, Teams
from gateway.transport.client_connection import PROBES, ClientConnection, Handler, IncomingRequest
from gateway.transport.connection_count import ConnectionCount
from gateway.transport.file_descriptors import clients_allowed
from gateway.transport.file_descriptors import limit as descriptors_allowed
from gateway.transport.listener import Listener
from gateway.transport.response_head import closing_response
from gateway.transport.write_buffer import WriteBuffer
from gateway.upstream import Upstream
from gateway.usage.accounting import UsageMeter
from gateway.watchdog import Watchdog

__all__ = ("Generation", "Server", "serve")

# When the gateway stops, a connection without a request may send one more for so many seconds: a client that
# has begun to send it cannot know yet, and closing on it would fail it.
_LAST_REQUEST = 1.0
# How long, in seconds, after the end of an old set what is left of it is collected: nothing holds it any more then, and
# several reloads are one collection.
_COLLECT_AFTER = 1.0
# How often, in seconds, a drain looks at what is left.
_DRAIN_CHECK = 0.02


class _Connections(AiohttpServer):
    """aiohttp's low-level server, with our connections."""

    def __init__(self, handle: Handler, limits: Limits, timeouts: Timeouts, count: ConnectionCount) -> None:
        super().__init__(cast(Any, handle))
        self._ours = handle, self._loop, limits, timeouts, WriteBuffer(self._loop)
        self._count = count
        self._open = 0
        self._enough_for = clients_allowed(descriptors_allowed())

    def __call__(self) -> RequestHandler:
        return cast("RequestHandler", ClientConnection(self, *self._ours))

    def above(self, most: int) -> int:
        """Return how many connections are too many, the newest included: 0 or less for none.

        All workers together may have `most`, and this one as many as its descriptors are enough for.
        """
        return max(self._count.set(self._open) - most, self._open - self._enough_for)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Take a connection; it is closed at once if even a refusal could take the last descriptor."""
        super().connection_made(handler, transport)
        self._open += 1
        if self._open > 2 * self._enough_for:
            transport.abort()

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Forget a connection."""
        super().connection_lost(handler, exc)
        self._open -= 1
        self._count.set(self._open)

    def use(self, limits: Limits, timeouts: Timeouts) -> None:
        """Have other limits and timeouts from now on, in the connections that are there, too: some live for days."""
        handle, loop, _, _, outbox = self._ours
        self._ours = handle, loop, limits, timeouts, outbox
        for connection in self.connections:
            cast(ClientConnection, connection).use(limits, timeouts)


@dataclass(eq=False, slots=True)
class Generation:
    """What one configuration decides for a running server: read once for each exchange, and replaced whole."""

    teams: Teams
    settings: Settings
    running: int = 0
    """How many exchanges go on in it: its stages are stopped after the last one, once another has followed."""


class Server:
    """One gateway: teams, the connections to Azure, and the listening socket."""

    def __init__(
        self,
        teams: Teams,
        settings: Settings | None = None,
        upstream: Upstream | None = None,
        count: ConnectionCount | None = None,
    ) -> None:
        """`count` is that of all workers' connections, if there are several."""
        self._generation = Generation(teams, settings or Settings())
        self._old: set[Generation] = set()  # followed by another, and not stopped yet
        self._prepared: set[Generation] = set()  # not swapped or discarded yet
        self._collecting: asyncio.TimerHandle | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self.shared = teams.shared
        """What outlives a reload; closed when the server stops."""
        self.upstream = upstream or Upstream(self.settings.timeouts)
        self.draining = False
        self.ready = False
        self._count = count or ConnectionCount()
        self._http: _Connections | None = None
        self._servers: list[asyncio.Server] = []
        self._listener: Listener | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self.watchdog = Watchdog(self._running)
        self._stopped = False
        self.counts: Counter[str] = Counter()
        """What stages counted since the start, such as repairs; told when the server stops."""
        self._prober = ActiveProbes(self.shared.health, self.upstream)
        self.admin: Admin | None = None
        """Where its operator may look, if the configuration says where."""
        self.address = self.settings.listen
        """Where the server listens: the true port, once it does, where 0 was asked for."""

    @property
    def teams(self) -> Teams:
        """The teams of new exchanges."""
        return self._generation.teams

    @property
    def settings(self) -> Settings:
        """What the configuration that counts now says to the server."""
        return self._generation.settings

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
            await self.shared.close()
            await self.upstream.close()
            raise
        self.shared.health.use(self.settings.health, self.teams.deployments)
        BUDGETS.use(limits.memory, limits.form)
        self._http = _Connections(self._handle, limits, timeouts, self._count)
        try:
            await self._listen_to_operator()
            await self._listen(listener)
        except BaseException:
            self._http = None  # there is nothing left to stop
            if self.admin is not None:
                await self.admin.stop()
            await self.teams.stop()
            await self.shared.close()
            await self.upstream.close()
            raise
        self._prober.follow()
        self.ready = True

    async def _listen_to_operator(self) -> None:
        """Open the admin listener. Raises StartError where the address cannot be had."""
        if self.settings.admin is not None:
            self.admin = Admin(self._report)
            await self.admin.start(self.settings.admin)

    async def _report(self) -> list[dict[str, Any]]:
        return self.shared.health.report()

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
        if self.counts:
            get_logger().info("counted", **self.counts)
        await self._prober.stop()
        if self.admin is not None:
            await self.admin.stop()
        if self._retiring:
            await asyncio.wait(list(self._retiring))
        for generation in (*self._old, self._generation):
            await generation.teams.stop()
        await self.shared.close()
        await self.upstream.close()

    async def _drain(self, http: _Connections, now: asyncio.Event) -> None:
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
                if not cast(ClientConnection, connection).idle:
                    idle_since.pop(connection, None)
                elif loop.time() - idle_since.setdefault(connection, loop.time()) >= _LAST_REQUEST:
                    connection.force_close()

    # -- another configuration -------------------------------------------------------------------------

    async def prepare(self, teams: Teams, settings: Settings) -> Generation:
        """Start the stages of another configuration beside those that run; `swap` or `discard` what it returns.

        Raises StartError where one cannot start: those that did are stopped then.
        """
        generation = Generation(teams, settings)
        self._prepared.add(generation)
        try:
            await teams.start(self.upstream)
        except BaseException:
            self._prepared.discard(generation)
            raise
        return generation

    async def discard(self, generation: Generation) -> None:
        """Stop what was prepared and is not wanted."""
        self._prepared.discard(generation)
        await generation.teams.stop()
        self._let_go()

    def swap(self, generation: Generation) -> None:
        """Give new exchanges to another generation; those that run end in theirs, whose stages then stop.

        Where the server listens stays as it is. A server that has stopped does nothing.
        """
        if self._stopped or self._http is None:
            return
        self._prepared.discard(generation)
        old, self._generation = self._generation, generation
        settings = generation.settings
        self._http.use(settings.limits, settings.timeouts)
        self.upstream.use(settings.timeouts)
        self.shared.health.use(settings.health, generation.teams.deployments)
        BUDGETS.use(settings.limits.memory, settings.limits.form)
        self._prober.follow()
        self._old.add(old)
        if not old.running:
            self._retire(old)

    def _retire(self, old: Generation) -> None:
        """Stop the stages of a generation whose last exchange is over, unless the server does it already."""
        if self._stopped:
            return
        self._old.discard(old)
        task = asyncio.get_running_loop().create_task(self._stop_old(old))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _stop_old(self, old: Generation) -> None:
        await old.teams.stop()
        self._let_go()
        # With our thresholds the collector would leave cycles of the old set, such as a stage with a table of its own
        # methods, for hours. What was there at the start is frozen, so there is little to look through.
        if self._collecting is None:
            self._collecting = asyncio.get_running_loop().call_later(_COLLECT_AFTER, self._collect)

    def _let_go(self) -> None:
        """Forget what only configurations have named that are gone."""
        if self._stopped:
            return
        named = [each.teams for each in (self._generation, *self._old, *self._prepared)]
        self.upstream.keep(resource for teams in named for resource in teams.resources)
        self.shared.keep(
            set().union(*(each.stage_keys for each in named)), set().union(*(each.fetched for each in named))
        )

    def _collect(self) -> None:
        self._collecting = None
        gc.collect()
        task = asyncio.get_running_loop().create_task(self.shared.close_unused())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    # -- one request -----------------------------------------------------------------------------------

    async def _handle(self, arrived: IncomingRequest) -> bool:
        """Handle one request, in a task of its own; returns whether its connection may go on."""
        task = arrived.connection.task
        assert task is not None, "a request is handled outside its task"  # noqa: S101 -- a bug of ours
        self._running.add(task)
        if self.watchdog.asleep:
            self.watchdog.wake()
        exchange = Exchange()
        generation = self._generation
        generation.running += 1
        try:
            return await self._exchange(arrived, exchange, task, generation)
        except ClientDisconnected:
            exchange.ended_by = "client"
            return False
        except asyncio.CancelledError:
            # The client left, or the grace period is over.
            transport = arrived.connection.transport
            exchange.ended_by = "client" if transport is None else "gateway"
            if transport is not None and exchange.first_byte_at is None:
                stopped = ApiError(503, "the gateway is stopping; try again", code="shutting_down")
                exchange.status, exchange.error = stopped.status, stopped.code
                arrived.connection.write(closing_response(stopped))
            raise
        except Exception:
            exchange.ended_by = "gateway"
            raise
        finally:
            try:
                exchange.finish()
            finally:
                self._running.discard(task)
                if exchange.counts:
                    self.counts.update(exchange.counts)
                generation.running -= 1
                if generation is not self._generation and not generation.running:
                    self._retire(generation)

    async def _exchange(
        self, arrived: IncomingRequest, exchange: Exchange, task: asyncio.Task[Any], generation: Generation
    ) -> bool:
        settings = generation.settings
        head, headers, connection = arrived.head, arrived.headers, arrived.connection
        request_id = request_id_of(head.given_id)
        try:
            if head.path in PROBES:
                response = self._probe(head.method, head.path)
            else:
                issuers = generation.teams.issuers
                judgement = await issuers.judge(headers) if issuers is not None else None
                team, place = self._team(generation.teams, head.path, headers, judgement)
                request = Request(
                    id=request_id,
                    operation=(find_operation("WS", place.path) if head.upgrade else None)
                    or find_operation(head.method, place.path),
                    method=head.method,
                    path=place.path,
                    query=head.query,
                    headers=headers,
                    body=arrived.body,
                    team=team.name,
                    target=team.target,
                    exchange=exchange,
                    path_model=place.model,
                    address=lambda: client_address(connection.transport, headers, settings.trusted_proxies),
                    verification=judgement,
                )
                if arrived.body.is_arriving():
                    arrived.body.account = exchange
                    exchange.request, exchange.before_body = request, team.before_body
                if team.metered:
                    exchange.meter = UsageMeter()
                exchange.run_in(task)
                connection.expire_in(settings.timeouts.first_byte, exchange.expire)
                try:
                    assert team.pipeline is not None, "the team was not started"  # noqa: S101 -- a bug of ours
                    response = await team.pipeline(request)
                finally:
                    exchange.run_in(None)
                    connection.no_expiry()
        except ApiError as exc:
            response = Response.from_error(exc)
            get_logger().info("refused before any team", status=exc.status, error=exc.code, request_id=request_id)
        return await write_response(
            arrived,
            response,
            exchange,
            request_id=request_id,
            close=self.draining,
            timeouts=settings.timeouts,
            limits=settings.limits,
        )

    def _probe(self, method: str, path: str) -> Response:
        if method not in ("GET", "HEAD"):
            raise ApiError(405, f"{method} is not allowed on {path}; use GET", headers={"allow": "GET"})
        if path == "/healthz":
            return Response.json({"status": "alive"})
        if self.ready:
            return Response.json({"status": "ready"})
        draining = Response.json({"status": "draining"}, 503)
        draining.headers.set("retry-after", "1")
        return draining

    def _team(
        self, teams: Teams, path: str, headers: Headers, judgement: TokenVerification | None
    ) -> tuple[Team, ClientPath]:
        """Return the team of a path, and what the path says."""
        place = parse_client_path(path)
        if place is None:
            raise ApiError(404, f"there is nothing at {path}; the API begins with /v1/", code="unknown_url")
        team = teams.find(place.prefix, headers, judgement)
        if team is None:
            raise ApiError(404, f"no team's API is at {place.prefix}/v1", code="unknown_url")
        return team, place


async def _wait_either(event: asyncio.Event, seconds: float) -> None:
    if seconds > 0:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), seconds)


def _spare_the_collector() -> None:
    """Keep the garbage collector from what does not need it.

    What was made at start stays, and an exchange leaves no cycles behind: with the thresholds that Python
    begins with, looking for some at every 700th new object took an eighth of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


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


def _warn_of_descriptors(connections: int) -> None:
    """Warn if a process may have too few descriptors for `limits.connections`."""
    enough_for = clients_allowed(descriptors_allowed())
    if enough_for < connections:
        get_logger().warning(
            "there are too few file descriptors for limits.connections",
            connections=connections,
            descriptors=descriptors_allowed(),
            enough_for=enough_for,
            advice="raise the limit (ulimit -n, LimitNOFILE=), or lower limits.connections",
        )


async def serve(
    server: Server,
    ready: Callable[[], None] | None = None,
    *,
    stopping: Callable[[], None] | None = None,
    listener: Listener | None = None,
    obey: Callable[[asyncio.Event, asyncio.Event], None] = _obey_signals,
    beside: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Run a server until SIGTERM or SIGINT, then drain it; a second signal ends it at once.

    `ready` is called when it listens (on `listener`, if given), `stopping` when the drain begins. `obey` is
    given the two events that stop it, and sees to it that they are set. `beside` runs from when it listens
    until the drain begins, and is cancelled then. Raises StartError where it cannot be started.
    """
    stop, now = asyncio.Event(), asyncio.Event()
    obey(stop, now)
    log = get_logger().bind(pid=os.getpid())
    starting = asyncio.create_task(server.start(listener))
    asked = asyncio.create_task(stop.wait())
    helper: asyncio.Task[None] | None = None
    try:
        await asyncio.wait((starting, asked), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            # A stage that hangs while it starts must not keep the gateway from being stopped.
            starting.cancel()
            await asyncio.wait((starting,), timeout=5)
            return
        await starting
        server.watchdog.start()
        _spare_the_collector()
        admin = {"admin": str(server.admin.address)} if server.admin is not None else {}
        log.info("listening", address=str(server.address), teams=len(server.teams.all), **admin)
        _warn_of_descriptors(server.settings.limits.connections)
        if beside is not None:
            helper = asyncio.create_task(beside())
            await asyncio.sleep(0)  # it has begun when others hear of it: they may ask for a reload at once
        if ready is not None:
            ready()
        await asked
        log.info("stopping")
        if stopping is not None:
            stopping()
    finally:
        asked.cancel()
        if helper is not None:
            helper.cancel()
            await asyncio.wait((helper,), timeout=5)
        await server.stop(now=now)
        server.watchdog.stop()
    log.info("stopped")
