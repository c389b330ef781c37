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
    """TLS files of one resource, in PEM, if it needs others than the system's.

    `digest` is the digest of their content, so that changed files make a different `Tls`.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    digest: str = ""

    def context(self) -> ssl.SSLContext:
        """Return a context with these files. Raises OSError (ssl.SSLError is one) if they are invalid."""
        context = ssl.create_default_context(cafile=self.ca)
        if self.certificate is not None:
            # Without `password`, OpenSSL would prompt for a passphrase on the terminal.
            context.load_cert_chain(self.certificate, self.key, password=lambda: b"")
        return context


@dataclass(frozen=True)
class ResourceTimeouts:
    """Timeouts of one resource, in seconds; None means the gateway's own."""

    connect: Annotated[float | None, Meta(gt=0, description="connect timeout, in seconds, including TLS")] = None
    first_byte: Annotated[
        float | None, Meta(gt=0, description="timeout, in seconds, for the first byte of the response")
    ] = None
    idle: Annotated[float | None, Meta(gt=0, description="idle timeout, in seconds, between response bytes")] = None


@dataclass(frozen=True, slots=True)
class Resource:
    """One Azure OpenAI endpoint of the configuration.

    Its own credential is a key, or the tokens of an Entra identity. `api_version` applies unless a stage sets another.
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
        """Whether it has a credential of its own, and so does not need the client's."""
        return self.credential is not None or self.tokens is not None


@dataclass(frozen=True, slots=True)
class Deployment:
    """One deployment of a pool. The lowest `priority` is used first; equal ones share requests by `weight`."""

    resource: Resource
    name: str
    priority: int = 1
    weight: float = 1.0

    def __str__(self) -> str:
        return f"{self.resource.name}/{self.name}"


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Interchangeable deployments of one model, in the order of their priorities."""

    name: str
    deployments: tuple[Deployment, ...]

    def within(self, resource: Resource) -> Deployment | None:
        """Return the first deployment in a resource, or None."""
        return next((each for each in self.deployments if each.resource.name == resource.name), None)


class Target(msgspec.Struct, frozen=True):
    """The destination of a request. Stages replace it: `request.target = request.target.replace(deployment="x")`.

    A `credential` of None means the resource's own. If `pool` is set and `resource` is not, the stage `balance` selects
    one of its deployments; with both, the target is the pool's deployment in that resource.
    """

    resource: Resource | None = None
    deployment: str | None = None
    api_version: str | None = None
    credential: Credential | None = None
    pool: Pool | None = None

    @property
    def is_v1(self) -> bool:
        """Whether it uses Azure's v1 API, which has no deployments in its paths."""
        return self.api_version == "v1"

    def replace(self, **fields: Any) -> Target:
        """Return a copy with some fields changed."""
        return msgspec.structs.replace(self, **fields)

    def routed_to(self, other: Target) -> Target:
        """Return this target with the resource, the deployment and the pool of another."""
        return msgspec.structs.replace(self, resource=other.resource, deployment=other.deployment, pool=other.pool)

    def within(self, resource: Resource) -> Target | None:
        """Return this target with its deployment in a resource, or None if it has none there."""
        if self.pool is None:
            return self if self.resource is not None and self.resource.name == resource.name else None
        deployment = self.pool.within(resource)
        if deployment is None:
            return None
        return self.replace(resource=deployment.resource, deployment=deployment.name)

    def pinned(self, preferred: Resource | None) -> Target:
        """Return this target in one resource of its pool, if it has one: the preferred resource, or else the first."""
        if self.pool is None or self.resource is not None:
            return self
        in_preferred = self.within(preferred) if preferred is not None else None
        first = self.pool.deployments[0]
        return in_preferred or self.replace(resource=first.resource, deployment=first.name)

    @property
    def resources(self) -> Sequence[Resource | None]:
        """The resources that it may use; None means a resource that is not known yet."""
        if self.pool is None or self.resource is not None:
            return (self.resource,)
        return [each.resource for each in self.pool.deployments]


def common_resource(targets: Iterable[Target]) -> Resource | None:
    """Return the first resource that has all these targets, or None."""
    first, *others = targets
    for resource in first.resources:
        if resource is not None and all(each.within(resource) is not None for each in others):
            return resource
    return None
