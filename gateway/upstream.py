"""One exchange with Azure: the end of every pipeline.

The head is written as bytes, its lines mostly as they came from the client; bodies that nobody read stream
through. Interim answers (1xx) are skipped, an unasked 101 is an error, and so is a redirect, which is never
followed. A kept connection that Azure had already closed is replaced, if not one byte of an answer came. An
answer that comes while the upload still runs stops the upload.
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
from gateway.azure.idempotency import seems_idempotent
from gateway.azure.key_redaction import MASK, redact_headers, redact_pieces
from gateway.azure.model_field import FrameModels, placed_query, with_deployment
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
from gateway.usage.usage_reader import UsageReader

__all__ = ("Upstream",)

# How large a body, in bytes, may be that nobody has read, for its stream to be asked for its usage. A larger one, of
# which the path names the deployment, streams through, and what it uses is made out from the answer.
_ASKED_FOR = 1024 * 1024
# How long, in seconds, Azure may be silent while a body is on its way: the client's own time-outs end that sooner.
_UPLOAD = 24 * 3600.0
# The last dated api-version that is no preview.
_LAST_DATED = "2024-10-21"


class Upstream:
    """Asks Azure. Call it with a request: it is the end of the pipeline."""

    def __init__(self, timeouts: Timeouts, context: ssl.SSLContext | None = None) -> None:
        self._timeouts = timeouts
        self._connector = ConnectionPool(context)

    def use(self, timeouts: Timeouts) -> None:
        """Have other timeouts from the next request on; the connections stay."""
        self._timeouts = timeouts

    def keep(self, resources: Iterable[Resource]) -> None:
        """Forget the connections to every resource but these."""
        self._connector.keep(resources)

    async def start(self) -> None:
        """Get ready to connect, on the running loop."""
        await self._connector.start()

    async def close(self) -> None:
        """Close every connection."""
        await self._connector.close()

    async def __call__(self, request: Request) -> Response:
        """Send the request to its target and return Azure's answer, its body unread unless it is small.

        Raises UpstreamError (502) and UpstreamTimeout (504); ApiError where the request cannot be sent.
        """
        operation = BY_NAME.get(request.operation or "")
        if operation is None or not operation.on_azure:
            raise unknown_operation(request.method, request.path)
        if operation.local:
            raise ApiError(404, f"no stage of this pipeline answers {operation.name}; list model_map in it")
        target = request.target
        if target.resource is None and operation.classic != "deployment":
            raise ApiError(
                400,
                f"{operation.name} goes to one Azure resource, and this team has several and no default among them; "
                "the operator sets its `resource:`",
                code="no_resource",
            )
        if target.api_version is None and target.resource is not None:
            target = target.replace(api_version=target.resource.api_version)
        resource, credential = _complete(target)
        query = request.query and placed_query(operation, request.query, target)
        path = upstream_path(operation, target, request.path, query)
        exchange = request._exchange
        exchange.target = target
        exchange.release()
        if credential is None:
            credential = await _token(resource)
        if operation.method == "WS":
            return await self._open(request, resource, path, credential)
        if request._json_set or operation.drops_model or operation.classic != "deployment" or target.is_v1:
            body: bytes | Body = await with_deployment(request, operation, target)
        else:  # nearly every request: the path names the deployment, and the body is not looked at
            body = request._body.unmodified()
        watch, hides = None, False
        if exchange.meter is not None and operation.name in METERED:
            if not isinstance(body, bytes) and operation.name in PROMPTED and 0 < (body.length or 0) <= _ASKED_FOR:
                body = await body.read()
            kept = body if isinstance(body, bytes) else None
            if kept is not None and operation.name in STREAMED:
                asking = request_stream_usage(kept, target.api_version or "")
                if asking is not None:
                    body, hides = asking, True
            watch = exchange.meter.watch(operation.name, kept, request._model)
        destination = self._connector.destination(resource)
        length = len(body) if isinstance(body, bytes) else body.length
        head = _head(
            request,
            destination,
            path,
            credential,
            b"transfer-encoding: chunked" if length is None else b"content-length: %d" % length,
        )
        answer = await self._ask(request, resource, destination, head, body, watch)
        if answer.status < 300:
            response = Response(answer.status, answer if answer.whole is None else answer.whole, _down(answer))
        else:
            response = _unusual(answer, resource, credential if target.credential is None else None)
        if answer.whole is None:
            response._exchange = exchange
            exchange.request = exchange.request or request
        if target.credential is None:
            response._shown = credential
        if hides and response.event_stream:
            response.pipe(HideUsage())
        return response

    async def models(self, resource: Resource, seconds: float, credential: Credential | None = None) -> Response:
        """Ask a resource for its models, in so many seconds at most, and return its answer, read whole.

        It costs no tokens, and tells whether the resource can be reached and takes the credential: its own, if none is
        given. Raises UpstreamError, and ApiError where there is no credential.
        """
        version = resource.api_version or _LAST_DATED
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
        request.begin_by = time.monotonic() + seconds
        path = "/openai/v1/models" if target.is_v1 else f"/openai/models?api-version={version}"
        try:
            async with asyncio.timeout(seconds):
                _, shown = _complete(target)
                shown = shown or await _token(resource)
                destination = self._connector.destination(resource)
                head = _head(request, destination, path, shown, b"content-length: 0")
                answer = await self._ask(request, resource, destination, head, b"", None)
                response = _unusual(answer, resource, shown if credential is None else None)
                await response.read()
                return response
        except TimeoutError:
            raise UpstreamTimeout(f"the Azure resource {resource.name!r} took more than {seconds:g} s") from None
        finally:
            exchange.finish()

    async def _open(self, request: Request, resource: Resource, path: str, credential: Credential) -> Response:
        """Open a WebSocket and return it as the body of a 101, or Azure's answer where it says no."""
        check_handshake(request.headers)
        exchange, key = request._exchange, new_key()
        destination = self._connector.destination(resource)
        head = _head(request, destination, path, credential, handshake_lines(key, offered_protocols(request.headers)))
        answer = await self._ask(request, resource, destination, head, b"", None, upgrade=True)
        if answer.status != 101:
            return _unusual(answer, resource, credential if request.target.credential is None else None)
        socket = WebSocket(cast(UpstreamConnection, answer.switched()))
        exchange.own(socket)
        exchange.request = exchange.request or request
        socket.protocol = check_accepted(answer.fields, key)
        if exchange.meter is not None and request.operation in METERED:
            socket.watch = exchange.meter.watch(request.operation, None, request._model).feed
        if (find := request._find) is not None:
            socket.up.append(FrameModels(request, find))
        return Response(101, socket, _down(answer))

    async def _ask(
        self,
        request: Request,
        resource: Resource,
        destination: Destination,
        head: bytes,
        body: bytes | Body,
        watch: UsageReader | None,
        *,
        upgrade: bool = False,
    ) -> UpstreamResponse:
        """Ask on a connection. Raises UpstreamError.

        A kept one that turns out to be closed, before a byte of an answer came, is replaced by a new one, once. Azure
        may have read the request all the same, so that is only done where it would do no harm twice.
        """
        timeouts = self._timeouts
        connect, first_byte, idle = timeouts.connect, timeouts.first_byte, timeouts.idle
        if (own := resource.timeouts) is not None:
            connect, first_byte, idle = own.connect or connect, own.first_byte or first_byte, own.idle or idle
        exchange = request._exchange
        again = False

        def repeatable() -> bool:
            return isinstance(body, bytes) and seems_idempotent(request, body)

        while True:
            wire = None if again else self._connector.take_idle(destination, repeatable)
            if wire is None:
                if (until := request.begin_by) is not None:
                    connect = min(connect, max(0.001, until - time.monotonic()))
                wire = await self._connector.connect(destination, connect)
            if (until := request.begin_by) is not None and (left := until - time.monotonic()) < first_byte:
                first_byte = max(0.001, left)
            # (While a body is on its way it is the client that takes its time.)
            answer = wire.ask(first_byte if isinstance(body, bytes) else _UPLOAD, idle)
            answer.upgrade = upgrade
            if watch is not None:
                answer.watch, watch.sent = watch.feed, True
            exchange.own(answer)
            try:
                if isinstance(body, bytes):
                    wire.send(head, body)
                    await answer.begun()
                else:
                    await self._upload(wire, answer, head, body, first_byte, idle)
            except UpstreamError as exc:
                answer.abort()
                if wire.used and wire.lost and not wire.received:
                    exc.fault = "stale"
                    if not again and isinstance(body, bytes) and await request.repeatable():
                        again = True
                        continue
                raise
            if watch is not None:
                watch.status = answer.status
            return answer

    async def _upload(
        self,
        wire: UpstreamConnection,
        answer: UpstreamResponse,
        head: bytes,
        body: Body,
        first_byte: float,
        idle: float,
    ) -> None:
        """Stream the body up while waiting for the answer, whichever comes first; it has `first_byte` s behind that."""
        answer.upload = upload = asyncio.create_task(wire.send_stream(head, body, idle))
        begun = asyncio.create_task(answer.begun())
        try:
            await asyncio.wait((upload, begun), return_when=asyncio.FIRST_COMPLETED)
            if not begun.done() and (failed := upload.exception()) is not None:
                answer.abort()
                raise failed
            if not begun.done():
                wire.expect(first_byte)
            await begun
        finally:
            begun.cancel()
            if not upload.done():
                # It answered before the upload was over: the rest is not wanted.
                upload.cancel()
            elif not upload.cancelled() and isinstance(failed := upload.exception(), ApiError):
                failed.with_traceback(None)  # its frames hold the body, which holds it: a cycle


