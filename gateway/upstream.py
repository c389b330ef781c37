"""One exchange with Azure: the end of every pipeline.

aiohttp gives the pool, DNS, TLS and the response parser; the head is written as bytes and the body read from
the parser's stream, because `ClientSession` costs several times what a request is worth. What that goes
round is redone here, and what aiohttp keeps private is used in `_Wire` and `_Destination` alone:

* interim answers (1xx) are skipped; an unasked 101 is an error; redirects are passed on, never followed;
* a pooled connection is reused only if the answer before it ended exactly where its bytes ended, and is
  closed on any byte that arrives while it is idle: such bytes would be the next caller's answer;
* a reused connection that Azure had already closed is replaced, if not one byte of an answer came;
* an answer that comes while the upload still runs stops the upload.
"""

from __future__ import annotations

import asyncio
import functools
import re
import ssl
from collections.abc import AsyncIterator
from functools import lru_cache
from typing import Any, Self, cast

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest, ConnectionKey
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import RawResponseMessage
from aiohttp.streams import StreamReader
from yarl import URL

from gateway.azure import BY_NAME, unknown_operation, upstream_path
from gateway.errors import ApiError, GatewayError, UpstreamError, UpstreamTimeout
from gateway.messages import Body, Credential, Headers, Request, Resource, Response, Target, replace_model
from gateway.settings import Timeouts

__all__ = ("Upstream",)

# An answer of known length up to this size is read whole before stages see it: a break then becomes a clean
# 502, and the connection is free again sooner.
_WHOLE = 1024 * 1024
_READ_BUFFER = 64 * 1024
_MAX_INTERIM = 16
_UNSAFE = re.compile(rb"[\r\n\0]")

# Fields that end at this hop (RFC 9110, 7.6.1), that the gateway writes itself, that carry credentials or
# cookies, or that would tell Azure (or a gateway before it) who the client is or where to go instead.
_NOT_UP = frozenset(
    b"""connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer
    transfer-encoding upgrade http2-settings host content-length expect accept-encoding authorization api-key
    x-api-key ocp-apim-subscription-key x-ms-authorization-auxiliary cookie cookie2 forwarded via proxy
    max-forwards range x-real-ip true-client-ip cf-connecting-ip x-client-ip x-original-url x-original-host
    x-rewrite-url x-host x-http-method-override x-method-override x-request-id""".split()
)
_NOT_DOWN = frozenset(
    b"""connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer
    transfer-encoding upgrade set-cookie set-cookie2 strict-transport-security alt-svc""".split()
)


@lru_cache(maxsize=1024)
def _goes_up(name: bytes) -> bool:
    lowered = name.lower()
    return not (lowered in _NOT_UP or lowered.startswith(b"x-forwarded-") or b"_" in lowered)


@lru_cache(maxsize=1024)
def _goes_down(name: bytes) -> bool:
    return name.lower() not in _NOT_DOWN


