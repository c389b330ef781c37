"""`cors`: which web pages may use the API; by the Fetch standard, 3.2."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from aiohttp import web

from gateway import ApiError, Headers, Response, UpstreamError
from gateway.testing import FakeAzure, Seen, Sent, post, running, send
from plugins.auth_passthrough import AuthPassthrough
from plugins.cors import EXPOSED, Cors
from tests.conftest import CHAT, YAML, StartGateway

APP = "https://app.example.com"
SITES = [APP, "https://*.example.org", "http://localhost:*", "https://[::1]:8443", "app://obsidian.md"]
CORS_YAML = YAML.replace("  - auth_passthrough", "  - cors: {origins: [https://app.example.com]}\n  - auth_passthrough")

ALLOWED = [
    APP,
    "https://APP.example.com",
    "HTTPS://app.Example.COM",
    "https://a.example.org",
    "https://a.b-c.example.org",
    "http://localhost",
    "http://localhost:5173",
    "https://[::1]:8443",
    "app://obsidian.md",
]
HOSTILE = [
    "https://evil.com",
    "http://app.example.com",
    "https://app.example.com:443",
    "https://app.example.com:8443",
    "https://app.example.com.evil.com",
    "https://app.example.com/",
    "https://app.example.com, https://evil.com",
    "https://app.example.com https://evil.com",
    "https://appXexample.com",
    "https://app.example.com.",
    "https://example.org",
    "https://.example.org",
    "https://a..example.org",
    "https://evil.com?.example.org",
    "https://evil.com/.example.org",
    "https://evil.com#.example.org",
    "https://evil.com:80.example.org",
    "https://evil.com\\.example.org",
    "https://me@a.example.org",
    "https://evil.com%2f.example.org",
    "https://evilexample.org",
    "https://a.example.org:443",
    "https://a.example.org.evil.com",
    "https://a.exampleXorg",
    "https://a.example.org\x0b",
    "https://\xe4.example.org",
    "http://localhost:",
    "http://localhost:80@evil.com",
    "http://localhost:5173.evil.com",
    "http://localhost:123456",
    "http://localhost.evil.com:5173",
    "https://[::1]",
    "https://a.example.org" + ".example.org" * 5000 + "/",
    "null",
    "*",
    "",
    "app.example.com",
    "//app.example.com",
]


async def ask(stage: Cors, origin: str | None, **more: Any) -> Sent:
    headers = {} if origin is None else {"Origin": origin}
    return await post(stage, json=CHAT, headers={**headers, **more.pop("headers", {})}, **more)


async def preflight(stage: Cors, origin: str = APP, headers: str | None = None, method: str = "POST") -> Sent:
    asked = {"Origin": origin, "Access-Control-Request-Method": method}
    if headers is not None:
        asked["Access-Control-Request-Headers"] = headers
    return await send([stage], "OPTIONS", "/chat/completions", headers=asked)


def said(headers: Headers) -> dict[str, str]:
    """Return a response's `access-control-*` headers."""
    return {
        name.lower(): value
        for name, value in headers
        if name.lower().startswith("access-control-") or name.lower() == "vary"
    }


# -- which origins -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ALLOWED)
async def test_a_listed_origin_is_told_that_it_may(origin: str) -> None:
    """In any case, and echoed unchanged: the browser compares them byte for byte."""
    for sent in (await ask(Cors(SITES), origin), await preflight(Cors(SITES), origin)):
        assert sent.status in (200, 204)
        assert said(sent.headers)["access-control-allow-origin"] == origin


@pytest.mark.parametrize("origin", HOSTILE, ids=lambda origin: origin[:40])
async def test_no_other_origin_is(origin: str) -> None:
    """However similar; its preflight is a 403 in OpenAI's shape, and the page cannot read its responses."""
    sent = await ask(Cors(SITES), origin)
    assert (sent.status, said(sent.headers)) == (200, {"vary": "Origin"})
    refused = await preflight(Cors(SITES), origin)
    assert (refused.status, said(refused.headers)) == (403, {"vary": "Origin"})
    assert refused.json()["error"]["code"] == "origin_not_allowed"
    assert refused.json()["error"]["type"] == "invalid_request_error"
    assert len(refused.body) < 1000
    assert refused.reached is None


