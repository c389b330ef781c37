"""The clients of `make soak`: each kind does one thing through the gateway and checks every byte of the response."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import count

import aiohttp

from tests.soak.azure import LARGE, event

__all__ = ("KEY", "KINDS", "Clients", "Wrong")

KEY = "soak-client-key-4711"
_AUTH = {"authorization": f"Bearer {KEY}"}
_numbers = count()
# Seconds that one request may take; only a hang takes as long.
_DEADLINE = 60.0


class Wrong(Exception):
    """A response that belongs to another request or is incomplete."""


def _check(condition: object, what: str, shown: object = "") -> None:
    if not condition:
        raise Wrong(f"{what}: {shown!r:.300}")


async def _sized_answer(reader: asyncio.StreamReader) -> bytes:
    """Read a response with a length and return its body."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    return await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))


class Clients:
    """Clients of one gateway."""

    def __init__(self, port: int, rng: random.Random) -> None:
        self.port = port
        self.rng = rng
        self.url = f"http://127.0.0.1:{port}"
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=_DEADLINE)
        )

    def _nonce(self) -> str:
        return f"nonce-{next(_numbers)}-{self.rng.randrange(1 << 32):08x}"

    def _headers(self, nonce: str, wish: str) -> dict[str, str]:
        return {**_AUTH, "x-nonce": nonce, "x-do": wish}

    def _chat(self, nonce: str, wish: str, *, stream: bool = False) -> aiohttp.client._RequestContextManager:
        text = "x" * self.rng.choice((10, 1000, 20_000))
        body = {"model": "gpt-4o", "stream": stream, "messages": [{"role": "user", "content": text}]}
        return self.session.post(self.url + "/v1/chat/completions", json=body, headers=self._headers(nonce, wish))

    # -- plain responses -------------------------------------------------------------------------------

    async def json(self) -> None:
        """A chat completion."""
        nonce = self._nonce()
        async with self._chat(nonce, "json") as response:
            answer = await response.json()
        _check(response.status == 200 and answer["nonce"] == nonce, "another's answer", answer)

    async def refused(self) -> None:
        """A request that the gateway refuses."""
        path, headers, status = self.rng.choice(
            [
                ("/v1/nothing", _AUTH, 404),
                ("/v1/chat/completions", {}, 401),
                ("/elsewhere", _AUTH, 404),
                ("/v1/files/a%2Fb", _AUTH, 400),
            ]
        )
        async with self.session.post(self.url + path, json={"model": "gpt-4o"}, headers=headers) as response:
            _check(response.status == status and "error" in await response.json(), f"{path} was a {response.status}")

    async def upstream_error(self) -> None:
        """An error of Azure, or an invalid response."""
        nonce = self._nonce()
        wish = self.rng.choice(["status 400", "status 429", "status 500", "status 503", "garbage", "half", "close"])
        async with self._chat(nonce, wish) as response:
            answer = await response.json()
        wanted = int(wish[7:]) if wish.startswith("status") else 502
        _check(response.status == wanted, f"{wish} was a {response.status}", answer)
        _check("error" in answer and (wanted == 502 or nonce in str(answer)), wish, answer)

    async def late(self) -> None:
        """Bytes after the end of Azure's response, which no client may get."""
        async with self._chat(self._nonce(), "late") as response:
            _check(b"poison" not in await response.read(), "bytes after a response were passed on")

    # -- streams ---------------------------------------------------------------------------------------

    async def stream(self) -> None:
        """A complete stream."""
        nonce, events = self._nonce(), self.rng.randrange(1, 60)
        async with self._chat(nonce, f"stream {events} 0.01 done", stream=True) as response:
            got = await response.read()
        _check(got == b"".join(event(nonce, each) for each in range(events)) + b"data: [DONE]\n\n", "a stream", got)

    async def broken_stream(self) -> None:
        """A stream that Azure breaks off: it ends with an error, not as a complete one."""
        nonce, got = self._nonce(), b""
        with contextlib.suppress(aiohttp.ClientPayloadError):
            async with self._chat(nonce, "stream 5 0.005 break", stream=True) as response:
                async for piece in response.content.iter_any():
                    got += piece
            raise Wrong("a stream that broke off ended as a complete one")
        _check(b'"error"' in got and b"[DONE]" not in got, "a stream that broke off", got)

    async def hang_up(self) -> None:
        """A client that leaves in the middle of a stream."""
        response = await self._chat(self._nonce(), "stream 500 0.02 done", stream=True)
        for _ in range(self.rng.randrange(3)):
            await response.content.readany()
        response.close()

    async def slow_reader(self) -> None:
        """A client with a small buffer that reads a large stream slowly, then leaves or sends another request."""
        nonce = self._nonce()
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(sock, ("127.0.0.1", self.port))
            reader, writer = await asyncio.open_connection(sock=sock, limit=8192)
        except BaseException:
            sock.close()
            raise
        try:
            body = b'{"model":"gpt-4o","stream":true,"messages":[]}'
            writer.write(self._raw(nonce, f"stream {LARGE} 0 done", body))
            await reader.readuntil(b"\r\n\r\n")
            stay = self.rng.random() < 0.5
            for _ in range(20):
                await reader.read(16384)
                await asyncio.sleep(0.05)
                if not stay and self.rng.random() < 0.1:
                    return
            rest = b""
            while not rest.endswith(b"0\r\n\r\n"):
                piece = await reader.read(65536)
                _check(piece, "a slow reader's stream broke off")
                rest = (rest + piece)[-4096:]
            _check(f"{nonce} {LARGE - 1} ".encode() in rest or b"[DONE]" in rest, "the end of a slow stream", rest)
            again = self._nonce()
            writer.write(self._raw(again, "json", b'{"model":"gpt-4o"}'))
            got = await _sized_answer(reader)
            _check(again.encode() in got, "the response after a slow stream", got)
        finally:
            writer.close()

    def _raw(self, nonce: str, wish: str, body: bytes) -> bytes:
        return (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: gw.test\r\nAuthorization: Bearer {KEY}\r\n"
            f"X-Nonce: {nonce}\r\nX-Do: {wish}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body

    # -- uploads ---------------------------------------------------------------------------------------

    def _form(self, *sizes: int) -> tuple[bytes, str]:
        size = self.rng.choice(sizes or (100, 5000, 70_000, 1_500_000))
        content = self.rng.randbytes(size).hex().encode()
        form = (
            b'--cut\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nassistants\r\n'
            b'--cut\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n%b\r\n--cut--\r\n' % content
        )
        return form, "multipart/form-data; boundary=cut"

    async def upload(self) -> None:
        """A file with a length, or in chunks of any size, that must arrive complete."""
        nonce, wish = self._nonce(), self.rng.choice(("json", "json", "json", "early"))
        form, kind = self._form()

        async def pieces() -> AsyncIterator[bytes]:
            offset = 0
            while offset < len(form):
                size = self.rng.choice((1, 3, 100, 4000, 65_536, 500_000))
                yield form[offset : offset + size]
                offset += size

        data = form if self.rng.random() < 0.3 else pieces()
        headers = {**self._headers(nonce, wish), "content-type": kind}
        try:
            async with self.session.post(self.url + "/v1/files", data=data, headers=headers) as response:
                answer = await response.json()
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
            if wish != "early":
                raise
            return  # the response arrived while aiohttp was still uploading
        if wish == "early":
            _check(response.status == 413, f"an early 413 was a {response.status}", answer)
            return
        _check(response.status == 200 and answer["nonce"] == nonce, "an upload's answer", answer)
        _check(answer["sha256"] == hashlib.sha256(form).hexdigest(), f"{answer['size']} of {len(form)} bytes arrived")

    async def upload_in_pieces(self) -> None:
        """A file in chunks, with separate writes for sizes and bytes, as Python's `requests` sends it."""
        nonce, (form, kind) = self._nonce(), self._form(100, 5000)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(
                f"POST /v1/files HTTP/1.1\r\nHost: gw.test\r\nAuthorization: Bearer {KEY}\r\nX-Nonce: {nonce}\r\n"
                f"X-Do: json\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
            )
            offset = 0
            while offset < len(form):
                piece = form[offset : offset + self.rng.choice((10, 1000, 5000))]
                offset += len(piece)
                for part in (b"%x\r\n" % len(piece), piece, b"\r\n"):
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.002)
            writer.write(b"0\r\n\r\n")
            async with asyncio.timeout(_DEADLINE):
                got = await _sized_answer(reader)
        finally:
            writer.close()
        _check(nonce.encode() in got, "an upload's answer", got)
        _check(hashlib.sha256(form).hexdigest().encode() in got, f"not all of {len(form)} bytes arrived", got[-300:])

    async def broken_upload(self) -> None:
        """A client that leaves in the middle of its upload."""
        form, kind = self._form()
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(
                f"POST /v1/files HTTP/1.1\r\nHost: gw.test\r\nAuthorization: Bearer {KEY}\r\nContent-Type: {kind}\r\n"
                f"Content-Length: {len(form)}\r\n\r\n".encode()
            )
            writer.write(form[: len(form) // 2])
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            await asyncio.sleep(0.02)
        finally:
            writer.close()

    # -- WebSockets ------------------------------------------------------------------------------------

    async def websocket(self) -> None:
        """Messages on a WebSocket that Azure echoes; then a close, or a lost connection."""
        url = self.url + "/v1/realtime?model=gpt-4o"
        async with self.session.ws_connect(url, headers=_AUTH, max_msg_size=0) as opened:
            for _ in range(self.rng.randrange(1, 8)):
                nonce = self._nonce()
                text = json.dumps({"type": "x", "nonce": nonce, "filling": "y" * self.rng.choice((1, 2000, 100_000))})
                await opened.send_str(text)
                answer = await opened.receive_str(timeout=_DEADLINE)
                _check(answer == text, "a WebSocket's message", answer)
            if self.rng.random() < 0.3 and (transport := opened._response.connection) is not None:
                transport.close()


KINDS: dict[str, tuple[int, Callable[[Clients], Awaitable[None]]]] = {
    "json": (30, Clients.json),
    "refused": (6, Clients.refused),
    "upstream_error": (8, Clients.upstream_error),
    "late": (2, Clients.late),
    "stream": (20, Clients.stream),
    "broken_stream": (5, Clients.broken_stream),
    "hang_up": (8, Clients.hang_up),
    "slow_reader": (4, Clients.slow_reader),
    "upload": (10, Clients.upload),
    "upload_in_pieces": (4, Clients.upload_in_pieces),
    "broken_upload": (4, Clients.broken_upload),
    "websocket": (6, Clients.websocket),
}
"""By name: the weight, and the action."""
