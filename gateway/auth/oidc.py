"""Verifies the tokens of clients, signed by an issuer such as Entra (OpenID Connect; RFC 7519, RFC 8725).

A token is verified before the team of its request is looked up. A valid one is cached by its digest until it expires or
its key is removed. An invalid one is only noted, and the stage that needs an identity decides: it may be a token for
Azure that merely passes through.
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeGuard

import aiohttp
import msgspec

from gateway.auth.credentials import Credential, presented_key
from gateway.auth.jwks import ALGORITHMS, IssuerKeys, KeysUnavailable, SigningKey
from gateway.errors import ApiError
from gateway.protocol.headers import Headers

__all__ = ("Claims", "Identity", "Issuer", "Issuers", "TokenVerification", "verification_unavailable")

Claims = Mapping[str, Sequence[str]]
"""The claims that a team requires: the name of a claim -> its accepted values."""

# Maximum number of cached tokens. Verifying a token takes some 50 microseconds; caching it takes a few KB.
_MAX_CACHED = 2048
_MAX_CALLER = 256
# Claims that hold a space-separated list (RFC 8693, 4.2; Entra's name is `scp`).
_SPACE_SEPARATED = ("scp", "scope")


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity in a verified token: all its `claims`, and the `caller` for logs and limits."""

    claims: Mapping[str, Any] = field(repr=False)
    caller: str

    def has(self, required: Claims) -> bool:
        """Whether it has every required claim with one of the accepted values. False if none is required."""
        return bool(required) and all(
            not set(values).isdisjoint(_values(name, self.claims.get(name))) for name, values in required.items()
        )


def _values(name: str, claim: Any) -> list[str]:
    """Return the values of a claim as text; numbers and booleans as JSON."""
    if name in _SPACE_SEPARATED and isinstance(claim, str):
        return claim.split(" ")
    each = claim if isinstance(claim, list) else [claim]
    return [
        value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for value in each
        if isinstance(value, str | bool | int | float)
    ]


@dataclass(frozen=True, slots=True)
class TokenVerification:
    """The result of verifying a token: an identity, or the `reason` for the log why there is none.

    `retry_after` is set if the token could not be verified because the issuer is unreachable.
    """

    identity: Identity | None = None
    reason: str | None = None
    retry_after: float | None = None


def verification_unavailable(verification: TokenVerification) -> ApiError:
    """Return the error for a client whose token could not be verified: it may be valid."""
    return ApiError(
        503,
        "the gateway cannot verify your token because its issuer is unreachable; retry shortly",
        code="identity_unavailable",
        headers={"retry-after": str(math.ceil(verification.retry_after or 1))},
    )


@dataclass(frozen=True)
class Issuer:
    """A configured issuer: its tokens are accepted if they are for one of these audiences.

    `jwks` is the URL of its keys (default: from its metadata). `caller` is the claim with the name of the caller
    (default: `oid`, else `sub`). `leeway` is in seconds, for clocks that differ.
    """

    issuer: str
    audience: tuple[str, ...]
    jwks: str | None = None
    caller: str | None = None
    leeway: float = 60.0


class _InvalidToken(Exception):
    """A token is invalid; the message is the reason for the log."""


@dataclass(frozen=True, slots=True)
class _VerifiedToken:
    """A valid token: until when, and by which key of which issuer."""

    verification: TokenVerification
    until: float
    key: SigningKey
    keys: IssuerKeys


