"""`auth_keys`: the team's own keys, stored as digests, and its members' tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

from gateway import ApiError, Credential, Next, Request, Response, Services, Stage


@dataclass
class AuthKeys(Stage):
    """Accept the team's own keys; Azure gets the resource's credential.

    List the keys in `match: keys:` of the team's file, as `gateway keys new` prints them. A client sends its key as
    `Authorization: Bearer K` or `api-key: K`. A token of an issuer in `identity:` works in place of a key if it has
    the claims of `match: claims:`. An unknown, expired or disabled key is a 401, and so is an invalid token or one of
    another team; the response is always the same, and the log event has the reason as `auth`.
    """

    provides = ("caller",)

    def check(self, services: Services) -> Iterator[tuple[tuple[str, ...], str]]:
        # The default team may have none if it only handles requests that match no team.
        if not services.keys and not services.claims and (services.team != "default" or services.team_count == 1):
            problem = f"team {services.team!r} has no keys and no claims, so no client can use it"
            yield (), f"{problem}; create a key: gateway keys new --team {services.team}"

    async def start(self, services: Services) -> None:
        self._keys = services.keys
        self._claims = services.claims
        self._now = services.now

    async def __call__(self, request: Request, call_next: Next) -> Response:
        key = request.key()
        if key is None:
            request.notes["auth"] = "no key"
            raise ApiError.invalid_key("no API key in the request; send it as `Authorization: Bearer YOUR_KEY`")
        listed = self._keys.get(key.digest)
        # Found by hash; the comparison that decides takes constant time.
        if listed is None or not listed.is_of(key):
            self._admit_member(request, key)
            return await call_next(request)
        if listed.label is not None:
            request.caller = listed.label
            request.notes["key"] = listed.digest[:15]  # which of the keys with this label
        else:
            request.caller = listed.digest
        if listed.disabled:
            raise rejection(request, "disabled key")
        if listed.expires is not None and self._now() >= listed.expires:
            raise rejection(request, "expired key")
        request.allowed_models = listed.models
        return await call_next(request)

    def _admit_member(self, request: Request, key: Credential) -> None:
        """Accept a token with the team's claims. Raises ApiError 401, and 503 for one that cannot be verified now."""
        identity = request.identity
        if identity is not None:
            request.caller = identity.caller
            if identity.has(self._claims):
                return
        request.notes["key"] = key.digest
        raise rejection(request, "token of no member" if identity else request.identity_error or "unknown key")


def rejection(request: Request, reason: str) -> ApiError:
    """Note the reason for the log, and return the client's error, which is the same for every wrong key."""
    request.notes["auth"] = reason
    return ApiError.invalid_key()
