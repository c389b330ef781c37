"""The signing keys of a token issuer (JWKS): fetched, cached, and rotated when the issuer rotates them.

They are fetched in the background, so that neither a start nor a known token waits for the issuer. If a fetch fails,
the current keys stay valid for `MAX_AGE` seconds. A fetch replaces all keys: a key that the issuer has removed is no
longer valid.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from gateway.auth.background_refresh import BackgroundRefresh
from gateway.logs import get_logger

__all__ = ("ALGORITHMS", "IssuerKeys", "KeysUnavailable", "SigningKey", "url_problem")

# All in seconds. The refresh interval; the backoff after a failed fetch, initial and maximum; the age at which keys
# expire; and the minimum time between two fetches because of unknown keys.
REFRESH_INTERVAL = 3600.0
MIN_RETRY, MAX_RETRY = 10.0, 300.0
MAX_AGE = 24 * 3600.0
MIN_FORCED_INTERVAL = 30.0
# Timeout of a fetch: a client may wait for it.
TIMEOUT = 5.0
# Entra's largest response is some 20 KB.
MAX_BYTES = 256 * 1024
MIN_RSA_BITS = 2048

_RSA = frozenset(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"))
_CURVES = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}
ALGORITHMS = _RSA | frozenset(_CURVES.values())
"""The accepted signature algorithms: never `none`, and none with a shared secret."""


class KeysUnavailable(Exception):
    """The keys of the issuer are unavailable; retry in `retry_after` seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the keys of the issuer are unavailable")
        self.retry_after = retry_after


@dataclass(frozen=True, eq=False, slots=True)
class SigningKey:
    """A public key and its allowed algorithms. The key is valid as long as `IssuerKeys.get` returns this object."""

    kid: str
    algorithms: frozenset[str]
    public: Any = field(repr=False)
    jwk: dict[str, Any] = field(repr=False)


class IssuerKeys:
    """The keys of one issuer, by their `kid`."""

    def __init__(
        self,
        issuer: str,
        url: str | None,
        session: Callable[[], aiohttp.ClientSession],
        clock: Callable[[], float] = time.monotonic,
        cache: MutableMapping[str, Any] | None = None,
    ) -> None:
        """`url` is the URL of the keys; None to read it from the issuer's metadata (OpenID Connect Discovery 1.0, 4).

        `cache` keeps the keys across reloads.
        """
        self.issuer = issuer
        self._url = url
        self._session = session
        self._clock = clock
        self._cache = {} if cache is None else cache
        self.cache_key = f"{issuer} {url}"
        """The key of these keys in the cache."""
        self._keys: dict[str, SigningKey]
        self._keys, self._good_until = self._cache.get(self.cache_key, ({}, 0.0))
        self._no_fetch_until = 0.0
        self._failed = True  # whether the last fetch failed
        self._refresh = BackgroundRefresh(self._fetch, f"keys of {issuer}")

    def start(self) -> None:
        """Fetch the keys in the background, and refresh them regularly."""
        self._refresh.start(self._keep_fresh())

    async def stop(self) -> None:
        """Stop fetching."""
        await self._refresh.stop()

    def get(self, kid: str) -> SigningKey | None:
        """Return a valid key, or None. Fetches nothing."""
        return self._keys.get(kid) if self._clock() < self._good_until else None

    async def find(self, kid: str) -> SigningKey | None:
        """Return a key by its id. Fetches the keys if it is unknown; returns None if the issuer has no such key.

        If a fetch is in progress, the caller waits for that one. Raises KeysUnavailable.
        """
        if (key := self.get(kid)) is not None:
            return key
        if not self._refresh.in_progress:
            now = self._clock()
            if now < self._no_fetch_until:
                # Clients can invent key ids: these must not cause requests to the issuer.
                if self._failed:
                    raise KeysUnavailable(self._no_fetch_until - now)
                return None
            self._no_fetch_until = now + MIN_FORCED_INTERVAL
        await self._refresh.refresh()
        key = self.get(kid)
        if key is None and self._failed:
            raise KeysUnavailable(MIN_RETRY)
        return key

    # -- fetching --------------------------------------------------------------------------------------

    async def _keep_fresh(self) -> None:
        retry = MIN_RETRY
        while True:
            await self._refresh.refresh()
            await asyncio.sleep(retry if self._failed else REFRESH_INTERVAL)
            retry = min(retry * 2, MAX_RETRY) if self._failed else MIN_RETRY

    async def _fetch(self) -> None:
        self._failed = True
        try:
            async with asyncio.timeout(TIMEOUT):
                url = self._url or await self._discover()
                listed = (await self._get(url)).get("keys")
            if not isinstance(listed, list):
                raise ValueError("the response is not a JWKS: it has no list `keys`")
        except Exception as exc:  # after any error the current keys stay in use
            left = max(0.0, self._good_until - self._clock())
            get_logger().warning(
                "issuer_keys_fetch_failed",
                issuer=self.issuer,
                error=type(exc).__name__,
                reason=str(exc)[:300] or "timeout",
                kept=len(self._keys) if left else 0,
                kept_for=round(left),
            )
            return
        self._store(listed)
        self._failed = False

    def _store(self, listed: list[Any]) -> None:
        """Replace the keys. An unchanged key stays the same object, so that tokens verified with it stay known."""
        keys: dict[str, SigningKey] = {}
        for jwk in listed:
            kid = jwk.get("kid") if isinstance(jwk, dict) else None
            before = self._keys.get(kid) if isinstance(kid, str) else None
            key = before if before is not None and before.jwk == jwk else signing_key(jwk)
            if key is not None:
                keys.setdefault(key.kid, key)
        if not keys:
            get_logger().warning("issuer_without_usable_keys", issuer=self.issuer)
        self._keys = keys
        self._good_until = self._clock() + MAX_AGE
        self._cache[self.cache_key] = keys, self._good_until

    async def _discover(self) -> str:
        """Return the URL of the keys from the issuer's metadata."""
        metadata = await self._get(self.issuer.rstrip("/") + "/.well-known/openid-configuration")
        if metadata.get("issuer") != self.issuer:
            raise ValueError(f"the metadata names another issuer, {str(metadata.get('issuer'))[:200]!r}")
        url = metadata.get("jwks_uri")
        if not isinstance(url, str) or url_problem(url):
            raise ValueError("the metadata has no valid `jwks_uri`")
        return url

    async def _get(self, url: str) -> dict[str, Any]:
        """Return the JSON object of the response. Raises ValueError for anything else. Does not follow redirects."""
        headers = {"accept": "application/json", "accept-encoding": "identity"}
        async with self._session().get(url, allow_redirects=False, headers=headers) as response:
            if response.status != 200:
                raise ValueError(f"{url} responded with status {response.status}")
            data = b""
            async for chunk in response.content.iter_any():
                data += chunk
                if len(data) > MAX_BYTES:
                    raise ValueError(f"{url} responded with more than {MAX_BYTES} bytes")
        decoded = msgspec.json.decode(data)
        if not isinstance(decoded, dict):
            raise ValueError(f"{url} responded without a JSON object")
        return decoded


