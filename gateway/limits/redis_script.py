"""The script where it runs: one connection to a Redis, or to the node of a cluster that has the limits."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from gateway.dns_resolver import connected_socket
from gateway.limits.redis_url import RedisUrl

__all__ = ("SCRIPT", "RedisScript")

SCRIPT = files("gateway.limits").joinpath("redis.lua").read_text(encoding="utf-8")
# How often a cluster may send a call to another node.
_HOPS = 4


class RedisScript:
    """A script in a Redis. It raises whatever the library does: OSError, RedisError and others."""

    def __init__(self, place: RedisUrl, text: str = SCRIPT) -> None:
        self._place = place
        self._text = text.encode()
        self._sha = hashlib.sha1(self._text, usedforsecurity=False).hexdigest()
        self._client: Any = None  # a redis.asyncio.Redis: its methods have no types
        self._nodes = [(place.host, place.port)]
        self._node = self._nodes[0]
        self.connected = False
        """Whether the connection has carried an answer already."""

    async def run(self, *arguments: Any) -> Any:
        """Run the script. In a cluster, the node that has the limits is found by asking any other."""
        from redis.exceptions import MovedError  # noqa: PLC0415 -- an extra

        for _ in range(_HOPS):
            client = self._client or await self._connect()
            try:
                reply = await self._evaluate(client, arguments)
            except MovedError as exc:
                if not self._place.cluster:
                    raise
                await self.hang_up()
                self._node = (exc.host or self._node[0], exc.port)
            else:
                self.connected = True
                return reply
        raise ConnectionError("the cluster sends the gateway from node to node")

    async def _evaluate(self, client: Any, arguments: Sequence[Any]) -> Any:
        from redis.exceptions import NoScriptError  # noqa: PLC0415 -- an extra

        try:
            return await client.execute_command("EVALSHA", self._sha, *arguments)
        except NoScriptError:
            return await client.execute_command("EVAL", self._text, *arguments)

    async def _connect(self) -> Any:
        from redis.asyncio import Redis  # noqa: PLC0415 -- an extra
        from redis.asyncio.retry import Retry  # noqa: PLC0415
        from redis.backoff import NoBackoff  # noqa: PLC0415

        place = self._place
        common: dict[str, Any] = {
            "username": place.user,
            "password": place.password,
            "protocol": 2,
            # Our own clock is what ends a call.
            "socket_timeout": None,
            "socket_connect_timeout": None,
            # A connection that broke while nobody looked; to repeat a call is safe.
            "retry": Retry(NoBackoff(), 1),
        }
        if place.tls:
            common |= {"ssl": True, "ssl_cert_reqs": "required", "ssl_check_hostname": True}
            common |= {"ssl_ca_certs": None if place.ca is None else str(place.ca)}
        if place.unix is not None:
            self._client = Redis(unix_socket_path=place.unix, **common)
        else:
            host, port = self._node
            self._client = Redis(host=host, port=port, db=place.database, **common)
            pool = self._client.connection_pool
            pool.connection_class = _looked_up_here(pool.connection_class)
        if place.cluster:
            await self._learn_nodes(self._client)
        return self._client

    async def _learn_nodes(self, client: Any) -> None:
        """Learn which nodes a cluster has: the one that the configuration names may be away one day."""
        from redis.exceptions import ResponseError  # noqa: PLC0415 -- an extra

        with contextlib.suppress(ResponseError):  # a user that may not ask
            shards: Any = await client.execute_command("CLUSTER", "SLOTS")
            nodes = [
                # (A node that does not know its own name is reached by the one that was used.)
                ((node[0] or b"").decode() or self._node[0], int(node[1]))
                for shard in shards
                for node in shard[2:]
            ]
            self._nodes = list(dict.fromkeys([(self._place.host, self._place.port), *nodes]))

    async def hang_up(self) -> None:
        """Close the connection; the next call makes another."""
        client, self._client, self.connected = self._client, None, False
        if client is not None:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(1):
                    await client.aclose()

    def try_another(self) -> None:
        """Turn to the next node of a cluster; there is but one else."""
        if self._node in self._nodes:
            self._node = self._nodes[(self._nodes.index(self._node) + 1) % len(self._nodes)]
        else:
            self._node = self._nodes[0]


@cache
def _looked_up_here(connection: Any) -> Any:
    """Return a connection class of the library whose host names are looked up by our resolver."""

    class LookedUpHere(connection):  # type: ignore[misc] # redis.asyncio.Connection, or the one with TLS
        async def _connect(self) -> None:
            self._connected = await connected_socket(self.host, self.port)
            await super()._connect()

        def _connection_arguments(self) -> dict[str, Any]:
            given = dict(super()._connection_arguments())
            host, _ = given.pop("host"), given.pop("port")
            if given.get("ssl") is not None:
                given["server_hostname"] = host
            return {**given, "sock": self._connected}

    return LookedUpHere
