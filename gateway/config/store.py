"""Where limits are counted, as `store:` of a configuration names it."""

from __future__ import annotations

from pathlib import Path

from gateway.config.files import StoreFile
from gateway.config.nodes import Node, Reader, value_of
from gateway.counters.place import RedisPlace
from gateway.counters.redis import RedisCounters
from gateway.services import Shared

__all__ = ("count_in", "read_store")


def read_store(reader: Reader, store: StoreFile | None, node: Node, folder: Path) -> RedisPlace | None:
    """Return the Redis that is named, or None; what is wrong with it is noted where it stands."""
    if store is None:
        return None
    ca = None if store.ca is None else folder / store.ca
    if ca is not None and (problem := _unreadable(ca)):
        reader.mistake(value_of(node, "ca"), f"store.ca: cannot read {store.ca}: {problem}")
        return None
    try:
        return RedisPlace.parse(
            store.redis.strip(), cluster=store.cluster, ca=ca, timeout=store.timeout, prefix=store.prefix
        )
    except ValueError as exc:
        reader.mistake(value_of(node, "redis"), f"store.redis: {exc}")
        return None


def count_in(shared: Shared, place: RedisPlace | None) -> None:
    """Let limits be counted there. Where they are already, as before a reload, they go on as they are."""
    now = shared.counters.store
    if place is None:
        if isinstance(now, RedisCounters):
            shared.count_in(None)
    elif not isinstance(now, RedisCounters) or now.place != place:
        shared.count_in(RedisCounters(place))


def _unreadable(path: Path) -> str | None:
    """Return why a file with certificates cannot be used, or None."""
    try:
        text = path.read_bytes()
    except (OSError, ValueError) as exc:
        return getattr(exc, "strerror", None) or "its name is no name"
    return None if b"-----BEGIN CERTIFICATE-----" in text else "it holds no certificate (PEM)"
