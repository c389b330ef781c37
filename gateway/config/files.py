"""The settings of the two kinds of configuration file: `gateway.yaml`, and one file per team."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from gateway.azure.resources import ResourceTimeouts
from gateway.config.convert import RawNode
from gateway.settings import HealthSettings, Limits, Timeouts
from gateway.usage.prices import Price

__all__ = (
    "CredentialFile",
    "GatewayFile",
    "IdentityFile",
    "KeyFile",
    "LogFile",
    "MatchFile",
    "PooledFile",
    "ResourceFile",
    "StoreFile",
    "TeamFile",
    "TlsFile",
)

VERSION = r"^(20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])(-preview)?|v1)$"


Pipeline = Annotated[
    RawNode | None,
    Meta(description="the stages, in order: the first one sees the request first and the response last"),
]
Auth = Annotated[
    Literal["none", "required"],
    Meta(description="`none` lets clients without a key use a resource's stored credential"),
]


@dataclass(frozen=True)
class CredentialFile:
    """An Entra identity of the gateway; its tokens authenticate at a resource in place of a key."""

    kind: Annotated[
        Literal["managed_identity", "workload_identity", "client_secret"],
        # (A message never shows it: it may be a key, written here in place of `api_key`.)
        Meta(description="kind of identity: the machine's, the pod's, or an application's", extra={"secret": True}),
    ]
    client_id: Annotated[
        str | None,
        Meta(min_length=1, description="client id of the application, or of a user-assigned managed identity"),
    ] = None
    tenant: Annotated[str | None, Meta(min_length=1, description="id of the tenant; not for a managed identity")] = None
    client_secret: Annotated[
        str | None, Meta(min_length=1, description="client secret of the application", extra={"secret": True})
    ] = None
    token_file: Annotated[
        str | None, Meta(min_length=1, description="file with the federated token of a workload; read each time")
    ] = None
    scope: Annotated[
        str,
        Meta(pattern=r"^\S+/\.default$", examples=["https://ai.azure.com/.default"], description="scope of the tokens"),
    ] = "https://cognitiveservices.azure.com/.default"
    authority: Annotated[
        str | None, Meta(description="token authority of a sovereign cloud, such as https://login.microsoftonline.us")
    ] = None


@dataclass(frozen=True)
class TlsFile:
    """TLS settings of a resource; the files are in PEM format."""

    ca: Annotated[
        str | None, Meta(min_length=1, description="file with the CA of the server certificate, if it is private")
    ] = None
    certificate: Annotated[
        str | None,
        Meta(min_length=1, description="file with the gateway's client certificate, if the resource requires one"),
    ] = None
    key: Annotated[
        str | None, Meta(min_length=1, description="file with the key of that certificate, if it is in another file")
    ] = None


@dataclass(frozen=True)
class ResourceFile:
    """One Azure OpenAI resource."""

    endpoint: Annotated[str, Meta(description="URL, such as https://NAME.openai.azure.com; a base path is kept")]
    api_key: Annotated[
        str | None,
        Meta(description="stored key, used unless a stage sets the client's own", extra={"secret": True}),
    ] = None
    proxy: Annotated[
        str | None,
        Meta(
            description="proxy to reach it: http://USER:PASSWORD@HOST:PORT or socks5://...; empty for none",
            extra={"secret": True},
        ),
    ] = None
    credential: Annotated[
        CredentialFile | None, Meta(description="Entra identity in place of a key: managed_identity, or a mapping")
    ] = None
    region: Annotated[
        str | None, Meta(min_length=1, description="Azure region, such as swedencentral; `gateway doctor` checks it")
    ] = None
    api_version: Annotated[
        str | None,
        Meta(
            pattern=VERSION,
            examples=["2024-10-21, 2025-04-01-preview or v1"],
            description="api-version for this resource; overrides `version` of the stage api_version",
        ),
    ] = None
    timeouts: Annotated[
        ResourceTimeouts | None, Meta(description="timeouts, in seconds, that differ from the global ones")
    ] = None
    tls: Annotated[TlsFile | None, Meta(description="private CA, or a client certificate for the gateway")] = None


@dataclass(frozen=True)
class PooledFile:
    """One deployment of a pool."""

    deployment: Annotated[str, Meta(description="RESOURCE/NAME")]
    priority: Annotated[
        int, Meta(ge=1, le=100, description="1 is tried first; the next priority only while those are unavailable")
    ] = 1
    weight: Annotated[
        float, Meta(gt=0, le=1000, description="share of the requests among deployments of the same priority")
    ] = 1.0


@dataclass(frozen=True)
class KeyFile:
    """One key of a team, as `gateway keys new` prints it."""

    digest: Annotated[str, Meta(description="sha256: and the hexadecimal SHA-256 of the key, never the key itself")]
    label: Annotated[
        str | None,
        Meta(
            min_length=1, description="holder of the key, for logs and limits; keys with the same label are one caller"
        ),
    ] = None
    created: Annotated[str | None, Meta(description="day it was created, for readers of this file")] = None
    expires: Annotated[
        str | None, Meta(description="last day (2027-01-31) or time (2027-01-31T18:00:00Z) of use, in UTC")
    ] = None
    disabled: Annotated[bool, Meta(description="true refuses the key without removing its line")] = False
    models: Annotated[
        str | list[str] | None,
        Meta(description="models that the key may use, all others are refused: names, or globs such as gpt-4o*"),
    ] = None


@dataclass(frozen=True)
class IdentityFile:
    """One issuer whose tokens clients may present, such as an Entra tenant."""

    issuer: Annotated[
        str, Meta(description="exact `iss` of its tokens, such as https://login.microsoftonline.com/TENANT/v2.0")
    ]
    audience: Annotated[
        str | list[str],
        Meta(min_length=1, description="accepted `aud` of tokens: api://gateway, or the id of an application"),
    ]
    jwks: Annotated[
        str | None, Meta(description="URL of its keys; default: from its metadata (.well-known/openid-configuration)")
    ] = None
    caller: Annotated[
        str | None, Meta(min_length=1, description="claim that names the caller; default: oid, else sub")
    ] = None
    leeway: Annotated[float, Meta(ge=0, le=600, description="tolerated clock difference, in seconds")] = 60.0


@dataclass(frozen=True)
class MatchFile:
    """The requests of a team; a request matches if any one of these does."""

    path_prefix: Annotated[str | list[str] | None, Meta(description="path before /v1, such as /research")] = None
    host: Annotated[str | list[str] | None, Meta(description="host name in the client's URL")] = None
    keys: Annotated[
        KeyFile | list[KeyFile] | None,
        Meta(description="the team's keys: digests (sha256:HEX), or what `gateway keys new` prints"),
    ] = None
    claims: Annotated[
        dict[str, str | list[str]] | None,
        Meta(description="claims of a token of `identity:`: all of them must match, each with one of its values"),
    ] = None


@dataclass(frozen=True)
class LogFile:
    """Log settings."""

    level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="lowest level that is logged")] = (
        "info"
    )
    format: Annotated[
        Literal["auto", "json", "text"],
        Meta(description="`auto` is text on a terminal, else one JSON object per line"),
    ] = "auto"


@dataclass(frozen=True)
class StoreFile:
    """The store in which limits are counted, so that several gateways share them."""

    redis: Annotated[
        str,
        Meta(
            description="Redis or Valkey: redis://USER:PASSWORD@HOST:PORT, rediss://... (TLS) or unix:///PATH",
            extra={"secret": True},
        ),
    ]
    cluster: Annotated[bool, Meta(description="whether it is a node of a cluster")] = False
    ca: Annotated[
        str | None, Meta(min_length=1, description="file with the CA of the server certificate, if it is private")
    ] = None
    timeout: Annotated[float, Meta(gt=0, le=60, description="timeout for a reply, in seconds")] = 0.25
    prefix: Annotated[
        str,
        Meta(
            pattern="^[A-Za-z0-9_.:-]{1,64}$",
            examples=["gateway"],
            description="prefix of its keys; gateways with the same prefix share their limits",
        ),
    ] = "gateway"


@dataclass(frozen=True)
class TeamFile:
    """One team's file; `gateway.yaml` has the defaults."""

    match: Annotated[MatchFile | None, Meta(description="requests of this team")] = None
    pipeline: Pipeline = None
    change: Annotated[
        RawNode | None, Meta(description="settings of inherited stages to replace, or `stage: off` to remove one")
    ] = None
    resource: Annotated[str | None, Meta(description="resource of deployments that name none")] = None
    auth: Auth | None = None


