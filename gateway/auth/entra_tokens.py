"""Entra's tokens that Azure is shown in place of an `api-key`: fetched, kept at hand, and renewed ahead of their end.

They are fetched in the background, so that a request waits for one only where there is none yet. What cannot be
fetched leaves the token at hand as it was, until it really expires. A token is never read: what it says is for Azure.
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

# All in seconds. How long before its end a token is no longer shown: a request takes a while to reach Azure, and
# clocks differ. How long before that the next one is fetched: time for several tries, so that an Entra that is away
# for some minutes is not noticed; of a token too short for that, half its time is left.
MARGIN, AHEAD = 10.0, 600.0
# How soon a fetch that failed is tried again, at first and at most; and how long requests make no new one.
RETRY, MOST_RETRY = 10.0, 300.0
REFUSED, MOST_REFUSED = 1.0, 10.0
# A client may have to wait for this, and where there is no metadata service nothing answers at all.
TIMEOUT = 5.0
# A managed identity's last a day, the longest that Entra has 28 hours; more is a mistake.
MOST_LIFETIME = 7 * 24 * 3600.0
# A token is 2 KB, and never more than the 16 KB of `is_key`.
MAX_BYTES = 64 * 1024
MAX_REASON = 300

# The instance metadata service: link-local, so plain HTTP, and never to be asked through a proxy.
_IMDS = "http://169.254.169.254/metadata/identity/oauth2/token"
_ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
_HEADERS = {"accept": "application/json", "accept-encoding": "identity"}
_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class EntraIdentity:
    """Who Azure is to take the gateway for, as configured; equal ones have the same tokens.

    `client_id` is an application's, or a user-assigned managed identity's (None for the system-assigned one).
    `token_file` holds a workload's federated token. `authority` differs in sovereign clouds. `endpoint` and
    `endpoint_header` are App Service's IDENTITY_ENDPOINT and IDENTITY_HEADER; without them a managed identity is
    that of a virtual machine.
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
    """No token can be had at present; try again in `retry_after` seconds.

    The message is for clients. `reason` is for the operator: one line that holds no secret.
    """

    def __init__(self, reason: str, retry_after: float) -> None:
        super().__init__("no Entra token for Azure can be had at present")
        self.reason = reason
        self.retry_after = retry_after


