"""Where requests go: Azure resources, pools of deployments in several of them, and the target of one request."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from gateway.auth.credentials import Credential
from gateway.protocol.proxy_url import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gateway.auth.entra_tokens import EntraTokens

__all__ = ("Deployment", "Pool", "Resource", "ResourceTimeouts", "Target", "Tls", "common_resource")


@dataclass(frozen=True, slots=True)
class Tls:
    """How a resource is spoken to over TLS, where not as usual: files in PEM.

    `digest` is that of their content, so that changed files are another `Tls`.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    digest: str = ""

    def context(self) -> ssl.SSLContext:
        """Return a context with these files. Raises OSError, as ssl.SSLError is one, where they are bad."""
        context = ssl.create_default_context(cafile=self.ca)
        if self.certificate is not None:
            # (Without the function, OpenSSL would ask for a passphrase on the terminal.)
            context.load_cert_chain(self.certificate, self.key, password=lambda: b"")
        return context


@dataclass(frozen=True)
class ResourceTimeouts:
    """How long, in seconds, the gateway waits for one resource; what is left out is as for all."""

    connect: Annotated[float | None, Meta(gt=0, description="for a connection to it, TLS included")] = None
    first_byte: Annotated[float | None, Meta(gt=0, description="for it to begin to answer")] = None
    idle: Annotated[float | None, Meta(gt=0, description="for the next bytes of an answer that has begun")] = None


@dataclass(frozen=True, slots=True)
class Resource:
    """One Azure OpenAI endpoint, as the configuration names it.

    Its own credential is either a key, or the tokens of an Entra identity. `api_version` is what it is asked with,
    where no stage says else.
    """

    name: str
    endpoint: str
    credential: Credential | None = None
    proxy: Proxy | None = None
    region: str | None = None
    api_version: str | None = None
    timeouts: ResourceTimeouts | None = None
    tls: Tls | None = None
    tokens: EntraTokens | None = None

    @property
    def has_credential(self) -> bool:
        """Whether it has one of its own, and can be asked without the client's."""
        return self.credential is not None or self.tokens is not None


@dataclass(frozen=True, slots=True)
class Deployment:
    """One deployment of a pool. The lowest `priority` is asked first; those of one share by `weight`."""

    resource: Resource
    name: str
    priority: int = 1
    weight: float = 1.0

    def __str__(self) -> str:
        return f"{self.resource.name}/{self.name}"


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Deployments of one model, of which any may answer, in the order of their priorities."""

    name: str
    deployments: tuple[Deployment, ...]

    def within(self, resource: Resource) -> Deployment | None:
        """Return its first deployment in a resource, or None."""
        return next((each for each in self.deployments if each.resource.name == resource.name), None)


class Target(msgspec.Struct, frozen=True):
    """Where a request goes. Stages replace it whole: `request.target = request.target.replace(deployment="x")`.

    `credential` is None where the resource's own is to be used. Of a `pool`, the stage `balance` picks the deployment;
    where the resource is known already, it is the pool's deployment there.
    """

    resource: Resource | None = None
    deployment: str | None = None
    api_version: str | None = None
    credential: Credential | None = None
    pool: Pool | None = None

    @property
    def is_v1(self) -> bool:
        """Whether it is asked on Azure's v1 API, which has no deployments in its paths."""
        return self.api_version == "v1"

    def replace(self, **fields: Any) -> Target:
        """Return this target with other values in some of its fields."""
        return msgspec.structs.replace(self, **fields)

    def to(self, found: Target) -> Target:
        """Return this target with the resource, the deployment and the pool of another."""
        return msgspec.structs.replace(self, resource=found.resource, deployment=found.deployment, pool=found.pool)

    def within(self, resource: Resource) -> Target | None:
        """Return this target with the deployment that it has in a resource, or None where it has none there."""
        if self.pool is None:
            return self if self.resource is not None and self.resource.name == resource.name else None
        there = self.pool.within(resource)
        return self.replace(resource=there.resource, deployment=there.name) if there is not None else None

    def settled(self, preferred: Resource | None) -> Target:
        """Return this target in one of the resources of its pool, if it has one: the preferred one, else the first."""
        if self.pool is None or self.resource is not None:
            return self
        there = self.within(preferred) if preferred is not None else None
        first = self.pool.deployments[0]
        return there or self.replace(resource=first.resource, deployment=first.name)

    @property
    def resources(self) -> Sequence[Resource | None]:
        """The resources that it may be in; None stands for one that is not known."""
        if self.pool is None or self.resource is not None:
            return (self.resource,)
        return [each.resource for each in self.pool.deployments]


def common_resource(targets: Iterable[Target]) -> Resource | None:
    """Return the first resource in which all of some targets are, or None."""
    first, *others = targets
    for resource in first.resources:
        if resource is not None and all(each.within(resource) is not None for each in others):
            return resource
    return None
