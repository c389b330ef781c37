"""Entra tokens: their requests, the schedule of their refresh, and failed fetches."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs

import aiohttp
import pytest
import structlog
from aiohttp import web
from aioresponses import aioresponses
from yarl import URL

from gateway.auth import entra_tokens as entra
from gateway.auth.credentials import Credential
from gateway.auth.entra_tokens import EntraIdentity, EntraTokens, TokenUnavailable
from gateway.errors import GatewayError
from gateway.services import Shared
from tests.conftest import until

TENANT = "11111111-2222-3333-4444-555555555555"
CLIENT = "66666666-7777-8888-9999-000000000000"
SECRET = "s3cr3t~of+the/application"
ASSERTION = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJmZWRlcmF0ZWQifQ.c2ln"
HEADER = "853b9a84-5bfa-4b22-a3f3-0b9a43d9ad8a"
IMDS = "http://169.254.169.254/metadata/identity/oauth2/token"
BEARER = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

BY_SECRET = EntraIdentity("client_secret", TENANT, CLIENT, SECRET)


def token(name: str) -> str:
    """Return a token with a name."""
    return f"eyJhbGciOiJSUzI1NiJ9.{name}.c2lnbmF0dXJl"


class Clock:
    """A clock that a test advances, and its sleep: while it does not advance, no sleep ends."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.held: Callable[[], bool] = lambda: False
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def __call__(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        woken = asyncio.get_running_loop().create_future()
        self._sleepers.append((self.time + seconds, woken))
        await woken

    async def forward(self, seconds: float) -> None:
        """Let time pass. After each sleep, the task does its work before time continues."""
        end = self.time + seconds
        await self._settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            self.time, woken = self._sleepers.pop()
            woken.set_result(None)
            await self._settle()
        self.time = end

    async def _settle(self) -> None:
        async with asyncio.timeout(30):
            while not self._sleepers and not self.held():
                await asyncio.sleep(0)


class FakeEntra:
    """A server on loopback that issues tokens named `1`, `2`, ...; `asked` has all its requests.

    `said` is what an answer holds besides the token. With `answer`, that makes it. It waits for `open`.
    """

    def __init__(self) -> None:
        self.status = 200
        self.said: dict[str, Any] = {"token_type": "Bearer", "expires_in": 3599, "ext_expires_in": 3599}
        self.answer: Callable[[], web.StreamResponse] | None = None
        self.open = asyncio.Event()
        self.open.set()
        self.held = 0
        self.asked: list[tuple[str, str, dict[str, str], dict[str, str]]] = []
        self.headers: list[dict[str, str]] = []

    async def __aenter__(self) -> Self:
        self._runner = web.ServerRunner(web.Server(self._handle))
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.open.set()
        await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        form = {name: values[0] for name, values in parse_qs(await request.text()).items()}
        self.asked.append((request.method, request.path, dict(request.query), form))
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        number = len(self.asked)
        self.held += 1
        await self.open.wait()
        self.held -= 1
        if self.answer is not None:
            return self.answer()
        return web.json_response({**self.said, "access_token": token(str(number))}, status=self.status)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def place() -> AsyncIterator[FakeEntra]:
    async with FakeEntra() as place:
        yield place


@pytest.fixture
async def tokens(place: FakeEntra, session: aiohttp.ClientSession, clock: Clock) -> AsyncIterator[EntraTokens]:
    identity = dataclasses.replace(BY_SECRET, authority=place.url)
    tokens = EntraTokens(identity, lambda: session, clock=clock, sleep=clock.sleep)
    clock.held = lambda: place.held > 0
    yield tokens
    await tokens.stop()


def name_of(found: Credential | None) -> str | None:
    return None if found is None else found.value.split(".")[1]


# -- what is asked ------------------------------------------------------------------------------------


async def test_an_application_sends_its_secret(place: FakeEntra, tokens: EntraTokens) -> None:
    """In a form, as OAuth client credentials; Azure gets the token as a bearer token."""
    assert await tokens.credential() == Credential(token("1"), bearer=True)
    form = {
        "grant_type": "client_credentials",
        "client_id": CLIENT,
        "scope": "https://cognitiveservices.azure.com/.default",
        "client_secret": SECRET,
    }
    assert place.asked == [("POST", f"/{TENANT}/oauth2/v2.0/token", {}, form)]
    assert place.headers[0]["content-type"] == "application/x-www-form-urlencoded"
    assert place.headers[0]["accept"] == "application/json"


async def test_a_workload_sends_its_current_federated_token(
    place: FakeEntra, session: aiohttp.ClientSession, clock: Clock, tmp_path: Path
) -> None:
    """The file is read for each fetch: it is replaced every hour or so."""
    file = tmp_path / "token"
    file.write_text(ASSERTION + "\n")
    identity = EntraIdentity("workload_identity", TENANT, CLIENT, token_file=file, authority=place.url + "/")
    tokens = EntraTokens(identity, lambda: session, clock=clock)
    await tokens.credential()
    form = {
        "grant_type": "client_credentials",
        "client_id": CLIENT,
        "scope": "https://cognitiveservices.azure.com/.default",
        "client_assertion_type": BEARER,
        "client_assertion": ASSERTION,
    }
    assert place.asked == [("POST", f"/{TENANT}/oauth2/v2.0/token", {}, form)]
    file.write_text(token("rotated"))
    clock.time += 3600
    assert name_of(await tokens.credential()) == "2"
    assert place.asked[1][3] == {**form, "client_assertion": token("rotated")}


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        (None, "No such file"),
        (b"", "does not contain a token"),
        (b"two words", "does not contain a token"),
        (b"\xff\xfe", "does not contain a token"),
        (b"x" * 100_000, "does not contain a token"),
    ],
)
async def test_a_file_without_a_federated_token_is_a_failure(
    held: bytes | None, reason: str, place: FakeEntra, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """Entra gets no request, and the log names the file."""
    file = tmp_path / "token"
    if held is not None:
        file.write_bytes(held)
    identity = EntraIdentity("workload_identity", TENANT, CLIENT, token_file=file, authority=place.url)
    with structlog.testing.capture_logs() as events, pytest.raises(TokenUnavailable) as raised:
        await EntraTokens(identity, lambda: session).credential()
    assert reason in raised.value.reason
    assert str(file) in raised.value.reason
    assert [event["reason"] for event in events] == [raised.value.reason]
    assert place.asked == []


@pytest.mark.usefixtures("aioresponses_314")
@pytest.mark.parametrize(
    ("client_id", "named"), [(None, {}), (CLIENT, {"client_id": CLIENT})], ids=["system-assigned", "user-assigned"]
)
async def test_a_virtual_machine_uses_its_metadata_service(
    client_id: str | None, named: dict[str, str], session: aiohttp.ClientSession
) -> None:
    """At its fixed address, with the header that forged requests cannot have."""
    identity = EntraIdentity("managed_identity", client_id=client_id)
    query = {"api-version": "2018-02-01", "resource": "https://cognitiveservices.azure.com", **named}
    with aioresponses() as mocked:
        said = {"expires_in": "3599", "expires_on": "5000", "not_before": "0", "token_type": "Bearer"}
        mocked.get(URL(IMDS).with_query(query), payload={"access_token": token("vm"), **said})
        assert name_of(await EntraTokens(identity, lambda: session, now=lambda: 1401.0).credential()) == "vm"
    ((call,),) = mocked.requests.values()
    assert call.kwargs["headers"]["Metadata"] == "true"
    assert "X-IDENTITY-HEADER" not in call.kwargs["headers"]
    assert call.kwargs["allow_redirects"] is False
    assert call.kwargs.get("data") is None


@pytest.mark.parametrize("client_id", [None, CLIENT])
async def test_app_service_has_its_own_endpoint(
    client_id: str | None, place: FakeEntra, session: aiohttp.ClientSession, clock: Clock
) -> None:
    """With a header that only the app knows; its responses have only the expiry time."""
    place.said = {"expires_on": "5000", "resource": "x", "token_type": "Bearer"}
    identity = EntraIdentity(
        "managed_identity", client_id=client_id, endpoint=place.url + "/msi/token", endpoint_header=HEADER
    )
    tokens = EntraTokens(identity, lambda: session, clock=clock, now=lambda: 4000.0)
    assert name_of(await tokens.credential()) == "1"
    query = {"api-version": "2019-08-01", "resource": "https://cognitiveservices.azure.com"}
    query |= {} if client_id is None else {"client_id": client_id}
    assert place.asked == [("GET", "/msi/token", query, {})]
    assert place.headers[0]["x-identity-header"] == HEADER
    clock.time += 1000 - entra.MARGIN - 1
    assert tokens.current()
    clock.time += 1
    assert tokens.current() is None


@pytest.mark.usefixtures("aioresponses_314")
@pytest.mark.parametrize("authority", ["https://login.microsoftonline.us", "https://login.partner.microsoftonline.cn/"])
@pytest.mark.parametrize("scope", ["https://ai.azure.com/.default", "https://cognitiveservices.azure.us/.default"])
async def test_other_clouds_have_other_authorities_and_scopes(
    authority: str, scope: str, session: aiohttp.ClientSession
) -> None:
    """Both are configurable."""
    identity = dataclasses.replace(BY_SECRET, authority=authority, scope=scope)
    url = f"{authority.rstrip('/')}/{TENANT}/oauth2/v2.0/token"
    with aioresponses() as mocked:
        mocked.post(url, payload={"access_token": token("gov"), "expires_in": 3599})
        assert name_of(await EntraTokens(identity, lambda: session).credential()) == "gov"
    assert list(mocked.requests) == [("POST", URL(url))]
    assert mocked.requests["POST", URL(url)][0].kwargs["data"]["scope"] == scope


@pytest.mark.parametrize(
    ("scope", "resource"),
    [
        ("https://ai.azure.com/.default", "https://ai.azure.com"),
        ("https://cognitiveservices.azure.us/.default", "https://cognitiveservices.azure.us"),
        ("https://example.com//.default", "https://example.com/"),
        ("https://example.com", "https://example.com"),
        ("api://app/.default", "api://app"),
    ],
)
async def test_a_managed_identity_names_a_resource(
    scope: str, resource: str, place: FakeEntra, session: aiohttp.ClientSession
) -> None:
    """It is the scope without `/.default`; a slash before that belongs to it."""
    identity = EntraIdentity("managed_identity", scope=scope, endpoint=place.url)
    await EntraTokens(identity, lambda: session).credential()
    assert place.asked[0][2]["resource"] == resource


async def test_no_proxy_of_the_environment_is_used(place: FakeEntra, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session uses none: requests to the metadata service must come from the machine itself."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    shared = Shared()
    identity = EntraIdentity("managed_identity", endpoint=place.url)
    assert name_of(await EntraTokens(identity, shared.session).credential()) == "1"
    await shared.close()


# -- when it is fetched -------------------------------------------------------------------------------


async def test_a_token_is_used_until_shortly_before_it_expires(
    place: FakeEntra, tokens: EntraTokens, clock: Clock
) -> None:
    """One fetch serves all requests until then."""
    assert tokens.current() is None
    first = await tokens.credential()
    clock.time += 3599 - entra.MARGIN - 1
    assert await tokens.credential() is first
    assert tokens.current() is first
    assert len(place.asked) == 1
    clock.time += 1
    assert tokens.current() is None
    assert name_of(await tokens.credential()) == "2"
    assert name_of(tokens.current()) == "2"


async def test_the_lifetime_of_a_token_starts_at_the_request(
    place: FakeEntra, tokens: EntraTokens, clock: Clock
) -> None:
    """The time of a slow response reduces the lifetime."""
    place.open.clear()
    asking = asyncio.create_task(tokens.credential())
    await until(lambda: place.asked)
    clock.time += 100
    place.open.set()
    assert name_of(await asking) == "1"
    clock.time += 3599 - entra.MARGIN - 100 - 1
    assert tokens.current()
    clock.time += 1
    assert tokens.current() is None


@pytest.mark.parametrize(
    ("said", "end"),
    [
        ({"expires_in": 3000}, 3000),
        ({"expires_in": "3000"}, 3000),
        ({"expires_on": "8000"}, 3000),
        ({"expires_on": 8000}, 3000),
        ({"expires_in": "3000", "expires_on": "7000"}, 2000),  # from a cache, issued some time ago
        ({"expires_in": "3000", "expires_on": "9000"}, 3000),
    ],
)
async def test_the_earlier_of_two_expiry_times_counts(
    said: dict[str, Any], end: float, place: FakeEntra, session: aiohttp.ClientSession, clock: Clock
) -> None:
    """Seconds can be text, relative or since the epoch."""
    place.said = said
    identity = EntraIdentity("managed_identity", endpoint=place.url)
    tokens = EntraTokens(identity, lambda: session, clock=clock, now=lambda: 5000.0)
    assert name_of(await tokens.credential()) == "1"
    clock.time += end - entra.MARGIN - 1
    assert tokens.current()
    clock.time += 1
    assert tokens.current() is None


@pytest.mark.parametrize(
    ("said", "at"),
    [
        ({"expires_in": 3610}, 3000),  # ten minutes before it expires for the gateway
        ({"expires_in": 410}, 200),  # half
        ({"expires_in": "86410", "refresh_in": "43200"}, 43200),
        ({"expires_in": 3610, "refresh_in": 1800}, 1800),
        ({"expires_in": 3610, "refresh_in": 3605}, 3000),
        ({"expires_in": 3610, "refresh_in": "soon"}, 3000),
        ({"expires_in": 3610, "refresh_in": 0}, 3000),
        ({"expires_in": 3610, "refresh_in": 1}, 10),
        ({"expires_in": 25}, 10),
    ],
)
async def test_the_next_token_is_fetched_ahead(
    said: dict[str, Any], at: float, place: FakeEntra, tokens: EntraTokens, clock: Clock
) -> None:
    """Once, in the background: at the advised time, after half of a short lifetime, or else minutes ahead."""
    place.said = said
    tokens.start()
    await until(tokens.current)
    await clock.forward(at - 1)
    assert len(place.asked) == 1
    await clock.forward(1)
    await until(lambda: name_of(tokens.current()) == "2")
    assert len(place.asked) == 2


async def test_no_token_is_fetched_after_stop(place: FakeEntra, tokens: EntraTokens, clock: Clock) -> None:
    """Nor does the current fetch continue."""
    place.open.clear()
    tokens.start()
    asking = asyncio.create_task(tokens.credential())
    await until(lambda: place.asked)
    await tokens.stop()
    place.open.set()
    with pytest.raises(TokenUnavailable) as raised:
        await asking
    assert raised.value.reason == "the fetch was stopped"
    clock.time += 4000
    await asyncio.sleep(0.05)
    assert tokens.current() is None
    assert len(place.asked) == 1


async def test_requests_do_not_wait_for_a_refresh(place: FakeEntra, tokens: EntraTokens, clock: Clock) -> None:
    """The current token is used while the next one is slow to arrive."""
    tokens.start()
    first = await tokens.credential()
    place.open.clear()
    await clock.forward(3000)
    await until(lambda: len(place.asked) == 2)
    async with asyncio.timeout(30):
        assert await tokens.credential() is tokens.current() is first
    place.open.set()
    await until(lambda: name_of(tokens.current()) == "2")


async def test_a_herd_of_requests_makes_one_fetch(place: FakeEntra, tokens: EntraTokens) -> None:
    """All of 200 concurrent callers get its token; a cancelled one fails no other, not even if it was the first."""
    place.open.clear()
    asking = [asyncio.create_task(tokens.credential()) for _ in range(200)]
    await until(lambda: place.asked)
    asking[0].cancel()
    await asyncio.wait(asking[:1])
    place.open.set()
    found = await asyncio.gather(*asking[1:])
    assert {name_of(each) for each in found} == {"1"}
    assert asking[0].cancelled()
    assert len(place.asked) == 1


async def test_a_short_lived_token_is_refreshed_in_time(place: FakeEntra, tokens: EntraTokens, clock: Clock) -> None:
    """The schedule had a long backoff after several failures, but it notices the earlier expiry."""
    place.status = 500
    tokens.start()
    await clock.forward(200)
    assert tokens._due - clock.time > 60
    place.status, place.said = 200, {"expires_in": 50}
    before = name_of(await tokens.credential())
    await clock.forward(35)
    assert name_of(tokens.current()) not in (before, None)


# -- what cannot be had -------------------------------------------------------------------------------


async def test_the_last_token_stays_until_it_expires(place: FakeEntra, tokens: EntraTokens, clock: Clock) -> None:
    """Each failure logs for how long; then requests get Retry-After, and finally it recovers."""
    tokens.start()
    first = await tokens.credential()
    place.status = 503
    with structlog.testing.capture_logs() as events:
        await clock.forward(3599 - entra.MARGIN - 1)
        assert await tokens.credential() is first
        tries = len(place.asked) - 1
        assert [event["log_level"] for event in events] == ["warning"] * tries
        kept = [event["kept_for"] for event in events]
        await clock.forward(1)
        with pytest.raises(TokenUnavailable) as raised:
            await tokens.credential()
    assert kept[:4] == [600, 590, 570, 530]
    assert 1 <= kept[-1] <= 2 * entra.MIN_RETRY  # frequent tries at the end: Entra may be back just in time
    assert tries <= 12
    assert isinstance(raised.value, GatewayError)
    assert 0 < raised.value.retry_after <= entra.MAX_REFUSAL
    assert str(raised.value) == "the gateway has no Entra token for Azure at the moment; retry shortly"
    assert "status 503" in raised.value.reason
    place.status = 200
    await clock.forward(entra.MAX_RETRY)
    assert name_of(tokens.current()) == str(len(place.asked))
    assert await tokens.credential() is tokens.current()


async def test_background_fetches_have_a_backoff(place: FakeEntra, tokens: EntraTokens, clock: Clock) -> None:
    """After 10 s, 20 s, ..., and then every five minutes, without any request, until one succeeds."""
    place.status = 500
    tokens.start()
    for tries, wait in enumerate((10, 20, 40, 80, 160, 300, 300), 1):
        await clock.forward(wait - 1)
        assert len(place.asked) == tries
        await clock.forward(1)
        assert len(place.asked) == tries + 1
    place.status = 200
    await clock.forward(300)
    assert name_of(tokens.current()) == "9"
    place.status = 500
    await clock.forward(3599 - entra.MARGIN - entra.AHEAD)
    for tries, wait in enumerate((10, 20), 10):
        await clock.forward(wait - 1)
        assert len(place.asked) == tries
        await clock.forward(1)
        assert len(place.asked) == tries + 1


async def test_requests_fail_at_once_after_a_failed_fetch(place: FakeEntra, tokens: EntraTokens, clock: Clock) -> None:
    """For a second, and longer after each further failure, no request fetches."""
    place.status = 401
    for failures, seconds in enumerate((1, 2, 4, 8, 10, 10), 1):
        for _ in range(20):
            with pytest.raises(TokenUnavailable) as raised:
                await tokens.credential()
            assert raised.value.retry_after == seconds
        assert len(place.asked) == failures
        clock.time += seconds / 2
        with pytest.raises(TokenUnavailable) as raised:
            await tokens.credential()
        assert raised.value.retry_after == seconds / 2
        clock.time += seconds / 2
    place.status = 200
    assert name_of(await tokens.credential()) == "7"


async def test_a_request_waits_for_the_current_fetch(place: FakeEntra, tokens: EntraTokens, clock: Clock) -> None:
    """Instead of failing because of earlier failures."""
    place.status = 500
    tokens.start()
    await clock.forward(29)
    place.status = 200
    place.open.clear()
    await clock.forward(1)
    await until(lambda: len(place.asked) == 3)
    tokens._refused_until = clock.time + 1
    asking = asyncio.create_task(tokens.credential())
    await asyncio.sleep(0.01)
    place.open.set()
    assert name_of(await asking) == "3"


async def test_after_very_many_failures_it_still_tries(tokens: EntraTokens, clock: Clock) -> None:
    """The backoff has a maximum, and no number overflows."""
    tokens._failures = 5000
    with structlog.testing.capture_logs():
        tokens._failed(ValueError("x"))
    assert tokens._due == clock.time + entra.MAX_RETRY
    assert tokens._refused_until == clock.time + entra.MAX_REFUSAL


async def test_a_fetch_has_a_timeout(place: FakeEntra, tokens: EntraTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a time that a client can wait: without a metadata service nothing responds."""
    assert entra.TIMEOUT == 5
    monkeypatch.setattr(entra, "TIMEOUT", 0.05)
    place.open.clear()
    with structlog.testing.capture_logs() as events, pytest.raises(TokenUnavailable) as raised:
        await tokens.credential()
    assert raised.value.reason == "timeout"
    assert [(event["error"], event["reason"]) for event in events] == [("TimeoutError", "timeout")]


async def test_a_refused_connection_is_a_failure(session: aiohttp.ClientSession, unused_tcp_port: int) -> None:
    """It is logged with the details of the identity."""
    identity = dataclasses.replace(BY_SECRET, authority=f"http://127.0.0.1:{unused_tcp_port}")
    with structlog.testing.capture_logs() as events, pytest.raises(TokenUnavailable):
        await EntraTokens(identity, lambda: session).credential()
    assert events == [
        {
            "event": "entra_token_fetch_failed",
            "log_level": "warning",
            "identity": "client_secret",
            "tenant": TENANT,
            "client_id": CLIENT,
            "error": "ClientConnectorError",
            "reason": events[0]["reason"],
            "kept_for": 0,
        }
    ]
    assert "Cannot connect" in events[0]["reason"]


GOOD = {"access_token": token("1"), "expires_in": 3599}


def good(**changed: Any) -> Callable[[], web.StreamResponse]:
    """Return a function that makes a valid response with changed fields; None removes a field."""
    said = {name: value for name, value in (GOOD | changed).items() if value is not None}
    return lambda: web.json_response(said)


def huge() -> web.StreamResponse:
    return web.Response(body=json.dumps(GOOD).encode() + b" " * entra.MAX_BYTES)


def bomb() -> web.StreamResponse:
    import zlib

    body = zlib.compress(json.dumps(GOOD).encode() + b" " * 50_000_000)
    return web.Response(body=body, headers={"content-encoding": "deflate"})


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda: web.Response(text="<html>"), "without a JSON object"),
        (lambda: web.Response(body=b"\xff"), "without a JSON object"),
        (lambda: web.Response(), "without a JSON object"),
        (lambda: web.json_response([GOOD]), "without a JSON object"),
        (lambda: web.Response(text="[" * 60_000), "without a JSON object"),
        (lambda: web.json_response(GOOD, status=500), "responded with status 500"),
        (lambda: web.json_response(GOOD, status=203), "responded with status 203"),
        (huge, "responded with more than 65536 bytes"),
        (bomb, "responded with more than 65536 bytes"),
        (good(access_token=None), "no `access_token`"),
        (good(access_token=""), "no `access_token`"),
        (good(access_token=7), "no `access_token`"),
        (good(access_token="eyJ.a\r\nx: y"), "or a malformed one"),
        (good(access_token="eyJ.a.b" + "c" * 20_000), "or a malformed one"),
        (good(expires_in=None), "neither `expires_in` nor `expires_on`"),
        (good(expires_in="soon"), "`expires_in` in the response is not a number"),
        (good(expires_in=[3599]), "`expires_in` in the response is not a number"),
        (good(expires_on="06/20/2019 02:57:58 +00:00"), "`expires_on` in the response is not a number"),
        (good(expires_in=-1), "an implausible lifetime of -1 s"),
        (good(expires_in=0), "an implausible lifetime of 0 s"),
        (good(expires_in=10), "an implausible lifetime of 10 s"),
        (good(expires_in="nan"), "an implausible lifetime of nan s"),
        (good(expires_in="inf"), "an implausible lifetime of inf s"),
        (good(expires_in=10**9), "an implausible lifetime of 1000000000 s"),
        (good(expires_on=1), "check the clock"),
    ],
)
async def test_an_invalid_response_is_a_failure(
    answer: Callable[[], web.StreamResponse], reason: str, place: FakeEntra, tokens: EntraTokens
) -> None:
    """The reason is one line without the token, and the current token stays."""
    before = await tokens.credential()
    place.answer = answer
    with structlog.testing.capture_logs() as events:
        await tokens._refresh.refresh()
    assert tokens.current() is before
    (event,) = events
    assert reason in event["reason"]
    assert token("1") not in str(event)
    tokens._good_until = 0
    with pytest.raises(TokenUnavailable) as raised:
        await tokens.credential()
    assert raised.value.reason == event["reason"]


async def test_valid_responses_are_accepted(place: FakeEntra, tokens: EntraTokens) -> None:
    """The base of the failures above is valid."""
    place.answer = good()
    assert (await tokens.credential()).value == token("1")


async def test_a_redirect_is_not_followed(place: FakeEntra, tokens: EntraTokens) -> None:
    """A redirect would carry the secret to another server."""
    place.answer = lambda: web.Response(status=307, headers={"location": "/elsewhere"})
    with pytest.raises(TokenUnavailable) as raised:
        await tokens.credential()
    assert "status 307" in raised.value.reason
    assert [path for _, path, _, _ in place.asked] == [f"/{TENANT}/oauth2/v2.0/token"]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            {
                "error": "invalid_client",
                "error_description": "AADSTS7000215: Invalid client secret provided.\r\nTrace ID: 1\r\n",
                "error_codes": [7000215],
            },
            "status 400: invalid_client: AADSTS7000215: Invalid client secret provided. Trace ID: 1",
        ),
        (
            {"error": "invalid_request", "error_description": "Identity not found"},
            "status 400: invalid_request: Identity not found",
        ),
        ({"statusCode": 400, "message": "No Managed Identity found"}, "status 400: No Managed Identity found"),
        ({"error": {"code": "x"}, "error_description": 7}, "status 400"),
        (["error"], "status 400"),
    ],
)
async def test_the_error_message_of_the_server_is_logged(
    said: Any, reason: str, place: FakeEntra, tokens: EntraTokens
) -> None:
    """Of Entra, the metadata service and App Service, in one line."""
    place.answer = lambda: web.json_response(said, status=400)
    with pytest.raises(TokenUnavailable) as raised:
        await tokens.credential()
    assert raised.value.reason.endswith(reason)


async def test_a_long_error_is_truncated(place: FakeEntra, tokens: EntraTokens) -> None:
    """And a secret at the end of the truncated text is redacted first."""
    url = f"{place.url}/{TENANT}/oauth2/v2.0/token responded with status 400: "
    filler = "x" * (entra.MAX_REASON - len(url) - 5)
    place.answer = lambda: web.json_response({"error": filler + SECRET + "y" * 1000}, status=400)
    with pytest.raises(TokenUnavailable) as raised:
        await tokens.credential()
    assert len(raised.value.reason) == entra.MAX_REASON
    assert raised.value.reason.endswith("x***yy")


# -- secrets ------------------------------------------------------------------------------------------


async def test_no_secret_is_logged(place: FakeEntra, session: aiohttp.ClientSession, tmp_path: Path) -> None:
    """Not if the server echoes the request, as text or form-encoded; and not in a repr."""
    file = tmp_path / "token"
    file.write_text(ASSERTION)
    identities = (
        dataclasses.replace(BY_SECRET, authority=place.url),
        EntraIdentity("workload_identity", TENANT, CLIENT, token_file=file, authority=place.url),
        EntraIdentity("managed_identity", endpoint=place.url, endpoint_header=HEADER),
    )
    form = "s3cr3t~of%2Bthe%2Fapplication"
    place.answer = lambda: web.json_response(
        {"error": f"{SECRET} {form}", "error_description": f"{ASSERTION} {HEADER}"}, status=400
    )
    for identity, secrets in zip(identities, ((SECRET, form), (ASSERTION,), (HEADER,)), strict=True):
        tokens = EntraTokens(identity, lambda: session)
        with structlog.testing.capture_logs() as events, pytest.raises(TokenUnavailable) as raised:
            await tokens.credential()
        told = f"{events} {raised.value!r} {raised.value.reason} {identity!r} {tokens!r}"
        assert "status 400: " in raised.value.reason
        assert not [secret for secret in secrets if secret in told]
        assert raised.value.__cause__ is raised.value.__context__ is None


async def test_no_text_contains_a_token(
    place: FakeEntra, tokens: EntraTokens, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by the object nor by the cache for reloads."""
    cache: dict[str, Any] = {}
    monkeypatch.setattr(tokens, "_cache", cache)
    with structlog.testing.capture_logs() as events:
        found = await tokens.credential()
        clock.time += 3600
        place.status = 500
        with pytest.raises(TokenUnavailable):
            await tokens.credential()
    assert len(events) == len(cache) == 1
    assert found.value not in f"{found!r} {tokens!r} {cache!r} {events!r}"
    assert SECRET not in repr(cache)


# -- reloads ------------------------------------------------------------------------------------------


async def test_a_token_outlives_a_reload(place: FakeEntra, session: aiohttp.ClientSession, clock: Clock) -> None:
    """The next object of an equal identity starts with the current token, and refreshes it when it is due."""
    cache: dict[str, Any] = {}
    identity = dataclasses.replace(BY_SECRET, authority=place.url)
    found = await EntraTokens(identity, lambda: session, clock=clock, cache=cache).credential()
    again = EntraTokens(dataclasses.replace(identity), lambda: session, clock=clock, sleep=clock.sleep, cache=cache)
    assert again.current() is found
    again.start()
    await clock.forward(3599 - entra.MARGIN - entra.AHEAD - 1)
    assert len(place.asked) == 1
    await clock.forward(1)
    await until(lambda: name_of(again.current()) == "2")
    await again.stop()
    clock.time += 3600
    assert EntraTokens(identity, lambda: session, clock=clock, cache=cache).current() is None


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": "workload_identity"},
        {"tenant": "another"},
        {"client_id": "another"},
        {"client_id": CLIENT + SECRET, "client_secret": None},
        {"client_secret": "another"},
        {"token_file": Path("another")},
        {"scope": "https://ai.azure.com/.default"},
        {"authority": "https://login.microsoftonline.us"},
        {"endpoint": "http://127.0.0.1:1"},
        {"endpoint_header": "another"},
    ],
)
async def test_another_identity_does_not_get_the_token(
    changed: dict[str, Any], session: aiohttp.ClientSession, clock: Clock, place: FakeEntra
) -> None:
    """Any difference matters, even if it is only the secret, which may be wrong."""
    cache: dict[str, Any] = {}
    identity = dataclasses.replace(BY_SECRET, authority=place.url)
    await EntraTokens(identity, lambda: session, clock=clock, cache=cache).credential()
    assert EntraTokens(identity, lambda: session, clock=clock, cache=cache).current()
    other = dataclasses.replace(identity, **changed)
    assert EntraTokens(other, lambda: session, clock=clock, cache=cache).current() is None
