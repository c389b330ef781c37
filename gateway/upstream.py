"""The end of every pipeline: sends the request to Azure and returns its response.

The head is written as bytes, most lines unchanged from the client; unread bodies stream through. Interim responses
(1xx) are skipped, an unexpected 101 is an error, and so is a redirect, which is never followed. If Azure has closed an
idle connection and no byte of a response has arrived, the request is sent again on a new one. A response that begins
during the upload stops the upload.
"""

from __future__ import annotations

import asyncio
import math
import os
import ssl
import time
from collections.abc import AsyncIterator, Iterable
from functools import lru_cache
from typing import cast

from gateway.auth.credentials import Credential
from gateway.auth.entra_tokens import TokenUnavailable
from gateway.azure.deployment_field import query_with_deployment, with_deployment
from gateway.azure.idempotency import seems_idempotent
from gateway.azure.key_redaction import MASK, redact_chunks, redact_headers
from gateway.azure.message_models import MessageModels
from gateway.azure.operations import BY_NAME, unknown_operation
from gateway.azure.resources import Resource, Target
from gateway.azure.urls import upstream_path
from gateway.body.request_body import Body
from gateway.errors import ApiError, GatewayError, UpstreamError, UpstreamTimeout
from gateway.exchange import Exchange
from gateway.protocol.header_policy import TO_CLIENT
from gateway.protocol.headers import Headers
from gateway.request import Request
from gateway.response import Response
from gateway.settings import Timeouts
from gateway.transport.connection_pool import ConnectionPool, Destination
from gateway.transport.upstream_connection import UpstreamConnection
from gateway.transport.upstream_response import UpstreamResponse
from gateway.transport.websocket_handshake import (
    WebSocket,
    check_accepted,
    check_handshake,
    handshake_lines,
    new_key,
    offered_protocols,
)
from gateway.usage.include_usage import STREAMED, HideUsage, request_stream_usage
from gateway.usage.metered_operations import METERED, PROMPTED
from gateway.usage.usage_scanner import UsageScanner

__all__ = ("Upstream",)

# The maximum size, in bytes, of an unread body that is read to request the usage of its stream. A larger body streams
# through if the path names the deployment, and its usage is computed from the response.
_MAX_USAGE_REQUEST = 1024 * 1024
# Response timeout during an upload, in seconds; the timeouts of the client end a stalled upload sooner.
_UPLOAD_TIMEOUT = 24 * 3600.0
# The last dated api-version that is not a preview.
_LAST_STABLE = "2024-10-21"


