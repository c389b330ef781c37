"""Settings of the server: addresses, timeouts, limits, circuit breaker, trusted proxies."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

__all__ = ("HealthSettings", "Limits", "Listen", "Network", "Settings", "Timeouts")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Timeouts:
    """Timeouts, in seconds."""

    connect: Annotated[
        float, Meta(gt=0, description="connect timeout, in seconds, for a connection to Azure, including TLS")
    ] = 10.0
    first_byte: Annotated[
        float, Meta(gt=0, description="timeout, in seconds, from the request's head to the first byte of the response")
    ] = 600.0
    idle: Annotated[
        float, Meta(gt=0, description="idle timeout, in seconds, between bytes of a response from Azure")
    ] = 300.0
    head: Annotated[
        float, Meta(gt=0, description="timeout, in seconds, for a client to send the head of a request")
    ] = 20.0
    client: Annotated[
        float,
        Meta(gt=0, description="read and write timeout, in seconds, for a client to send or accept the next bytes"),
    ] = 60.0
    ping: Annotated[
        float,
        Meta(
            gt=0,
            description="ping interval, in seconds: time without data on a WebSocket before the gateway sends a ping",
        ),
    ] = 30.0
    keep_alive: Annotated[
        float,
        Meta(
            gt=0,
            description="keep-alive timeout, in seconds, of a client's connection; keep it above nginx's 60",
        ),
    ] = 75.0
    drain_delay: Annotated[
        float,
        Meta(
            ge=0,
            description="drain delay, in seconds, from the first 503 of /readyz to the closing of the listener",
        ),
    ] = 0.0
    grace: Annotated[
        float, Meta(ge=0, description="grace period, in seconds, for running exchanges when the gateway stops")
    ] = 30.0


@dataclass(frozen=True)
class HealthSettings:
    """Circuit breaker: when a failing deployment of a pool gets no requests for a while."""

    failures: Annotated[
        int, Meta(ge=1, le=1000, description="number of consecutive failures that opens the circuit of a deployment")
    ] = 5
    share: Annotated[
        float,
        Meta(gt=0, le=1, description="share of failed requests in the last `window` that opens the circuit, too"),
    ] = 0.5
    least: Annotated[
        int, Meta(ge=1, le=100_000, description="minimum number of requests in the window before `share` applies")
    ] = 20
    window: Annotated[float, Meta(ge=1, le=600, description="length of the window for `share`, in seconds")] = 10.0
    rest: Annotated[
        float,
        Meta(gt=0, le=600, description="initial cooldown, in seconds, before one request tries the deployment again"),
    ] = 1.0
    most_rest: Annotated[
        float,
        Meta(gt=0, le=3600, description="maximum cooldown, in seconds; the cooldown doubles each time the try fails"),
    ] = 30.0
    probe: Annotated[
        float | None,
        Meta(
            gt=0,
            le=600,
            description="interval, in seconds, of active probes of failing deployments; a failed probe postpones the "
            "trial by a client's request, and a successful one allows it at once",
        ),
    ] = None


@dataclass(frozen=True)
class Limits:
    """Limits on what the gateway accepts from clients."""

    body: Annotated[
        int, Meta(gt=0, description="maximum size, in bytes, of a request's body or of a WebSocket message")
    ] = 100 * 1024 * 1024
    form: Annotated[
        int,
        Meta(gt=0, description="maximum bytes of a form to buffer on disk until its field `model` arrives"),
    ] = 256 * 1024 * 1024
    body_rate: Annotated[
        int,
        Meta(
            gt=0,
            description="minimum average rate of a body, in bytes/s, after the first `timeouts.client` seconds",
        ),
    ] = 500
    connections: Annotated[int, Meta(gt=0, description="maximum number of concurrent connections of clients")] = 20_000
    memory: Annotated[
        int,
        Meta(
            ge=1024 * 1024,
            description="maximum memory, in bytes, for the data of all requests; one caller may use a quarter of it",
        ),
    ] = 1024 * 1024 * 1024


@dataclass(frozen=True)
class Listen:
    """A listen address: a TCP host and port, or a Unix socket and the permissions of its file."""

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
        """The address, with the permissions of a Unix socket."""
        return f"{self}, mode {self.mode:04o}" if self.unix is not None else str(self)

    @classmethod
    def parse(cls, text: str) -> Listen:
        """Parse `HOST:PORT`, `:PORT` (all interfaces) or `unix:PATH`. Raises ValueError with a description."""
        if text.startswith("unix:"):
            if not text[5:]:
                raise ValueError("unix: needs the path of a socket, such as unix:/run/gateway.sock")
            return cls(unix=text[5:])
        host, colon, port = text.rpartition(":")
        bare = host.removeprefix("[").removesuffix("]")
        invalid = "/" in host or (":" in host and host != f"[{bare}]")
        host = bare
        if invalid or not colon or not port.isdigit() or not 0 <= int(port) <= 65_535:
            raise ValueError(f"{text!r} is not HOST:PORT or unix:PATH, such as 127.0.0.1:8080")
        return cls(host=host or "0.0.0.0", port=int(port))  # noqa: S104 -- the meaning of `:8080`


@dataclass(frozen=True)
class Settings:
    """The server's own part of the configuration."""

    listen: Listen = Listen()
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    health: HealthSettings = HealthSettings()
    admin: Listen | None = None
    trusted_proxies: tuple[Network, ...] = ()
