"""What the two kinds of configuration file may say: `gateway.yaml`, and one file per team."""

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
    Meta(description="the stages, in order: the first sees the request first, the answer last"),
]
Auth = Annotated[
    Literal["none", "required"],
    Meta(description="`none` lets clients without a key spend a resource's own credential"),
]


@dataclass(frozen=True)
class CredentialFile:
    """An Entra identity of the gateway's own, whose tokens a resource is shown in place of a key."""

    kind: Annotated[
        Literal["managed_identity", "workload_identity", "client_secret"],
        # (Not shown where it is wrong: it may be a key, written here where `api_key` is meant.)
        Meta(description="what the identity is: the machine's, the pod's, or an application's", extra={"secret": True}),
    ]
    client_id: Annotated[
        str | None, Meta(min_length=1, description="of the application, or of a managed identity assigned by a user")
    ] = None
    tenant: Annotated[str | None, Meta(min_length=1, description="the tenant's id; a managed identity has none")] = None
    client_secret: Annotated[
        str | None, Meta(min_length=1, description="the application's secret", extra={"secret": True})
    ] = None
    token_file: Annotated[
        str | None, Meta(min_length=1, description="the file with a workload's federated token, read anew each time")
    ] = None
    scope: Annotated[
        str,
        Meta(pattern=r"^\S+/\.default$", examples=["https://ai.azure.com/.default"], description="for what it asks"),
    ] = "https://cognitiveservices.azure.com/.default"
    authority: Annotated[
        str | None, Meta(description="who gives the tokens, in a sovereign cloud: https://login.microsoftonline.us")
    ] = None


@dataclass(frozen=True)
class TlsFile:
    """How a resource is spoken to over TLS, where not as usual; the files are PEM."""

    ca: Annotated[str | None, Meta(min_length=1, description="a file with the CA of its certificate, if private")] = (
        None
    )
    certificate: Annotated[
        str | None, Meta(min_length=1, description="a file with the gateway's own certificate, if it wants one")
    ] = None
    key: Annotated[
        str | None, Meta(min_length=1, description="the file with that certificate's key, if it is another")
    ] = None


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
    credential: Annotated[
        CredentialFile | None, Meta(description="an Entra identity in place of a key: managed_identity, or more of it")
    ] = None
    region: Annotated[
        str | None, Meta(min_length=1, description="where it is, such as swedencentral; `gateway doctor` compares")
    ] = None
    api_version: Annotated[
        str | None,
        Meta(
            pattern=VERSION,
            examples=["2024-10-21, 2025-04-01-preview or v1"],
            description="what it is asked with, in place of the `version` of the stage api_version",
        ),
    ] = None
    timeouts: Annotated[
        ResourceTimeouts | None, Meta(description="how long it is waited for, where not as long as all others")
    ] = None
    tls: Annotated[TlsFile | None, Meta(description="its own CA, or a certificate that it wants of the gateway")] = None


@dataclass(frozen=True)
class PooledFile:
    """One deployment of a pool."""

    deployment: Annotated[str, Meta(description="RESOURCE/NAME")]
    priority: Annotated[int, Meta(ge=1, le=100, description="1 is asked first; the next while those cannot be")] = 1
    weight: Annotated[float, Meta(gt=0, le=1000, description="its share among those of one priority")] = 1.0


@dataclass(frozen=True)
class KeyFile:
    """One key of a team, as `gateway keys new` prints it."""

    digest: Annotated[str, Meta(description="sha256: and the hexadecimal SHA-256 of the key; never the key itself")]
    label: Annotated[
        str | None, Meta(min_length=1, description="who has it, for logs and limits; keys of one label are one caller")
    ] = None
    created: Annotated[str | None, Meta(description="the day it was made, for whoever reads this file")] = None
    expires: Annotated[
        str | None, Meta(description="its last day (2027-01-31) or moment (2027-01-31T18:00:00Z), in UTC")
    ] = None
    disabled: Annotated[bool, Meta(description="true refuses it, and keeps its line")] = False
    models: Annotated[
        str | list[str] | None, Meta(description="the only models that it may use: names, or globs such as gpt-4o*")
    ] = None


@dataclass(frozen=True)
class IdentityFile:
    """One issuer whose tokens clients may present, such as an Entra tenant."""

    issuer: Annotated[
        str, Meta(description="the `iss` of its tokens, to the letter: https://login.microsoftonline.com/TENANT/v2.0")
    ]
    audience: Annotated[
        str | list[str],
        Meta(min_length=1, description="for whom tokens must be: api://gateway, or an application's id"),
    ]
    jwks: Annotated[
        str | None, Meta(description="the URL of its keys; its metadata (.well-known/openid-configuration) says it")
    ] = None
    caller: Annotated[
        str | None, Meta(min_length=1, description="the claim that names the caller; oid, else sub, if it is left out")
    ] = None
    leeway: Annotated[float, Meta(ge=0, le=600, description="how far clocks may differ, in seconds")] = 60.0