class Issuers:
    """The accepted issuers, and a cache of their verified tokens."""

    def __init__(
        self,
        issuers: Sequence[Issuer],
        session: Callable[[], aiohttp.ClientSession],
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        cache: MutableMapping[str, Any] | None = None,
    ) -> None:
        """`session` returns the session for fetching keys. `cache` keeps the keys across reloads."""
        import jwt  # noqa: PLC0415 -- an extra; imported here, so that no request waits for it

        self._jws = jwt.PyJWS()
        self.all = tuple(issuers)
        self._now = now
        self._issuers = {
            each.issuer: (each, IssuerKeys(each.issuer, each.jwks, session, clock, cache)) for each in issuers
        }
        self._verified: dict[str, _VerifiedToken] = {}

    @property
    def fetched(self) -> list[str]:
        """The cache keys of the issuers' keys."""
        return [keys.cache_key for _, keys in self._issuers.values()]

    def start(self) -> None:
        """Fetch the keys of all issuers in the background. A failure does not stop the gateway."""
        for _, keys in self._issuers.values():
            keys.start()

    async def stop(self) -> None:
        """Stop fetching."""
        for _, keys in self._issuers.values():
            await keys.stop()

    async def verify(self, headers: Headers) -> TokenVerification | None:
        """Verify the token in these headers. Returns None if there is none.

        Waits only for the keys of the issuer, if they are not yet known.
        """
        try:
            key = presented_key(headers)
        except ApiError:
            return None  # the stage that needs the key refuses it
        if key is None or not key.bearer:
            return None
        found = self._verified.pop(key.digest, None)
        if found is not None and self._now() < found.until and found.keys.get(found.key.kid) is found.key:
            self._verified[key.digest] = found  # at the end: the first is the least recently used
            return found.verification
        try:
            return self._remember(key, await self._verify(key.value))
        except _InvalidToken as exc:
            return TokenVerification(reason=str(exc))
        except KeysUnavailable as exc:
            return TokenVerification(reason="token that cannot be verified", retry_after=exc.retry_after)

    def _remember(self, key: Credential, verified: _VerifiedToken) -> TokenVerification:
        while len(self._verified) >= _MAX_CACHED:
            del self._verified[next(iter(self._verified))]
        self._verified[key.digest] = verified
        return verified.verification

    async def _verify(self, token: str) -> _VerifiedToken:
        """Verify a token. Raises _InvalidToken and KeysUnavailable.

        The claims are checked first, before the signature: a forger gains nothing from being refused, and a token for
        another audience, such as Azure, never causes a request to its issuer.
        """
        import jwt  # noqa: PLC0415 -- see above

        parts = token.split(".")
        header, claims = _decoded(parts[0]), _decoded(parts[1])
        named = claims.get("iss")
        if not _is_text(named) or named not in self._issuers:
            raise _InvalidToken("token of an unknown issuer")
        issuer, keys = self._issuers[named]
        until = self._check_claims(claims, issuer)
        caller = _caller(claims, issuer)
        if "crit" in header:
            raise _InvalidToken("token with a critical header")  # the gateway supports none of these extensions
        kid, algorithm = header.get("kid"), header.get("alg")
        if not _is_text(kid):
            raise _InvalidToken("token without a key id")
        if not _is_text(algorithm) or algorithm not in ALGORITHMS:
            raise _InvalidToken("token with an unsupported algorithm")
        key = await keys.find(kid)
        if key is None:
            raise _InvalidToken("token with an unknown key")
        if algorithm not in key.algorithms:
            raise _InvalidToken("token with an algorithm that its key does not allow")
        try:
            self._jws.decode(token, key.public, algorithms=[algorithm])
        except jwt.InvalidSignatureError:
            raise _InvalidToken("token with a wrong signature") from None
        except (jwt.PyJWTError, ValueError):
            raise _InvalidToken("malformed token") from None
        return _VerifiedToken(TokenVerification(Identity(MappingProxyType(claims), caller)), until, key, keys)

    def _check_claims(self, claims: Mapping[str, Any], issuer: Issuer) -> float:
        """Return the time when the token expires. Raises _InvalidToken if it is not valid now."""
        claim = claims.get("aud")
        audiences = claim if isinstance(claim, list) else [claim]
        if not any(_is_text(each) and each in issuer.audience for each in audiences):
            raise _InvalidToken("token for another audience")
        now = self._now()
        until = _seconds(claims, "exp", issuer.leeway)
        if now >= until:
            raise _InvalidToken("expired token")
        for name in ("nbf", "iat"):
            if name in claims and now < _seconds(claims, name, -issuer.leeway):
                raise _InvalidToken("token that is not valid yet")
        return until


def _decoded(part: str) -> dict[str, Any]:
    """Return one part of a token, a JSON object. Its characters are known to be base64url."""
    try:
        found = msgspec.json.decode(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (ValueError, RecursionError):
        raise _InvalidToken("malformed token") from None
    if not isinstance(found, dict):
        raise _InvalidToken("malformed token")
    return found


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and value != ""


def _seconds(claims: Mapping[str, Any], name: str, leeway: float) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:
        raise _InvalidToken(f"token without a valid {name}")
    return value + leeway


def _caller(claims: Mapping[str, Any], issuer: Issuer) -> str:
    for name in (issuer.caller,) if issuer.caller else ("oid", "sub"):
        value = claims.get(name)
        if isinstance(value, str) and 0 < len(value) <= _MAX_CALLER and value.isprintable():
            # With the issuer: the same name at another issuer, or as the label of a key, is another caller.
            return f"{value}@{issuer.issuer.partition('://')[2]}"
    raise _InvalidToken("token without a caller")
