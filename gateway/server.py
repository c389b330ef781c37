"""The server: turns each incoming request into a `Request`, runs its team's pipeline, and has the response written.

A request's path is interpreted once, in its raw form: `/{the team's prefix}/v1/{operation}`. The server knows nothing
about the individual stages.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

from gateway.admin.listener import Admin
from gateway.auth.client_address import client_address
from gateway.auth.oidc import TokenVerification
from gateway.azure.operations import find_operation
from gateway.azure.urls import ClientPath, parse_client_path
from gateway.balancing.active_probes import ActiveProbes
from gateway.errors import ApiError
from gateway.exchange import Exchange
from gateway.generation import Generation, Generations
from gateway.limits.memory_budget import BUDGETS
from gateway.logs import get_logger
from gateway.protocol.headers import Headers
from gateway.protocol.request_id import request_id as request_id_of
from gateway.request import Request
from gateway.response import Response
from gateway.response_writer import write_response
from gateway.settings import Settings
from gateway.stream_writer import ClientDisconnected
from gateway.teams import Team, Teams
from gateway.transport.client_connection import PROBE_PATHS, ClientConnection, IncomingRequest
from gateway.transport.connection_limit import ConnectionCount
from gateway.transport.http_server import HttpServer
from gateway.transport.listener import Listener
from gateway.transport.response_head import closing_response
from gateway.upstream import Upstream
from gateway.usage.accounting import UsageMeter
from gateway.watchdog import Watchdog

if TYPE_CHECKING:
    from aiohttp.web_protocol import RequestHandler

    from gateway.auth.oidc import TokenVerification
    from gateway.protocol.headers import Headers

__all__ = ("Server",)

# During a drain, an idle connection may send one more request for this many seconds: a client that has begun to send it
# does not know yet, and its request would fail.
_LAST_REQUEST_TIMEOUT = 1.0
# Interval, in seconds, for checking whether the drain is complete.
_DRAIN_CHECK_INTERVAL = 0.02


class Server:
    """One gateway: teams, the connections to Azure, and the listening sockets."""

    def __init__(
        self,
        teams: Teams,
        settings: Settings | None = None,
        upstream: Upstream | None = None,
        count: ConnectionCount | None = None,
    ) -> None:
        """`count` is shared by all workers, if there are several."""
        settings = settings or Settings()
        self.shared = teams.shared
        """State that outlives a reload; closed when the server stops."""
        self.upstream = upstream or Upstream(settings.timeouts)
        self.generations = Generations(teams, settings, self.upstream)
        self.draining = False
        self.ready = False
        self._count = count or ConnectionCount()
        self._http: HttpServer | None = None
        self._servers: list[asyncio.Server] = []
        self._listener: Listener | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self.watchdog = Watchdog(self._running)
        self._stopped = False
        self.counts: Counter[str] = Counter()
        """Counters of the stages since the start, such as repairs; logged when the server stops."""
        self._prober = ActiveProbes(self.shared.health, self.upstream)
        self.admin: Admin | None = None
        """The admin listener, if configured."""
        self.address = settings.listen
        """The listening address: with the real port once it listens, even if port 0 is configured."""

    @property
    def teams(self) -> Teams:
        """The teams of new exchanges."""
        return self.generations.current.teams

    @property
    def settings(self) -> Settings:
        """The server's settings in the current configuration."""
        return self.generations.current.settings

    # -- start and stop --------------------------------------------------------------------------------

    async def start(self, listener: Listener | None = None) -> None:
        """Start the stages and listen, on the sockets of `listener` if given.

        Raises StartError if a stage cannot start, or the address cannot be used.
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
        self._http = HttpServer(self._handle, limits, timeouts, self._count)
        try:
            await self._start_admin()
            await self._listen(listener)
        except BaseException:
            self._http = None  # nothing is left to stop
            if self.admin is not None:
                await self.admin.stop()
            await self.teams.stop()
            await self.shared.close()
            await self.upstream.close()
            raise
        self._prober.follow()
        self.ready = True

    async def _start_admin(self) -> None:
        """Open the admin listener. Raises StartError if its address cannot be used."""
        if self.settings.admin is not None:
            self.admin = Admin(self._report)
            await self.admin.start(self.settings.admin)

    async def _report(self) -> list[dict[str, Any]]:
        return self.shared.health.report()

    async def _listen(self, listener: Listener | None) -> None:
        """Listen. Raises StartError if the address cannot be used."""
        loop = asyncio.get_running_loop()
        self._listener = listener or Listener.open(self.settings.listen)
        self.address = self._listener.address
        for sock in self._listener.sockets:
            self._servers.append(await loop.create_server(cast(Any, self._http), sock=sock, backlog=1024))

    async def stop(self, *, now: asyncio.Event | None = None) -> None:
        """Stop: fail readiness probes, accept no client after `drain_delay`, and end running exchanges within `grace`.

        An idle connection may send one more request within 1 second. Setting `now` ends all waits.
        """
        http = self._http
        if self._stopped or http is None:
            return  # already stopped, or never started
        self._stopped = True
        self.generations.begin_stop()
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
            get_logger().warning("exchanges_cancelled", exchanges=len(self._running))
            await asyncio.wait(list(self._running), timeout=5)
        await http.shutdown(timeout=1)
        if self._listener is not None:
            self._listener.remove()
        if self.counts:
            get_logger().info("counters", **self.counts)
        await self._prober.stop()
        if self.admin is not None:
            await self.admin.stop()
        await self.generations.stop()
        await self.shared.close()
        await self.upstream.close()

    async def _drain(self, http: HttpServer, now: asyncio.Event) -> None:
        """Wait until the last connection has closed, the grace period is over, or `now` is set.

        Responses say `connection: close` from now on. Those that began earlier did not, so their connections may send
        one more request, too.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self.settings.timeouts.grace
        idle_since: dict[RequestHandler, float] = {}
        while not now.is_set() and loop.time() < end:
            await _wait_either(now, _DRAIN_CHECK_INTERVAL)  # first: the last accepted connection may not be listed yet
            if not http.connections:
                return
            for connection in http.connections:
                if not cast(ClientConnection, connection).idle:
                    idle_since.pop(connection, None)
                elif loop.time() - idle_since.setdefault(connection, loop.time()) >= _LAST_REQUEST_TIMEOUT:
                    connection.force_close()

    # -- reload ----------------------------------------------------------------------------------------

    async def prepare(self, teams: Teams, settings: Settings) -> Generation:
        """Start the stages of a new configuration next to the running ones, for `swap` or `discard`.

        Raises StartError if one cannot start; then those that did are stopped.
        """
        return await self.generations.prepare(teams, settings)

    async def discard(self, generation: Generation) -> None:
        """Stop a prepared generation."""
        await self.generations.discard(generation)

    def swap(self, generation: Generation) -> None:
        """Use a prepared generation for new exchanges; the old one stops after its last exchange.

        The listening address does not change. A stopped server does nothing.
        """
        if self._stopped or self._http is None:
            return
        old = self.generations.replace(generation)
        settings = generation.settings
        self._http.use(settings.limits, settings.timeouts)
        self.upstream.use(settings.timeouts)
        self.shared.health.use(settings.health, generation.teams.deployments)
        BUDGETS.use(settings.limits.memory, settings.limits.form)
        self._prober.follow()
        self.generations.retire_unused(old)

    # -- one request -----------------------------------------------------------------------------------

    async def _handle(self, incoming: IncomingRequest) -> bool:
        """Handle one request, in its own task; returns whether the connection is kept alive."""
        task = incoming.connection.task
        assert task is not None, "a request is handled outside its task"  # noqa: S101 -- a bug of ours
        self._running.add(task)
        if self.watchdog.asleep:
            self.watchdog.wake()
        exchange = Exchange()
        generation = self.generations.current
        generation.running += 1
        try:
            return await self._exchange(incoming, exchange, task, generation)
        except ClientDisconnected:
            exchange.ended_by = "client"
            return False
        except asyncio.CancelledError:
            # The client disconnected, or the grace period is over.
            transport = incoming.connection.transport
            exchange.ended_by = "client" if transport is None else "gateway"
            if transport is not None and exchange.first_byte_at is None:
                stopped = ApiError(503, "the gateway is shutting down; retry", code="shutting_down")
                exchange.status, exchange.error = stopped.status, stopped.code
                incoming.connection.write(closing_response(stopped))
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
                if generation is not self.generations.current:
                    self.generations.retire_unused(generation)

    async def _exchange(
        self, incoming: IncomingRequest, exchange: Exchange, task: asyncio.Task[Any], generation: Generation
    ) -> bool:
        settings = generation.settings
        head, headers, connection = incoming.head, incoming.headers, incoming.connection
        request_id = request_id_of(head.given_id)
        try:
            if head.path in PROBE_PATHS:
                response = self._probe(head.method, head.path)
            else:
                issuers = generation.teams.issuers
                verification = await issuers.verify(headers) if issuers is not None else None
                team, path = self._route(generation.teams, head.path, headers, verification)
                request = Request(
                    id=request_id,
                    operation=(find_operation("WS", path.path) if head.upgrade else None)
                    or find_operation(head.method, path.path),
                    method=head.method,
                    path=path.path,
                    query=head.query,
                    headers=headers,
                    body=incoming.body,
                    team=team.name,
                    target=team.target,
                    exchange=exchange,
                    path_model=path.model,
                    address=lambda: client_address(connection.transport, headers, settings.trusted_proxies),
                    verification=verification,
                )
                if incoming.body.is_arriving():
                    incoming.body.account = exchange
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
                    connection.cancel_expiry()
        except ApiError as exc:
            response = Response.from_error(exc)
            get_logger().info("request_rejected", status=exc.status, error=exc.code, request_id=request_id)
        return await write_response(
            incoming,
            response,
            exchange,
            request_id=request_id,
            close=self.draining,
            timeouts=settings.timeouts,
            limits=settings.limits,
        )

    def _probe(self, method: str, path: str) -> Response:
        """Return the response to a liveness or readiness probe of an orchestrator."""
        if method not in ("GET", "HEAD"):
            raise ApiError(405, f"{method} is not allowed on {path}; use GET", headers={"allow": "GET"})
        if path == "/healthz":
            return Response.json({"status": "alive"})
        if self.ready:
            return Response.json({"status": "ready"})
        draining = Response.json({"status": "draining"}, 503)
        draining.headers.set("retry-after", "1")
        return draining

    def _route(
        self, teams: Teams, path: str, headers: Headers, verification: TokenVerification | None
    ) -> tuple[Team, ClientPath]:
        """Return the team of a request, and its parsed path. Raises ApiError 404."""
        parsed = parse_client_path(path)
        if parsed is None:
            raise ApiError(404, f"{path} is not a path of this API; its paths begin with /v1/", code="unknown_url")
        team = teams.find(parsed.prefix, headers, verification)
        if team is None:
            raise ApiError(404, f"no team has its API at {parsed.prefix}/v1; check the base URL", code="unknown_url")
        return team, parsed


async def _wait_either(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, at most `seconds`."""
    if seconds > 0:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), seconds)
