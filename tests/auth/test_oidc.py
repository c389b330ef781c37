"""Tokens of clients: their verification, the team of a token, and the errors for invalid ones."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from gateway.auth.credentials import key_digest
from gateway.auth.oidc import Identity, Issuer, Issuers, TokenVerification
from gateway.config import identity as config_identity
from gateway.config import load
from gateway.errors import ApiError, ConfigError
from gateway.protocol.headers import Headers
from gateway.testing import FakeAzure
from tests.conftest import CHAT, Gateway, StartGateway, until, write_files
from tests.issuer import AUDIENCE, FakeIssuer, claims_of, ec_key, jwk, rsa_key


class Time:
    """A clock that a test advances, monotonic and wall clock."""

    def __init__(self) -> None:
        self.passed = 0.0

    def now(self) -> float:
        return time.time() + self.passed

    def clock(self) -> float:
        return time.monotonic() + self.passed


@pytest.fixture
def passing() -> Time:
    return Time()


@pytest.fixture
async def issuer() -> AsyncIterator[FakeIssuer]:
    async with FakeIssuer() as issuer:
        yield issuer


@pytest.fixture
def issuers(issuer: FakeIssuer, session: aiohttp.ClientSession, passing: Time) -> Issuers:
    return Issuers([Issuer(issuer.url, (AUDIENCE, "other"))], lambda: session, now=passing.now, clock=passing.clock)


def bearer(token: str) -> Headers:
    return Headers({"Authorization": f"Bearer {token}"})


async def verified(issuers: Issuers, token: str) -> TokenVerification:
    verification = await issuers.verify(bearer(token))
    assert verification is not None
    return verification


def part(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def made(header: Any, claims: Any, signature: bytes = b"signature") -> str:
    """Return a token with any header, also one that the library would not make."""
    return ".".join(map(part, (json.dumps(header).encode(), json.dumps(claims).encode(), signature)))


HEAD = part(b'{"alg": "RS256", "kid": "first"}')


# -- one token ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"])
async def test_a_token_signed_by_the_issuer_is_valid(algorithm: str, issuers: Issuers, issuer: FakeIssuer) -> None:
    """It identifies its bearer: the object id, and all claims."""
    verification = await verified(issuers, issuer.token(algorithm=algorithm))
    assert (verification.reason, verification.retry_after) == (None, None)
    assert verification.identity is not None
    # (With the issuer: `oid-ann` of another issuer is another caller.)
    assert verification.identity.caller == f"oid-ann@{issuer.url.partition('://')[2]}"
    assert verification.identity.claims["roles"] == ["research"]
    assert "research" not in repr(verification)


@pytest.mark.parametrize(
    ("curve", "algorithm"), [(ec.SECP256R1, "ES256"), (ec.SECP384R1, "ES384"), (ec.SECP521R1, "ES512")]
)
async def test_elliptic_curves_work(
    curve: type[ec.EllipticCurve], algorithm: str, issuers: Issuers, issuer: FakeIssuer
) -> None:
    """Each curve with its own algorithm."""
    issuer.key = ec_key(algorithm, curve)
    issuer.jwks = {"keys": [jwk(issuer.key, "first")]}
    assert (await verified(issuers, issuer.token(algorithm=algorithm))).identity is not None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"aud": "api://another"}, "token for another audience"),
        ({"aud": None}, "token for another audience"),
        ({"aud": []}, "token for another audience"),
        ({"aud": {"api://gateway": 1}}, "token for another audience"),
        ({"aud": "api://gateway/"}, "token for another audience"),
        ({"aud": "API://gateway"}, "token for another audience"),
        ({"iss": "https://login.microsoftonline.com/another/v2.0"}, "token of an unknown issuer"),
        ({"iss": None}, "token of an unknown issuer"),
        ({"iss": ["x"]}, "token of an unknown issuer"),
        ({"exp": 1}, "expired token"),
        ({"exp": None}, "token without a valid exp"),
        ({"exp": "4102444800"}, "token without a valid exp"),
        ({"exp": True}, "token without a valid exp"),
        ({"exp": 1e300}, "token without a valid exp"),
        ({"exp": 10**400}, "token without a valid exp"),
        ({"nbf": 4102444800}, "token that is not valid yet"),
        ({"iat": 4102444800}, "token that is not valid yet"),
        ({"nbf": "soon"}, "token without a valid nbf"),
        ({"iat": [1]}, "token without a valid iat"),
        ({"oid": None, "sub": None}, "token without a caller"),
        ({"oid": 7, "sub": "a\nb"}, "token without a caller"),
        ({"oid": "x" * 257, "sub": ""}, "token without a caller"),
    ],
)
async def test_required_claims(changed: dict[str, Any], reason: str, issuers: Issuers, issuer: FakeIssuer) -> None:
    """Issuer, audience and times; the log gets the reason, and no keys are fetched in vain."""
    token = made({"alg": "RS256", "kid": "first"}, claims_of(issuer.url, **changed))
    assert await verified(issuers, token) == TokenVerification(reason=reason)
    assert not issuer.asked


async def test_exp_infinite_or_no_number_is_malformed(issuers: Issuers, issuer: FakeIssuer) -> None:
    """Python's JSON decoder accepts NaN, and no time is later than that."""
    for number in ("NaN", "Infinity", "1e999"):
        claims = json.dumps(claims_of(issuer.url, exp="EXP")).replace('"EXP"', number)
        token = f"{HEAD}.{part(claims.encode())}.AAAA"
        assert (await verified(issuers, token)).reason in ("malformed token", "token without a valid exp")