async def test_the_configuration_may_be_in_capitals() -> None:
    """Hosts are case-insensitive."""
    assert (
        "access-control-allow-origin" in (await ask(Cors(["HTTPS://*.Example.Com"]), "https://a.example.com")).headers
    )


async def test_several_origins_at_once_are_none() -> None:
    """No browser sends two fields; an allowed one does not allow the other."""
    async with running(Cors([APP])) as run:
        for origins in ((APP, "https://evil.com"), ("https://evil.com", APP), (APP, APP)):
            headers = Headers([(b"origin", each.encode()) for each in origins])
            sent = await run.post(CHAT, headers=_Raw(headers))
            assert said(sent.headers) == {"vary": "Origin"}
            headers.add("access-control-request-method", "POST")
            assert (await run.send("OPTIONS", headers=_Raw(headers))).status == 403


class _Raw(dict[str, str]):
    """Headers with one name twice, for a kit that takes a mapping."""

    def __init__(self, headers: Headers) -> None:
        super().__init__({"x": "x"})
        self._pairs = list(headers)

    def items(self) -> Any:
        return self._pairs


async def test_every_page_there_is() -> None:
    """The value is `*` for every request, also without an origin, so that caches can share the response."""
    for origin in ("https://anything.test", "null", None):
        assert said((await ask(Cors(["*"], expose=[]), origin)).headers) == {"access-control-allow-origin": "*"}
    assert said((await preflight(Cors(["*"]), "null")).headers)["access-control-allow-origin"] == "*"


async def test_null_is_an_origin_only_where_it_is_listed() -> None:
    """Local files and sandboxed frames have this origin."""
    assert said((await ask(Cors(["null"]), "null")).headers)["access-control-allow-origin"] == "null"
    assert said((await ask(Cors(["null"]), "https://null")).headers) == {"vary": "Origin"}


# -- preflights ----------------------------------------------------------------------------------------------------


