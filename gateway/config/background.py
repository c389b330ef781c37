"""Background work of a configuration: fetching Entra tokens, and sharing the health of deployments."""

from __future__ import annotations

from collections.abc import Iterable

from gateway.azure.resources import Resource
from gateway.balancing.shared_health import SharedHealth
from gateway.limits.redis_url import RedisUrl
from gateway.services import Shared
from gateway.teams import Background

__all__ = ("background_work",)


def background_work(
    resources: Iterable[Resource], store: RedisUrl | None, shared: Shared, *, with_pools: bool
) -> list[Background]:
    """Return the work that runs beside requests."""
    tokens = {id(each.tokens): each.tokens for each in resources if each.tokens is not None}
    work: list[Background] = list(tokens.values())
    if store is not None and with_pools:
        work.append(SharedHealth(store, shared.health))
    return work
