"""The keys with which an issuer signs its tokens: fetched, kept, and changed when the issuer changes them.

They are fetched in the background, so that neither a start nor a known token waits for the issuer. What cannot be
fetched leaves the keys as they were, for `GOOD_FOR` seconds; what was fetched is all there is: a key that is gone
from it is no longer good.
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

# All in seconds. How often the keys are fetched; how soon again after a failure, at first and at most; how long
# they stay good if they cannot be; and for how long an unknown key's name makes nobody fetch them again.
REFRESH = 3600.0
RETRY, MOST_RETRY = 10.0, 300.0
GOOD_FOR = 24 * 3600.0
FORCED = 30.0
# A client may have to wait for this.
TIMEOUT = 5.0
# Entra's largest is some 20 KB.
MAX_BYTES = 256 * 1024
MIN_RSA_BITS = 2048

_RSA = frozenset(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"))
_CURVES = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}
ALGORITHMS = _RSA | frozenset(_CURVES.values())
"""All that a token may be signed with: never `none`, and nothing whose key is a secret."""


class KeysUnavailable(Exception):
    """The key that a token names cannot be looked for at present; try again in `retry_after` seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the issuer's keys cannot be had at present")
        self.retry_after = retry_after


@dataclass(frozen=True, eq=False, slots=True)
class SigningKey:
    """A public key, and the only algorithms that signatures by it may have. It is good as long as it is this object."""

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
        kept: MutableMapping[str, Any] | None = None,
    ) -> None:
        """`url` is where the keys are; None if the issuer's own metadata says it (OpenID Connect Discovery 1.0, 4).

        `kept` is where what was fetched outlives this object: after a reload nothing waits for the issuer.
        """
        self.issuer = issuer
        self._url = url
        self._session = session
        self._clock = clock
        self._kept = {} if kept is None else kept
        self.place = f"{issuer} {url}"
        """The name under which they are kept."""
        self._keys: dict[str, SigningKey]
        self._keys, self._good_until = self._kept.get(self.place, ({}, 0.0))
        self._forced_until = 0.0
        self._failed = True  # whether the last try did
        self._fetching = BackgroundRefresh(self._fetch, f"keys of {issuer}")

    def start(self) -> None:
        """Begin to fetch the keys, now and then again and again, in the background."""
        self._fetching.start(self._keep_fresh())

    async def stop(self) -> None:
        """Fetch nothing any more."""
        await self._fetching.stop()

    def get(self, kid: str) -> SigningKey | None:
        """Return a key that is good now, or None; fetches nothing."""
        return self._keys.get(kid) if self._clock() < self._good_until else None

    async def find(self, kid: str) -> SigningKey | None:
        """Return the key of a name, fetching the keys if it is not known; None where the issuer has no such key.

        Whoever asks for an unknown one while a fetch is under way waits for that one. Raises KeysUnavailable.
        """
        if (key := self.get(kid)) is not None:
            return key
        if not self._fetching.under_way:
            now = self._clock()
            if now < self._forced_until:
                # Anybody can make up names of keys: they must not become requests to the issuer.
                if self._failed:
                    raise KeysUnavailable(self._forced_until - now)
                return None
            self._forced_until = now + FORCED
        await self._fetching.refresh()
        key = self.get(kid)
        if key is None and self._failed:
            raise KeysUnavailable(RETRY)
        return key

    # -- fetching --------------------------------------------------------------------------------------

    async def _keep_fresh(self) -> None:
        retry = RETRY
        while True:
            await self._fetching.refresh()
            await asyncio.sleep(retry if self._failed else REFRESH)
            retry = min(retry * 2, MOST_RETRY) if self._failed else RETRY

    async def _fetch(self) -> None:
        self._failed = True
        try:
            async with asyncio.timeout(TIMEOUT):
                url = self._url or await self._discover()
                listed = (await self._get(url)).get("keys")
            if not isinstance(listed, list):
                raise ValueError("what came is no set of keys: it has no list `keys`")
        except Exception as exc:  # whatever it is: the keys stay as they were
            left = max(0.0, self._good_until - self._clock())
            get_logger().warning(
                "an issuer's keys cannot be had",
                issuer=self.issuer,
                error=type(exc).__name__,
                reason=str(exc)[:300] or "it took too long",
                kept=len(self._keys) if left else 0,
                kept_for=round(left),
            )
            return
        self._take(listed)
        self._failed = False

    def _take(self, listed: list[Any]) -> None:
        """Let these be the keys. One that is as before stays the same object, and so do tokens judged by it."""
        keys: dict[str, SigningKey] = {}
        for jwk in listed:
            kid = jwk.get("kid") if isinstance(jwk, dict) else None
            before = self._keys.get(kid) if isinstance(kid, str) else None
            key = before if before is not None and before.jwk == jwk else signing_key(jwk)
            if key is not None:
                keys.setdefault(key.kid, key)
        if not keys:
            get_logger().warning("an issuer has no key that tokens can be checked with", issuer=self.issuer)
        self._keys = keys
        self._good_until = self._clock() + GOOD_FOR
        self._kept[self.place] = keys, self._good_until

    async def _discover(self) -> str:
        """Return where the issuer says that its keys are."""
        metadata = await self._get(self.issuer.rstrip("/") + "/.well-known/openid-configuration")
        if metadata.get("issuer") != self.issuer:
            raise ValueError(f"its metadata is of another issuer, {str(metadata.get('issuer'))[:200]!r}")
        url = metadata.get("jwks_uri")
        if not isinstance(url, str) or url_problem(url):
            raise ValueError("its metadata has no `jwks_uri` that could be asked")
        return url

    async def _get(self, url: str) -> dict[str, Any]:
        """Return a JSON object. Raises ValueError for anything else; a redirect is not followed."""
        headers = {"accept": "application/json", "accept-encoding": "identity"}
        async with self._session().get(url, allow_redirects=False, headers=headers) as answer:
            if answer.status != 200:
                raise ValueError(f"{url} answered with the status {answer.status}")
            data = b""
            async for chunk in answer.content.iter_any():
                data += chunk
                if len(data) > MAX_BYTES:
                    raise ValueError(f"{url} answered with more than {MAX_BYTES} bytes")
        decoded = msgspec.json.decode(data)
        if not isinstance(decoded, dict):
            raise ValueError(f"{url} answered with no JSON object")
        return decoded


def signing_key(jwk: Any) -> SigningKey | None:
    """Return a key of a JWKS (RFC 7517), or None for what signs no tokens, or is none of ours to use.

    Which algorithms its signatures may have is decided here, by the key and never by a token: one that says HS256
    would have the public key for its secret.
    """
    import jwt  # noqa: PLC0415 -- an extra, and nobody without `identity:` needs it

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
    """Return what is wrong with the URL of an issuer or of its keys, or None: only loopback may do without TLS."""
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
        return "must not hold a user name, a password or a fragment"
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
