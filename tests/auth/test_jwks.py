"""The keys of an issuer: fetched in the background, kept during an outage, and rotated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import structlog
from aiohttp import web
from aioresponses import aioresponses
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import RSAAlgorithm
from yarl import URL

from gateway.auth import jwks
from gateway.auth.jwks import IssuerKeys, KeysUnavailable, signing_key, url_problem
from tests.conftest import until
from tests.issuer import FakeIssuer, ec_key, jwk, rsa_key

ISSUER = "https://login.example.com/tenant/v2.0"
METADATA = ISSUER + "/.well-known/openid-configuration"
KEYS = "https://keys.example.com/all"


class Clock:
    """A clock that a test advances."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def issuer() -> AsyncIterator[FakeIssuer]:
    async with FakeIssuer() as issuer:
        yield issuer


@pytest.fixture
def keys(issuer: FakeIssuer, session: aiohttp.ClientSession, clock: Clock) -> IssuerKeys:
    return IssuerKeys(issuer.url, None, lambda: session, clock)


# -- where they are -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("aioresponses_314")
async def test_the_metadata_says_where_the_keys_are(session: aiohttp.ClientSession) -> None:
    """At ISSUER/.well-known/openid-configuration, whether or not the issuer ends with a slash."""
    for issuer in (ISSUER, ISSUER + "/"):
        with aioresponses() as mocked:
            mocked.get(METADATA, payload={"issuer": issuer, "jwks_uri": KEYS})
            mocked.get(KEYS, payload={"keys": [jwk(rsa_key("first"), "first")]})
            found = await IssuerKeys(issuer, None, lambda: session).find("first")
        assert found is not None
        assert found.kid == "first"


@pytest.mark.usefixtures("aioresponses_314")
async def test_keys_whose_url_is_configured_need_no_metadata(session: aiohttp.ClientSession) -> None:
    """The metadata is not fetched."""
    with aioresponses() as mocked:
        mocked.get(KEYS, payload={"keys": [jwk(rsa_key("first"), "first")]})
        assert await IssuerKeys(ISSUER, KEYS, lambda: session).find("first") is not None


@pytest.mark.usefixtures("aioresponses_314")
@pytest.mark.parametrize(
    "metadata",
    [
        {"issuer": "https://login.example.com/other/v2.0", "jwks_uri": KEYS},
        {"issuer": "https://login.example.com/{tenantid}/v2.0", "jwks_uri": KEYS},
        {"issuer": ISSUER + "/", "jwks_uri": KEYS},
        {"jwks_uri": KEYS},
        {"issuer": ISSUER},
        {"issuer": ISSUER, "jwks_uri": "http://keys.example.com/all"},
        {"issuer": ISSUER, "jwks_uri": "file:///etc/passwd"},
        {"issuer": ISSUER, "jwks_uri": ["https://keys.example.com/all"]},
        [],
    ],
)
async def test_metadata_of_another_issuer_is_rejected(metadata: Any, session: aiohttp.ClientSession) -> None:
    """Nor metadata with keys over plain HTTP, or without keys."""
    with aioresponses() as mocked:
        mocked.get(METADATA, payload=metadata)
        for url in (KEYS, "http://keys.example.com/all"):
            mocked.get(url, payload={"keys": [jwk(rsa_key("first"), "first")]})
        with pytest.raises(KeysUnavailable):
            await IssuerKeys(ISSUER, None, lambda: session).find("first")
        assert list(mocked.requests) == [("GET", URL(METADATA))]


@pytest.mark.parametrize(
    ("url", "sound"),
    [
        ("https://login.microsoftonline.com/t/v2.0", True),
        ("http://127.0.0.1:8000/x", True),
        ("http://[::1]:8000/x", True),
        ("http://localhost/x", True),
        ("http://login.example.com", False),
        ("http://127.0.0.1.example.com/x", False),
        ("https://user:password@login.example.com", False),
        ("https://login.example.com/#x", False),
        ("ftp://login.example.com", False),
        ("login.example.com", False),
        ("https://", False),
        ("https://x:99999/", False),
        ("", False),
    ],
)
def test_only_loopback_works_without_tls(url: str, sound: bool) -> None:
    """An attacker on the network could replace the keys."""
    assert (url_problem(url) is None) == sound


# -- what cannot be had -------------------------------------------------------------------------------


def redirected(_: web.Request) -> web.StreamResponse:
    return web.Response(status=302, headers={"location": "/elsewhere/keys"})


def huge(_: web.Request) -> web.StreamResponse:
    return web.Response(body=b'{"keys": [' + b" " * jwks.MAX_BYTES + b"]}")


def bomb(request: web.Request) -> web.StreamResponse:
    answer = huge(request)
    answer.headers["content-encoding"] = "deflate"
    assert isinstance(answer, web.Response)
    import zlib

    answer.body = zlib.compress(b'{"keys": [' + b" " * 50_000_000 + b"]}")
    return answer


def no_json(_: web.Request) -> web.StreamResponse:
    return web.Response(text="<html>")


