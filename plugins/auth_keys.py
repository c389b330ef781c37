"""`auth_keys`: the team's own keys, of which the configuration knows the digests, and its members' tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

from gateway import ApiError, Credential, Next, Request, Response, Services, Stage


@dataclass
class AuthKeys(Stage):
    """Let in who presents one of the team's keys; Azure is shown the resource's own.

    The keys stand in `match: keys:` of the team's file, as `gateway keys new` prints them. A client sends its key as
    `Authorization: Bearer K` or `api-key: K`. In place of a key, a token of an issuer of `identity:` will do, if it has
    the claims of `match: claims:`. A key that is unknown, expired or disabled, and a token that is not good or not the
    team's, is a 401, always the same one; which of these it was is in the log event, as `auth`.
    """

    provides = ("caller",)

    def check(self, services: Services) -> Iterator[tuple[tuple[str, ...], str]]:
        # The default team may well have none, where it is only there for requests that are no team's.
        if not services.keys and not services.claims and (services.team != "default" or services.team_count == 1):
            has_none = f"team {services.team!r} has no keys and no claims, so nobody could use it"
            yield (), f"{has_none}: gateway keys new --team {services.team}"

    async def start(self, services: Services) -> None:
        self._keys = services.keys
        self._claims = services.claims
        self._now = services.now

    async def __call__(self, request: Request, call_next: Next) -> Response:
        key = request.key()
        if key is None:
            raise refusal(request, "no key", "no key was presented; send it as `Authorization: Bearer YOUR_KEY`")
        listed = self._keys.get(key.digest)
        # Found by hash; the comparison that decides takes the same time whatever the digest.
        if listed is None or not listed.is_of(key):
            self._admit_member(request, key)
            return await call_next(request)
        if listed.label is not None:
            request.caller = listed.label
            request.notes["key"] = listed.digest[:15]  # which of those of one label
        else:
            request.caller = listed.digest
        if listed.disabled:
            raise refusal(request, "disabled key")
        if listed.expires is not None and self._now() >= listed.expires:
            raise refusal(request, "expired key")
        request.allowed_models = listed.models
        return await call_next(request)

    def _admit_member(self, request: Request, key: Credential) -> None:
        """Let in whose token has the team's claims. Raises ApiError 401, and 503 for one that cannot be judged now."""
        identity = request.identity
        if identity is not None:
            request.caller = identity.caller
            if identity.has(self._claims):
                return
        request.notes["key"] = key.digest
        raise refusal(request, "token of no member" if identity else request.identity_error or "unknown key")


def refusal(
    request: Request, reason: str, message: str = "this key is not valid here; ask the operator of this gateway for one"
) -> ApiError:
    """Note the reason for the log, and return what the client is told, which is the same for every wrong key."""
    request.notes["auth"] = reason
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