class Upstream:
    """Sends requests to Azure. Call it with a request: it is the end of the pipeline."""

    def __init__(self, timeouts: Timeouts, context: ssl.SSLContext | None = None) -> None:
        self._timeouts = timeouts
        self._connections = ConnectionPool(context)

    def use(self, timeouts: Timeouts) -> None:
        """Use other timeouts from the next request on; connections stay open."""
        self._timeouts = timeouts

    def keep(self, resources: Iterable[Resource]) -> None:
        """Drop the connections to all resources but these."""
        self._connections.keep(resources)

    async def start(self) -> None:
        """Prepare to connect, on the running loop."""
        await self._connections.start()

    async def close(self) -> None:
        """Close every connection."""
        await self._connections.close()

    async def __call__(self, request: Request) -> Response:
        """Send the request to its target and return Azure's response; its body is unread unless it is small.

        Raises UpstreamError (502), UpstreamTimeout (504), and ApiError if the request cannot be sent.
        """
        operation = BY_NAME.get(request.operation or "")
        if operation is None or not operation.on_azure:
            raise unknown_operation(request.method, request.path)
        if operation.local:
            raise ApiError(404, f"no stage of this pipeline handles {operation.name}; the operator can add model_map")
        target = request.target
        if target.resource is None and operation.classic != "deployment":
            raise ApiError(
                400,
                f"{operation.name} needs one Azure resource, and this team has several but no default; the operator "
                "can set its `resource:`",
                code="no_resource",
            )
        if target.api_version is None and target.resource is not None:
            target = target.replace(api_version=target.resource.api_version)
        resource, credential = _resource_and_credential(target)
        query = request.query and query_with_deployment(operation, request.query, target)
        path = upstream_path(operation, target, request.path, query)
        exchange = request._exchange
        exchange.target = target
        exchange.close_upstream()
        if credential is None:
            credential = await _token(resource)
        if operation.method == "WS":
            return await self._open(request, resource, path, credential)
        if request._json_replaced or operation.drops_model or operation.classic != "deployment" or target.is_v1:
            body: bytes | Body = await with_deployment(request, operation, target)
        else:  # nearly every request: the path names the deployment, and the body passes unparsed
            body = request._body.unmodified()
        reader, hides_usage = None, False
        if exchange.meter is not None and operation.name in METERED:
            if (
                not isinstance(body, bytes)
                and operation.name in PROMPTED
                and 0 < (body.length or 0) <= _MAX_USAGE_REQUEST
            ):
                body = await body.read()
            kept = body if isinstance(body, bytes) else None
            if kept is not None and operation.name in STREAMED:
                with_usage = request_stream_usage(kept, target.api_version or "")
                if with_usage is not None:
                    body, hides_usage = with_usage, True
            reader = exchange.meter.watch(operation.name, kept, request._model)
        destination = self._connections.destination(resource)
        length = len(body) if isinstance(body, bytes) else body.length
        head = _head(
            request,
            destination,
            path,
            credential,
            b"transfer-encoding: chunked" if length is None else b"content-length: %d" % length,
        )
        azure_response = await self._ask(request, resource, destination, head, body, reader)
        if azure_response.status < 300:
            response = Response(
                azure_response.status,
                azure_response if azure_response.whole is None else azure_response.whole,
                _client_headers(azure_response),
            )
        else:
            response = _checked_response(azure_response, resource, credential if target.credential is None else None)
        if azure_response.whole is None:
            response._exchange = exchange
            exchange.request = exchange.request or request
        if target.credential is None:
            response._gateway_credential = credential
        if hides_usage and response.is_event_stream:
            response.pipe(HideUsage())
        return response

    async def models(self, resource: Resource, seconds: float, credential: Credential | None = None) -> Response:
        """List the models of a resource within `seconds`, and return its complete response.

        A probe without tokens: it shows whether the resource is reachable and accepts the credential, which is the
        resource's own unless one is given. Raises UpstreamError, and ApiError if there is no credential.
        """
        version = resource.api_version or _LAST_STABLE
        target = Target(resource, api_version=version, credential=credential)
        if credential is None and not resource.has_credential:
            raise ApiError(401, f"the resource {resource.name!r} has no credential of its own", code="no_credential")
        exchange = Exchange()
        request = Request(
            id=f"probe-{os.urandom(8).hex()}",
            operation=None,
            method="GET",
            path="/models",
            headers=Headers(),
            body=Body(b""),
            team="",
            target=target,
            exchange=exchange,
        )
        request.first_byte_deadline = time.monotonic() + seconds
        path = "/openai/v1/models" if target.is_v1 else f"/openai/models?api-version={version}"
        try:
            async with asyncio.timeout(seconds):
                _, sent = _resource_and_credential(target)
                sent = sent or await _token(resource)
                destination = self._connections.destination(resource)
                head = _head(request, destination, path, sent, b"content-length: 0")
                azure_response = await self._ask(request, resource, destination, head, b"", None)
                response = _checked_response(azure_response, resource, sent if credential is None else None)
                await response.read()
                return response
        except TimeoutError:
            raise UpstreamTimeout(
                f"the Azure resource {resource.name!r} did not respond within {seconds:g} s"
            ) from None
        finally:
            exchange.finish()

    async def _open(self, request: Request, resource: Resource, path: str, credential: Credential) -> Response:
        """Open a WebSocket and return it as the body of a 101, or Azure's response if it refuses."""
        check_handshake(request.headers)
        exchange, key = request._exchange, new_key()
        destination = self._connections.destination(resource)
        head = _head(request, destination, path, credential, handshake_lines(key, offered_protocols(request.headers)))
        azure_response = await self._ask(request, resource, destination, head, b"", None, upgrade=True)
        if azure_response.status != 101:
            return _checked_response(
                azure_response, resource, credential if request.target.credential is None else None
            )
        websocket = WebSocket(cast(UpstreamConnection, azure_response.switched()))
        exchange.own_upstream(websocket)
        exchange.request = exchange.request or request
        websocket.protocol = check_accepted(azure_response.fields, key)
        if exchange.meter is not None and request.operation in METERED:
            websocket.watch = exchange.meter.watch(request.operation, None, request._model).feed
        if (find := request._find_target) is not None:
            websocket.up.append(MessageModels(request, find))
        return Response(101, websocket, _client_headers(azure_response))

    async def _ask(
        self,
        request: Request,
        resource: Resource,
        destination: Destination,
        head: bytes,
        body: bytes | Body,
        reader: UsageScanner | None,
        *,
        upgrade: bool = False,
    ) -> UpstreamResponse:
        """Send a request on an idle or a new connection and wait for the response's head. Raises UpstreamError.

        If an idle connection turns out to be closed before a byte of the response arrives, an idempotent request is
        sent again on a new connection, once. Others are not: Azure may have read the request.
        """
        timeouts = self._timeouts
        connect, first_byte, idle = timeouts.connect, timeouts.first_byte, timeouts.idle
        if (own := resource.timeouts) is not None:
            connect, first_byte, idle = own.connect or connect, own.first_byte or first_byte, own.idle or idle
        exchange = request._exchange
        retried = False

        def idempotent() -> bool:
            return isinstance(body, bytes) and seems_idempotent(request, body)

        while True:
            connection = None if retried else self._connections.take_idle(destination, idempotent)
            if connection is None:
                if (until := request.first_byte_deadline) is not None:
                    connect = min(connect, max(0.001, until - time.monotonic()))
                connection = await self._connections.connect(destination, connect)
            if (until := request.first_byte_deadline) is not None and (left := until - time.monotonic()) < first_byte:
                first_byte = max(0.001, left)
            # During an upload the client sets the pace.
            azure_response = connection.ask(first_byte if isinstance(body, bytes) else _UPLOAD_TIMEOUT, idle)
            azure_response.upgrade = upgrade
            if reader is not None:
                azure_response.watch, reader.sent = reader.feed, True
            exchange.own_upstream(azure_response)
            try:
                if isinstance(body, bytes):
                    connection.send(head, body)
                    await azure_response.begun()
                else:
                    await self._upload(connection, azure_response, head, body, first_byte, idle)
            except UpstreamError as exc:
                azure_response.abort()
                if connection.used and connection.lost and not connection.received:
                    exc.fault = "stale"
                    if not retried and isinstance(body, bytes) and await request.is_idempotent():
                        retried = True
                        continue
                raise
            if reader is not None:
                reader.status = azure_response.status
            return azure_response

    async def _upload(
        self,
        connection: UpstreamConnection,
        azure_response: UpstreamResponse,
        head: bytes,
        body: Body,
        first_byte: float,
        idle: float,
    ) -> None:
        """Upload the body and wait for the response, which must begin within `first_byte` seconds after the upload."""
        azure_response.upload = upload = asyncio.create_task(connection.send_stream(head, body, idle))
        begun = asyncio.create_task(azure_response.begun())
        try:
            await asyncio.wait((upload, begun), return_when=asyncio.FIRST_COMPLETED)
            if not begun.done() and (error := upload.exception()) is not None:
                azure_response.abort()
                raise error
            if not begun.done():
                connection.expect(first_byte)
            await begun
        finally:
            begun.cancel()
            if not upload.done():
                # Azure responded during the upload: it does not want the rest.
                upload.cancel()
            elif not upload.cancelled() and isinstance(error := upload.exception(), ApiError):
                error.with_traceback(None)  # its frames refer to the body, which refers to it: a cycle