def signing_key(jwk: Any) -> SigningKey | None:
    """Return a key of a JWKS (RFC 7517), or None if it does not sign tokens or the gateway does not accept its type.

    The key decides which algorithms its signatures can have, never a token: a token with HS256 would use the public key
    as the secret.
    """
    import jwt  # noqa: PLC0415 -- an extra that only `identity:` needs

    if not isinstance(jwk, dict) or "d" in jwk or jwk.get("use", "sig") != "sig":
        return None
    kid, operations = jwk.get("kid"), jwk.get("key_ops", ["verify"])
    if not isinstance(kid, str) or not kid or not isinstance(operations, list) or "verify" not in operations:
        return None
    if jwk.get("kty") == "RSA":
        algorithms = _RSA
    elif jwk.get("kty") == "EC" and isinstance(jwk.get("crv"), str) and jwk["crv"] in _CURVES:
        algorithms = frozenset((_CURVES[jwk["crv"]],))
    else:
        return None
    if "alg" in jwk:
        algorithms = frozenset(each for each in algorithms if each == jwk["alg"])
    if not algorithms:
        return None
    try:
        public = jwt.PyJWK(jwk, min(algorithms)).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    return SigningKey(kid, algorithms, public, jwk) if _long_enough(jwk, public) else None


def _long_enough(jwk: dict[str, Any], public: Any) -> bool:
    return bool(jwk["kty"] != "RSA" or public.key_size >= MIN_RSA_BITS)


def url_problem(text: str) -> str | None:
    """Return the problem of a URL of an issuer or of its keys, or None. Only loopback works without TLS."""
    try:
        url = URL(text)
        host, port = url.host, url.port
    except ValueError:
        host = None
    if not host or not port or url.scheme not in ("https", "http"):
        return "must be a URL, such as https://login.microsoftonline.com/TENANT/v2.0"
    if url.scheme == "http" and not _is_loopback(host):
        return "must begin with https://"
    if url.user is not None or url.password is not None or url.fragment:
        return "must not contain a user name, a password or a fragment"
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