async def test_a_preflight_is_answered_here_and_needs_no_key() -> None:
    """It has the allowed headers and the maximum age; the stages below do not see it."""
    asked = "authorization,content-type,x-stainless-os"
    headers = {"Origin": APP, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": asked}
    sent = await send([Cors([APP]), AuthPassthrough()], "OPTIONS", "/chat/completions", headers=headers)
    assert (sent.status, sent.body, sent.reached) == (204, b"", None)
    assert said(sent.headers) == {
        "access-control-allow-origin": APP,
        "access-control-allow-methods": "GET, POST, DELETE",
        "access-control-allow-headers": "authorization, content-type, x-stainless-os",
        "access-control-max-age": "7200",
        "vary": "Origin, Access-Control-Request-Headers",
    }


async def test_the_headers_that_pages_may_send_can_be_listed() -> None:
    """The response always has the list; the browser reports a header that is missing in it."""
    for asked in ("authorization", "x-other", None, "no token,"):
        sent = await preflight(Cors([APP], headers=["authorization", "Content-Type"]), headers=asked)
        assert sent.headers.get("access-control-allow-headers") == "authorization, Content-Type"


async def test_asked_for_headers_are_looked_at_before_they_are_said_back() -> None:
    """Only valid names, in a list that may be untidy or empty."""
    assert "access-control-allow-headers" not in (await preflight(Cors([APP]))).headers
    assert "access-control-allow-headers" not in (await preflight(Cors([APP]), headers=" ,")).headers
    sent = await preflight(Cors([APP]), headers=",a,\tb , c,,")
    assert sent.headers.get("access-control-allow-headers") == "a, b, c"
    sent = await preflight(Cors([APP]), headers=",".join(f"x-{number}" for number in range(100)))
    assert sent.status == 204


@pytest.mark.parametrize("asked", ["a b", "a;b", "a: b", "(a)", "\xe4", 'a,"b"', "a\x01", ",".join(["a"] * 101)])
async def test_what_is_no_list_of_names_is_refused(asked: str) -> None:
    """A 400, and never echoed."""
    sent = await preflight(Cors([APP]), headers=asked)
    assert sent.status == 400
    assert "Access-Control-Request-Headers" in sent.json()["error"]["message"]
    assert "access-control-allow-headers" not in sent.headers


async def test_a_plain_options_request_is_no_preflight() -> None:
    """Without an origin, or without a requested method: it passes to the stages below."""
    for headers in ({}, {"Origin": APP}, {"Access-Control-Request-Method": "POST"}):
        sent = await send([Cors([APP])], "OPTIONS", "/chat/completions", headers=headers)
        assert sent.reached is not None
    sent = await ask(Cors([APP]), APP, headers={"Access-Control-Request-Method": "POST"})
    assert sent.reached is not None, "nor is a POST"


async def test_how_long_a_browser_remembers_is_a_setting() -> None:
    """`max_age`, in seconds."""
    assert (await preflight(Cors([APP], max_age=0))).headers.get("access-control-max-age") == "0"


# -- every other answer --------------------------------------------------------------------------------------------


async def test_what_pages_may_read_is_a_setting() -> None:
    """The default is the headers that OpenAI's SDKs use."""
    sent = await ask(Cors([APP]), APP)
    assert said(sent.headers)["access-control-expose-headers"] == ", ".join(EXPOSED)
    assert {"x-request-id", "retry-after", "retry-after-ms", "x-should-retry", "apim-request-id"} < set(EXPOSED)
    assert "access-control-expose-headers" not in (await preflight(Cors([APP]))).headers
    sent = await ask(Cors([APP], expose=["x-one", "X-Two"]), APP)
    assert said(sent.headers)["access-control-expose-headers"] == "x-one, X-Two"
    assert "access-control-expose-headers" not in (await ask(Cors([APP], expose=[]), APP)).headers


async def test_errors_can_be_read_too() -> None:
    """Of stages below, of Azure, of the connection to Azure, and of a stage that raises."""
    broken = {"Content-Type": "application/json"}
    for answer in (ApiError(429, "slow"), Response(400, b"{}", broken), UpstreamError("gone"), RuntimeError("oh")):
        sent = await ask(Cors([APP]), APP, response=answer)
        assert sent.status >= 400
        assert said(sent.headers)["access-control-allow-origin"] == APP
    sent = await send([Cors([APP]), AuthPassthrough()], headers={"Origin": APP}, json=CHAT)
    assert (sent.status, said(sent.headers)["access-control-allow-origin"]) == (401, APP)


@pytest.mark.parametrize("origin", [APP, "https://evil.com", None])
async def test_what_azure_says_of_origins_is_taken_out(origin: str | None) -> None:
    """All of its fields, in any case; and Azure does not get the page's origin."""
    azure = [("Access-Control-Allow-Origin", "*"), ("access-control-allow-origin", "https://evil.com")]
    azure += [("ACCESS-CONTROL-EXPOSE-HEADERS", "a"), ("access-control-allow-credentials", "true"), ("x-access", "1")]
    headers = Headers([(name.encode(), value.encode()) for name, value in azure])
    sent = await ask(Cors([APP]), origin, response=Response(200, b"{}", headers))
    assert sent.headers.getall("access-control-allow-origin") == ([APP] if origin == APP else [])
    assert "access-control-allow-credentials" not in sent.headers
    assert sent.headers.get("access-control-expose-headers") != "a"
    assert sent.headers.get("x-access") == "1"
    assert sent.reached is not None
    assert "origin" not in sent.reached.headers


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "Origin"),
        (["Accept-Encoding"], "Accept-Encoding, Origin"),
        (["Accept-Encoding", "x"], "Accept-Encoding, x, Origin"),
        (["a, oRIGIN"], "a, oRIGIN"),
        (["X-Origin"], "X-Origin, Origin"),
        (["*"], "*"),
    ],
)
async def test_caches_are_told_that_answers_differ_by_origin(given: list[str], expected: str) -> None:
    """With and without an origin; existing values of `vary` stay."""
    for origin in (APP, "https://evil.com", None):
        answer = Response(200, b"{}", Headers([(b"Vary", each.encode()) for each in given]))
        sent = await ask(Cors([APP]), origin, response=answer)
        assert ", ".join(sent.headers.getall("vary")) == expected


