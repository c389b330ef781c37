"""Connections to Azure: made by aiohttp's connector (happy eyeballs, TLS), and kept here between requests.

`dns_resolver.py` looks up host names, in a part of the connect timeout. A connection through a proxy is made on a
socket that `proxy_tunnel.py` connects.
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

# Keep-alive: maximum idle time of a connection, in seconds. Azure closes an idle one after a minute or more.
_MAX_IDLE = 55.0
# Maximum idle time, in seconds, for a request that must not be sent twice: no server closes this soon.
_FRESH = 2.0
# Interval, in seconds, of the search for connections that have been idle too long.
_SWEEP = 5.0
# The timeout is set around each call.
_NO_LIMIT = aiohttp.ClientTimeout(total=None)
# Why a certificate is not valid, by OpenSSL's numbers (x509_vfy.h).
_CERTIFICATE_ERRORS = {
    9: "it is not valid yet; the clock of one side may be wrong",
    10: "it has expired",
    18: "it is self-signed; the operator can name a file with it: `tls: {ca: FILE}`",
    19: "its issuer is not known; the operator can name a file with the CA: `tls: {ca: FILE}`",
    20: "its issuer is not known; the operator can name a file with the CA: `tls: {ca: FILE}`",
    21: "its issuer is not known: the server sends no intermediate certificate",
    23: "it has been revoked",
    62: "it is for another host",
    64: "it is for another address",
}


class Destination:
    """One resource, as aiohttp's connector sees a request; and its idle connections."""

    proxy = None  # aiohttp's own proxy support knows no SOCKS, and reads a proxy's response without limits
    server_hostname = None

    def __init__(self, resource: Resource, context: ssl.SSLContext) -> None:
        self.name = resource.name
        self.via = resource.proxy
        self.url = URL(resource.endpoint)
        self.host = self.url.raw_host or ""
        self.port = self.url.port
        self.ssl = context
        self.connection_key = ConnectionKey(self.host, self.port, self.is_ssl(), context, None, None, None)
        self.base = self.url.raw_path.rstrip("/").encode()
        default = 443 if self.is_ssl() else 80
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.host_header = (host if self.port == default else f"{host}:{self.port}").encode()
        self.idle: list[UpstreamConnection] = []  # the last one used is at the end
        self.retired = False
        """Whether no configuration names the resource any more: its connections are not kept."""

    def is_ssl(self) -> bool:
        """Whether the resource is reached over TLS."""
        return self.url.scheme == "https"


