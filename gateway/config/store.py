"""The store of a configuration: the Redis in which limits are counted."""

from __future__ import annotations

from pathlib import Path

from gateway.config.files import StoreFile
from gateway.config.nodes import Node, Reader, value_of
from gateway.limits.redis_counters import RedisCounters
from gateway.limits.redis_url import RedisUrl
from gateway.limits.wait_queue import WaitQueue
from gateway.services import Shared

__all__ = ("counters_of", "read_store")


def read_store(reader: Reader, store: StoreFile | None, node: Node, folder: Path) -> RedisUrl | None:
    """Return the Redis of `store:`, or None; mistakes are noted."""
    if store is None:
        return None
    ca = None if store.ca is None else folder / store.ca
    if ca is not None and (problem := _unreadable(ca)):
        reader.mistake(value_of(node, "ca"), f"store.ca: cannot read {store.ca}: {problem}")
        return None
    try:
        return RedisUrl.parse(
            store.redis.strip(), cluster=store.cluster, ca=ca, timeout=store.timeout, prefix=store.prefix
        )
    except ValueError as exc:
        reader.mistake(value_of(node, "redis"), f"store.redis: {exc}")
        return None


def counters_of(shared: Shared, store: RedisUrl | None) -> WaitQueue | None:
    """Return the counters of a store; None if limits are counted in this process, or on this machine."""
    if store is None:
        return None
    import redis.asyncio  # noqa: F401, PLC0415 -- an extra, loaded here so that no request waits for the import

    return shared.counters_of(store, lambda: RedisCounters(store))


def _unreadable(path: Path) -> str | None:
    """Return why a file with certificates cannot be used, or None."""
    try:
        text = path.read_bytes()
    except (OSError, ValueError) as exc:
        return getattr(exc, "strerror", None) or "the name is not valid"
    return None if b"-----BEGIN CERTIFICATE-----" in text else "it has no certificate in PEM format"
