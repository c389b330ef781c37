"""The proxy of a resource, from its `proxy:` URL. No text shows the password."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib.util import find_spec

from yarl import URL

__all__ = ("Proxy",)

_PORTS = {"http": 80, "socks5": 1080, "socks5h": 1080}
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?|[0-9A-Fa-f.]*:[0-9A-Fa-f:.]+")
# Maximum length of a SOCKS 5 user name or password (RFC 1929): the length field has one byte.
_MAX_SOCKS = 255


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy (by CONNECT) or a SOCKS 5 proxy; resources with equal proxies share connections."""

    host: str
    port: int
    socks: bool = False
    user: str | None = field(default=None, repr=False)
    password: str = field(default="", repr=False)

    @classmethod
    def parse(cls, text: str) -> Proxy:
        """Parse `http://USER:PASSWORD@HOST:PORT` or `socks5://...`. Raises ValueError, which never quotes the text."""
        try:
            url = URL(text)
            host, port = url.host or "", _PORTS.get(url.scheme) if url.port is None else url.port
        except ValueError:
            host, port = "", None
        if not port or not _HOST.fullmatch(host) or url.scheme not in _PORTS:
            raise ValueError("proxy must be a URL, such as http://user:password@proxy.example:3128 or socks5://...")
        if url.raw_path not in ("", "/") or url.query_string or url.fragment:
            # An unescaped / ? or # in a password ends the authority of a URL.
            raise ValueError("proxy must end after its port; write / ? # in a password as %2F %3F %23")
        user, password = url.user, url.password or ""
        socks = url.scheme != "http"
        both = (user or "") + password
        if user is None and password:
            raise ValueError("proxy has a password without a user name")
        if not both.isprintable() or (":" in (user or "") and not socks):
            raise ValueError("proxy: the user name or the password has a character that cannot be sent")
        if socks and user is not None:
            for part in (user, password):
                if not part.isascii() or not 0 < len(part) <= _MAX_SOCKS:
                    raise ValueError(
                        "proxy: SOCKS requires a user name and a password of 1 to 255 ASCII characters each"
                    )
        if socks and find_spec("python_socks") is None:
            raise ValueError("proxy: SOCKS requires the extra `socks`: pip install 'azure-openai-gateway[socks]'")
        return cls(host, port, socks, user, password)

    def __str__(self) -> str:
        """Return its URL with `***` for the user name and the password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        shown = "" if self.user is None else "***@"
        return f"{'socks5' if self.socks else 'http'}://{shown}{host}:{self.port}"