class _Wire(ResponseHandler):
    """aiohttp's client protocol, with what decides whether its connection may be used again."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.used = False
        self.idle = False
        self.received = 0
        self._head_size = -1
        self._last = b""

    def begin(self, first_byte: float) -> None:
        """Get ready for one answer."""
        self.idle = False
        self.received = 0
        self._head_size = -1
        self._last = b""
        self.set_response_params(
            read_until_eof=True,
            auto_decompress=False,
            read_timeout=first_byte,
            read_bufsize=_READ_BUFFER,
            max_line_size=16_384,
            max_field_size=16_384,
            max_headers=256,
        )
        self.start_timeout()

    def data_received(self, data: bytes) -> None:
        if self.idle:
            # Nobody asked for these bytes, and the next caller must not get them.
            self.abort()
            return
        if data:
            if not self.received:
                self._head_size = data.find(b"\r\n\r\n") + 4
            self.received += len(data)
            self._last = data
        super().data_received(data)

    def ended_cleanly(self, message: RawResponseMessage, payload: StreamReader) -> bool:
        """Whether the bytes received are one answer and nothing else, as far as can be proved."""
        if self.should_close or message.should_close or not payload.is_eof():
            return False
        if message.chunked:
            return self._last.endswith(b"\r\n\r\n")
        return self.received == self._head_size + payload.total_bytes

    def resume_reading(self, resume_parser: bool = True) -> None:
        # aiohttp calls this after every read; there is nothing to do unless reading was paused.
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def connection_lost(self, exc: BaseException | None) -> None:
        payload = self._payload
        if exc is not None and payload is not None and not payload.is_eof():
            # A body that lasts until the connection closes must not look whole after a reset.
            payload.set_exception(aiohttp.ClientPayloadError("connection reset"))
        super().connection_lost(exc)
        if payload is not None and not payload.is_eof() and payload.exception() is None:
            # The parser gave up on what came (and closed the connection): whoever reads must not wait for more.
            payload.set_exception(aiohttp.ClientPayloadError("not a whole answer"))

    async def drain(self, patience: float) -> None:
        """Wait until what was written has left, as flow control asks; TimeoutError after `patience` seconds."""
        if self._paused:
            async with asyncio.timeout(patience):
                await self._drain_helper()


class _Destination:
    """What aiohttp's connector asks of a request, for one resource."""

    proxy = None
    server_hostname = None

    def __init__(self, resource: Resource, context: ssl.SSLContext) -> None:
        self.url = URL(resource.endpoint)
        self.host = self.url.raw_host or ""
        self.port = self.url.port
        self.ssl = context
        self.connection_key = ConnectionKey(self.host, self.port, self.is_ssl(), context, None, None, None)
        self.base = self.url.raw_path.rstrip("/")
        default = 443 if self.is_ssl() else 80
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.host_header = (host if self.port == default else f"{host}:{self.port}").encode()

    def is_ssl(self) -> bool:
        return self.url.scheme == "https"


class _Exchange:
    """One connection while it is in use; the request's exchange owns it."""

    __slots__ = ("connection", "upload", "wire")

    def __init__(self, connection: aiohttp.connector.Connection) -> None:
        self.connection = connection
        self.wire = cast(_Wire, connection.protocol)
        self.upload: asyncio.Task[None] | None = None

    def hand_back(self, message: RawResponseMessage, payload: StreamReader) -> None:
        """Return the connection to the pool if the answer ended cleanly on it, else close it."""
        upload = self.upload
        if (upload is None or upload.done()) and self.wire.ended_cleanly(message, payload):
            self.wire.used = self.wire.idle = True
            self.connection.release()
        else:
            self.abort()

    def abort(self) -> None:
        """Close at once, without waiting for what is still to be written."""
        if self.upload is not None:
            self.upload.cancel()
        if self.connection.protocol is not None:
            self.wire.abort()
            self.connection.close()


class _Answer:
    """The body of an answer, as it comes; read by the server after the chain has returned."""

    def __init__(self, exchange: _Exchange, message: RawResponseMessage, payload: StreamReader, idle: float) -> None:
        self._exchange = exchange
        self._message = message
        self._payload = payload
        self._idle = idle

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await self._payload.readany()
        except Exception as exc:
            self._exchange.abort()
            raise _broken(exc, f"sent nothing for {self._idle:g} s") from None
        if chunk:
            return chunk
        self._exchange.hand_back(self._message, self._payload)
        raise StopAsyncIteration


