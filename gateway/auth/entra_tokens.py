"""Entra tokens for Azure instead of an `api-key`: fetched, cached, and refreshed before they expire.

The refresh runs in the background: a request waits only if there is no token yet. If a fetch fails, the current token
stays in use until it expires. The gateway never parses a token: its content is for Azure.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote_plus

import aiohttp
import msgspec

from gateway.auth.background_refresh import BackgroundRefresh
from gateway.auth.credentials import Credential, is_key
from gateway.errors import GatewayError
from gateway.logs import get_logger, redacted

__all__ = ("EntraIdentity", "EntraTokens", "TokenUnavailable")

# All in seconds. MARGIN: stop using a token this long before it expires, because a request takes a while to reach Azure
# and clocks differ. AHEAD: fetch the next token this long before that, with time for several tries, so that an outage
# of Entra of some minutes has no effect. (A token with a short lifetime is refreshed after half of it.)
MARGIN, AHEAD = 10.0, 600.0
# Backoff after a failed fetch: initial and maximum, in the background.
MIN_RETRY, MAX_RETRY = 10.0, 300.0
# How long requests do not fetch after a failure: initial and maximum.
MIN_REFUSAL, MAX_REFUSAL = 1.0, 10.0
# Timeout of a fetch: a client may wait for it, and without a metadata service nothing responds at all.
TIMEOUT = 5.0
# Tokens of managed identities are valid for a day, Entra's longest for 28 hours; more is a mistake.
MAX_LIFETIME = 7 * 24 * 3600.0
# A token is 2 KB, and never more than the 16 KB of `is_key`.
MAX_BYTES = 64 * 1024
MAX_REASON = 300

# The instance metadata service: link-local, therefore plain HTTP, and never through a proxy.
_IMDS = "http://169.254.169.254/metadata/identity/oauth2/token"
_ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
_HEADERS = {"accept": "application/json", "accept-encoding": "identity"}
_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class EntraIdentity:
    """The configured identity of the gateway for Azure. Equal identities have the same tokens.

    `client_id` is the id of an application or of a user-assigned managed identity (None for the system-assigned one).
    `token_file` holds the federated token of a workload. `authority` differs in sovereign clouds. `endpoint` and
    `endpoint_header` are IDENTITY_ENDPOINT and IDENTITY_HEADER of App Service; without them the managed identity is the
    one of a virtual machine.
    """

    kind: Literal["client_secret", "managed_identity", "workload_identity"]
    tenant: str | None = None
    client_id: str | None = None
    client_secret: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    scope: str = "https://cognitiveservices.azure.com/.default"
    authority: str = "https://login.microsoftonline.com"
    endpoint: str | None = None
    endpoint_header: str | None = field(default=None, repr=False)


class TokenUnavailable(GatewayError):
    """There is no token at the moment; retry in `retry_after` seconds.

    The message is for clients. `reason` is for the operator: one line without secrets.
    """

    def __init__(self, reason: str, retry_after: float) -> None:
        super().__init__("the gateway has no Entra token for Azure at the moment; retry shortly")
        self.reason = reason
        self.retry_after = retry_after


class EntraTokens:
    """The tokens of one identity: the current one, and its refresh."""

    def __init__(
        self,
        identity: EntraIdentity,
        session: Callable[[], aiohttp.ClientSession],
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        cache: MutableMapping[str, Any] | None = None,
    ) -> None:
        """`session` must not use a proxy from the environment. `sleep` belongs to `clock`.

        `cache` keeps the token across reloads, for an equal identity only.
        """
        self.identity = identity
        self._session = session
        self._clock = clock
        self._now = now
        self._sleep = sleep
        self._cache = {} if cache is None else cache
        # With the secrets: an identity with another secret has not yet proved that it is valid.
        self._cache_key = hashlib.sha256(msgspec.json.encode(astuple(identity), enc_hook=str)).hexdigest()
        self._credential: Credential | None
        self._credential, self._good_until, self._due = self._cache.get(self._cache_key, (None, _NEVER, _NEVER))
        self._failures = 0  # in a row
        self._reason = "the fetch was stopped"  # of the last failure
        self._refused_until = _NEVER
        self._assertion = ""
        self._refresh = BackgroundRefresh(self._fetch, f"a token of {identity.client_id}")

    @property
    def fetched(self) -> tuple[str]:
        """The cache key of the token."""
        return (self._cache_key,)

    def start(self) -> None:
        """Fetch a token in the background, and refresh it before it expires."""
        self._refresh.start(self._keep_fresh())

    async def stop(self) -> None:
        """Stop fetching."""
        await self._refresh.stop()

    def current(self) -> Credential | None:
        """Return the current token, or None if it is missing or about to expire. Fetches nothing."""
        return self._credential if self._clock() < self._good_until else None

    async def credential(self) -> Credential:
        """Return a valid token. If there is none, all callers wait for the same fetch. Raises TokenUnavailable."""
        if (found := self.current()) is not None:
            return found
        if not self._refresh.in_progress and (left := self._refused_until - self._clock()) > 0:
            raise TokenUnavailable(self._reason, left)
        await self._refresh.refresh()
        if (found := self.current()) is None:
            raise TokenUnavailable(self._reason, max(MIN_REFUSAL, self._refused_until - self._clock()))
        return found

    # -- schedule ---------------------------------------------------------------------------------------

    async def _keep_fresh(self) -> None:
        while True:
            while (left := self._due - self._clock()) > 0:
                # In short steps: meanwhile a request may have fetched a token that expires earlier.
                await self._sleep(min(left, MIN_RETRY))
            await self._refresh.refresh()

    async def _fetch(self) -> None:
        started, started_at = self._clock(), self._now()
        try:
            async with asyncio.timeout(TIMEOUT):
                response = await self._request_token()
            self._store(response, started, started_at)
        except Exception as exc:  # after any error the current token stays in use
            self._failed(exc)

    def _store(self, response: Mapping[str, Any], started: float, started_at: float) -> None:
        """Make this token the current one. Its lifetime starts when the fetch started. Raises ValueError."""
        token = response.get("access_token")
        if not isinstance(token, str) or not is_key(token):
            raise ValueError("the response has no `access_token`, or a malformed one")
        expires_in, expires_on = _number(response, "expires_in"), _number(response, "expires_on")
        # The metadata service caches tokens and counts `expires_in` from their issue: use the earlier of the two times.
        lifetimes = [] if expires_in is None else [expires_in]
        lifetimes += [] if expires_on is None else [expires_on - started_at]
        if not lifetimes:
            raise ValueError("the response has neither `expires_in` nor `expires_on`")
        lifetime = min(lifetimes) - MARGIN
        if not 0 < lifetime <= MAX_LIFETIME:
            raise ValueError(f"the token has an implausible lifetime of {min(lifetimes):.0f} s; check the clock")
        due = lifetime - min(AHEAD, lifetime / 2)
        with contextlib.suppress(ValueError):  # `refresh_in` is only advice
            due = min(due, _number(response, "refresh_in") or due)
        self._credential = Credential(token, bearer=True)
        # Not immediately: a service with a cache may return the same token again shortly before it expires.
        self._good_until, self._due = started + lifetime, started + max(MIN_RETRY, due)
        self._failures = 0
        self._cache[self._cache_key] = self._credential, self._good_until, self._due

    def _failed(self, exc: Exception) -> None:
        """Log a failure, and schedule a retry: early enough that the token is refreshed once Entra is available."""
        now = self._clock()
        left = max(0.0, self._good_until - now)
        backoff = 2.0 ** min(self._failures, 10)
        self._failures += 1
        retry = min(MIN_RETRY * backoff, MAX_RETRY)
        self._due = now + (min(retry, max(MIN_RETRY, left / 2)) if left else retry)
        self._refused_until = now + min(MIN_REFUSAL * backoff, MAX_REFUSAL)
        self._reason = self._redacted(str(exc)) or "timeout"
        get_logger().warning(
            "entra_token_fetch_failed",
            identity=self.identity.kind,
            tenant=self.identity.tenant,
            client_id=self.identity.client_id,
            error=type(exc).__name__,
            reason=self._reason,
            kept_for=round(left),
        )

    def _redacted(self, text: str) -> str:
        """Return one short line without secrets. Redact before truncating: a truncated secret would not be found."""
        known = (self.identity.client_secret, self.identity.endpoint_header, self._assertion)
        secrets = [form for secret in known if secret for form in (secret, quote_plus(secret))]
        return " ".join(str(redacted({"text": text}, secrets)["text"]).split())[:MAX_REASON]

    # -- requests ---------------------------------------------------------------------------------------

    async def _request_token(self) -> dict[str, Any]:
        """Request a token for this identity, and return the response. Raises ValueError, or an error of aiohttp."""
        identity = self.identity
        if identity.kind == "managed_identity":
            query = {
                "api-version": "2019-08-01" if identity.endpoint else "2018-02-01",
                "resource": identity.scope.removesuffix("/.default"),
                "client_id": identity.client_id,
            }
            header = {"X-IDENTITY-HEADER": identity.endpoint_header}
            return await self._send(
                "GET", identity.endpoint or _IMDS, {"Metadata": "true"} | _without_none(header), query
            )
        form = {"grant_type": "client_credentials", "client_id": identity.client_id, "scope": identity.scope}
        if identity.kind == "client_secret":
            form["client_secret"] = identity.client_secret
        else:
            # Read it each time: it is replaced every hour or so.
            self._assertion = await asyncio.to_thread(_read_federated_token, identity.token_file)
            form |= {"client_assertion_type": _ASSERTION, "client_assertion": self._assertion}
        return await self._send(
            "POST", f"{identity.authority.rstrip('/')}/{identity.tenant}/oauth2/v2.0/token", {}, form
        )

    async def _send(
        self, method: Literal["GET", "POST"], url: str, headers: dict[str, str], fields: Mapping[str, str | None]
    ) -> dict[str, Any]:
        """Return the JSON object of the response. Raises ValueError for anything else. Does not follow redirects."""
        arguments: dict[str, Any] = {"params" if method == "GET" else "data": _without_none(fields)}
        async with self._session().request(
            method, url, allow_redirects=False, headers=_HEADERS | headers, **arguments
        ) as response:
            data = b""
            async for chunk in response.content.iter_any():
                data += chunk
                if len(data) > MAX_BYTES:
                    raise ValueError(f"{url} responded with more than {MAX_BYTES} bytes")
        try:
            decoded = msgspec.json.decode(data)
        except (ValueError, RecursionError):
            decoded = None
        if response.status != 200:
            raise ValueError(f"{url} responded with status {response.status}{_error_message(decoded)}")
        if not isinstance(decoded, dict):
            raise ValueError(f"{url} responded without a JSON object")
        return decoded


def _error_message(error: Any) -> str:
    """Return the error message of a response: of Entra and the metadata service, or of App Service."""
    found = [error.get(name) for name in ("error", "error_description", "message")] if isinstance(error, dict) else []
    return "".join(f": {text}" for text in found if isinstance(text, str) and text)


def _without_none(fields: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in fields.items() if value is not None}


def _number(response: Mapping[str, Any], name: str) -> float | None:
    """Return a number, which can be text, or None if there is none. Raises ValueError."""
    try:
        return None if response.get(name) is None else float(response[name])
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"`{name}` in the response is not a number") from None


def _read_federated_token(path: Path | None) -> str:
    """Return the token in a file. Raises ValueError or OSError."""
    if path is None:
        raise ValueError("a workload identity needs a file with its federated token")
    with path.open("rb") as file:
        text = file.read(MAX_BYTES).decode("latin-1").strip()
    if not is_key(text):
        raise ValueError(f"{path} does not contain a token")
    return text