async def test_clocks_may_differ_by_the_leeway(issuers: Issuers, issuer: FakeIssuer) -> None:
    """A minute by default; and an audience can be one of several."""
    now = int(time.time())
    good: list[dict[str, Any]] = [{"exp": now - 50}, {"nbf": now + 50}, {"iat": now + 50}, {"aud": ["x", "other"]}]
    bad: list[dict[str, Any]] = [{"exp": now - 61}, {"nbf": now + 70}, {"iat": now + 70}]
    for changed in good:
        assert (await verified(issuers, issuer.token(**changed))).identity is not None
    for changed in bad:
        assert (await verified(issuers, issuer.token(**changed))).identity is None


async def test_the_claim_that_names_the_caller_can_be_chosen(
    issuer: FakeIssuer, session: aiohttp.ClientSession
) -> None:
    """Without `oid` it is `sub`; a configured claim is required."""
    for chosen, changed, caller in (
        (None, {"oid": None}, "sub-ann"),
        ("azp", {"azp": "app-1"}, "app-1"),
        ("azp", {}, None),
    ):
        issuers = Issuers([Issuer(issuer.url, (AUDIENCE,), caller=chosen)], lambda: session)
        found = (await verified(issuers, issuer.token(**changed))).identity
        assert (found.caller.partition("@")[0] if found is not None else None) == caller


# -- forgeries ----------------------------------------------------------------------------------------


