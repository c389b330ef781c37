"""Who a client is by its token: an issuer, such as Entra, has signed who that is (OpenID Connect; RFC 7519, 8725).

A token is judged before its request's team is looked up, and a good one is remembered by its digest until it expires
or its key is gone. One that is not good is only noted: whether it matters is for the stage that asks, since a token
may also be Azure's own and merely pass through.
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

__all__ = ("Claims", "Identity", "Issuer", "Issuers", "TokenVerification", "unavailable")

Claims = Mapping[str, Sequence[str]]
"""What a team wants of a token: the name of a claim -> the values of which it must have one."""

# How many tokens are remembered. To check one anew costs some 50 microseconds; to keep one, a few KB.
_MAX_KNOWN = 2048
_MAX_CALLER = 256
# Claims that are lists, written as words with spaces between (RFC 8693, 4.2; Entra calls it `scp`).
_WORDS = ("scp", "scope")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a verified token says its bearer is: all its `claims`, and the `caller` for logs and limits."""

    claims: Mapping[str, Any] = field(repr=False)
    caller: str

    def has(self, wanted: Claims) -> bool:
        """Whether every claim that is wanted is there, with one of its values; False where none is wanted."""
        return bool(wanted) and all(
            not set(values).isdisjoint(_values(name, self.claims.get(name))) for name, values in wanted.items()
        )


def _values(name: str, claim: Any) -> list[str]:
    """Return the values of a claim as text; numbers and booleans as JSON has them."""
    if name in _WORDS and isinstance(claim, str):
        return claim.split(" ")
    each = claim if isinstance(claim, list) else [claim]
    return [
        value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for value in each
        if isinstance(value, str | bool | int | float)
    ]


@dataclass(frozen=True, slots=True)
class TokenVerification:
    """What became of a token: an identity, or the `reason` for none, in words for the log.

    `retry_after` is set where the token could not be judged, for now.
    """

    identity: Identity | None = None
    reason: str | None = None
    retry_after: float | None = None


def unavailable(judgement: TokenVerification) -> ApiError:
    """Return what a client is told whose token could not be judged: it may well be good."""
    return ApiError(
        503,
        "your token cannot be checked at present, its issuer cannot be reached; try again",
        code="identity_unavailable",
        headers={"retry-after": str(math.ceil(judgement.retry_after or 1))},
    )


@dataclass(frozen=True)
class Issuer:
    """One issuer as configured: whose tokens are taken, and for whom they must be.

    `jwks` is where its keys are, if not where its metadata says; `caller` the claim that names the caller, if not
    `oid`, else `sub`; `leeway` in seconds, for clocks that differ.
    """

    issuer: str
    audience: tuple[str, ...]
    jwks: str | None = None
    caller: str | None = None
    leeway: float = 60.0


class _Refused(Exception):
    """A token is not good; the message is the reason for the log."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A token that was good: until when, by which key of which issuer."""

    judgement: TokenVerification
    until: float
    key: SigningKey
    keys: IssuerKeys


