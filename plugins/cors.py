"""`cors`: which web pages may use the API, by the origin that their browser tells (fetch.spec.whatwg.org)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from gateway import ApiError, Meta, Next, Request, Response, Services, Stage

# What OpenAI's operations need; HEAD is never asked for.
METHODS = "GET, POST, DELETE"
# What OpenAI's clients go by, and what names the request to its operator and to Azure's support.
EXPOSED = (
    "x-request-id", "x-azure-request-id", "apim-request-id", "retry-after", "retry-after-ms", "x-should-retry",
    "x-ratelimit-limit-requests", "x-ratelimit-limit-tokens", "x-ratelimit-remaining-requests",
    "x-ratelimit-remaining-tokens", "x-ratelimit-reset-requests", "x-ratelimit-reset-tokens",
    "openai-model", "openai-organization", "openai-processing-ms", "openai-version", "content-disposition",
)  # fmt: skip
ASKED = 100  # headers that one preflight may ask for

TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://"
    r"(?:(?P<below>\*\.)?(?P<host>[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)|(?P<six>\[[0-9a-f:.]+\]))"
    r"(?::(?P<port>[1-9][0-9]{0,4}|\*))?"
)
# No browser writes these into an origin.
USUAL = {"http": "80", "https": "443", "ws": "80", "wss": "443"}


@dataclass
class Cors(Stage):
    """Let pages of these origins use the API from a browser, and no others.

    A preflight, which has no key, is answered here, with a 403 where the origin is not allowed: so this stands above
    the stage that authenticates. Any other answer, errors and streams too, says that the page may read it. A
    WebSocket of an origin that is not allowed is refused, as browsers would not. What Azure says of origins
    (`access-control-*`) is taken out, and Azure is not told the page's.
    """

    origins: Annotated[
        list[str],
        Meta(
            description="whose pages may: https://app.example.com; https://*.example.com for all hosts below it, "
            'http://localhost:* for all ports, "*" for every page there is; [] is as if the stage were not listed',
        ),
    ]
    headers: Annotated[
        list[str],
        Meta(description="the request headers that pages may send; whatever they ask for if it is left out"),
    ] = field(default_factory=list)
    expose: Annotated[
        list[str],
        Meta(description="the answer's headers that pages may read; those that OpenAI's clients go by if left out"),
    ] = field(default_factory=lambda: list(EXPOSED))
    max_age: Annotated[
        int, Meta(ge=0, description="seconds for which a browser need not ask again; Chromium's most is 7200")
    ] = 7200
    credentials: Annotated[
        bool, Meta(description="whether pages may send cookies; keys in `Authorization` do not need it")
    ] = False

    def check(self, services: Services) -> Iterator[tuple[tuple[str | int, ...], str]]:
        for place, origin in enumerate(self.origins):
            if wrong := mistake_of(origin):
                yield ("origins", place), wrong
            elif self.credentials and origin in ("*", "null"):
                yield (
                    ("credentials",),
                    f"with the origin {origin!r} any page could use its visitors' cookies; list origins",
                )
        for setting, names in (("headers", self.headers), ("expose", self.expose)):
            for place, name in enumerate(names):
                if not TOKEN.fullmatch(name):
                    yield (setting, place), f"{name!r} is no header's name"
        if "*" in self.headers:
            yield ("headers", self.headers.index("*")), "'*' is all but Authorization; leave `headers` out for all"
        if "*" in self.expose and self.credentials:
            yield ("expose", self.expose.index("*")), "'*' means nothing where `credentials` is true; list the names"

    must_precede = ("caller",)  # a preflight has no key

    async def start(self, services: Services) -> None:
        self.idle = not self.origins
        self._every = "*" in self.origins
        self._match = re.compile("|".join(map(pattern_of, self.origins))).fullmatch
        self._grant = {"access-control-allow-credentials": "true"} if self.credentials else {}
        self._shown = {"access-control-expose-headers": ", ".join(self.expose)} if self.expose else {}

    async def __call__(self, request: Request, call_next: Next) -> Response:
        origins = request.headers.getall("origin")
        granted = self._granted(origins)
        if origins:
            if request.method == "OPTIONS" and "access-control-request-method" in request.headers:
                return self._preflight(request, origins, granted)
            if granted is None and (request.operation or "").endswith(".connect"):
                raise refused(origins)
            # It is ours to judge: API Management with a policy of its own would answer nothing at all.
            request.headers.remove("origin")
        response = await call_next(request)
        headers = response.headers
        for name in {each.name for each in headers.fields if each.name.startswith(b"access-control-")}:
            headers.remove(name.decode("latin-1"))
        if granted is not None:
            headers.update({"access-control-allow-origin": granted, **self._grant, **self._shown})
        if not self._every:
            vary(response)
        return response

    def _granted(self, origins: list[str]) -> str | None:
        """Return what `access-control-allow-origin` is, or None where the page may not read the answer."""
        if self._every:
            return "*"  # also without an origin: a cache may give the answer to a page later
        return origins[0] if len(origins) == 1 and self._match(origins[0].lower()) else None

    def _preflight(self, request: Request, origins: list[str], granted: str | None) -> Response:
        if granted is None:
            raise refused(origins)
        names = self.headers or asked_headers(request)
        response = Response(204, headers={"access-control-allow-origin": granted, **self._grant})
        response.headers.set("access-control-allow-methods", METHODS)
        if names:
            response.headers.set("access-control-allow-headers", ", ".join(names))
        response.headers.set("access-control-max-age", str(self.max_age))
        response.headers.set(
            "vary", "Access-Control-Request-Headers" if self._every else "Origin, Access-Control-Request-Headers"
        )
        return response


def refused(origins: list[str]) -> ApiError:
    """Return the error of a page that may not use the API."""
    return ApiError(
        403,
        f"pages of {', '.join(origins)[:200]!r} may not use this API from a browser; "
        "the gateway's operator lists who may, as `origins` of the stage cors",
        code="origin_not_allowed",
        headers={"vary": "Origin"},
    )


def asked_headers(request: Request) -> list[str]:
    """Return the headers that a preflight asks for. Raises ApiError 400 where they are none, or too many."""
    asked = ",".join(request.headers.getall("access-control-request-headers")).split(",")
    names = [name for each in asked if (name := each.strip(" \t"))]
    if len(names) > ASKED or not all(map(TOKEN.fullmatch, names)):
        raise ApiError(400, f"Access-Control-Request-Headers must be a list of header names, {ASKED} at most")
    return names


def vary(response: Response) -> None:
    """Tell caches that the answer differs by origin."""
    given = ", ".join(response.headers.getall("vary"))
    if not {"*", "origin"} & {name.strip().lower() for name in given.split(",")}:
        response.headers.set("vary", f"{given}, Origin" if given else "Origin")


def pattern_of(origin: str) -> str:
    """Return the expression of an origin that `mistake_of` finds right; what `*` stands for has no other meaning."""
    found = ORIGIN.fullmatch(origin.lower())
    if found is None:
        return re.escape(origin)  # null; and `*`, which no origin is
    below = r"(?:[a-z0-9_-]+\.)+" if found["below"] else ""
    port = "(?::[0-9]{1,5})?" if found["port"] == "*" else f":{found['port']}" if found["port"] else ""
    return re.escape(f"{found['scheme']}://") + below + re.escape(found["host"] or found["six"]) + port


def mistake_of(origin: str) -> str | None:
    """Return what is wrong with an origin of the configuration, or None."""
    if origin in ("*", "null"):
        return None
    found = ORIGIN.fullmatch(origin.lower())
    if found is None:
        scheme, is_url, rest = origin.partition("://")
        if not is_url:
            return f"{origin!r} has no scheme; an origin is written as https://app.example.com"
        if ends := re.search(r"[/?#]", rest):
            return f"{origin!r} is more than an origin; browsers send it as {f'{scheme}://{rest[: ends.start()]}'!r}"
        if "*" in rest:
            return f"in {origin!r}, `*.` must be the host's beginning, as in https://*.example.com, or `*` its port"
        if not rest.isascii():
            return f"{origin!r} is not as browsers send it; write the host in its xn-- form"
        return f"{origin!r} is no origin, such as https://app.example.com or http://localhost:3000"
    port = found["port"] or ""
    if port == USUAL.get(found["scheme"]):
        return f"browsers leave {found['scheme']}'s own port out; write {origin.removesuffix(f':{port}')!r}"
    if port.isdigit() and int(port) > 65535:
        return f"{origin!r} has a port above 65535"
    return None