class ConnectionPool:
    """Idle connections to every resource, and a way to make new ones."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self._context = context or ssl.create_default_context()
        self._destinations: dict[object, Destination] = {}
        self._connector: aiohttp.TCPConnector | None = None
        self._write_buffer: WriteBuffer | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Prepare for connections, on the running loop."""
        self._connector = aiohttp.TCPConnector(
            limit=0, use_dns_cache=False, force_close=True, resolver=Resolver.of(asyncio.get_running_loop())
        )
        self._write_buffer = WriteBuffer(asyncio.get_running_loop())
        # The only way to give aiohttp a protocol of our own.
        factory = functools.partial(UpstreamConnection, asyncio.get_running_loop())
        self._connector._factory = cast("functools.partial[ResponseHandler]", factory)

    async def close(self) -> None:
        """Close every connection."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for destination in self._destinations.values():
            for connection in destination.idle:
                connection.abort()
            destination.idle.clear()
        if self._connector is not None:
            await self._connector.close()
            self._connector = None

    def destination(self, resource: Resource) -> Destination:
        """Return the destination of a resource's requests."""
        # (`_destination_key`, without the call: this runs for each request.)
        plain = resource.proxy is None and resource.tls is None
        key = resource.endpoint if plain else (resource.endpoint, resource.proxy, resource.tls)
        found = self._destinations.get(key)
        if found is None:
            context = self._context if resource.tls is None else _own_context(resource)
            found = self._destinations[key] = Destination(resource, context)
        return found

    def keep(self, resources: Iterable[Resource]) -> None:
        """Retire every destination except those of `resources`, with its TLS context and idle connections.

        A connection in use stays open until its exchange ends.
        """
        keys = {_destination_key(each) for each in resources}
        for key in [each for each in self._destinations if each not in keys]:
            destination = self._destinations.pop(key)
            destination.retired = True
            for connection in destination.idle:
                connection.abort()
            destination.idle.clear()
        if self._connector is not None:
            self._connector.clear_dns_cache()  # aiohttp keeps every name that it has ever looked up

    def take_idle(self, destination: Destination, may_be_stale: Callable[[], bool]) -> UpstreamConnection | None:
        """Return an idle connection that is still open, if there is one.

        Azure may have closed a connection that was idle for some time, and a request on it would be lost:
        `may_be_stale` says whether the caller takes one of those.
        """
        while destination.idle:
            connection = destination.idle[-1]
            if not connection.is_connected():
                destination.idle.pop()
            elif connection.loop.time() - connection.idle_since < _FRESH or may_be_stale():
                return destination.idle.pop()
            else:
                return None
        return None

    def put(self, connection: UpstreamConnection) -> None:
        """Keep a connection for the next request, unless it is not clean."""
        destination: Destination = connection.destination  # type: ignore[assignment] # it was attached with one
        if not connection.is_clean() or destination.retired:
            connection.abort()
            return
        connection.idle_since = connection.loop.time()
        destination.idle.append(connection)
        if self._sweeper is None:
            self._sweeper = connection.loop.call_later(_SWEEP, self._sweep)

    def _sweep(self) -> None:
        """Close connections that have been idle too long."""
        loop = asyncio.get_running_loop()
        self._sweeper = None
        oldest = loop.time() - _MAX_IDLE
        for destination in self._destinations.values():
            old = [each for each in destination.idle if each.idle_since < oldest or not each.is_connected()]
            destination.idle = [each for each in destination.idle if each not in old]
            for connection in old:
                connection.abort()
        if any(destination.idle for destination in self._destinations.values()):
            self._sweeper = loop.call_later(_SWEEP, self._sweep)

    async def connect(self, destination: Destination, seconds: float) -> UpstreamConnection:
        """Make a new connection within `seconds`.

        Raises UpstreamError (502) and UpstreamTimeout (504) with the reason; they are `unsent`. Raises ApiError 503 if
        the gateway has no file descriptor left.
        """
        try:
            return await self._connect(destination, seconds)
        except UpstreamError as exc:
            if descriptors.caused_by_exhaustion(exc):
                raise descriptors.descriptors_exhausted() from None
            exc.unsent = True
            if exc.fault == "broken_off":  # by a proxy
                exc.fault = "connect"
            raise

    async def _connect(self, destination: Destination, seconds: float) -> UpstreamConnection:
        assert self._connector is not None, "ConnectionPool.start() was not awaited"  # noqa: S101 -- a bug of ours
        assert self._write_buffer is not None, "ConnectionPool.start() was not awaited"  # noqa: S101 -- a bug of ours
        name = destination.name
        made_by_aiohttp = None
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        proxy = destination.via
        try:
            # A step by itself, so that its timeout names what took too long; below, the addresses are known.
            await Resolver.of(loop).look_up(destination.host if proxy is None else proxy.host, seconds)
            if proxy is None:
                async with asyncio.timeout_at(end):
                    made_by_aiohttp = await self._connector.connect(cast(ClientRequest, destination), [], _NO_LIMIT)
                connection = cast(UpstreamConnection, made_by_aiohttp.protocol)
            else:
                connection = await self._connect_through(destination, proxy, end, seconds)
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
                f"the certificate of the Azure resource {name!r}, from {destination.host!r}, is not valid: "
                f"{_certificate_error(exc)}",
                fault="tls",
            ) from None
        except (aiohttp.ClientConnectorSSLError, ssl.SSLError):
            raise UpstreamError(f"TLS with the Azure resource {name!r} failed", fault="tls") from None
        except (aiohttp.ClientError, OSError):
            raise UpstreamError(f"could not connect to the Azure resource {name!r}", fault="connect") from None
        connection.attach(made_by_aiohttp, self, destination, self._write_buffer)
        return connection

    async def _connect_through(
        self, destination: Destination, proxy: Proxy, end: float, seconds: float
    ) -> UpstreamConnection:
        """Make a connection through a proxy. Raises UpstreamError if the proxy fails; other errors are Azure's."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(end):
                sock = await open_tunnel(proxy, destination.host, destination.port or 0, destination.name)
        except TimeoutError:
            raise UpstreamTimeout(
                f"the proxy of the Azure resource {destination.name!r} did not connect to it within {seconds:g} s",
                fault="connect_timeout",
            ) from None
        tls = destination.is_ssl()
        async with asyncio.timeout_at(end):
            _, connection = await loop.create_connection(
                functools.partial(UpstreamConnection, loop),
                sock=sock,
                ssl=destination.ssl if tls else None,
                server_hostname=destination.host.rstrip(".") if tls else None,
            )
        return connection


def _certificate_error(exc: BaseException) -> str:
    """Return why a certificate is not valid, in words for clients and operators."""
    cause = getattr(exc, "certificate_error", exc)
    code, message = getattr(cause, "verify_code", None), getattr(cause, "verify_message", None)
    return _CERTIFICATE_ERRORS.get(code or 0) or message or "the TLS library gives no reason"


def _destination_key(resource: Resource) -> object:
    """Return the key of a resource's destination: resources with equal keys share their connections."""
    if resource.proxy is None and resource.tls is None:
        return resource.endpoint
    return resource.endpoint, resource.proxy, resource.tls


def _own_context(resource: Resource) -> ssl.SSLContext:
    """Return the TLS context of a resource with TLS files. Raises UpstreamError if they cannot be read."""
    assert resource.tls is not None, "it has none"  # noqa: S101 -- a bug of ours
    try:
        return resource.tls.context()
    except OSError as exc:  # they were good when the configuration was loaded
        if descriptors.caused_by_exhaustion(exc):
            raise descriptors.descriptors_exhausted() from None
        gone = UpstreamError(f"the TLS files of the Azure resource {resource.name!r} cannot be used", fault="tls")
        gone.unsent = True
        raise gone from None