class EntraTokens:
    """The tokens of one identity, one after the other."""

    def __init__(
        self,
        identity: EntraIdentity,
        session: Callable[[], aiohttp.ClientSession],
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        kept: MutableMapping[str, Any] | None = None,
    ) -> None:
        """`session` must take no proxy from the environment; `sleep` goes with `clock`.

        `kept` is where the token outlives this object, for an equal identity alone: after a reload nothing waits.
        """
        self.identity = identity
        self._session = session
        self._clock = clock
        self._now = now
        self._sleep = sleep
        self._kept = {} if kept is None else kept
        # Its secrets too: who has another one has yet to show that it is right.
        self._place = hashlib.sha256(msgspec.json.encode(astuple(identity), enc_hook=str)).hexdigest()
        self._credential: Credential | None
        self._credential, self._good_until, self._due = self._kept.get(self._place, (None, _NEVER, _NEVER))
        self._failures = 0  # in a row
        self._reason = "the fetch was stopped"  # what the last failure was, or, before there was one
        self._refused_until = _NEVER
        self._assertion = ""
        self._fetching = BackgroundRefresh(self._fetch, f"a token of {identity.client_id}")

    @property
    def fetched(self) -> tuple[str]:
        """The name under which the token is kept."""
        return (self._place,)

    def start(self) -> None:
        """Begin to fetch a token, then each next one ahead of the end of the last, in the background."""
        self._fetching.start(self._keep_fresh())

    async def stop(self) -> None:
        """Fetch nothing any more."""
        await self._fetching.stop()

    def at_hand(self) -> Credential | None:
        """Return a token that is good now, or None; fetches nothing."""
        return self._credential if self._clock() < self._good_until else None

    async def credential(self) -> Credential:
        """Return a token that is good now; all who find none wait for the same fetch. Raises TokenUnavailable."""
        if (found := self.at_hand()) is not None:
            return found
        if not self._fetching.under_way and (left := self._refused_until - self._clock()) > 0:
            raise TokenUnavailable(self._reason, left)
        await self._fetching.refresh()
        if (found := self.at_hand()) is None:
            raise TokenUnavailable(self._reason, max(REFUSED, self._refused_until - self._clock()))
        return found

    # -- when -------------------------------------------------------------------------------------------

    async def _keep_fresh(self) -> None:
        while True:
            while (left := self._due - self._clock()) > 0:
                # In short turns: a request may have fetched one meanwhile whose end is nearer.
                await self._sleep(min(left, RETRY))
            await self._fetching.refresh()

    async def _fetch(self) -> None:
        asked, asked_at = self._clock(), self._now()
        try:
            async with asyncio.timeout(TIMEOUT):
                answer = await self._ask()
            self._take(answer, asked, asked_at)
        except Exception as exc:  # whatever it is: the token at hand stays as it was
            self._note(exc)

    def _take(self, answer: Mapping[str, Any], asked: float, asked_at: float) -> None:
        """Let this be the token, counting its time from when it was asked for. Raises ValueError."""
        token = answer.get("access_token")
        if not isinstance(token, str) or not is_key(token):
            raise ValueError("the answer has no `access_token`, or one that cannot be a token")
        expires_in, expires_on = _number(answer, "expires_in"), _number(answer, "expires_on")
        # The metadata service keeps tokens, and counts `expires_in` from when they were issued: the sooner holds.
        ends = [] if expires_in is None else [expires_in]
        ends += [] if expires_on is None else [expires_on - asked_at]
        if not ends:
            raise ValueError("the answer has neither `expires_in` nor `expires_on`")
        lifetime = min(ends) - MARGIN
        if not 0 < lifetime <= MOST_LIFETIME:
            raise ValueError(f"the token is said to be good for {min(ends):.0f} s; is the clock right?")
        due = lifetime - min(AHEAD, lifetime / 2)
        with contextlib.suppress(ValueError):  # it is no more than advice
            due = min(due, _number(answer, "refresh_in") or due)
        self._credential = Credential(token, bearer=True)
        # Never at once: who has tokens in a cache may give the same one again, a moment before its end.
        self._good_until, self._due = asked + lifetime, asked + max(RETRY, due)
        self._failures = 0
        self._kept[self._place] = self._credential, self._good_until, self._due

    def _note(self, exc: Exception) -> None:
        """Log a failure, and say when to try again: often enough that no token ends while Entra is back."""
        now = self._clock()
        left = max(0.0, self._good_until - now)
        doubled = 2.0 ** min(self._failures, 10)
        self._failures += 1
        retry = min(RETRY * doubled, MOST_RETRY)
        self._due = now + (min(retry, max(RETRY, left / 2)) if left else retry)
        self._refused_until = now + min(REFUSED * doubled, MOST_REFUSED)
        self._reason = self._safe(str(exc)) or "it took too long"
        get_logger().warning(
            "an Entra token cannot be had",
            identity=self.identity.kind,
            tenant=self.identity.tenant,
            client_id=self.identity.client_id,
            error=type(exc).__name__,
            reason=self._reason,
            kept_for=round(left),
        )

    def _safe(self, text: str) -> str:
        """Return one line, not too long, without a secret; they go first, since a cut one would not be found."""
        known = (self.identity.client_secret, self.identity.endpoint_header, self._assertion)
        secrets = [form for secret in known if secret for form in (secret, quote_plus(secret))]
        return " ".join(str(redacted({"text": text}, secrets)["text"]).split())[:MAX_REASON]

    # -- asking -----------------------------------------------------------------------------------------

    async def _ask(self) -> dict[str, Any]:
        """Return the answer to this identity's request for a token. Raises ValueError, or what aiohttp does."""
        identity = self.identity
        if identity.kind == "managed_identity":
            query = {
                "api-version": "2019-08-01" if identity.endpoint else "2018-02-01",
                "resource": identity.scope.removesuffix("/.default"),
                "client_id": identity.client_id,
            }
            header = {"X-IDENTITY-HEADER": identity.endpoint_header}
            return await self._send("GET", identity.endpoint or _IMDS, {"Metadata": "true"} | _given(header), query)
        form = {"grant_type": "client_credentials", "client_id": identity.client_id, "scope": identity.scope}
        if identity.kind == "client_secret":
            form["client_secret"] = identity.client_secret
        else:
            # Anew each time: it is good for an hour or so, and then replaced.
            self._assertion = await asyncio.to_thread(_federated, identity.token_file)
            form |= {"client_assertion_type": _ASSERTION, "client_assertion": self._assertion}
        return await self._send(
            "POST", f"{identity.authority.rstrip('/')}/{identity.tenant}/oauth2/v2.0/token", {}, form
        )

    async def _send(
        self, method: Literal["GET", "POST"], url: str, headers: dict[str, str], fields: Mapping[str, str | None]
    ) -> dict[str, Any]:
        """Return a JSON object. Raises ValueError for anything else; a redirect is not followed."""
        place: dict[str, Any] = {"params" if method == "GET" else "data": _given(fields)}
        async with self._session().request(
            method, url, allow_redirects=False, headers=_HEADERS | headers, **place
        ) as answer:
            data = b""
            async for chunk in answer.content.iter_any():
                data += chunk
                if len(data) > MAX_BYTES:
                    raise ValueError(f"{url} answered with more than {MAX_BYTES} bytes")
        try:
            decoded = msgspec.json.decode(data)
        except (ValueError, RecursionError):
            decoded = None
        if answer.status != 200:
            raise ValueError(f"{url} answered with the status {answer.status}{_told(decoded)}")
        if not isinstance(decoded, dict):
            raise ValueError(f"{url} answered with no JSON object")
        return decoded


def _told(error: Any) -> str:
    """Return what an answer says of an error: Entra's and the metadata service's, or App Service's."""
    found = [error.get(name) for name in ("error", "error_description", "message")] if isinstance(error, dict) else []
    return "".join(f": {text}" for text in found if isinstance(text, str) and text)


def _given(fields: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in fields.items() if value is not None}


def _number(answer: Mapping[str, Any], name: str) -> float | None:
    """Return a number that may be written as text, or None where there is none. Raises ValueError."""
    try:
        return None if answer.get(name) is None else float(answer[name])
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"the answer's `{name}` is no number") from None


def _federated(path: Path | None) -> str:
    """Return the token in a file. Raises ValueError or OSError."""
    if path is None:
        raise ValueError("a workload identity needs a file with its federated token")
    with path.open("rb") as file:
        text = file.read(MAX_BYTES).decode("latin-1").strip()
    if not is_key(text):
        raise ValueError(f"{path} holds no token")
    return text
