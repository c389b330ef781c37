"""`cors`: which web pages may use the API, by the origin that the browser sends (fetch.spec.whatwg.org)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from gateway import ApiError, Headers, Meta, Next, Request, Response, Services, Stage

# The methods of OpenAI's operations; a HEAD needs no preflight.
METHODS = "GET, POST, DELETE"
# Headers that OpenAI's clients read, and the request ids for the operator and Azure's support.
EXPOSED = (
    "x-request-id", "x-azure-request-id", "apim-request-id", "retry-after", "retry-after-ms", "x-should-retry",
    "x-ratelimit-limit-requests", "x-ratelimit-limit-tokens", "x-ratelimit-remaining-requests",
    "x-ratelimit-remaining-tokens", "x-ratelimit-reset-requests", "x-ratelimit-reset-tokens",
    "openai-model", "openai-organization", "openai-processing-ms", "openai-version", "content-disposition",
)  # fmt: skip
MAX_REQUESTED = 100  # headers in one preflight

ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://"
    r"(?:(?P<subdomain>\*\.)?(?P<host>[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)|(?P<ipv6>\[[0-9a-f:.]+\]))"
    r"(?::(?P<port>[1-9][0-9]{0,4}|\*))?"
)
# Browsers leave these out of an origin.
DEFAULT_PORTS = {"http": "80", "https": "443", "ws": "80", "wss": "443"}


@dataclass
class Cors(Stage):
    """Allow web pages of these origins, and no others, to use the API from a browser.

    The stage answers preflights, which have no key, with a 403 if the origin is not allowed: put it above the stage
    that authenticates. A page of an allowed origin may read every other response, including errors and streams. A
    WebSocket of another origin is a 403, because browsers do not check it. Azure's own `access-control-*` headers are
    removed, and Azure does not get the page's origin.
    """

    origins: Annotated[
        list[str],
        Meta(
            description="allowed origins: https://app.example.com; https://*.example.com for all its subdomains; "
            'http://localhost:* for all ports; "*" for all pages; [] turns the stage off',
        ),
    ]
    headers: Annotated[
        list[str],
        Meta(description="request headers that pages may send; default: all that the preflight requests"),
    ] = field(default_factory=list)
    expose: Annotated[
        list[str],
        Meta(description="response headers that pages may read; default: those that OpenAI's clients use"),
    ] = field(default_factory=lambda: list(EXPOSED))
    max_age: Annotated[
        int, Meta(ge=0, description="seconds that a browser may cache a preflight; Chromium's maximum is 7200")
    ] = 7200
    credentials: Annotated[
        bool, Meta(description="allow pages to send cookies; keys in `Authorization` do not need it")
    ] = False

    def check(self, services: Services) -> Iterator[tuple[tuple[str | int, ...], str]]:
        for index, origin in enumerate(self.origins):
            if problem := mistake_of(origin):
                yield ("origins", index), problem
            elif self.credentials and origin in ("*", "null"):
                yield (
                    ("credentials",),
                    f"with the origin {origin!r}, any page could use its visitors' cookies; list the origins",
                )
        for setting, names in (("headers", self.headers), ("expose", self.expose)):
            for index, name in enumerate(names):
                if not Headers.is_name(name):
                    yield (setting, index), f"{name!r} is not a valid header name"
        if "*" in self.headers:
            yield (
                ("headers", self.headers.index("*")),
                "'*' does not include Authorization; leave `headers` out to allow all headers",
            )
        if "*" in self.expose and self.credentials:
            yield ("expose", self.expose.index("*")), "'*' has no effect if `credentials` is true; list the names"

    must_precede = ("caller",)  # a preflight has no key

    async def start(self, services: Services) -> None:
        self.idle = not self.origins
        self._any = "*" in self.origins
        self._match = re.compile("|".join(map(pattern_of, self.origins))).fullmatch
        self._credentials = {"access-control-allow-credentials": "true"} if self.credentials else {}
        self._exposed = {"access-control-expose-headers": ", ".join(self.expose)} if self.expose else {}

    async def __call__(self, request: Request, call_next: Next) -> Response:
        origins = request.headers.getall("origin")
        allowed = self._allowed_origin(origins)
        if origins:
            if request.method == "OPTIONS" and "access-control-request-method" in request.headers:
                return self._preflight(request, origins, allowed)
            if allowed is None and (request.operation or "").endswith(".connect"):
                raise not_allowed(origins)
            # The gateway decides: API Management's own policy would return an empty response.
            request.headers.remove("origin")
        response = await call_next(request)
        headers = response.headers
        for name in {each.name for each in headers.fields if each.name.startswith(b"access-control-")}:
            headers.remove(name.decode("latin-1"))
        if allowed is not None:
            headers.update({"access-control-allow-origin": allowed, **self._credentials, **self._exposed})
        if not self._any:
            add_vary(response)
        return response

    def _allowed_origin(self, origins: list[str]) -> str | None:
        """Return the value of `access-control-allow-origin`, or None if the page may not read the response."""
        if self._any:
            return "*"  # also without an origin: a cache may serve the response to a page later
        return origins[0] if len(origins) == 1 and self._match(origins[0].lower()) else None

    def _preflight(self, request: Request, origins: list[str], allowed: str | None) -> Response:
        if allowed is None:
            raise not_allowed(origins)
        names = self.headers or requested_headers(request)
        response = Response(204, headers={"access-control-allow-origin": allowed, **self._credentials})
        response.headers.set("access-control-allow-methods", METHODS)
        if names:
            response.headers.set("access-control-allow-headers", ", ".join(names))
        response.headers.set("access-control-max-age", str(self.max_age))
        response.headers.set(
            "vary", "Access-Control-Request-Headers" if self._any else "Origin, Access-Control-Request-Headers"
        )
        return response


def not_allowed(origins: list[str]) -> ApiError:
    """Return the error for a page whose origin is not allowed."""
    return ApiError(
        403,
        f"pages of {', '.join(origins)[:200]!r} may not use this API from a browser; "
        "ask the gateway's operator to add the origin to `origins` of the stage cors",
        code="origin_not_allowed",
        headers={"vary": "Origin"},
    )


def requested_headers(request: Request) -> list[str]:
    """Return the headers that a preflight requests. Raises ApiError 400 for an invalid name, and for too many."""
    requested = ",".join(request.headers.getall("access-control-request-headers")).split(",")
    names = [name for each in requested if (name := each.strip(" \t"))]
    if len(names) > MAX_REQUESTED or not all(map(Headers.is_name, names)):
        raise ApiError(400, f"Access-Control-Request-Headers must be a list of at most {MAX_REQUESTED} header names")
    return names


def add_vary(response: Response) -> None:
    """Tell caches that the response depends on the origin."""
    current = ", ".join(response.headers.getall("vary"))
    if not {"*", "origin"} & {name.strip().lower() for name in current.split(",")}:
        response.headers.set("vary", f"{current}, Origin" if current else "Origin")


def pattern_of(origin: str) -> str:
    """Return the regular expression of an origin that `mistake_of` accepts; only `*` is special."""
    match = ORIGIN.fullmatch(origin.lower())
    if match is None:
        return re.escape(origin)  # `null`; or `*`, which matches no origin
    subdomain = r"(?:[a-z0-9_-]+\.)+" if match["subdomain"] else ""
    port = "(?::[0-9]{1,5})?" if match["port"] == "*" else f":{match['port']}" if match["port"] else ""
    return re.escape(f"{match['scheme']}://") + subdomain + re.escape(match["host"] or match["ipv6"]) + port


def mistake_of(origin: str) -> str | None:
    """Return the mistake in an origin of the configuration, or None."""
    if origin in ("*", "null"):
        return None
    match = ORIGIN.fullmatch(origin.lower())
    if match is None:
        scheme, is_url, rest = origin.partition("://")
        if not is_url:
            return f"{origin!r} has no scheme; write an origin as https://app.example.com"
        if ends := re.search(r"[/?#]", rest):
            return f"{origin!r} is more than an origin; browsers send it as {f'{scheme}://{rest[: ends.start()]}'!r}"
        if "*" in rest:
            return f"in {origin!r}, `*.` must begin the host, as in https://*.example.com, or `*` must be the port"
        if not rest.isascii():
            return f"{origin!r} is not ASCII; write the host in its xn-- form, as browsers send it"
        return f"{origin!r} is not an origin, such as https://app.example.com or http://localhost:3000"
    port = match["port"] or ""
    if port == DEFAULT_PORTS.get(match["scheme"]):
        return f"browsers leave the default port of {match['scheme']} out; write {origin.removesuffix(f':{port}')!r}"
    if port.isdigit() and int(port) > 65535:
        return f"{origin!r} has a port above 65535"
    return None
