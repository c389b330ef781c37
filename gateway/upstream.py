"""One exchange with Azure: the end of every pipeline.

aiohttp gives the pool, DNS, TLS and the response parser; the head is written as bytes and the body read from
the parser's stream, because `ClientSession` costs several times what a request is worth. What that goes
round is redone here, and in `wire.py`:

* interim answers (1xx) are skipped; an unasked 101 is an error; redirects are passed on, never followed;
* a pooled connection is reused only if the answer before it ended exactly where its bytes ended, and is
  closed on any byte that arrives while it is idle: such bytes would be the next caller's answer;
* a reused connection that Azure had already closed is replaced, if not one byte of an answer came;
* an answer that comes while the upload still runs stops the upload.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
from collections.abc import AsyncIterator
from functools import lru_cache
from typing import Any, Self, cast

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import RawResponseMessage
from aiohttp.streams import StreamReader

from gateway.azure import BY_NAME, unknown_operation, upstream_path
from gateway.body import Body
from gateway.errors import ApiError, GatewayError, UpstreamError, UpstreamTimeout
from gateway.headers import UNSAFE, Headers
from gateway.keys import Credential
from gateway.messages import Request, Resource, Response, Target, replace_model
from gateway.settings import Timeouts
from gateway.wire import READ_BUFFER, Destination, Lease, Wire, final_answer, send_body

__all__ = ("Upstream",)

# An answer of known length up to this size is read whole before stages see it: a break then becomes a clean
# 502, and the connection is free again sooner.
_WHOLE = 1024 * 1024

# Fields that end at this hop (RFC 9110, 7.6.1), that the gateway writes itself, that carry credentials or
# cookies, or that would tell Azure (or a gateway before it) who the client is or where to go instead.
_NOT_UP = frozenset(
    b"""connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer
    transfer-encoding upgrade http2-settings host content-length expect accept-encoding authorization api-key
    x-api-key ocp-apim-subscription-key x-ms-authorization-auxiliary cookie cookie2 forwarded via proxy
    max-forwards range x-real-ip true-client-ip cf-connecting-ip x-client-ip x-original-url x-original-host
    x-rewrite-url x-host x-http-method x-http-method-override x-method-override x-ms-client-principal
    x-ms-client-principal-id x-ms-client-principal-name api-version x-request-id""".split()
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


class _Answer:
    """The body of an answer, as it comes; read by the server after the chain has returned."""

    def __init__(self, lease: Lease, message: RawResponseMessage, payload: StreamReader, idle: float) -> None:
        self._lease = lease
        self._message = message
        self._payload = payload
        self._idle = idle

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await self._payload.readany()
        except Exception as exc:
            self._lease.abort()
            raise _broken(exc, f"sent nothing for {self._idle:g} s") from None
        if chunk:
            return chunk
        self._lease.hand_back(self._message, self._payload)
        raise StopAsyncIteration


class Upstream:
    """The pool of connections to every resource. Call it with a request: it is the end of the pipeline."""

    def __init__(self, timeouts: Timeouts, context: ssl.SSLContext | None = None) -> None:
        self._timeouts = timeouts
        self._context = context or ssl.create_default_context()
        self._connect_timeout = aiohttp.ClientTimeout(total=None, connect=timeouts.connect)
        self._destinations: dict[str, Destination] = {}
        self._connector: aiohttp.TCPConnector | None = None

    async def start(self) -> None:
        """Make the pool, on the running loop."""
        self._connector = aiohttp.TCPConnector(
            limit=0, ttl_dns_cache=60, keepalive_timeout=55, resolver=aiohttp.ThreadedResolver()
        )
        # The only way to give aiohttp a protocol of our own.
        factory = functools.partial(Wire, asyncio.get_running_loop())
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
            destination = self._destinations[resource.endpoint] = Destination(resource, self._context)
        head = _head(request, destination, path, credential, body)
        while True:
            lease = await self._connect(destination, resource)
            request._exchange.own(lease)
            try:
                message, payload = await self._ask(lease, head, body)
            except (
                aiohttp.ClientError,
                ConnectionError,
                HttpProcessingError,
                TimeoutError,
                GatewayError,
            ) as exc:
                stale = lease.wire.used and not lease.wire.received
                lease.abort()
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
            return await self._answer(lease, message, payload)

    async def _connect(self, destination: Destination, resource: Resource) -> Lease:
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
        return Lease(connection)

    async def _ask(self, lease: Lease, head: bytes, body: bytes | Body) -> tuple[RawResponseMessage, StreamReader]:
        wire = lease.wire
        transport = wire.transport
        if transport is None:
            raise aiohttp.ServerDisconnectedError
        wire.begin(self._timeouts.first_byte)
        if isinstance(body, bytes):
            transport.write(head + body if len(body) < READ_BUFFER else head)
            if len(body) >= READ_BUFFER:
                transport.write(body)
            message, payload = await final_answer(wire)
        else:
            transport.write(head)
            message, payload = await self._upload(lease, body)
        wire.read_timeout = self._timeouts.idle
        if not payload.is_eof():
            # The timer that runs is still the one for the first byte.
            wire.start_timeout()
        if not 200 <= message.code <= 599:
            raise UpstreamError(f"Azure answered with the status {message.code}, which is none")
        return message, payload

    async def _upload(self, lease: Lease, body: Body) -> tuple[RawResponseMessage, StreamReader]:
        """Stream the body up while waiting for the answer, whichever comes first."""
        lease.upload = asyncio.create_task(send_body(lease.wire, body, self._timeouts.idle))
        answer = asyncio.create_task(final_answer(lease.wire))
        try:
            await asyncio.wait((lease.upload, answer), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and (failed := lease.upload.exception()) is not None:
                raise failed
            return await answer
        finally:
            answer.cancel()
            if not lease.upload.done():
                # It answered before the upload was over: the rest is not wanted.
                lease.upload.cancel()

    async def _answer(self, lease: Lease, message: RawResponseMessage, payload: StreamReader) -> Response:
        if message.chunked and (message.headers.get("transfer-encoding") or "").strip().lower() != "chunked":
            lease.abort()
            raise UpstreamError("Azure answered with a transfer coding other than chunked")
        headers = Headers()
        length: int | None = None
        named = _connection_named(message.raw_headers)
        for name, value in message.raw_headers:
            if not _goes_down(name) or (named and name.lower() in named):
                continue
            if UNSAFE.search(value):
                lease.abort()
                raise UpstreamError("Azure answered with a header that has a line break in it")
            if name.lower() == b"content-length":
                if message.chunked:
                    continue
                length = int(value) if value.isdigit() else None
            headers.raw.append((name, value))
        answer: AsyncIterator[bytes] = _Answer(lease, message, payload, self._timeouts.idle)
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


def _head(request: Request, destination: Destination, path: str, credential: Credential, body: bytes | Body) -> bytes:
    raw = request.headers.raw
    named = _connection_named(raw)
    lines = [
        b"%b %b%b HTTP/1.1\r\nhost: %b"
        % (request.method.encode(), destination.base, path.encode("ascii"), destination.host_header)
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
    named: frozenset[bytes] = frozenset()
    for name, value in raw:
        if len(name) == 10 and name.lower() == b"connection":
            named |= frozenset(token.strip().lower() for token in value.split(b","))
    return named - {b"close", b"keep-alive"} if named else named


def _broken(exc: BaseException, too_slow: str) -> UpstreamError:
    """Say what went wrong, in our words: the parser's may hold bytes of the answer."""
    if isinstance(exc, TimeoutError):
        return UpstreamTimeout(f"Azure {too_slow}")
    if isinstance(exc, HttpProcessingError):
        return UpstreamError("what Azure answered is not valid HTTP")
    if isinstance(exc, aiohttp.ClientPayloadError):
        return UpstreamError("Azure's answer broke off before its end")
    return UpstreamError("Azure closed the connection before it had answered")
