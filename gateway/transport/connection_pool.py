"""The connections to Azure: made by aiohttp's connector (happy eyeballs, TLS), kept here between answers.

Host names are looked up by `resolver.py`, in a part of the time that connecting may take. Connections through a proxy
are made on a socket that `tunnel.py` connects.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
from collections.abc import Callable, Iterable
from typing import cast

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest, ConnectionKey
from yarl import URL

from gateway.azure.resources import Resource
from gateway.dns_resolver import LookupFailed, LookupTimeout, Resolver
from gateway.errors import UpstreamError, UpstreamTimeout
from gateway.protocol.proxy_url import Proxy
from gateway.transport import file_descriptors as descriptors
from gateway.transport.proxy_tunnel import open_tunnel
from gateway.transport.upstream_connection import UpstreamConnection
from gateway.transport.write_buffer import WriteBuffer

__all__ = ("ConnectionPool", "Destination")

# How long, in seconds, a connection is kept that nobody uses: Azure closes on it after a minute or more.
_KEPT = 55.0
# How long, in seconds, one may have been idle for a request that must not be sent twice: nobody closes so soon.
_FRESH = 2.0
# How often, in seconds, those kept too long are looked for.
_SWEEP = 5.0
# The time limit is set around each call.
_NO_LIMIT = aiohttp.ClientTimeout(total=None)
# Why a certificate is not valid, by OpenSSL's numbers (x509_vfy.h).
_NOT_VALID = {
    9: "its time has not begun; the clock of one side may be wrong",
    10: "it has expired",
    18: "it is self-signed; the operator can name a file with it: `tls: {ca: FILE}`",
    19: "its issuer is not known; the operator can name a file with the CA: `tls: {ca: FILE}`",
    20: "its issuer is not known; the operator can name a file with the CA: `tls: {ca: FILE}`",
    21: "its issuer is not known: the server sends no intermediate certificate",
    23: "it was revoked",
    62: "it is for another host",
    64: "it is for another address",
}


class Destination:
    """What aiohttp's connector asks of a request, for one resource; and the connections kept for it."""

    proxy = None  # the connector's own way through proxies knows no SOCKS, and reads what they answer without bounds
    server_hostname = None

    def __init__(self, resource: Resource, context: ssl.SSLContext) -> None:
        self.name = resource.name
        self.through = resource.proxy
        self.url = URL(resource.endpoint)
        self.host = self.url.raw_host or ""
        self.port = self.url.port
        self.ssl = context
        self.connection_key = ConnectionKey(self.host, self.port, self.is_ssl(), context, None, None, None)
        self.base = self.url.raw_path.rstrip("/").encode()
        default = 443 if self.is_ssl() else 80
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.host_header = (host if self.port == default else f"{host}:{self.port}").encode()
        self.kept: list[UpstreamConnection] = []  # the one used last at the end
        self.forgotten = False
        """Whether no configuration names it any more: its connections are not kept."""

    def is_ssl(self) -> bool:
        """Whether the resource is spoken to over TLS."""
        return self.url.scheme == "https"


