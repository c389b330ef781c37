"""The addresses of a configuration: `listen`, `admin` and `trusted_proxies`."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

from gateway.config.files import ListenFile
from gateway.config.nodes import MappingNode, Reader, value_of
from gateway.config.paths import as_list
from gateway.settings import Listen, Network

__all__ = ("read_listen", "read_trusted_proxies")


def read_listen(reader: Reader, given: ListenFile, name: str, root: MappingNode) -> Listen:
    """Return the address of `listen` or `admin`, and the default one in place of a wrong one."""
    node = value_of(root, name)
    mapping = node if isinstance(node, MappingNode) else root
    try:
        listen = Listen.parse(given.address)
    except ValueError as exc:
        reader.mistake(node if mapping is root else value_of(mapping, "address"), f"{name}: {exc}")
        return Listen()
    if given.mode is None:
        return listen
    if listen.unix is None:
        reader.mistake(value_of(mapping, "mode"), f"{name}: only a unix socket has a mode")
    return replace(listen, mode=int(given.mode, 8))


def read_trusted_proxies(reader: Reader, given: str | list[str], root: MappingNode) -> tuple[Network, ...]:
    """Return the networks of `trusted_proxies`."""
    networks: list[Network] = []
    for text in as_list(given):
        try:
            networks.append(ipaddress.ip_network(text, strict=False))
        except ValueError:
            reader.mistake(
                value_of(root, "trusted_proxies"), f"trusted_proxies: {text!r} is not an IP address or network"
            )
    return tuple(networks)
