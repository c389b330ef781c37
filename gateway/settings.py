"""What the server itself is told: where to listen, how long to wait, how much to take, whom to trust."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

__all__ = ("HealthSettings", "Limits", "Listen", "Network", "Settings", "Timeouts")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Timeouts:
    """How long, in seconds, the gateway waits."""

    connect: Annotated[float, Meta(gt=0, description="for a connection to Azure, TLS included")] = 10.0
    first_byte: Annotated[float, Meta(gt=0, description="for everything before the first byte of an answer")] = 600.0
    idle: Annotated[float, Meta(gt=0, description="for the next bytes of an answer that has begun")] = 300.0
    head: Annotated[float, Meta(gt=0, description="for a client to send the head of a request")] = 20.0
    client: Annotated[float, Meta(gt=0, description="for a client to send, or to take, the next bytes")] = 60.0
    ping: Annotated[
        float, Meta(gt=0, description="of silence on a WebSocket until its other end is asked whether it is there")
    ] = 30.0
    keep_alive: Annotated[
        float,
        Meta(gt=0, description="for the next request on a client's connection; keep it above nginx's 60"),
    ] = 75.0
    drain_delay: Annotated[
        float,
        Meta(ge=0, description="for /readyz to say 503 before the listener closes; 5 behind a load balancer"),
    ] = 0.0
    grace: Annotated[float, Meta(ge=0, description="for running exchanges to end when the gateway stops")] = 30.0


@dataclass(frozen=True)
class HealthSettings:
    """When a deployment of a pool is left alone for a while, because it fails; times are in seconds."""

    failures: Annotated[int, Meta(ge=1, le=1000, description="so many failures in a row are enough")] = 5
    share: Annotated[float, Meta(gt=0, le=1, description="or this share of the requests of the last `window`")] = 0.5
    least: Annotated[int, Meta(ge=1, le=100_000, description="if they were so many at least")] = 20
    window: Annotated[float, Meta(ge=1, le=600, description="how far back the share looks")] = 10.0
    rest: Annotated[
        float, Meta(gt=0, le=600, description="how long it is left alone at first, until one request tries it again")
    ] = 1.0
    most_rest: Annotated[
        float, Meta(gt=0, le=3600, description="how long at most: it is doubled each time the try fails")
    ] = 30.0
    probe: Annotated[
        float | None,
        Meta(
            gt=0, le=600, description="how often the gateway itself asks those that rest, so that no request need try"
        ),
    ] = None


@dataclass(frozen=True)
class Limits:
    """How much the gateway takes from clients."""

    body: Annotated[
        int, Meta(gt=0, description="the most bytes of a request's body, or of a message of a WebSocket")
    ] = 100 * 1024 * 1024
    form: Annotated[
        int, Meta(gt=0, description="the most bytes of a form that are kept on disk until its `model` has come")
    ] = 256 * 1024 * 1024
    body_rate: Annotated[
        int,
        Meta(
            gt=0,
            description="the least bytes per second of a body, on average, after its first `timeouts.client` seconds",
        ),
    ] = 500
    connections: Annotated[int, Meta(gt=0, description="the most connections of clients at once")] = 20_000
    memory: Annotated[
        int,
        Meta(
            ge=1024 * 1024,
            description="the most bytes that all requests together may hold in memory; one caller's share is a quarter",
        ),
    ] = 1024 * 1024 * 1024


@dataclass(frozen=True)
class Listen:
    """Where to listen: a TCP host and port, or a unix socket and its file's permissions."""

    host: str = "127.0.0.1"
    port: int = 8080
    unix: str | None = None
    mode: int = 0o660

    def __str__(self) -> str:
        if self.unix is not None:
            return f"unix:{self.unix}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def described(self) -> str:
        """The address, with the permissions of a unix socket."""
        return f"{self}, mode {self.mode:04o}" if self.unix is not None else str(self)

    @classmethod
    def parse(cls, text: str) -> Listen:
        """Read `HOST:PORT`, `:PORT` (every interface) or `unix:PATH`. Raises ValueError, saying what is wrong."""
        if text.startswith("unix:"):
            if not text[5:]:
                raise ValueError("unix: needs the path of a socket, as in unix:/run/gateway.sock")
            return cls(unix=text[5:])
        host, colon, port = text.rpartition(":")
        inside = host.removeprefix("[").removesuffix("]")
        odd = "/" in host or (":" in host and host != f"[{inside}]")
        host = inside
        if odd or not colon or not port.isdigit() or not 0 <= int(port) <= 65_535:
            raise ValueError(f"{text!r} is not HOST:PORT or unix:PATH, as in 127.0.0.1:8080")
        return cls(host=host or "0.0.0.0", port=int(port))  # noqa: S104 -- what `:8080` means


@dataclass(frozen=True)
class Settings:
    """What the server itself is told by the configuration."""

    listen: Listen = Listen()
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    health: HealthSettings = HealthSettings()
    admin: Listen | None = None
    trusted_proxies: tuple[Network, ...] = ()