def _unusual(answer: UpstreamResponse, resource: Resource, stored: Credential | None) -> Response:
    """Return Azure's answer as stages see it, if it may be an error.

    `stored` is the credential that Azure was shown, if it is the gateway's own. Raises UpstreamError for a redirect.
    """
    if 300 <= answer.status < 400 and answer.status != 304:  # that one leads nowhere
        answer.abort()
        raise UpstreamError(
            f"the Azure resource {resource.name!r} answered with a redirect (status {answer.status}), which "
            "the gateway does not follow: that would send the credential along. Its operator should check the "
            "resource's `endpoint`",
            code="upstream_redirect",
            fault="redirect",
        )
    body: bytes | AsyncIterator[bytes] = answer if answer.whole is None else answer.whole
    headers = _down(answer)
    if answer.status >= 400 and stored is not None:
        secret = stored.value.encode()
        redact_headers(headers, secret)
        if isinstance(body, bytes):
            body = body.replace(secret, MASK)
        else:
            headers.remove("content-length")
            body = redact_pieces(body, secret)
    return Response(answer.status, body, headers)


def _down(answer: UpstreamResponse) -> Headers:
    headers = Headers.of([each for each in answer.fields if each[3] & TO_CLIENT])
    if answer.inflated:
        headers.remove("content-encoding")
        headers.remove("content-length")
    return headers


