"""A raw Azure: it parses requests with aiohttp's C parser and responds with exact bytes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import socket
import struct
import zlib
from collections.abc import Callable
from typing import Any

from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParser

from tests.fuzz.mutants import Mutant

__all__ = ("Azure",)

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
# Seconds between a response and its late bytes.
_HELD = 0.01
# Seconds within which the gateway must close a connection with unexpected bytes.
_NOTICED = 0.5


class Azure:
    """Responds with a description of the request, or with the mutant that the request names in `x-mutant`.

    `faults` lists invalid HTTP from the gateway.
    """

    def __init__(self, moved: Callable[[], None]) -> None:
        self.moved = moved
        """Called for each write, as a sign of progress."""
        self.mutants: dict[str, Mutant] = {}
        self.played = asyncio.Event()
        """Set when a mutant has been written, late bytes included."""
        self.faults: list[str] = []
        self.connections: set[_Connection] = set()

    async def start(self) -> None:
        """Listen on loopback."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self, loop), "127.0.0.1", 0, backlog=256)
        self.endpoint = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Stop listening and close every connection."""
        self._server.close()
        self.hang_up()

    def hang_up(self) -> None:
        """Close every connection."""
        for connection in list(self.connections):
            connection.transport.abort()


class _Connection(asyncio.Protocol):
    def __init__(self, azure: Azure, loop: asyncio.AbstractEventLoop) -> None:
        self._azure = azure
        self._loop = loop
        self._parser = HttpRequestParser(
            BaseProtocol(loop), loop, 1 << 24, max_line_size=1 << 16, max_field_size=1 << 16, auto_decompress=False
        )
        self._message: Any = None
        self._payload: Any = None
        self._switched = False
        self._lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment] # of a TCP connection
        self._azure.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._azure.connections.discard(self)
        self._lost.set()

    def data_received(self, data: bytes) -> None:
        if self._switched:
            return
        try:
            messages, self._switched, _ = self._parser.feed_data(data)
        except Exception as exc:
            if "Duplicate" in str(exc):
                # The parser refuses two lines of one field; such a request is valid HTTP, and Azure refuses it.
                self.transport.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
                self.transport.close()
                return
            self._azure.faults.append(f"the gateway sent Azure invalid HTTP: {exc!r} in {data!r}")
            self.transport.abort()
            return
        for message, payload in messages:
            if self._message is not None:
                self._azure.faults.append(f"the gateway sent Azure a request before the last response: {data!r}")
            self._message, self._payload = message, payload
        if self._message is not None and self._payload.is_eof():
            message, body = self._message, b"".join(getattr(self._payload, "_buffer", ()))
            self._message = self._payload = None
            mutant = self._azure.mutants.get(message.headers.get("x-mutant", ""))
            if mutant is None:
                self.transport.write(_echo(message, body))
            else:
                self._loop.create_task(self._play(mutant))

    async def _play(self, mutant: Mutant) -> None:
        """Write a mutant, one write in each turn of the loop, and end the connection as it says."""
        try:
            await self._write(mutant)
        finally:
            self._azure.played.set()

    async def _write(self, mutant: Mutant) -> None:
        for piece in mutant.pieces:
            if self.transport.is_closing():
                return
            self.transport.write(piece)
            self._azure.moved()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        if mutant.late:
            await asyncio.sleep(_HELD)
        if self.transport.is_closing():
            return
        if mutant.late:
            self.transport.write(mutant.late)
            # The gateway must close the connection first: late bytes during the next request look like its response.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._lost.wait(), _NOTICED)
        if self.transport.is_closing():
            return
        if mutant.ending == "close":
            self.transport.close()
        elif mutant.ending == "reset":
            sock = self.transport.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()


def _echo(message: Any, body: bytes) -> bytes:
    """Return a valid response that describes the request and its body."""
    if message.upgrade and message.headers.get("upgrade", "").lower() == "websocket":
        key = message.headers.get("sec-websocket-key", "").encode()
        accept = base64.b64encode(hashlib.sha1(key + _GUID).digest())  # noqa: S324 -- RFC 6455 requires it
        return (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: %b\r\n\r\n" % accept
        )
    facts = {
        "nonce": message.headers.get("x-nonce", ""),
        "read": [message.method, message.path.partition("?")[0].rpartition("/")[2], len(body), zlib.crc32(body)],
    }
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "logprobs": None}
    response = {"id": "chatcmpl-1", "created": 1, "model": "gpt-4o"}
    if message.method == "HEAD":
        return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n"
    if b'"stream": true' in body:
        choice["delta"] = {"role": "assistant", "content": "hi"}
        events = [{**response, "object": "chat.completion.chunk", "choices": [choice], **facts}]
        text = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
        return (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"%x\r\n%b\r\n0\r\n\r\n" % (len(text), text)
        )
    choice["message"] = {"role": "assistant", "content": "hi"}
    text = json.dumps({**response, "object": "chat.completion", "choices": [choice], **facts}).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)