@dataclass(frozen=True)
class ListenFile:
    """An address to listen on; it may be written as a single value."""

    address: Annotated[str, Meta(description="HOST:PORT, or unix:PATH")]
    mode: Annotated[
        str | None,
        Meta(
            pattern=r"^0?[0-7]{3}$",
            examples=["0660"],
            description="permissions of a unix socket, in octal; default: 0660, for the gateway's user and group",
        ),
    ] = None


@dataclass(frozen=True)
class GatewayFile:
    """`gateway.yaml`: the server, the resources, and the default team."""

    listen: Annotated[
        ListenFile,
        Meta(description="address for clients: HOST:PORT, unix:PATH, or {address: ..., mode: ...}"),
    ] = field(default_factory=lambda: ListenFile("127.0.0.1:8080"))
    teams: Annotated[
        str | list[str], Meta(description="paths or patterns of the teams' files, from this file's folder")
    ] = field(default_factory=list)
    plugins_path: Annotated[str | list[str], Meta(description="folders with your own stages, one per file")] = field(
        default_factory=list
    )
    resources: Annotated[RawNode | None, Meta(description="Azure OpenAI resources by name")] = None
    pools: Annotated[
        RawNode | None, Meta(description="deployments of one model in several resources, by the pool's name")
    ] = None
    health: Annotated[
        HealthSettings,
        Meta(description="circuit breaker: when a failing deployment gets no requests, and for how long"),
    ] = field(default_factory=HealthSettings)
    identity: Annotated[
        IdentityFile | list[IdentityFile] | None,
        Meta(description="issuers whose tokens clients may present, such as Entra tenants"),
    ] = None
    match: Annotated[
        MatchFile | None, Meta(description="`keys` and `claims` of the default team, if it has its own")
    ] = None
    pipeline: Pipeline = None
    resource: Annotated[str | None, Meta(description="resource of deployments that name none")] = None
    auth: Auth = "required"
    admin: Annotated[
        ListenFile | None,
        Meta(description="address of the admin listener, written as in `listen`; default: none"),
    ] = None
    trusted_proxies: Annotated[
        str | list[str], Meta(description="addresses or networks whose X-Forwarded-For is trusted")
    ] = field(default_factory=list)
    prices: Annotated[
        dict[str, Price],
        Meta(description="prices of models, by the names that clients use or globs, for limits on spending"),
    ] = field(default_factory=dict)
    timeouts: Annotated[Timeouts, Meta(description="timeouts, in seconds")] = field(default_factory=Timeouts)
    limits: Annotated[Limits, Meta(description="size, rate and memory limits for clients")] = field(
        default_factory=Limits
    )
    store: Annotated[
        StoreFile | None, Meta(description="store in which limits are counted; default: this gateway's memory")
    ] = None
    log: Annotated[LogFile, Meta(description="log level and format")] = field(default_factory=LogFile)
    watch: Annotated[bool, Meta(description="whether a change of these files triggers a reload")] = True
