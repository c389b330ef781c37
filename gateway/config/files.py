"""What the two kinds of configuration file may say: `gateway.yaml`, and one file per team."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from gateway.config.convert import RawNode
from gateway.settings import Limits, Timeouts

__all__ = ("GatewayFile", "LogFile", "MatchFile", "ResourceFile", "TeamFile")


Pipeline = Annotated[
    RawNode | None,
    Meta(description="the stages, in order: the first sees the request first, the answer last"),
]
Auth = Annotated[
    Literal["none", "required"],
    Meta(description="`none` lets clients without a key spend a resource's own credential"),
]


@dataclass(frozen=True)
class ResourceFile:
    """One Azure OpenAI resource."""

    endpoint: Annotated[str, Meta(description="its URL, as https://NAME.openai.azure.com; a base path is kept")]
    api_key: Annotated[
        str | None,
        Meta(description="its key, used where no stage sets the client's own", extra={"secret": True}),
    ] = None
    proxy: Annotated[
        str | None,
        Meta(
            description="the way to it: http://USER:PASSWORD@HOST:PORT or socks5://...; none where it is empty",
            extra={"secret": True},
        ),
    ] = None


@dataclass(frozen=True)
class MatchFile:
    """Whose requests a team's are: any one of these is enough."""

    path_prefix: Annotated[str | list[str] | None, Meta(description="the path before /v1, such as /research")] = None
    host: Annotated[str | list[str] | None, Meta(description="the host name in the client's URL")] = None
    keys: Annotated[str | list[str] | None, Meta(description="digests of the team's keys, as sha256:HEX")] = None


@dataclass(frozen=True)
class LogFile:
    """What is logged, and how."""

    level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="the least that is shown")] = "info"
    format: Annotated[
        Literal["auto", "json", "text"],
        Meta(description="`auto` is text on a terminal, else one JSON object a line"),
    ] = "auto"


@dataclass(frozen=True)
class TeamFile:
    """One team's file: what it does not say comes from the file that lists it."""

    match: Annotated[MatchFile | None, Meta(description="whose requests are this team's")] = None
    pipeline: Pipeline = None
    change: Annotated[RawNode | None, Meta(description="settings of inherited stages to replace, or `stage: off`")] = (
        None
    )
    resource: Annotated[str | None, Meta(description="the resource of deployments that name none")] = None
    auth: Auth | None = None


@dataclass(frozen=True)
class GatewayFile:
    """`gateway.yaml`: the server, the resources, and the default team."""

    listen: Annotated[str, Meta(description="HOST:PORT, or unix:PATH")] = "127.0.0.1:8080"
    teams: Annotated[str | list[str], Meta(description="the teams' files, as patterns from this file's folder")] = (
        field(default_factory=list)
    )
    plugins_path: Annotated[str | list[str], Meta(description="folders with stages of your own, one a file")] = field(
        default_factory=list
    )
    resources: Annotated[RawNode | None, Meta(description="the Azure OpenAI resources by name")] = None
    pipeline: Pipeline = None
    resource: Annotated[str | None, Meta(description="the resource of deployments that name none")] = None
    auth: Auth = "required"
    trusted_proxies: Annotated[
        str | list[str], Meta(description="addresses or networks whose X-Forwarded-For is believed")
    ] = field(default_factory=list)
    timeouts: Annotated[Timeouts, Meta(description="how long the gateway waits, in seconds")] = field(
        default_factory=Timeouts
    )
    limits: Annotated[Limits, Meta(description="how much the gateway takes")] = field(default_factory=Limits)
    log: Annotated[LogFile, Meta(description="what is logged, and how")] = field(default_factory=LogFile)
    watch: Annotated[bool, Meta(description="whether a change of these files is taken over while the gateway runs")] = (
        True
    )