class Upstream:
    """The pool of connections to every resource. Call it with a request: it is the end of the pipeline."""

    def __init__(self, timeouts: Timeouts, context: ssl.SSLContext | None = None) -> None:
        self._timeouts = timeouts
        self._context = context or ssl.create_default_context()
        self._connect_timeout = aiohttp.ClientTimeout(total=None, connect=timeouts.connect)
        self._destinations: dict[str, _Destination] = {}
        self._connector: aiohttp.TCPConnector | None = None

    async def start(self) -> None:
        """Make the pool, on the running loop."""
        self._connector = aiohttp.TCPConnector(
            limit=0, ttl_dns_cache=60, keepalive_timeout=55, resolver=aiohttp.ThreadedResolver()
        )
        # The only way to give aiohttp a protocol of our own.
        factory = functools.partial(_Wire, asyncio.get_running_loop())
        self._connector._factory = cast(functools.partial[ResponseHandler], factory)

    async def close(self) -> None:
        """Close every connection."""
        if self._connector is not None:
            await self._connector.close()
            self._connector = None

    async def __call__(self, request: Request) -> Response:
        """Send the request to its target and return Azure's answer, its body unread unless it is small.

        Raises UpstreamError (502) and UpstreamTimeout (504); ApiError where the request cannot be sent.
        """
        operation = BY_NAME.get(request.operation or "")
        if operation is None:
            raise unknown_operation(request.method, request.path)
        if operation.local:
            raise ApiError(404, f"no stage of this pipeline answers {operation.name}; list model_map in it")
        target = request.target
        resource, credential = _complete(target)
        path = upstream_path(operation, target, request.query)
        request._exchange.target = target
        request._exchange.release()
        body: bytes | Body = request._body
        if target.api_version == "v1":
            body = await request.body()
            if await request.model() != target.deployment:
                body = replace_model(body, target.deployment or "")
        elif request._json_set or request._body.buffered:
            body = await request.body()
        destination = self._destinations.get(resource.endpoint)
        if destination is None:
            destination = self._destinations[resource.endpoint] = _Destination(resource, self._context)
        head = _head(request, destination, path, credential, body)
        while True:
            exchange = await self._connect(destination, resource)
            request._exchange.own(exchange)
            try:
                message, payload = await self._ask(exchange, head, body)
            except (
                aiohttp.ClientError,
                ConnectionError,
                HttpProcessingError,
                TimeoutError,
                GatewayError,
            ) as exc:
                stale = exchange.wire.used and not exchange.wire.received
                exchange.abort()
                if isinstance(exc, GatewayError):
                    raise
                if (
                    stale
                    and isinstance(body, bytes)
                    and isinstance(exc, (ConnectionError, aiohttp.ClientOSError, aiohttp.ServerDisconnectedError))
                    and not isinstance(exc, TimeoutError)
                ):
                    continue
                raise _broken(exc, f"did not begin to answer within {self._timeouts.first_byte:g} s") from None
            return await self._answer(exchange, message, payload)

    async def _connect(self, destination: _Destination, resource: Resource) -> _Exchange:
        assert self._connector is not None, "Upstream.start() was not awaited"  # noqa: S101 -- a bug of ours
        try:
            connection = await self._connector.connect(cast(ClientRequest, destination), [], self._connect_timeout)
        except TimeoutError:
            raise UpstreamTimeout(
                f"could not connect to the Azure resource {resource.name!r} within {self._timeouts.connect:g} s"
            ) from None
        except aiohttp.ClientConnectorCertificateError:
            raise UpstreamError(f"the certificate of the Azure resource {resource.name!r} is not valid") from None
        except aiohttp.ClientConnectorDNSError:
            raise UpstreamError(f"the host name of the Azure resource {resource.name!r} was not found") from None
        except aiohttp.ClientConnectorSSLError:
            raise UpstreamError(f"TLS with the Azure resource {resource.name!r} failed") from None
        except (aiohttp.ClientError, OSError):
            raise UpstreamError(f"could not connect to the Azure resource {resource.name!r}") from None
        return _Exchange(connection)

    async def _ask(
        self, exchange: _Exchange, head: bytes, body: bytes | Body
    ) -> tuple[RawResponseMessage, StreamReader]:
        wire = exchange.wire
        transport = wire.transport
        if transport is None:
            raise aiohttp.ServerDisconnectedError
        wire.begin(self._timeouts.first_byte)
        if isinstance(body, bytes):
            transport.write(head + body if len(body) < _READ_BUFFER else head)
            if len(body) >= _READ_BUFFER:
                transport.write(body)
            message, payload = await _final(wire)
        else:
            transport.write(head)
            message, payload = await self._upload(exchange, body)
        wire.read_timeout = self._timeouts.idle
        if not payload.is_eof():
            # The timer that runs is still the one for the first byte.
            wire.start_timeout()
        if not 200 <= message.code <= 599:
            raise UpstreamError(f"Azure answered with the status {message.code}, which is none")
        return message, payload

    async def _upload(self, exchange: _Exchange, body: Body) -> tuple[RawResponseMessage, StreamReader]:
        """Stream the body up while waiting for the answer, whichever comes first."""
        exchange.upload = asyncio.create_task(_send(exchange.wire, body, self._timeouts.idle))
        answer = asyncio.create_task(_final(exchange.wire))
        try:
            await asyncio.wait((exchange.upload, answer), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and (failed := exchange.upload.exception()) is not None:
                raise failed
            return await answer
        finally:
            answer.cancel()
            if not exchange.upload.done():
                # It answered before the upload was over: the rest is not wanted.
                exchange.upload.cancel()

    async def _answer(self, exchange: _Exchange, message: RawResponseMessage, payload: StreamReader) -> Response:
        headers = Headers()
        length: int | None = None
        named = _connection_named(message.raw_headers)
        for name, value in message.raw_headers:
            if not _goes_down(name) or (named and name.lower() in named):
                continue
            if _UNSAFE.search(value):
                exchange.abort()
                raise UpstreamError("Azure answered with a header that has a line break in it")
            if name.lower() == b"content-length":
                if message.chunked:
                    continue
                length = int(value) if value.isdigit() else None
            headers.raw.append((name, value))
        answer: AsyncIterator[bytes] = _Answer(exchange, message, payload, self._timeouts.idle)
        if (length is not None and length <= _WHOLE) or message.code in (204, 304):
            return Response(message.code, b"".join([chunk async for chunk in answer]), headers)
        return Response(message.code, answer, headers)


def _complete(target: Target) -> tuple[Resource, Credential]:
    """Return a target's resource and credential; `gateway check` makes sure that stages fill them in."""
    credential = target.credential or (target.resource.credential if target.resource else None)
    if target.resource is None or target.api_version is None or credential is None:
        missing = [
            name
            for name, value in (
                ("resource", target.resource),
                ("api_version", target.api_version),
                ("credential", credential),
            )
            if value is None
        ]
        raise GatewayError(f"no stage filled in the target's {', '.join(missing)}")
    return target.resource, credential


def _head(request: Request, destination: _Destination, path: str, credential: Credential, body: bytes | Body) -> bytes:
    raw = request.headers.raw
    named = _connection_named(raw)
    lines = [
        b"%b %b%b HTTP/1.1\r\nhost: %b"
        % (request.method.encode(), destination.base.encode(), path.encode("ascii"), destination.host_header)
    ]
    lines += [b"%b: %b" % pair for pair in raw if _goes_up(pair[0]) and not (named and pair[0].lower() in named)]
    # Filters read text, and Azure compresses nothing by itself: ask for it plain.
    lines.append(b"accept-encoding: identity\r\nx-request-id: " + request.id.encode())
    if credential.bearer:
        lines.append(b"authorization: Bearer " + credential.value.encode())
    else:
        lines.append(b"api-key: " + credential.value.encode())
    length = len(body) if isinstance(body, bytes) else body.length
    lines.append(b"transfer-encoding: chunked" if length is None else b"content-length: %d" % length)
    lines.append(b"\r\n")
    return b"\r\n".join(lines)


def _connection_named(raw: Any) -> frozenset[bytes]:
    """Return the fields that `Connection` names as ending at this hop."""
    for name, value in raw:
        if len(name) == 10 and name.lower() == b"connection":
            return frozenset(token.strip().lower() for token in value.split(b",")) - {b"close", b"keep-alive"}
    return frozenset()


async def _final(wire: _Wire) -> tuple[RawResponseMessage, StreamReader]:
    """Wait for the head of the final answer."""
    for _ in range(_MAX_INTERIM):
        message, payload = await wire.read()
        if message.code >= 200 or message.code == 101 or message.code < 100:
            return message, payload
    raise UpstreamError("Azure sent interim answers without end")


async def _send(wire: _Wire, body: Body, patience: float) -> None:
    chunked = body.length is None
    async for chunk in body.stream():
        if wire.transport is None:
            return
        wire.transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunked else chunk)
        await wire.drain(patience)
    if chunked and wire.transport is not None:
        wire.transport.write(b"0\r\n\r\n")


def _broken(exc: BaseException, too_slow: str) -> UpstreamError:
    """Say what went wrong, in our words: the parser's may hold bytes of the answer."""
    if isinstance(exc, TimeoutError):
        return UpstreamTimeout(f"Azure {too_slow}")
    if isinstance(exc, HttpProcessingError):
        return UpstreamError("what Azure answered is not valid HTTP")
    if isinstance(exc, aiohttp.ClientPayloadError):
        return UpstreamError("Azure's answer broke off before its end")
    return UpstreamError("Azure closed the connection before it had answered")
