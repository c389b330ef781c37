"""A tunnel to Azure through a proxy: a connected socket, made by an HTTP CONNECT or a SOCKS 5 handshake with limits.

Error messages name the proxy, so that an operator does not search for the fault at Azure.
"""

from __future__ import annotations

import asyncio
import socket
from base64 import b64encode
from typing import Any

from gateway.dns_resolver import LookupFailed, connected_socket
from gateway.errors import UpstreamError
from gateway.protocol.http1_fields import HEAD_END, MAX_HEAD, MalformedMessage
from gateway.protocol.http1_response import parse_response
from gateway.protocol.proxy_url import Proxy

__all__ = ("open_tunnel",)

# The timeout is the caller's; python-socks requires one of its own, in seconds.
_NO_TIMEOUT = 86_400.0


async def open_tunnel(proxy: Proxy, host: str, port: int, resource: str) -> socket.socket:
    """Return a socket that a proxy has connected to `host` and `port`; `resource` is for messages.

    Raises UpstreamError, and LookupFailed if the proxy's own name has no address. The caller sets a timeout.
    """
    owner = f"the proxy of the Azure resource {resource!r}"
    sock = await _connect(proxy, owner)
    try:
        if proxy.socks:
            await _socks5_handshake(sock, proxy, host, port, owner)
        else:
            await _http_connect(sock, proxy, host, port, owner)
    except OSError:
        sock.close()
        raise UpstreamError(f"{owner} closed the connection") from None
    except BaseException:
        sock.close()
        raise
    return sock


async def _connect(proxy: Proxy, owner: str) -> socket.socket:
    try:
        return await connected_socket(proxy.host, proxy.port)
    except LookupFailed:
        raise
    except OSError:
        raise UpstreamError(f"could not connect to {owner}") from None


async def _http_connect(sock: socket.socket, proxy: Proxy, host: str, port: int, owner: str) -> None:
    """Send a CONNECT (RFC 9110, 9.3.6): a response other than a 2xx is a refusal."""
    loop = asyncio.get_running_loop()
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {authority} HTTP/1.1", f"host: {authority}"]
    if proxy.user is not None:
        basic = b64encode(f"{proxy.user}:{proxy.password}".encode()).decode()
        lines.append(f"proxy-authorization: Basic {basic}")
    await loop.sock_sendall(sock, "\r\n".join([*lines, "", ""]).encode())
    response = b""
    while (end := response.find(HEAD_END)) < 0:
        data = await loop.sock_recv(sock, MAX_HEAD)
        response += data
        if not data or len(response) > MAX_HEAD or not response.startswith(b"HTTP/1."[: len(response)]):
            raise UpstreamError(f"the response of {owner} is not a complete HTTP response")
    try:
        status = parse_response(response[:end]).status
    except MalformedMessage as exc:
        raise UpstreamError(f"the response of {owner} is not valid HTTP: {exc}") from None
    if not 200 <= status <= 299:
        hint = "; correct the user name and password in the resource's `proxy:`" if status == 407 else ""
        raise UpstreamError(f"{owner} refused the tunnel with status {status}{hint}")
    if len(response) > end + len(HEAD_END):
        # In neither TLS nor HTTP does the server send first; these bytes would be the beginning of some response.
        raise UpstreamError(f"{owner} sent bytes after its response")


class _ConnectedProxy:
    """The connection to the proxy, in a form that python-socks can "connect": it is connected already."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def connect(self, **_: Any) -> socket.socket:
        return self._sock


async def _socks5_handshake(sock: socket.socket, proxy: Proxy, host: str, port: int, owner: str) -> None:
    """Do the handshake of SOCKS 5 (RFC 1928); the proxy looks up the host name."""
    from python_socks import ProxyError, ProxyType  # noqa: PLC0415 -- the extra `socks`
    from python_socks.async_.asyncio import Proxy as Socks  # noqa: PLC0415

    forward: Any = _ConnectedProxy(sock)
    handshake = Socks(ProxyType.SOCKS5, proxy.host, proxy.port, proxy.user, proxy.password, rdns=True, forward=forward)
    try:
        await handshake.connect(host, port, timeout=_NO_TIMEOUT)
    except ProxyError as exc:
        raise UpstreamError(f"{owner} refused the tunnel: {exc}") from None
    except (UnicodeError, ValueError, AssertionError):
        raise UpstreamError(f"{owner} does not accept the host name, or its response is not SOCKS 5") from None