class Issuers:
    """The issuers whose tokens are taken, and the tokens of theirs that are known to be good."""

    def __init__(
        self,
        issuers: Sequence[Issuer],
        session: Callable[[], aiohttp.ClientSession],
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        kept: MutableMapping[str, Any] | None = None,
    ) -> None:
        """`session` returns the one to fetch keys with, and `kept` is where they outlive a reload."""
        import jwt  # noqa: PLC0415 -- an extra; loaded here, so that no request waits for it

        self._jws = jwt.PyJWS()
        self.all = tuple(issuers)
        self._now = now
        self._issuers = {
            each.issuer: (each, IssuerKeys(each.issuer, each.jwks, session, clock, kept)) for each in issuers
        }
        self._known: dict[str, _Known] = {}

    @property
    def fetched(self) -> list[str]:
        """The names under which their keys are kept."""
        return [keys.place for _, keys in self._issuers.values()]

    def start(self) -> None:
        """Begin to fetch the issuers' keys; nothing waits for them, and none that fails stops the gateway."""
        for _, keys in self._issuers.values():
            keys.start()

    async def stop(self) -> None:
        """Fetch no keys any more."""
        for _, keys in self._issuers.values():
            await keys.stop()

    async def judge(self, headers: Headers) -> TokenVerification | None:
        """Return what there is to say of the token that these headers present; None where they present none.

        Waits for nothing but, where the issuer's keys are not known yet, those.
        """
        try:
            key = presented_key(headers)
        except ApiError:
            return None  # the stage that asks for the key refuses it, in its own place
        if key is None or not key.bearer:
            return None
        known = self._known.pop(key.digest, None)
        if known is not None and self._now() < known.until and known.keys.get(known.key.kid) is known.key:
            self._known[key.digest] = known  # last again: the first is the one that was not asked for longest
            return known.judgement
        try:
            return self._remember(key, await self._verify(key.value))
        except _Refused as exc:
            return TokenVerification(reason=str(exc))
        except KeysUnavailable as exc:
            return TokenVerification(reason="token that cannot be checked", retry_after=exc.retry_after)

    def _remember(self, key: Credential, known: _Known) -> TokenVerification:
        while len(self._known) >= _MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[key.digest] = known
        return known.judgement

    async def _verify(self, token: str) -> _Known:
        """Judge a token. Raises _Refused and KeysUnavailable.

        What it says is looked at first, unproven: who made it up wins nothing by being refused, and a token for
        somebody else, such as Azure's own, never makes a request to its issuer.
        """
        import jwt  # noqa: PLC0415 -- as above

        parts = token.split(".")
        header, claims = _decoded(parts[0]), _decoded(parts[1])
        named = claims.get("iss")
        if not _is_text(named) or named not in self._issuers:
            raise _Refused("token of an unknown issuer")
        issuer, keys = self._issuers[named]
        until = self._check_claims(claims, issuer)
        caller = _caller(claims, issuer)
        if "crit" in header:
            raise _Refused("token with a critical header")  # that must be understood, and none is
        kid, algorithm = header.get("kid"), header.get("alg")
        if not _is_text(kid):
            raise _Refused("token that names no key")
        if not _is_text(algorithm) or algorithm not in ALGORITHMS:
            raise _Refused("token of an algorithm that is not taken")
        key = await keys.find(kid)
        if key is None:
            raise _Refused("token of an unknown key")
        if algorithm not in key.algorithms:
            raise _Refused("token of another algorithm than its key's")
        try:
            self._jws.decode(token, key.public, algorithms=[algorithm])
        except jwt.InvalidSignatureError:
            raise _Refused("token with a wrong signature") from None
        except (jwt.PyJWTError, ValueError):
            raise _Refused("malformed token") from None
        return _Known(TokenVerification(Identity(MappingProxyType(claims), caller)), until, key, keys)

    def _check_claims(self, claims: Mapping[str, Any], issuer: Issuer) -> float:
        """Return when the token is no longer good. Raises _Refused for one that is not good now."""
        audience = claims.get("aud")
        meant = audience if isinstance(audience, list) else [audience]
        if not any(_is_text(each) and each in issuer.audience for each in meant):
            raise _Refused("token for another audience")
        now = self._now()
        until = _seconds(claims, "exp", issuer.leeway)
        if now >= until:
            raise _Refused("expired token")
        for name in ("nbf", "iat"):
            if name in claims and now < _seconds(claims, name, -issuer.leeway):
                raise _Refused("token that is not valid yet")
        return until


def _decoded(part: str) -> dict[str, Any]:
    """Return one part of a token, a JSON object; the token's letters are known to be base64url's."""
    try:
        found = msgspec.json.decode(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (ValueError, RecursionError):
        raise _Refused("malformed token") from None
    if not isinstance(found, dict):
        raise _Refused("malformed token")
    return found


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and value != ""


def _seconds(claims: Mapping[str, Any], name: str, leeway: float) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:
        raise _Refused(f"token without a sound {name}")
    return value + leeway


def _caller(claims: Mapping[str, Any], issuer: Issuer) -> str:
    for name in (issuer.caller,) if issuer.caller else ("oid", "sub"):
        value = claims.get(name)
        if isinstance(value, str) and 0 < len(value) <= _MAX_CALLER and value.isprintable():
            # Of this issuer: what another one calls so is somebody else, and so is a key's label.
            return f"{value}@{issuer.issuer.partition('://')[2]}"
    raise _Refused("token that names no caller")
