"""A request's head: what no proxy may pass on, its id, and the client's address behind proxies."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
from collections.abc import Sequence

from gateway.connection import Arrived, too_large
from gateway.errors import ApiError
from gateway.headers import Headers
from gateway.settings import Network

__all__ = (
    "check_head",
    "client_address",
    "request_id",
)

_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~-]*)(:[0-9]{1,5})?")
_PATH = re.compile(r"/[!$&-;=@-Z_a-z~%]*")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})|%(0[0-9A-F]|1[0-9A-F]|2E|2F|5C|7F)", re.IGNORECASE)
_QUERY = re.compile(r"[!-\"$-~]*")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# Above this many fields, their total size is looked at; aiohttp bounds each of them, and their number.
_MANY_FIELDS = 48
_HEAD_TOTAL = 24 * 1024


def request_id(headers: Headers) -> str:
    """Return the client's `X-Request-ID`, if it is a sound one, or a new id."""
    given = headers.get("x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return "req_" + os.urandom(12).hex()


def check_head(arrived: Arrived, path: str, query: str, limit: int) -> tuple[int | None, bool]:
    """Refuse a head that no proxy may pass on; return the body's length and whether `100 Continue` is awaited."""
    message = arrived.message
    if not _PATH.fullmatch(path) or _BAD_ESCAPE.search(path) or not _QUERY.fullmatch(query):
        raise ApiError(400, "the request's target must be a plain path, such as /v1/chat/completions")
    if "/." in path and any(segment in (".", "..") for segment in path.split("/")):
        raise ApiError(400, "the request's path must not have dot segments")
    if message.version.major != 1:
        raise ApiError(400, "the gateway speaks HTTP/1.1")
    length: int | None = 0
    expects = False
    for name, value in message.raw_headers:
        lowered = name.lower()
        if lowered == b"host":
            if not _HOST.fullmatch(value):
                raise ApiError(400, "the Host header is not a host name")
        elif lowered == b"content-length":
            if not value.isdigit() or len(value) > 19:
                raise ApiError(400, "the Content-Length header is not a number")
            length = int(value)
            if length > limit:
                raise too_large(limit)
        elif lowered == b"transfer-encoding":
            length = None
            if message.version < (1, 1) or value.strip().lower() != b"chunked":
                raise ApiError(400, "the only Transfer-Encoding is chunked, and it needs HTTP/1.1")
        elif lowered == b"expect":
            if value.strip().lower() != b"100-continue":
                raise ApiError(417, "the only expectation met is 100-continue")
            expects = True
        elif lowered == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise ApiError(415, "the body must not be compressed; leave Content-Encoding out")
    if len(message.raw_headers) > _MANY_FIELDS:
        size = sum(len(name) + len(value) + 4 for name, value in message.raw_headers)
        if size > _HEAD_TOTAL:
            raise ApiError(431, f"the request's head is larger than {_HEAD_TOTAL} bytes")
    return length, expects and message.version >= (1, 1) and not arrived.payload.is_eof()


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


def _trusted(address: str, networks: Sequence[Network]) -> bool:
    if not networks:
        return False
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return any(ip in network for network in networks)
