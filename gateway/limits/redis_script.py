"""Runs the Lua script in Redis: one connection to a server, or to the cluster node that has the keys."""

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
# Maximum number of nodes to try per call in a cluster.
_MAX_HOPS = 4


class RedisScript:
    """A script in a Redis. It raises every error of the library: OSError, RedisError and others."""

    def __init__(self, url: RedisUrl, text: str = SCRIPT) -> None:
        self._url = url
        self._text = text.encode()
        self._sha = hashlib.sha1(self._text, usedforsecurity=False).hexdigest()
        self._client: Any = None  # a redis.asyncio.Redis: its methods have no types
        self._nodes = [(url.host, url.port)]
        self._node = self._nodes[0]
        self.connected = False
        """Whether the connection has delivered a reply."""

    async def run(self, *arguments: Any) -> Any:
        """Run the script. In a cluster, any node redirects to the one that has the keys."""
        from redis.exceptions import MovedError  # noqa: PLC0415 -- an extra

        for _ in range(_MAX_HOPS):
            client = self._client or await self._connect()
            try:
                reply = await self._evaluate(client, arguments)
            except MovedError as exc:
                if not self._url.cluster:
                    raise
                await self.disconnect()
                self._node = (exc.host or self._node[0], exc.port)
            else:
                self.connected = True
                return reply
        raise ConnectionError(f"the cluster redirected the call more than {_MAX_HOPS} times")

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

        url = self._url
        common: dict[str, Any] = {
            "username": url.user,
            "password": url.password,
            "protocol": 2,
            # The caller has a timeout.
            "socket_timeout": None,
            "socket_connect_timeout": None,
            # The connection may have broken while it was idle. Calls are idempotent.
            "retry": Retry(NoBackoff(), 1),
        }
        if url.tls:
            common |= {"ssl": True, "ssl_cert_reqs": "required", "ssl_check_hostname": True}
            common |= {"ssl_ca_certs": None if url.ca is None else str(url.ca)}
        if url.unix is not None:
            self._client = Redis(unix_socket_path=url.unix, **common)
        else:
            host, port = self._node
            self._client = Redis(host=host, port=port, db=url.database, **common)
            pool = self._client.connection_pool
            pool.connection_class = _with_own_resolver(pool.connection_class)
        if url.cluster:
            await self._learn_nodes(self._client)
        return self._client

    async def _learn_nodes(self, client: Any) -> None:
        """Learn the nodes of the cluster, in case the configured one becomes unavailable."""
        from redis.exceptions import ResponseError  # noqa: PLC0415 -- an extra

        with contextlib.suppress(ResponseError):  # the user has no permission
            shards: Any = await client.execute_command("CLUSTER", "SLOTS")
            nodes = [
                # (A node that does not know its own name has the one we connected to.)
                ((node[0] or b"").decode() or self._node[0], int(node[1]))
                for shard in shards
                for node in shard[2:]
            ]
            self._nodes = list(dict.fromkeys([(self._url.host, self._url.port), *nodes]))

    async def disconnect(self) -> None:
        """Close the connection. The next call opens a new one."""
        client, self._client, self.connected = self._client, None, False
        if client is not None:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(1):
                    await client.aclose()

    def use_next_node(self) -> None:
        """Use the next node of a cluster for the next connection. Without a cluster there is only one."""
        if self._node in self._nodes:
            self._node = self._nodes[(self._nodes.index(self._node) + 1) % len(self._nodes)]
        else:
            self._node = self._nodes[0]


@cache
def _with_own_resolver(connection: Any) -> Any:
    """Return a subclass of the library's connection that resolves host names with the gateway's resolver."""

    class ConnectionWithOwnResolver(connection):  # type: ignore[misc] # redis.asyncio.Connection, or the one with TLS
        async def _connect(self) -> None:
            self._connected = await connected_socket(self.host, self.port)
            await super()._connect()

        def _connection_arguments(self) -> dict[str, Any]:
            given = dict(super()._connection_arguments())
            host, _ = given.pop("host"), given.pop("port")
            if given.get("ssl") is not None:
                given["server_hostname"] = host
            return {**given, "sock": self._connected}

    return ConnectionWithOwnResolver