def _complete(target: Target) -> tuple[Resource, Credential | None]:
    """Return a target's resource and credential; `gateway check` makes sure that stages fill them in.

    The credential is None where it is a token of the resource's that is not at hand.
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
        raise GatewayError(f"no stage filled in the target's {', '.join(missing)}")
    return resource, credential


async def _token(resource: Resource) -> Credential:
    """Wait for a token of a resource's identity. Raises UpstreamError, which is `unsent`."""
    assert resource.tokens is not None, "it has no identity"  # noqa: S101 -- a bug of ours
    try:
        return await resource.tokens.credential()
    except TokenUnavailable as exc:
        failed = UpstreamError(
            f"the gateway has no token for the Azure resource {resource.name!r} at present; its log says why",
            status=503,
            fault="credential",
        )
        failed.unsent = True
        failed.headers["retry-after"] = str(math.ceil(exc.retry_after))
        raise failed from None


def _head(request: Request, destination: Destination, path: str, credential: Credential, last: bytes) -> bytes:
    # Filters read text, and Azure compresses nothing by itself: ask for it plain.
    return b"%b\r\n%b\r\naccept-encoding: identity\r\nx-request-id: %b\r\n%b%b\r\n%b\r\n\r\n" % (
        _request_line(request.method, destination.base, path, destination.host_header),
        request.headers.lines_to_azure() or b"accept: */*",
        request.id.encode(),
        b"authorization: Bearer " if credential.bearer else b"api-key: ",
        credential.value.encode(),
        last,
    )


def _request_line(method: str, base: bytes, path: str, host: bytes) -> bytes:
    # Only short ones are kept: what a client makes up must not fill the memory.
    return (_short_line if len(path) <= 128 else _line)(method, base, path, host)


def _line(method: str, base: bytes, path: str, host: bytes) -> bytes:
    return b"%b %b%b HTTP/1.1\r\nhost: %b" % (method.encode(), base, path.encode("ascii"), host)


_short_line = lru_cache(maxsize=1024)(_line)
