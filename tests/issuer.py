"""A token issuer for tests: real keys, on a real server on loopback that can fail in many ways."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from functools import cache
from typing import Any, Self

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

AUDIENCE = "api://gateway"
Private = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@cache
def rsa_key(name: str, bits: int = 2048) -> rsa.RSAPrivateKey:
    """Return a key, made once for each name because it is slow."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


@cache
def ec_key(name: str, curve: type[ec.EllipticCurve] = ec.SECP256R1) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve())


def jwk(key: Private, kid: str, **more: Any) -> dict[str, Any]:
    """Return the public key as an entry of a JWKS, without `alg`, as Entra has it."""
    if isinstance(key, rsa.RSAPrivateKey):
        made = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    else:
        made = ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    made.pop("key_ops", None)
    return {**made, "use": "sig", "kid": kid, **more}


def claims_of(issuer: str, **changed: Any) -> dict[str, Any]:
    """Return the claims of a valid token, some of them changed, or left out if they are None."""
    now = int(time.time())
    claims: dict[str, Any] = {"iss": issuer, "aud": AUDIENCE, "oid": "oid-ann", "sub": "sub-ann", "roles": ["research"]}
    claims |= {"iat": now, "nbf": now, "exp": now + 3600, **changed}
    return {name: value for name, value in claims.items() if value is not None}


class FakeIssuer:
    """An issuer on loopback: it serves `jwks` and `metadata`, and records each request in `asked`.

    `status` and `delay` apply to every response; `answer`, if set, makes the response.
    """

    def __init__(self) -> None:
        self.key: Private = rsa_key("first")
        self.kid = "first"
        self.jwks: dict[str, Any] = {"keys": [jwk(self.key, "first")]}
        self.metadata: dict[str, Any] = {}
        self.status = 200
        self.delay = 0.0
        self.answer: Callable[[web.Request], web.StreamResponse] | None = None
        self.asked: list[str] = []

    async def __aenter__(self) -> Self:
        self._runner = web.ServerRunner(web.Server(self._handle))
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/tenant/v2.0"
        self.metadata = {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    @property
    def fetches(self) -> int:
        """The number of requests for the keys."""
        return sum(path.endswith("/keys") for path in self.asked)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append(request.path)
        await asyncio.sleep(self.delay)
        if self.answer is not None:
            return self.answer(request)  # type: ignore[arg-type] # a low-level server's
        found = self.jwks if request.path.endswith("/keys") else self.metadata
        return web.Response(status=self.status, text=json.dumps(found), content_type="application/json")

    def rotate(self, kid: str, *, keep: bool = False) -> None:
        """Sign with another key from now on, and remove the previous one unless `keep` is set."""
        self.key, self.kid = rsa_key(kid), kid
        before = self.jwks["keys"] if keep else []
        self.jwks = {"keys": [*before, jwk(self.key, kid)]}

    def token(self, *, algorithm: str = "RS256", headers: dict[str, Any] | None = None, **changed: Any) -> str:
        """Return a signed token; see `claims_of`."""
        return jwt.encode(
            claims_of(self.url, **changed), self.key, algorithm=algorithm, headers={"kid": self.kid, **(headers or {})}
        )