async def test_credentials_are_allowed_on_both_answers() -> None:
    """If the setting allows it; never for an origin that is not listed."""
    stage = Cors([APP], credentials=True)
    for sent in (await ask(stage, APP), await preflight(stage)):
        assert said(sent.headers)["access-control-allow-credentials"] == "true"
    for sent in (await ask(stage, "https://evil.com"), await preflight(stage, "https://evil.com")):
        assert "access-control-allow-credentials" not in sent.headers
    assert "access-control-allow-credentials" not in (await ask(Cors([APP]), APP)).headers


async def test_a_websocket_of_another_origin_is_refused() -> None:
    """Browsers do not check it; a program that is not a browser has no origin."""

    async def connect(origin: str | None, stage: Cors) -> Sent:
        def answer(request: object) -> Response:
            return Response(101)

        class Connecting(Cors):
            async def __call__(self, request: Any, call_next: Any) -> Response:
                request.operation = "realtime.connect"
                return await super().__call__(request, call_next)

        headers = {} if origin is None else {"Origin": origin}
        made = Connecting(stage.origins)
        return await send([made], "GET", "/realtime", headers=headers, response=answer)

    assert (await connect(APP, Cors([APP]))).status == 101
    assert (await connect(None, Cors([APP]))).status == 101
    assert (await connect("null", Cors(["*"]))).status == 101
    refused = await connect("https://evil.com", Cors([APP]))
    assert (refused.status, refused.reached) == (403, None)


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"origins": ["https://a.test/"]}, r"origins\.0: .* is more than an origin; .* as 'https://a\.test'"),
        ({"origins": [APP, "https://a.test/app?x"]}, r"origins\.1: .* is more than an origin"),
        ({"origins": ["a.test"]}, "has no scheme; write an origin as https://app.example.com"),
        ({"origins": ["localhost:3000"]}, "has no scheme"),
        ({"origins": [""]}, "has no scheme"),
        ({"origins": ["https://"]}, "is not an origin, such as"),
        ({"origins": ["https://me@a.test"]}, "is not an origin, such as"),
        ({"origins": ["https://a.test:port"]}, "is not an origin, such as"),
        ({"origins": ["https://a..test"]}, "is not an origin, such as"),
        ({"origins": ["https://a.test "]}, "is not an origin, such as"),
        ({"origins": ["https://\xe4.test"]}, "write the host in its xn-- form"),
        ({"origins": ["https://*"]}, r"`\*\.` must begin the host"),
        ({"origins": ["https://*example.com"]}, r"`\*\.` must begin the host"),
        ({"origins": ["https://a.*.example.com"]}, r"`\*\.` must begin the host"),
        ({"origins": ["https://app.*"]}, r"`\*\.` must begin the host"),
        ({"origins": ["*://a.test"]}, "is not an origin, such as"),
        ({"origins": ["https://a.test:443"]}, "browsers leave the default port of https out; write 'https://a.test'"),
        ({"origins": ["http://*.a.test:80"]}, r"write 'http://\*\.a\.test'"),
        ({"origins": ["http://a.test:65536"]}, "has a port above 65535"),
        ({"origins": ["*"], "credentials": True}, r"credentials: with the origin '\*', any page could"),
        ({"origins": [APP, "null"], "credentials": True}, "credentials: with the origin 'null', any page could"),
        ({"origins": [APP], "headers": ["a", "b c"]}, r"headers\.1: 'b c' is not a valid header name"),
        ({"origins": [APP], "headers": ["*"]}, r"headers\.0: '\*' does not include Authorization"),
        ({"origins": [APP], "expose": ["x:"]}, r"expose\.0: 'x:' is not a valid header name"),
        ({"origins": [APP], "expose": ["*"], "credentials": True}, r"expose\.0: '\*' has no effect"),
    ],
)
async def test_mistakes_are_told_with_their_place(settings: Mapping[str, Any], expected: str) -> None:
    """And with a correction."""
    with pytest.raises(AssertionError, match=expected):
        await ask(Cors(**settings), APP)