@dataclass(frozen=True)
class MatchFile:
    """Whose requests a team's are: any one of these is enough."""

    path_prefix: Annotated[str | list[str] | None, Meta(description="the path before /v1, such as /research")] = None
    host: Annotated[str | list[str] | None, Meta(description="the host name in the client's URL")] = None
    keys: Annotated[
        KeyFile | list[KeyFile] | None,
        Meta(description="the team's keys: digests (sha256:HEX), or what `gateway keys new` prints"),
    ] = None
    claims: Annotated[
        dict[str, str | list[str]] | None,
        Meta(description="what a token of `identity:` must say: every claim that is named, with one of its values"),
    ] = None


@dataclass(frozen=True)
class LogFile:
    """What is logged, and how."""

    level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="the least that is shown")] = "info"
    format: Annotated[
        Literal["auto", "json", "text"],
        Meta(description="`auto` is text on a terminal, else one JSON object a line"),
    ] = "auto"


@dataclass(frozen=True)
class StoreFile:
    """Where limits are counted, so that several gateways keep one."""

    redis: Annotated[
        str,
        Meta(
            description="a Redis or Valkey: redis://USER:PASSWORD@HOST:PORT, rediss://... (TLS) or unix:///PATH",
            extra={"secret": True},
        ),
    ]
    cluster: Annotated[bool, Meta(description="it is one node of a cluster")] = False
    ca: Annotated[str | None, Meta(min_length=1, description="a file with the CA of its certificate, if private")] = (
        None
    )
    timeout: Annotated[float, Meta(gt=0, le=60, description="for it to answer, in seconds")] = 0.25
    prefix: Annotated[
        str,
        Meta(
            pattern="^[A-Za-z0-9_.:-]{1,64}$",
            examples=["gateway"],
            description="what its keys begin with; gateways with one prefix share their limits",
        ),
    ] = "gateway"


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
class ListenFile:
    """An address to listen on; it may stand alone."""

    address: Annotated[str, Meta(description="HOST:PORT, or unix:PATH")]
    mode: Annotated[
        str | None,
        Meta(
            pattern=r"^0?[0-7]{3}$",
            examples=["0660"],
            description="permissions of a unix socket, in octal: 0660 if left out, for the gateway's user and group",
        ),
    ] = None


@dataclass(frozen=True)
class GatewayFile:
    """`gateway.yaml`: the server, the resources, and the default team."""

    listen: Annotated[
        ListenFile,
        Meta(description="where clients find the gateway: HOST:PORT, or unix:PATH, or {address: ..., mode: ...}"),
    ] = field(default_factory=lambda: ListenFile("127.0.0.1:8080"))
    teams: Annotated[str | list[str], Meta(description="the teams' files, as patterns from this file's folder")] = (
        field(default_factory=list)
    )
    plugins_path: Annotated[str | list[str], Meta(description="folders with stages of your own, one a file")] = field(
        default_factory=list
    )
    resources: Annotated[RawNode | None, Meta(description="the Azure OpenAI resources by name")] = None
    pools: Annotated[
        RawNode | None, Meta(description="deployments of one model in several resources, by the pool's name")
    ] = None
    health: Annotated[
        HealthSettings, Meta(description="when a deployment is left alone for a while, because it fails")
    ] = field(default_factory=HealthSettings)
    identity: Annotated[
        IdentityFile | list[IdentityFile] | None, Meta(description="whose tokens clients may present, as with Entra")
    ] = None
    match: Annotated[
        MatchFile | None, Meta(description="the default team's `keys` and `claims`, if it has some of its own")
    ] = None
    pipeline: Pipeline = None
    resource: Annotated[str | None, Meta(description="the resource of deployments that name none")] = None
    auth: Auth = "required"
    admin: Annotated[
        ListenFile | None,
        Meta(description="where the gateway tells its operator how it is, as with `listen`; nowhere if left out"),
    ] = None
    trusted_proxies: Annotated[
        str | list[str], Meta(description="addresses or networks whose X-Forwarded-For is believed")
    ] = field(default_factory=list)
    prices: Annotated[
        dict[str, Price],
        Meta(description="what models cost, by the names that clients use or globs, for limits of what may be spent"),
    ] = field(default_factory=dict)
    timeouts: Annotated[Timeouts, Meta(description="how long the gateway waits, in seconds")] = field(
        default_factory=Timeouts
    )
    limits: Annotated[Limits, Meta(description="how much the gateway takes")] = field(default_factory=Limits)
    store: Annotated[
        StoreFile | None, Meta(description="where limits are counted; by this gateway alone if it is left out")
    ] = None
    log: Annotated[LogFile, Meta(description="what is logged, and how")] = field(default_factory=LogFile)
    watch: Annotated[bool, Meta(description="whether a change of these files is taken over while the gateway runs")] = (
        True
    )