def _checked_response(azure_response: UpstreamResponse, resource: Resource, stored: Credential | None) -> Response:
    """Return Azure's response as stages see it, with the gateway's key redacted if it is an error.

    `stored` is the credential that was sent, if it is the gateway's own. Raises UpstreamError for a redirect.
    """
    if 300 <= azure_response.status < 400 and azure_response.status != 304:  # a 304 has no location
        azure_response.abort()
        raise UpstreamError(
            f"the Azure resource {resource.name!r} responded with a redirect (status {azure_response.status}). The "
            "gateway does not follow it, because that would forward the credential. Its operator should check the "
            "resource's `endpoint`",
            code="upstream_redirect",
            fault="redirect",
        )
    body: bytes | AsyncIterator[bytes] = azure_response if azure_response.whole is None else azure_response.whole
    headers = _client_headers(azure_response)
    if azure_response.status >= 400 and stored is not None:
        secret = stored.value.encode()
        redact_headers(headers, secret)
        if isinstance(body, bytes):
            body = body.replace(secret, MASK)
        else:
            headers.remove("content-length")
            body = redact_chunks(body, secret)
    return Response(azure_response.status, body, headers)


def _client_headers(azure_response: UpstreamResponse) -> Headers:
    headers = Headers.of([each for each in azure_response.fields if each[3] & TO_CLIENT])
    if azure_response.inflated:
        headers.remove("content-encoding")
        headers.remove("content-length")
    return headers


