"""Proxies for tests, on loopback: an HTTP proxy with CONNECT, and a SOCKS 5 proxy (RFC 1928, 1929)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress

from tests.conftest import RawUpstream

__all__ = ("ConnectProxy", "SocksProxy", "pipe")


class _Proxy(RawUpstream):
    """Common to both: the user they accept, the destinations they were asked for, and the relay of bytes.

    Every host name leads to this machine, so that a test sees which side looked it up.
    """

    scheme = ""

    def __init__(self, user: str | None = None, password: str = "") -> None:
        super().__init__(self._serve)
        self.user, self.password = user, password
        self.asked: list[tuple[str, int]] = []

    def url(self, login: str = "") -> str:
        return f"{self.scheme}://{login}127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, granted: bytes) -> None:
        await pipe(reader, writer, self.asked[-1][1], granted)


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int, granted: bytes = b"") -> None:
    """Connect to a port, write `granted`, and relay bytes both ways."""
    there_reader, there = await asyncio.open_connection("127.0.0.1", port)
    writer.write(granted)
    try:
        await asyncio.gather(_copy(reader, there), _copy(there_reader, writer))
    finally:
        there.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


class ConnectProxy(_Proxy):
    """An HTTP proxy; `granted` is its response to CONNECT."""

    scheme = "http"
    granted = b"HTTP/1.0 200 Connection established\r\nProxy-Agent: test\r\n\r\n"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await self.request(reader)
        line, *fields = head.decode().removesuffix("\r\n\r\n").split("\r\n")
        method, there, version = line.split(" ")
        host, _, port = there.rpartition(":")
        assert (method, version) == ("CONNECT", "HTTP/1.1")
        given = dict(field.split(": ", 1) for field in fields)
        assert given.pop("host") == there
        login = given.pop("proxy-authorization", None)
        assert not given, "no other header goes to a proxy"
        if self.user is not None:
            wanted = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
            if login != f"Basic {wanted}":
                writer.write(b"HTTP/1.1 407 Who Are You\r\nProxy-Authenticate: Basic\r\nContent-Length: 3\r\n\r\nno!")
                return
        self.asked.append((host.strip("[]"), int(port)))
        await self.pass_on(reader, writer, self.granted)


class SocksProxy(_Proxy):
    """A SOCKS 5 proxy; `reply` is its reply code for every request, 0 for success."""

    scheme = "socks5"
    reply = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        version, count = await reader.readexactly(2)
        methods = await reader.readexactly(count)
        assert version == 5
        method = 0 if self.user is None else 2
        if method not in methods:
            writer.write(b"\x05\xff")
            return
        writer.write(bytes((5, method)))
        if method == 2:
            _, length = await reader.readexactly(2)
            user = (await reader.readexactly(length)).decode()
            (length,) = await reader.readexactly(1)
            right = (user, (await reader.readexactly(length)).decode()) == (self.user, self.password)
            writer.write(b"\x01" + (b"\x00" if right else b"\x01"))
            if not right:
                return
        _, command, _, kind = await reader.readexactly(4)
        assert command == 1
        if kind == 3:
            (length,) = await reader.readexactly(1)
            host = (await reader.readexactly(length)).decode()
        else:
            host = str(ipaddress.ip_address(await reader.readexactly(4 if kind == 1 else 16)))
        self.asked.append((host, int.from_bytes(await reader.readexactly(2), "big")))
        answer = bytes((5, self.reply, 0, 1, 127, 0, 0, 1, 0, 80))
        if self.reply:
            writer.write(answer)
        else:
            await self.pass_on(reader, writer, answer)
