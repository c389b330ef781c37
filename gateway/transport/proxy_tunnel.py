"""A way to Azure through a proxy: a connected socket, from a CONNECT or a SOCKS 5 handshake with bounds.

What is wrong is said as the proxy's fault: who reads it must not look for it at Azure.
"""

from __future__ import annotations

import asyncio
import socket
from base64 import b64encode
from typing import Any

from gateway.dns_resolver import LookupFailed, connected_socket
from gateway.errors import UpstreamError
from gateway.protocol.http1 import HEAD_END, MAX_HEAD, MalformedMessage, parse_response
from gateway.protocol.proxy_url import Proxy

__all__ = ("open_tunnel",)

# The time limit is the caller's; python-socks insists on one of its own, in seconds.
_NEVER = 86_400.0


async def open_tunnel(proxy: Proxy, host: str, port: int, resource: str) -> socket.socket:
    """Return a socket whose other end is `host` and `port`, behind the proxy; `resource` is for messages.

    Raises UpstreamError, and LookUpFailed if the proxy's own name has no address. There is no time limit of its own.
    """
    of = f"the proxy of the Azure resource {resource!r}"
    sock = await _connect(proxy, of)
    try:
        if proxy.socks:
            await _socks(sock, proxy, host, port, of)
        else:
            await _http_connect(sock, proxy, host, port, of)
    except OSError:
        sock.close()
        raise UpstreamError(f"{of} broke the connection off") from None
    except BaseException:
        sock.close()
        raise
    return sock


async def _connect(proxy: Proxy, of: str) -> socket.socket:
    try:
        return await connected_socket(proxy.host, proxy.port)
    except LookupFailed:
        raise
    except OSError:
        raise UpstreamError(f"could not connect to {of}") from None


async def _http_connect(sock: socket.socket, proxy: Proxy, host: str, port: int, of: str) -> None:
    """Ask for the way with CONNECT (RFC 9110, 9.3.6): any other answer than a 2xx is a refusal."""
    loop = asyncio.get_running_loop()
    there = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {there} HTTP/1.1", f"host: {there}"]
    if proxy.user is not None:
        basic = b64encode(f"{proxy.user}:{proxy.password}".encode()).decode()
        lines.append(f"proxy-authorization: Basic {basic}")
    await loop.sock_sendall(sock, "\r\n".join([*lines, "", ""]).encode())
    answer = b""
    while (end := answer.find(HEAD_END)) < 0:
        data = await loop.sock_recv(sock, MAX_HEAD)
        answer += data
        if not data or len(answer) > MAX_HEAD or not answer.startswith(b"HTTP/1."[: len(answer)]):
            raise UpstreamError(f"what {of} answered is not a whole answer of an HTTP proxy")
    try:
        status = parse_response(answer[:end]).status
    except MalformedMessage as exc:
        raise UpstreamError(f"what {of} answered is not valid HTTP: {exc}") from None
    if not 200 <= status <= 299:
        hint = ": it wants another user name or password" if status == 407 else ""
        raise UpstreamError(f"{of} refused to connect to it, with status {status}{hint}")
    if len(answer) > end + len(HEAD_END):
        # Neither TLS nor HTTP lets the server speak first; taken along, it would be some answer's beginning.
        raise UpstreamError(f"{of} sent something behind its answer")


class _Connected:
    """Stands for a proxy before the proxy, which python-socks asks to connect: it is connected already."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def connect(self, **_: Any) -> socket.socket:
        return self._sock


async def _socks(sock: socket.socket, proxy: Proxy, host: str, port: int, of: str) -> None:
    """Ask for the way as SOCKS 5 has it (RFC 1928); the proxy looks the host name up."""
    from python_socks import ProxyError, ProxyType  # noqa: PLC0415 -- the extra `socks`
    from python_socks.async_.asyncio import Proxy as Socks  # noqa: PLC0415

    forward: Any = _Connected(sock)
    asked = Socks(ProxyType.SOCKS5, proxy.host, proxy.port, proxy.user, proxy.password, rdns=True, forward=forward)
    try:
        await asked.connect(host, port, timeout=_NEVER)
    except ProxyError as exc:
        raise UpstreamError(f"{of} refused to connect to it: {exc}") from None
    except (UnicodeError, ValueError, AssertionError):
        raise UpstreamError(f"{of} cannot be asked for it, or its answer is not SOCKS 5") from None
