"""One connection to Azure, and whether it may be used again.

What aiohttp keeps private is used here, in `upstream.py` and in `connection.py` alone; tests name what moved.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import cast

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.http_parser import RawResponseMessage
from aiohttp.streams import StreamReader
from yarl import URL

from gateway.body import Body
from gateway.errors import UpstreamError
from gateway.messages import Resource

__all__ = (
    "READ_BUFFER",
    "Destination",
    "Lease",
    "Wire",
    "final_answer",
    "send_body",
)

READ_BUFFER = 64 * 1024
_MAX_INTERIM = 16


class Wire(ResponseHandler):
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
            read_bufsize=READ_BUFFER,
            max_line_size=16_384,
            max_field_size=16_384,
            max_headers=256,
        )
        self.start_timeout()

    def data_received(self, data: bytes) -> None:
        """Parse what came; on an idle connection, close it."""
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
        """Go on reading where it was paused."""
        # aiohttp calls this after every read; there is nothing to do unless reading was paused.
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Fail a body that was not whole, whatever ended the connection."""
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


class Destination:
    """What aiohttp's connector asks of a request, for one resource."""

    proxy = None
    server_hostname = None

    def __init__(self, resource: Resource, context: ssl.SSLContext) -> None:
        self.url = URL(resource.endpoint)
        self.host = self.url.raw_host or ""
        self.port = self.url.port
        self.ssl = context
        self.connection_key = ConnectionKey(self.host, self.port, self.is_ssl(), context, None, None, None)
        self.base = self.url.raw_path.rstrip("/").encode()
        default = 443 if self.is_ssl() else 80
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.host_header = (host if self.port == default else f"{host}:{self.port}").encode()

    def is_ssl(self) -> bool:
        """Whether the resource is spoken to over TLS."""
        return self.url.scheme == "https"


class Lease:
    """One connection while it is in use; the request's exchange owns it."""

    __slots__ = ("connection", "upload", "wire")

    def __init__(self, connection: aiohttp.connector.Connection) -> None:
        self.connection = connection
        self.wire = cast(Wire, connection.protocol)
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


async def final_answer(wire: Wire) -> tuple[RawResponseMessage, StreamReader]:
    """Wait for the head of the final answer."""
    for _ in range(_MAX_INTERIM):
        message, payload = await wire.read()
        if message.code >= 200 or message.code == 101 or message.code < 100:
            return message, payload
    raise UpstreamError("Azure sent interim answers without end")


async def send_body(wire: Wire, body: Body, patience: float) -> None:
    """Write a request's body as it comes from the client, in chunks where its length is not known."""
    chunked = body.length is None
    async for chunk in body.stream():
        if wire.transport is None:
            return
        wire.transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunked else chunk)
        await wire.drain(patience)
    if chunked and wire.transport is not None:
        wire.transport.write(b"0\r\n\r\n")