def no_keys(_: web.Request) -> web.StreamResponse:
    return web.json_response({"keys": {"first": 1}})


def deep(_: web.Request) -> web.StreamResponse:
    return web.Response(text='{"keys": ' + "[" * 100_000)


def failing(_: web.Request) -> web.StreamResponse:
    return web.json_response({"keys": [jwk(rsa_key("first"), "first")]}, status=500)


@pytest.mark.parametrize("answer", [redirected, huge, bomb, no_json, no_keys, deep, failing])
async def test_an_invalid_response_is_not_used(answer: Any, issuer: FakeIssuer, session: aiohttp.ClientSession) -> None:
    """A redirect is not followed, and a response that is too large for keys is not read to its end."""
    issuer.answer = answer
    keys = IssuerKeys(issuer.url, issuer.url + "/keys", lambda: session)
    with structlog.testing.capture_logs() as events, pytest.raises(KeysUnavailable):
        await keys.find("first")
    assert issuer.asked == ["/tenant/v2.0/keys"]
    assert [event["event"] for event in events] == ["issuer_keys_fetch_failed"]
    assert events[0]["reason"]
    assert len(str(events[0]["reason"])) <= 300


async def test_fetching_keys_has_a_timeout(
    issuer: FakeIssuer, keys: IssuerKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a time that a client can wait."""
    monkeypatch.setattr(jwks, "TIMEOUT", 0.05)
    issuer.delay = 1
    with structlog.testing.capture_logs() as events, pytest.raises(KeysUnavailable):
        await keys.find("first")
    assert events[0]["reason"] == "timeout"


async def test_keys_stay_valid_for_a_day_while_the_issuer_is_down(
    issuer: FakeIssuer, keys: IssuerKeys, clock: Clock
) -> None:
    """Then there are none, and the log has said for how long they stay valid."""
    assert await keys.find("first") is not None
    issuer.status = 503
    clock.time += 23 * 3600
    with structlog.testing.capture_logs() as events:
        await keys._refresh.refresh()
        assert keys.get("first") is not None
        clock.time += 2 * 3600
        assert keys.get("first") is None
        with pytest.raises(KeysUnavailable):
            await keys.find("first")
    assert [(event["kept"], event["kept_for"], event["log_level"]) for event in events] == [
        (1, 3600, "warning"),
        (0, 0, "warning"),
    ]
    issuer.status = 200
    clock.time += jwks.MIN_FORCED_INTERVAL
    assert await keys.find("first") is not None


# -- when they are fetched ----------------------------------------------------------------------------


async def test_they_are_fetched_at_start_and_ahead(
    issuer: FakeIssuer, keys: IssuerKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regularly in the background: a removed key becomes invalid even without a request."""
    monkeypatch.setattr(jwks, "REFRESH_INTERVAL", 0.01)
    keys.start()
    await until(lambda: keys.get("first"))
    issuer.rotate("second")
    await until(lambda: keys.get("second"))
    assert keys.get("first") is None
    await keys.stop()
    before = issuer.fetches
    await asyncio.sleep(0.05)
    assert issuer.fetches == before


async def test_after_a_failure_they_are_fetched_sooner(
    issuer: FakeIssuer, keys: IssuerKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an outage at the start, keys are fetched as soon as the issuer is back, before the next regular refresh."""
    monkeypatch.setattr(jwks, "MIN_RETRY", 0.01)
    issuer.status = 500
    keys.start()
    await until(lambda: len(issuer.asked) > 2)
    issuer.status = 200
    await until(lambda: keys.get("first"))
    await keys.stop()


async def test_a_key_that_is_not_known_yet_is_fetched_at_once(issuer: FakeIssuer, keys: IssuerKeys) -> None:
    """So that a rotation fails no request; the old key is invalid if the issuer has removed it."""
    await keys._refresh.refresh()
    issuer.rotate("second", keep=True)
    assert await keys.find("second") is not None
    assert keys.get("first") is not None
    keys._no_fetch_until = 0
    issuer.rotate("third")
    assert await keys.find("third") is not None
    assert keys.get("first") is keys.get("second") is None


async def test_invented_key_ids_cause_no_requests_to_the_issuer(
    issuer: FakeIssuer, keys: IssuerKeys, clock: Clock
) -> None:
    """One fetch per half a minute, whatever the key ids are."""
    await keys._refresh.refresh()
    for number in range(50):
        assert await keys.find(f"made-up-{number}") is None
    assert issuer.fetches == 2
    clock.time += jwks.MIN_FORCED_INTERVAL
    assert await keys.find("made-up") is None
    assert issuer.fetches == 3


async def test_a_herd_of_requests_makes_one_fetch(issuer: FakeIssuer, keys: IssuerKeys) -> None:
    """All of 200 concurrent callers get the key from one fetch; a cancelled one fails no other."""
    issuer.delay = 0.02
    asking = [asyncio.create_task(keys.find("first")) for _ in range(200)]
    await until(lambda: issuer.asked)
    asking[0].cancel()
    found = await asyncio.gather(*asking[1:])
    assert len(set(map(id, found))) == 1
    assert found[0] is not None
    assert len(issuer.asked) == 2  # the metadata and the keys


async def test_an_issuer_that_is_down_is_not_asked_by_each_request(
    issuer: FakeIssuer, keys: IssuerKeys, clock: Clock
) -> None:
    """Requests between two tries fail at once, with the time to retry."""
    issuer.status = 500
    for _ in range(20):
        with pytest.raises(KeysUnavailable) as raised:
            await keys.find("first")
        assert 0 < raised.value.retry_after <= jwks.MIN_FORCED_INTERVAL
    assert len(issuer.asked) == 1


async def test_keys_outlive_a_reload(issuer: FakeIssuer, session: aiohttp.ClientSession) -> None:
    """The next object starts with the cached keys, but not with those of another URL."""
    cache: dict[str, Any] = {}
    first = IssuerKeys(issuer.url, None, lambda: session, cache=cache)
    found = await first.find("first")
    assert IssuerKeys(issuer.url, None, lambda: session, cache=cache).get("first") is found
    assert IssuerKeys(issuer.url, issuer.url + "/other", lambda: session, cache=cache).get("first") is None


async def test_a_key_that_has_not_changed_stays_the_same(issuer: FakeIssuer, keys: IssuerKeys) -> None:
    """It stays the same object, which verified tokens refer to; another key with the same id is another object."""
    before = await keys.find("first")
    await keys._refresh.refresh()
    assert keys.get("first") is before
    issuer.jwks = {"keys": [jwk(rsa_key("another"), "first")]}
    await keys._refresh.refresh()
    assert keys.get("first") is not before


async def test_an_issuer_without_any_usable_key_has_none(issuer: FakeIssuer, keys: IssuerKeys) -> None:
    """A warning says that the issuer has removed all keys."""
    await keys.find("first")
    issuer.jwks = {"keys": []}
    with structlog.testing.capture_logs() as events:
        await keys._refresh.refresh()
    assert keys.get("first") is None
    assert events[0]["event"] == "issuer_without_usable_keys"


# -- what is a key ------------------------------------------------------------------------------------

RSA = {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}


@pytest.mark.parametrize(
    ("made", "algorithms"),
    [
        (jwk(rsa_key("first"), "k"), RSA),
        (jwk(rsa_key("first"), "k", alg="RS256"), {"RS256"}),
        (jwk(rsa_key("first"), "k", alg="PS512", key_ops=["verify"]), {"PS512"}),
        (jwk(ec_key("p256"), "k"), {"ES256"}),
        (jwk(ec_key("p384", ec.SECP384R1), "k"), {"ES384"}),
        (jwk(ec_key("p521", ec.SECP521R1), "k", alg="ES512"), {"ES512"}),
    ],
)
def test_a_key_decides_its_algorithms(made: dict[str, Any], algorithms: set[str]) -> None:
    """By its type and its curve, or its own `alg`."""
    found = signing_key(made)
    assert found is not None
    assert found.algorithms == algorithms
    assert str(made.get("n", made.get("x"))) not in repr(found)


def _private() -> dict[str, Any]:
    return {**RSAAlgorithm.to_jwk(rsa_key("first"), as_dict=True), "kid": "k", "key_ops": ["verify"]}


@pytest.mark.parametrize(
    "made",
    [
        jwk(rsa_key("first"), "k", use="enc"),
        jwk(rsa_key("first"), "k", alg="RSA-OAEP"),
        jwk(rsa_key("first"), "k", alg="HS256"),
        jwk(rsa_key("first"), "k", alg="none"),
        jwk(rsa_key("first"), "k", alg=["RS256"]),
        jwk(rsa_key("first"), "k", alg="ES256"),
        jwk(rsa_key("first"), "k", key_ops=["encrypt"]),
        jwk(rsa_key("first"), "k", key_ops="verify"),
        jwk(rsa_key("first"), ""),
        {**jwk(rsa_key("first"), "k"), "kid": None},
        {**jwk(rsa_key("first"), "k"), "kid": 7},
        jwk(rsa_key("first"), "k", n="!"),
        jwk(rsa_key("first"), "k", n=None),
        jwk(rsa_key("first"), "k", e="AQ"),
        jwk(rsa_key("small", 1024), "k"),
        jwk(ec_key("p256"), "k", alg="ES384"),
        jwk(ec_key("p256"), "k", crv="P-384"),
        jwk(ec_key("p256"), "k", crv=["P-256"]),
        jwk(ec_key("p256"), "k", crv="secp256k1"),
        {"kty": "oct", "kid": "k", "k": "c2VjcmV0", "alg": "HS256"},
        {"kty": "OKP", "kid": "k", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"},
        {"kid": "k"},
        _private(),
        None,
        [],
        "key",
    ],
)
async def test_keys_that_sign_no_tokens_are_left_out(made: Any, issuer: FakeIssuer, keys: IssuerKeys) -> None:
    """And the others in the set stay valid."""
    assert signing_key(made) is None
    issuer.jwks = {"keys": [made, *issuer.jwks["keys"]]}
    assert await keys.find("first") is not None
    assert keys.get("k") is None
