"""The URL of a Redis server, as in the setting `store:`. No text contains its password."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

from yarl import URL

__all__ = ("RedisUrl",)

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?|[0-9A-Fa-f.]*:[0-9A-Fa-f:.]+")
_UNIX = re.compile(r"unix://(?:(?P<user>[^@/:]*)(?::(?P<password>[^@/]*))?@)?(?P<path>/[^?#]+)")
_PORT = 6379
# (The message does not repeat the invalid URL: it may contain a password.)
_EXPECTED = (
    "it must be a URL: redis://USER:PASSWORD@HOST:PORT, rediss://... for TLS, or unix:///PATH; "
    "encode / ? # @ in a password as %2F %3F %23 %40"
)


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """The address of a Redis or Valkey server or cluster. Equal addresses share one connection."""

    host: str = ""
    port: int = _PORT
    unix: str | None = None
    database: int = 0
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    ca: Path | None = None
    cluster: bool = False
    timeout: float = 0.25
    prefix: str = "gateway"

    @classmethod
    def parse(
        cls, text: str, *, cluster: bool = False, ca: Path | None = None, timeout: float = 0.25, prefix: str = "gateway"
    ) -> RedisUrl:
        """Parse `redis://USER:PASSWORD@HOST:PORT/DATABASE`, `rediss://...` or `unix:///PATH`.

        Raises ValueError. The message does not repeat the text.
        """
        url = _parse_unix_socket(text) if text.startswith("unix:") else _parse_url(text)
        if cluster and (url.unix is not None or url.database):
            raise ValueError("a cluster has neither a unix socket nor databases; write redis://HOST:PORT")
        if ca is not None and not url.tls:
            raise ValueError("`ca` is for TLS; write rediss://")
        if find_spec("redis") is None:
            raise ValueError("Redis needs the extra `redis`: pip install 'azure-openai-gateway[redis]'")
        return replace(url, cluster=cluster, ca=ca, timeout=timeout, prefix=prefix)

    @property
    def keys(self) -> str:
        """The prefix of all keys: a hash tag, so that the keys of one call are on one shard of a cluster."""
        return f"{{{self.prefix}}}:"

    def __str__(self) -> str:
        """Return the address without the user and the password."""
        kind = ("a Redis cluster" if self.cluster else "Redis") + (" over TLS" if self.tls else "")
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{kind} at {self.unix or f'{host}:{self.port}'}"


def _parse_unix_socket(text: str) -> RedisUrl:
    found = _UNIX.fullmatch(text)
    if found is None:
        raise ValueError(_EXPECTED)
    user, password, path = (unquote(each) if each else None for each in found.group("user", "password", "path"))
    return RedisUrl(unix=path, user=user, password=password)


def _parse_url(text: str) -> RedisUrl:
    try:
        url = URL(text)
        host, port = url.host or "", url.port or _PORT
    except ValueError:
        raise ValueError(_EXPECTED) from None
    if url.scheme not in ("redis", "rediss") or not _HOST.fullmatch(host) or url.query_string or url.fragment:
        # An unescaped / ? or # in a password ends the authority part of a URL.
        raise ValueError(_EXPECTED)
    database = url.path.strip("/") or "0"
    if not re.fullmatch("[0-9]{1,5}", database):
        raise ValueError("the path must be the number of a database, as in redis://HOST:6379/1")
    return RedisUrl(
        host=host,
        port=port,
        database=int(database),
        user=url.user or None,
        password=url.password or None,
        tls=url.scheme == "rediss",
    )