def forged_with_the_public_key(issuer: FakeIssuer, algorithm: str = "HS256") -> str:
    """Return a token whose signature is valid if the public key is used as a shared secret."""
    import hmac

    pem = (
        rsa_key("first")
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    head = made({"alg": algorithm, "kid": "first"}, claims_of(issuer.url)).rpartition(".")[0]
    return f"{head}.{part(hmac.digest(pem, head.encode(), 'sha256'))}"


async def test_a_public_key_is_no_secret(issuers: Issuers, issuer: FakeIssuer) -> None:
    """A token signed with HS256 and the public key is refused, under that name and under the key's own."""
    for algorithm, reason in (
        ("HS256", "token with an unsupported algorithm"),
        ("RS256", "token with a wrong signature"),
    ):
        assert (await verified(issuers, forged_with_the_public_key(issuer, algorithm))).reason == reason


@pytest.mark.parametrize(
    "algorithm", ["none", "None", "NONE", "", "HS256", "HS512", "EdDSA", "ES256K", None, ["RS256"]]
)
async def test_only_signatures_by_a_key_pair_count(algorithm: Any, issuers: Issuers, issuer: FakeIssuer) -> None:
    """`none` is rejected in any spelling, with or without a signature."""
    for signature in (b"", b"x"):
        token = made({"alg": algorithm, "kid": "first", "typ": "JWT"}, claims_of(issuer.url), signature)
        assert (await verified(issuers, token)).reason == "token with an unsupported algorithm"
    assert not issuer.asked


async def test_a_key_is_valid_for_its_own_algorithm_only(issuers: Issuers, issuer: FakeIssuer) -> None:
    """Whatever the token's header says."""
    issuer.jwks = {"keys": [jwk(issuer.key, "first", alg="RS256"), jwk(ec_key("p256"), "curve")]}
    for kid, algorithm in (("first", "RS512"), ("first", "ES256"), ("curve", "ES384"), ("curve", "RS256")):
        token = made({"alg": algorithm, "kid": kid}, claims_of(issuer.url))
        assert (await verified(issuers, token)).reason == "token with an algorithm that its key does not allow"


async def test_a_changed_token_is_invalid(issuers: Issuers, issuer: FakeIssuer) -> None:
    """Changed claims, headers or signatures are detected."""
    head, claims, signature = issuer.token().split(".")
    other = issuer.token(roles=["admin"])
    for token in (
        f"{head}.{other.split('.')[1]}.{signature}",
        f"{made({'alg': 'RS256', 'kid': 'first', 'x': 1}, {}).split('.')[0]}.{claims}.{signature}",
        f"{head}.{claims}.{other.split('.')[2]}",
        f"{head}.{claims}.{part(b'x')}",
        f"{head}.{claims}.",
    ):
        assert (await verified(issuers, token)).reason == "token with a wrong signature"


async def test_a_key_that_the_token_brings_along_is_not_used(issuers: Issuers, issuer: FakeIssuer) -> None:
    """`jwk`, `jku`, `x5u` and `x5c` in the header are ignored: no URL of a client is ever fetched."""
    good = issuer.jwks
    issuer.key = rsa_key("attacker")
    issuer.jwks = good
    for header in ({"jwk": jwk(issuer.key, "first")}, {"jku": issuer.url + "/mine"}, {"x5u": issuer.url + "/mine"}):
        assert (await verified(issuers, issuer.token(headers=header))).reason == "token with a wrong signature"
    assert not any("mine" in path for path in issuer.asked)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"kid": None}, "token without a key id"),
        ({"kid": ""}, "token without a key id"),
        ({"kid": 7}, "token without a key id"),
        ({"kid": "another"}, "token with an unknown key"),
        ({"kid": "../../etc/passwd"}, "token with an unknown key"),
        ({"crit": ["exp"], "exp": 1}, "token with a critical header"),
        ({"crit": []}, "token with a critical header"),
        ({"b64": False}, "malformed token"),
    ],
)
async def test_required_headers_of_a_token(
    header: dict[str, Any], reason: str, issuers: Issuers, issuer: FakeIssuer
) -> None:
    """A key id, and no critical extension."""
    token = made({"alg": "RS256", "kid": "first", **header}, claims_of(issuer.url))
    assert (await verified(issuers, token)).reason == reason


@pytest.mark.parametrize(
    "token",
    [
        "eyJ.eyJ.",
        "eyJhbGciOiJSUzI1NiJ9.W10.x",
        "eyJhbGciOiJSUzI1NiJ9.bnVsbA.x",
        f"eyJ{'A' * 8000}.{'B' * 8000}.x",
        ".".join(map(part, (b'{"a":' + b"[" * 5000, b"[" * 5000, b"x"))),
        ".".join(map(part, (b'{"a": 1}', b'{"iss": "\xff"}', b"x"))),
        "eyJh.a.a",
    ],
)
async def test_malformed_tokens_are_invalid(token: str, issuers: Issuers) -> None:
    """Malformed tokens are rejected."""
    assert (await verified(issuers, token)).identity is None


@given(header=st.binary(max_size=40), claims=st.binary(max_size=40), signature=st.binary(max_size=10))
def test_random_bytes_cause_no_error(header: bytes, claims: bytes, signature: bytes) -> None:
    """Any three parts of bytes are rejected without an error."""
    issuers = Issuers([Issuer("https://x.example.com", ("a",))], aiohttp.ClientSession)
    for head in (header, b'{"a' + header, b'{"a": "' + header + b'"}'):
        token = ".".join(map(part, (head, claims, signature)))
        verification = asyncio.run(issuers.verify(bearer(token))) if token else None
        assert verification is None or verification.identity is None


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer sk-plain"},
        {"Authorization": "Bearer a.b.c"},
        {"Authorization": "Basic eyJ.eyJ.x"},
        {"api-key": "eyJh.eyJh.x"},
        {"Authorization": "Bearer one", "api-key": "two"},
        {"Authorization": "Bearer eyJ" + "a" * 20_000 + ".a.a"},
    ],
)
async def test_a_request_without_a_token_is_not_verified(headers: dict[str, str], issuers: Issuers) -> None:
    """A key is no token, and neither is a malformed key: the stage that needs a key rejects it."""
    assert await issuers.verify(Headers(headers)) is None


