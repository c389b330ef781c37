"""The pools of a configuration: deployments of one model in several resources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.azure.resources import Deployment, Pool, Resource
from gateway.azure.urls import DEPLOYMENT
from gateway.config.convert import FAILED, did_you_mean, fill
from gateway.config.files import PooledFile
from gateway.config.nodes import NAME, MappingNode, Reader, SequenceNode, value_of
from gateway.config.resources import UNKNOWN

__all__ = ("read_pools",)


def read_pools(reader: Reader, node: Any, resources: Mapping[str, Resource]) -> dict[str, Pool]:
    """Return the pools of a `pools:` mapping by name, including invalid ones, so that they are reported once."""
    pools: dict[str, Pool] = {}
    if node is None or reader.blank(node):
        return pools
    if not isinstance(node, MappingNode):
        reader.mistake(node, "pools must be a mapping: name: [RESOURCE/DEPLOYMENT, ...]")
        return pools
    for name, key, value in reader.pairs(node):
        if not NAME.fullmatch(name):
            reader.mistake(key, f"{name!r} is not a valid pool name: use letters, digits, . _ and -")
            continue
        found: list[Deployment] = []
        if not isinstance(value, SequenceNode) or not value.value:
            reader.mistake(value, f"pool {name!r} must be a list of deployments, each written as RESOURCE/NAME")
        for each in value.value if isinstance(value, SequenceNode) else ():
            made = fill(reader, each, PooledFile, f"pool {name!r}")
            if made is FAILED:
                continue
            deployment_node = value_of(each, "deployment")
            resource_name, _, deployment = made.deployment.strip().rpartition("/")
            if not resource_name:
                reader.mistake(deployment_node, f"pool {name!r}: write the deployment as RESOURCE/NAME")
                continue
            resource = resources.get(resource_name)
            if resource is None:
                known = did_you_mean(resource_name, resources)
                reader.mistake(deployment_node, f"pool {name!r}: there is no resource {resource_name!r}{known}")
            if not DEPLOYMENT.fullmatch(deployment):
                reader.mistake(
                    deployment_node,
                    f"pool {name!r}: {deployment!r} is not a valid deployment name: use at most 64 "
                    "letters, digits, . _ and -",
                )
            if any(str(known) == f"{resource_name}/{deployment}" for known in found):
                reader.mistake(deployment_node, f"pool {name!r} has {made.deployment.strip()} twice")
            if resource is not None and resource is not UNKNOWN:
                found.append(Deployment(resource, deployment, made.priority, made.weight))
        ordered = sorted(found, key=lambda each: each.priority)
        # An invalid pool is reported once, not again by its users.
        pools[name] = Pool(name, tuple(ordered) or (Deployment(UNKNOWN, "unknown"),))
    return pools