async def test_what_is_no_mistake() -> None:
    """Hosts without a dot, addresses, other schemes, ports; every header without cookies."""
    fine = ["http://localhost", "http://127.0.0.1:3000", "https://*.internal:8443", "chrome-extension://abc", "null"]
    assert (await ask(Cors([*fine, *SITES], expose=["*"]), "null")).status == 200


# -- over sockets --------------------------------------------------------------------------------------------------


async def test_preflight_and_stream_over_sockets(start_gateway: StartGateway) -> None:
    """The preflight never reaches Azure; the stream arrives as Azure sends it, with the page's headers added."""
    more = asyncio.Event()

    async def respond(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"content-type": "text/event-stream", "access-control-allow-origin": "*", "vary": "Accept-Encoding"}
        )
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await more.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    async with FakeAzure(respond=respond) as azure:
        gateway = await start_gateway(azure.endpoint, CORS_YAML)
        url = f"{gateway.url}/v1/chat/completions"
        asked = {
            "Origin": APP,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        async with gateway.session.options(url, headers=asked) as answer:
            assert (answer.status, answer.headers["access-control-allow-headers"]) == (204, "authorization")
            assert "content-length" not in answer.headers
        async with gateway.session.options(url, headers={**asked, "Origin": "https://evil.com"}) as answer:
            assert (answer.status, "access-control-allow-origin" in answer.headers) == (403, False)
        assert azure.requests == []
        async with gateway.post(json={**CHAT, "stream": True}, headers={"Origin": APP}) as answer:
            assert answer.headers.getall("access-control-allow-origin") == [APP]
            assert answer.headers.getall("vary") == ["Accept-Encoding, Origin"]
            assert await answer.content.readany() == b"data: 1\n\n"
            more.set()
            assert await answer.read() == b"data: [DONE]\n\n"
        assert "origin" not in azure.requests[0].headers
        async with gateway.session.options(url, headers={"Origin": APP}) as answer:
            assert answer.status == 401, "no preflight: it goes on, and has no key"
        await gateway.idle()
        assert [event["status"] for event in gateway.exchanges()] == [204, 403, 200, 401]


async def test_a_preflight_of_a_team_found_by_its_key_is_the_default_team_s(
    azure: FakeAzure, start_gateway: StartGateway
) -> None:
    """It has no key. The request that follows has one, and uses the team's own `origins`."""
    from gateway.auth.credentials import key_digest

    team = (
        f"match: {{keys: '{key_digest('azure-key')}'}}\nchange: {{cors: {{origins: ['https://team.example.com']}}}}\n"
    )
    gateway = await start_gateway(azure.endpoint, "teams: team.yaml\n" + CORS_YAML, {"team.yaml": team})
    url = f"{gateway.url}/v1/chat/completions"
    for origin, status, readable in ((APP, 204, False), ("https://team.example.com", 403, True)):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        async with gateway.session.options(url, headers=asked) as answer:
            assert answer.status == status
        async with gateway.post(headers={"Origin": origin}) as answer:
            assert (answer.status, "access-control-allow-origin" in answer.headers) == (200, readable)