class ConnectionPool:
    """The connections to every resource, and how they are made."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self._context = context or ssl.create_default_context()
        self._destinations: dict[object, Destination] = {}
        self._connector: aiohttp.TCPConnector | None = None
        self._outbox: WriteBuffer | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Get ready, on the running loop."""
        self._connector = aiohttp.TCPConnector(
            limit=0, use_dns_cache=False, force_close=True, resolver=Resolver.of(asyncio.get_running_loop())
        )
        self._outbox = WriteBuffer(asyncio.get_running_loop())
        # The only way to give aiohttp a protocol of our own.
        factory = functools.partial(UpstreamConnection, asyncio.get_running_loop())
        self._connector._factory = cast("functools.partial[ResponseHandler]", factory)

    async def close(self) -> None:
        """Close every connection."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for destination in self._destinations.values():
            for wire in destination.kept:
                wire.abort()
            destination.kept.clear()
        if self._connector is not None:
            await self._connector.close()
            self._connector = None

    def destination(self, resource: Resource) -> Destination:
        """Return where a resource's requests go."""
        # (What `_place` returns, without the call: this is asked for each request.)
        plain = resource.proxy is None and resource.tls is None
        place = resource.endpoint if plain else (resource.endpoint, resource.proxy, resource.tls)
        found = self._destinations.get(place)
        if found is None:
            context = self._context if resource.tls is None else _context(resource)
            found = self._destinations[place] = Destination(resource, context)
        return found

    def keep(self, resources: Iterable[Resource]) -> None:
        """Forget every destination but those of these resources, with its TLS context and idle connections.

        A connection in use stays until its exchange ends, and is closed then.
        """
        places = {_place(each) for each in resources}
        for place in [each for each in self._destinations if each not in places]:
            destination = self._destinations.pop(place)
            destination.forgotten = True
            for wire in destination.kept:
                wire.abort()
            destination.kept.clear()
        if self._connector is not None:
            self._connector.clear_dns_cache()  # aiohttp keeps every name that it has ever looked up

    def kept(self, destination: Destination, old_too: Callable[[], bool]) -> UpstreamConnection | None:
        """Return a connection that was kept, if there is one that is still open.

        One that has been idle may have been closed at the other end, and a request on it be lost: `old_too` is asked
        whether it may be one of those.
        """
        while destination.kept:
            wire = destination.kept[-1]
            if not wire.is_connected():
                destination.kept.pop()
            elif wire.loop.time() - wire.idle_since < _FRESH or old_too():
                return destination.kept.pop()
            else:
                return None
        return None

    def put(self, wire: UpstreamConnection) -> None:
        """Keep a connection for the next request, unless something of the last one is left on it."""
        destination: Destination = wire.destination  # type: ignore[assignment] # it was settled with one
        if not wire.is_clean() or destination.forgotten:
            wire.abort()
            return
        wire.idle_since = wire.loop.time()
        destination.kept.append(wire)
        if self._sweeper is None:
            self._sweeper = wire.loop.call_later(_SWEEP, self._sweep)

    def _sweep(self) -> None:
        """Close connections that were kept too long."""
        loop = asyncio.get_running_loop()
        self._sweeper = None
        oldest = loop.time() - _KEPT
        for destination in self._destinations.values():
            old = [wire for wire in destination.kept if wire.idle_since < oldest or not wire.is_connected()]
            destination.kept = [wire for wire in destination.kept if wire not in old]
            for wire in old:
                wire.abort()
        if any(destination.kept for destination in self._destinations.values()):
            self._sweeper = loop.call_later(_SWEEP, self._sweep)

    async def connect(self, destination: Destination, seconds: float) -> UpstreamConnection:
        """Make a new connection in so many seconds.

        Raises UpstreamError (502) and UpstreamTimeout (504), saying why it cannot; they are `unsent`. Raises ApiError
        503 where the gateway itself has no descriptor left.
        """
        try:
            return await self._connect(destination, seconds)
        except UpstreamError as exc:
            if descriptors.caused_by_exhaustion(exc):
                raise descriptors.descriptors_exhausted() from None
            exc.unsent = True
            if exc.fault == "broken_off":  # on the way through a proxy
                exc.fault = "connect"
            raise

    async def _connect(self, destination: Destination, seconds: float) -> UpstreamConnection:
        assert self._connector is not None, "Connector.start() was not awaited"  # noqa: S101 -- a bug of ours
        assert self._outbox is not None, "Connector.start() was not awaited"  # noqa: S101 -- a bug of ours
        name = destination.name
        connection = None
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        proxy = destination.through
        try:
            # First, and by itself, so that its own limit tells what took too long; below the addresses are known.
            await Resolver.of(loop).look_up(destination.host if proxy is None else proxy.host, seconds)
            if proxy is None:
                async with asyncio.timeout_at(end):
                    connection = await self._connector.connect(cast(ClientRequest, destination), [], _NO_LIMIT)
                wire = cast(UpstreamConnection, connection.protocol)
            else:
                wire = await self._connect_through(destination, proxy, end, seconds)
        except LookupFailed as exc:
            owner = f"{'' if proxy is None else 'the proxy of '}the Azure resource {name!r}"
            if isinstance(exc, LookupTimeout):
                raise UpstreamTimeout(exc.of(owner), fault="dns_timeout") from None
            raise UpstreamError(exc.of(owner), fault="dns") from None
        except TimeoutError:
            raise UpstreamTimeout(
                f"could not connect to the Azure resource {name!r} within {seconds:g} s", fault="connect_timeout"
            ) from None
        except (aiohttp.ClientConnectorCertificateError, ssl.SSLCertVerificationError) as exc:
            raise UpstreamError(
                f"the certificate of the Azure resource {name!r}, which {destination.host!r} shows, is not valid: "
                f"{_why_not_valid(exc)}",
                fault="tls",
            ) from None
        except (aiohttp.ClientConnectorSSLError, ssl.SSLError):
            raise UpstreamError(f"TLS with the Azure resource {name!r} failed", fault="tls") from None
        except (aiohttp.ClientError, OSError):
            raise UpstreamError(f"could not connect to the Azure resource {name!r}", fault="connect") from None
        wire.settle(connection, self, destination, self._outbox)
        return wire

    async def _connect_through(
        self, destination: Destination, proxy: Proxy, end: float, seconds: float
    ) -> UpstreamConnection:
        """Make a connection through a proxy. Raises UpstreamError; other errors are not the proxy's fault."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(end):
                sock = await open_tunnel(proxy, destination.host, destination.port or 0, destination.name)
        except TimeoutError:
            raise UpstreamTimeout(
                f"the proxy of the Azure resource {destination.name!r} gave no connection to it within {seconds:g} s",
                fault="connect_timeout",
            ) from None
        tls = destination.is_ssl()
        async with asyncio.timeout_at(end):
            _, wire = await loop.create_connection(
                functools.partial(UpstreamConnection, loop),
                sock=sock,
                ssl=destination.ssl if tls else None,
                server_hostname=destination.host.rstrip(".") if tls else None,
            )
        return wire


def _why_not_valid(exc: BaseException) -> str:
    """Return why a certificate is not valid, in words for clients and operators."""
    cause = getattr(exc, "certificate_error", exc)
    code, message = getattr(cause, "verify_code", None), getattr(cause, "verify_message", None)
    return _NOT_VALID.get(code or 0) or message or "the TLS library does not say why"


def _place(resource: Resource) -> object:
    """Return what tells one destination from another: equal ones share their connections."""
    if resource.proxy is None and resource.tls is None:
        return resource.endpoint
    return resource.endpoint, resource.proxy, resource.tls


def _context(resource: Resource) -> ssl.SSLContext:
    """Return the TLS context of a resource that has files of its own. Raises UpstreamError where they are gone."""
    assert resource.tls is not None, "it has none"  # noqa: S101 -- a bug of ours
    try:
        return resource.tls.context()
    except OSError as exc:  # they were good when the configuration was loaded
        if descriptors.caused_by_exhaustion(exc):
            raise descriptors.descriptors_exhausted() from None
        gone = UpstreamError(f"the TLS files of the Azure resource {resource.name!r} cannot be used", fault="tls")
        gone.unsent = True
        raise gone from None
