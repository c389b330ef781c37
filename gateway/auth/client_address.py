"""The client's address: the TCP peer, or the address in `X-Forwarded-For` if the peer is a trusted proxy."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Sequence

from gateway.protocol.headers import Headers
from gateway.settings import Network

__all__ = (
    "client_address",
    "network_of",
)


def client_address(
    transport: asyncio.BaseTransport | None,
    headers: Headers,
    trusted: Sequence[Network],
) -> str:
    """Return the client's address: the peer, or the address from trusted proxies, read from the right.

    The peer of a Unix socket is trusted: file permissions decide who can connect.
    """
    peer = transport.get_extra_info("peername") if transport is not None else None
    address = peer[0] if isinstance(peer, tuple) else ""
    if address and not _is_trusted(address, trusted):
        return address
    for hop in reversed([part.strip() for line in headers.getall("x-forwarded-for") for part in line.split(",")]):
        try:
            ipaddress.ip_address(hop)
        except ValueError:
            break
        address = hop
        if not _is_trusted(hop, trusted):
            break
    return address


def network_of(address: str) -> str:
    """Return the network of one client: an IPv4 address, or the first 64 bits of an IPv6 one (RFC 6177)."""
    if ":" not in address:
        return address
    try:
        ip = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if (inner := ip.ipv4_mapped) is not None:
        return str(inner)
    return str(ipaddress.IPv6Network((int(ip) >> 64 << 64, 64)))


def _is_trusted(address: str, networks: Sequence[Network]) -> bool:
    if not networks:
        return False
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return any(ip in network for network in networks)