def _resource_and_credential(target: Target) -> tuple[Resource, Credential | None]:
    """Return a target's resource and credential; `gateway check` makes sure that stages set them.

    The credential is None if it is a token of the resource that must be fetched first.
    """
    resource = target.resource
    credential = target.credential or (resource.credential if resource else None)
    if credential is None and resource is not None and resource.tokens is not None and target.api_version is not None:
        return resource, resource.tokens.current()
    if resource is None or target.api_version is None or credential is None:
        missing = [
            name
            for name, value in (
                ("resource", resource),
                ("api_version", target.api_version),
                ("credential", credential),
            )
            if value is None
        ]
        raise GatewayError(f"no stage set the target's {', '.join(missing)}")
    return resource, credential


async def _token(resource: Resource) -> Credential:
    """Wait for a token of the resource's identity. Raises UpstreamError with `unsent` set."""
    assert resource.tokens is not None, "the resource has no identity"  # noqa: S101 -- a bug of ours
    try:
        return await resource.tokens.credential()
    except TokenUnavailable as exc:
        error = UpstreamError(
            f"the gateway has no token for the Azure resource {resource.name!r}; retry shortly. Its log has the reason",
            status=503,
            fault="credential",
        )
        error.unsent = True
        error.headers["retry-after"] = str(math.ceil(exc.retry_after))
        raise error from None


def _head(request: Request, destination: Destination, path: str, credential: Credential, framing: bytes) -> bytes:
    # Filters read plain text: ask for no compression.
    return b"%b\r\n%b\r\naccept-encoding: identity\r\nx-request-id: %b\r\n%b%b\r\n%b\r\n\r\n" % (
        _request_line(request.method, destination.base, path, destination.host_header),
        request.headers.lines_to_azure() or b"accept: */*",
        request.id.encode(),
        b"authorization: Bearer " if credential.bearer else b"api-key: ",
        credential.value.encode(),
        framing,
    )


def _request_line(method: str, base: bytes, path: str, host: bytes) -> bytes:
    # Cache short paths only, so that clients cannot fill the memory with made-up ones.
    return (_cached_line if len(path) <= 128 else _line)(method, base, path, host)


def _line(method: str, base: bytes, path: str, host: bytes) -> bytes:
    return b"%b %b%b HTTP/1.1\r\nhost: %b" % (method.encode(), base, path.encode("ascii"), host)


_cached_line = lru_cache(maxsize=1024)(_line)
