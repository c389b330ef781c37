"""A request's head: its id, and the client's address behind proxies."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Sequence
from random import getrandbits

from gateway.protocol.headers import Headers
from gateway.settings import Network

__all__ = (
    "client_address",
    "network_of",
    "request_id",
)

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


def request_id(given: bytes | None) -> str:
    """Return the client's `X-Request-ID`, if it is a sound one, or a new id."""
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    return f"req_{getrandbits(96):024x}"


def client_address(
    transport: asyncio.BaseTransport | None,
    headers: Headers,
    trusted: Sequence[Network],
) -> str:
    """Return the client's address: the peer's, or what trusted proxies say, read from the right.

    A unix socket's peer is trusted: only who can open the socket is there.
    """
    peer = transport.get_extra_info("peername") if transport is not None else None
    address = peer[0] if isinstance(peer, tuple) else ""
    if address and not _trusted(address, trusted):
        return address
    for hop in reversed([part.strip() for line in headers.getall("x-forwarded-for") for part in line.split(",")]):
        try:
            ipaddress.ip_address(hop)
        except ValueError:
            break
        address = hop
        if not _trusted(hop, trusted):
            break
    return address


def network_of(address: str) -> str:
    """Return what one client has of an address: all of it, but of IPv6 the first 64 bits (RFC 6177 gives no less)."""
    if ":" not in address:
        return address
    try:
        ip = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if (inner := ip.ipv4_mapped) is not None:
        return str(inner)
    return str(ipaddress.IPv6Network((int(ip) >> 64 << 64, 64)))


def _trusted(address: str, networks: Sequence[Network]) -> bool:
    if not networks:
        return False
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return any(ip in network for network in networks)