async def test_a_browser_s_websocket_can_present_a_token(issuers: Issuers, issuer: FakeIssuer) -> None:
    """As the subprotocol for keys."""
    headers = Headers({"Sec-WebSocket-Protocol": f"realtime, openai-insecure-api-key.{issuer.token()}"})
    verification = await issuers.verify(headers)
    assert verification is not None
    assert verification.identity is not None


# -- tokens that are known, and keys that change ------------------------------------------------------


async def test_a_cached_token_is_not_verified_again(
    issuers: Issuers, issuer: FakeIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its signature is not verified again until it expires."""
    token = issuer.token(exp=int(time.time()) + 100)
    first = await verified(issuers, token)
    monkeypatch.setattr(issuers, "_verify", None)
    assert await verified(issuers, token) is first


async def test_a_cached_token_expires(issuers: Issuers, issuer: FakeIssuer, passing: Time) -> None:
    """To the second."""
    token = issuer.token(exp=int(time.time()) + 100)
    passing.passed = 150
    assert (await verified(issuers, token)).identity is not None
    passing.passed = 161
    assert (await verified(issuers, token)).reason == "expired token"


async def test_a_cached_token_is_invalid_without_its_key(issuers: Issuers, issuer: FakeIssuer, passing: Time) -> None:
    """After a rotation a token with the new key is valid at once; one with the old key is not, cached or not."""
    old = issuer.token()
    assert (await verified(issuers, old)).identity is not None
    issuer.rotate("second", keep=True)
    passing.passed += 31
    assert (await verified(issuers, issuer.token())).identity is not None
    assert (await verified(issuers, old)).identity is not None
    issuer.rotate("third")
    passing.passed += 31
    assert (await verified(issuers, issuer.token())).identity is not None
    assert (await verified(issuers, old)).reason == "token with an unknown key"


async def test_a_new_key_with_the_same_id_is_another_key(issuers: Issuers, issuer: FakeIssuer, passing: Time) -> None:
    """A cached token is not accepted with the new key."""
    old = issuer.token()
    assert (await verified(issuers, old)).identity is not None
    issuer.key = rsa_key("another")
    issuer.jwks = {"keys": [jwk(issuer.key, "first")]}
    (_, keys) = issuers._issuers[issuer.url]
    await keys._refresh.refresh()
    assert (await verified(issuers, old)).reason == "token with a wrong signature"
    assert (await verified(issuers, issuer.token())).identity is not None


async def test_the_cache_of_tokens_is_bounded(
    issuers: Issuers, issuer: FakeIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least recently used one is dropped first."""
    monkeypatch.setattr("gateway.auth.oidc._MAX_CACHED", 3)
    tokens = [issuer.token(jti=str(number)) for number in range(4)]
    for token in (*tokens[:3], tokens[0], tokens[3]):
        await verified(issuers, token)
    assert list(issuers._verified) == [key_digest(tokens[number]) for number in (2, 0, 3)]


async def test_a_token_cannot_be_verified_while_its_issuer_is_down(issuers: Issuers, issuer: FakeIssuer) -> None:
    """It may be valid; a token that is invalid without looking at its signature is still rejected."""
    issuer.status = 500
    verification = await verified(issuers, issuer.token())
    assert verification.identity is None
    assert verification.reason == "token that cannot be verified"
    assert verification.retry_after is not None
    assert (await verified(issuers, issuer.token(aud="x"))).retry_after is None


async def test_each_issuer_has_its_own_keys_and_audience(session: aiohttp.ClientSession) -> None:
    """A token is verified with the keys of its issuer, never with those of another."""
    async with FakeIssuer() as one, FakeIssuer() as two:
        two.rotate("second")
        issuers = Issuers([Issuer(one.url, ("a",)), Issuer(two.url, ("b",))], lambda: session)
        assert (await verified(issuers, one.token(aud="a"))).identity is not None
        assert (await verified(issuers, two.token(aud="b"))).identity is not None
        assert (await verified(issuers, two.token(aud="a"))).reason == "token for another audience"
        assert (await verified(issuers, two.token(aud="a", iss=one.url))).reason == "token with an unknown key"
        two.kid = "first"
        assert (await verified(issuers, two.token(aud="a", iss=one.url))).reason == "token with a wrong signature"


# -- claims -------------------------------------------------------------------------------------------

CLAIMS: dict[str, Any] = {
    "roles": ["research", "sales"],
    "tid": "tenant",
    "admin": True,
    "level": 3,
    "share": 0.5,
    "nothing": None,
    "more": {"a": "b"},
    "mixed": ["a", 7, False, None, {}],
    "scp": "chat.read chat.write",
    "name": "chat.read chat.write",
    "empty": "",
}


@pytest.mark.parametrize(
    ("wanted", "has"),
    [
        ({"roles": ["research"]}, True),
        ({"roles": ["x", "sales"]}, True),
        ({"roles": ["resea"]}, False),
        ({"roles": ["Research"]}, False),
        ({"tid": ["tenant"]}, True),
        ({"tid": ["tenant"], "roles": ["x"]}, False),
        ({"tid": ["tenant"], "roles": ["sales"]}, True),
        ({"admin": ["true"]}, True),
        ({"admin": ["True"]}, False),
        ({"admin": ["1"]}, False),
        ({"level": ["3"]}, True),
        ({"share": ["0.5"]}, True),
        ({"nothing": ["null"]}, False),
        ({"nothing": [""]}, False),
        ({"absent": [""]}, False),
        ({"more": ["a"]}, False),
        ({"mixed": ["7"]}, True),
        ({"mixed": ["false"]}, True),
        ({"mixed": ["null"]}, False),
        ({"scp": ["chat.write"]}, True),
        ({"name": ["chat.write"]}, False),
        ({}, False),
    ],
)
def test_claims_that_a_team_requires(wanted: dict[str, list[str]], has: bool) -> None:
    """All required claims, each with one of its values, exactly; scopes are a space-separated list."""
    assert Identity(CLAIMS, "ann").has(wanted) == has


# -- whose request it is ------------------------------------------------------------------------------

YAML = """
resources: {azure: {endpoint: "${ENDPOINT}", api_key: stored-key}}
identity: {issuer: "${ISSUER}", audience: "api://gateway"}
teams: [teams/one.yaml, teams/two.yaml, teams/path.yaml]
match: {claims: {roles: everyone}}
pipeline: [access_log, auth_keys, model_map: {models: {m: default}, unmapped: refuse}, api_version]
"""
FILES = {
    "teams/one.yaml": "match: {claims: {roles: research, tid: [t1, t2]}}\nchange: {model_map: {models: {m: one}}}\n",
    "teams/two.yaml": "match: {claims: {roles: [sales, research]}}\nchange: {model_map: {models: {m: two}}}\n",
    "teams/path.yaml": f"match: {{path_prefix: /path, keys: ['{key_digest('K-path')}'], claims: {{roles: path}}}}\n"
    "change: {model_map: {models: {m: path}}}\n",
}
BODY = {**CHAT, "model": "m"}


@pytest.fixture
async def gateway(start_gateway: StartGateway, azure: FakeAzure, issuer: FakeIssuer) -> Gateway:
    azure.deployments = ("default", "one", "two", "path")
    azure.api_key = "stored-key"
    return await start_gateway(azure.endpoint, YAML, FILES, env={"ISSUER": issuer.url})


@pytest.mark.parametrize(
    ("path", "claims", "team"),
    [
        ("/v1", {"roles": ["research"], "tid": "t2"}, "one"),
        ("/v1", {"roles": ["research"], "tid": "t3"}, "two"),
        ("/v1", {"roles": ["sales"], "tid": "t1"}, "two"),
        ("/v1", {"roles": ["path"]}, "path"),
        ("/path/v1", {"roles": ["path"]}, "path"),
        ("/v1", {"roles": ["everyone"]}, "default"),
    ],
)
async def test_the_claims_decide_the_team(
    path: str, claims: dict[str, Any], team: str, gateway: Gateway, azure: FakeAzure, issuer: FakeIssuer
) -> None:
    """The first team, in the order of the files, whose claims a token has; Azure gets the key of the resource."""
    async with gateway.post(f"{path}/chat/completions", BODY, key=issuer.token(**claims)) as answer:
        assert answer.status == 200, await answer.text()
    assert azure.requests[0].path.split("/")[3] == team
    assert not any("eyJ" in value for _, value in azure.requests[0].headers)
    await gateway.idle()
    (event,) = gateway.exchanges()
    assert (event["team"], event["caller"].partition("@")[0], event.get("auth")) == (team, "oid-ann", None)


async def test_every_invalid_token_is_the_same_401(gateway: Gateway, azure: FakeAzure, issuer: FakeIssuer) -> None:
    """As with every wrong key; the log event has the reason, and of the token only the caller."""
    tokens = [
        ("/v1", issuer.token(exp=1), "expired token", None),
        ("/v1", issuer.token(aud="x"), "token for another audience", None),
        ("/v1", made({"alg": "none"}, claims_of(issuer.url)), "token without a key id", None),
        ("/v1", issuer.token(roles=["secret-role"]), "token of no member", "oid-ann"),
        ("/path/v1", issuer.token(roles=["sales"]), "token of no member", "oid-ann"),
        ("/v1", "K-unknown", "unknown key", None),
    ]
    answers = set()
    for path, token, _, _ in tokens:
        async with gateway.post(f"{path}/chat/completions", BODY, key=token) as answer:
            answers.add((answer.status, await answer.text()))
    ((status, text),) = answers
    assert status == 401
    assert json.loads(text)["error"]["code"] == "invalid_api_key"
    await gateway.idle()
    events = gateway.exchanges()
    callers = [event["caller"] and event["caller"].partition("@")[0] for event in events]
    assert [*zip([event["auth"] for event in events], callers, strict=True)] == [tuple(each[2:]) for each in tokens]
    assert [event["key"] for event in events] == [key_digest(token) for _, token, _, _ in tokens]
    assert not azure.requests
    assert "eyJ" not in str(gateway.events)
    assert "secret-role" not in str(gateway.events)


async def test_keys_and_tokens_live_side_by_side(gateway: Gateway) -> None:
    """A team may have both."""
    async with gateway.post("/v1/chat/completions", BODY, key="K-path") as answer:
        assert answer.status == 200
    async with gateway.post("/path/v1/chat/completions", BODY, key=None) as answer:
        assert answer.status == 401


async def test_an_issuer_that_is_down_is_a_503(
    start_gateway: StartGateway, azure: FakeAzure, issuer: FakeIssuer
) -> None:
    """The gateway starts without it; its tokens get 503 with Retry-After, keys and other tokens do not wait."""
    issuer.status = 500
    azure.deployments, azure.api_key = ("path",), "stored-key"
    gateway = await start_gateway(azure.endpoint, YAML, FILES, env={"ISSUER": issuer.url})
    await until(lambda: any(event["event"] == "issuer_keys_fetch_failed" for event in gateway.events))
    for path in ("/v1", "/path/v1"):
        async with gateway.post(f"{path}/chat/completions", BODY, key=issuer.token()) as answer:
            assert answer.status == 503
            assert int(answer.headers["retry-after"]) > 0
            assert (await answer.json())["error"]["code"] == "identity_unavailable"
    async with gateway.post("/path/v1/chat/completions", BODY, key="K-path") as answer:
        assert answer.status == 200
    async with gateway.post("/path/v1/chat/completions", BODY, key=issuer.token(exp=1)) as answer:
        assert answer.status == 401
    assert "eyJ" not in str(gateway.events)


async def test_an_issuer_that_goes_down_later_is_not_noticed(gateway: Gateway, issuer: FakeIssuer) -> None:
    """The cached keys stay valid, also for new tokens."""
    await until(lambda: issuer.fetches)
    async with gateway.post(json=BODY, key=issuer.token(roles=["sales"])) as answer:
        assert answer.status == 200
    issuer.status = 500
    async with gateway.post(json=BODY, key=issuer.token(roles=["sales"], jti="another")) as answer:
        assert answer.status == 200


async def test_azure_s_own_tokens_pass_through(
    start_gateway: StartGateway, azure: FakeAzure, issuer: FakeIssuer
) -> None:
    """Where a team passes keys on, a token for Azure is no worse for being none of the gateway's, its issuer down.

    One for the gateway is another's secret to Azure: where only its claims could tell whose it is, it waits.
    """
    yaml = """
resources: {azure: {endpoint: "${ENDPOINT}"}}
identity: {issuer: "${ISSUER}", audience: "api://gateway"}
teams: teams/*.yaml
pipeline: [access_log, auth_passthrough, model_map: {models: {m: default}}, api_version]
"""
    issuer.status = 500
    token = issuer.token(aud="https://cognitiveservices.azure.com")
    azure.deployments, azure.api_key = ("default",), token
    gateway = await start_gateway(
        azure.endpoint, yaml, {"teams/one.yaml": "match: {claims: {roles: x}}\n"}, env={"ISSUER": issuer.url}
    )
    async with gateway.post(json=BODY, key=token) as answer:
        await answer.read()
    assert azure.requests[0].headers.get("authorization") == f"Bearer {token}"
    async with gateway.post(json=BODY, key=issuer.token()) as answer:
        assert answer.status == 503
        assert (await answer.json())["error"]["code"] == "identity_unavailable"
    assert len(azure.requests) == 1


async def test_a_herd_of_tokens_makes_one_fetch(gateway: Gateway, issuer: FakeIssuer) -> None:
    """200 requests at once with tokens of a new key."""
    await until(lambda: issuer.fetches)
    issuer.delay = 0.05
    issuer.rotate("second")
    tokens = [issuer.token(roles=["sales"], jti=str(number)) for number in range(200)]

    async def ask(token: str) -> int:
        async with gateway.post(json=BODY, key=token) as answer:
            return int(answer.status)

    assert set(await asyncio.gather(*map(ask, tokens))) == {200}
    assert issuer.fetches == 2


async def test_a_gateway_without_identity_verifies_nothing(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """A token is treated like any key."""
    yaml = f"""
resources: {{azure: {{endpoint: "${{ENDPOINT}}", api_key: stored-key}}}}
match: {{keys: ["{key_digest("K")}"]}}
pipeline: [access_log, auth_keys, model_map, api_version]
"""
    gateway = await start_gateway(azure.endpoint, yaml)
    assert gateway.server.teams.issuers is None
    async with gateway.post(json=BODY, key=made({"alg": "RS256"}, {})) as answer:
        assert answer.status == 401
    await gateway.idle()
    assert gateway.exchanges()[0]["auth"] == "unknown key"


# -- configuration ------------------------------------------------------------------------------------


def test_the_library_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it is not installed, `identity:` is a mistake with file and line that says how to install it."""
    monkeypatch.setattr(config_identity, "find_spec", lambda name: None)
    yaml = YAML.replace("${ISSUER}", "https://login.example.com").replace("${ENDPOINT}", "https://x.openai.azure.com")
    with pytest.raises(ConfigError) as raised:
        load(write_files(tmp_path, {"gateway.yaml": yaml, **FILES}), {})
    (mistake,) = raised.value.mistakes
    assert (mistake.line, mistake.column) == (3, 11)
    assert "pip install 'azure-openai-gateway[identity]'" in mistake.message


def test_the_library_is_imported_only_if_it_is_used() -> None:
    """A start without `identity:` does not import it."""
    import subprocess
    import sys

    code = "import gateway.server, gateway.config, sys; assert 'jwt' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_reading_an_identity_that_cannot_be_verified_is_an_error() -> None:
    """Otherwise a stage could treat it as no identity, and the client would not learn to retry."""
    from gateway.testing import running

    async with running() as run:
        sent = await run.post()
    request = sent.reached
    assert request is not None
    assert (request.identity, request.identity_error) == (None, None)
    request._verification = TokenVerification(reason="token that cannot be verified", retry_after=0.2)
    with pytest.raises(ApiError) as raised:
        _ = request.copy().identity
    assert (raised.value.status, raised.value.headers) == (503, {"retry-after": "1"})
    assert request.identity_error == "token that cannot be verified"
