"""Keys: what a client presents, what Azure is shown, and what must never be printed."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field

from gateway.errors import ApiError
from gateway.protocol.headers import Headers

__all__ = (
    "KEY_PROTOCOL",
    "Credential",
    "ListedKey",
    "is_key",
    "key_digest",
    "new_key",
    "presented_key",
)

# How a browser's WebSocket, which can set no header, presents a key: as one of the subprotocols that it offers.
KEY_PROTOCOL = "openai-insecure-api-key."

# A bearer token's alphabet (RFC 6750, 2.1), which Azure's and OpenAI's keys keep to.
_KEY = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_JWT = re.compile(r"eyJ[A-Za-z0-9_-]*\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
_MAX_KEY = 512
_MAX_TOKEN = 16_384


@dataclass(frozen=True, slots=True)
class Credential:
    """What Azure is shown: an `api-key`, or an Entra token as `Authorization: Bearer`."""

    value: str = field(repr=False)
    bearer: bool = False
    digest: str = field(init=False)
    """`sha256:` and 64 hexadecimal digits: how logs and counters name a key."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", key_digest(self.value))


@dataclass(frozen=True, slots=True)
class ListedKey:
    """A key of a team as its configuration lists it: by its digest, never itself.

    `expires` is in seconds since the epoch. `models` are the only ones that it may use (names or globs); None for
    all of its team's.
    """

    digest: str
    label: str | None = None
    expires: float | None = None
    disabled: bool = False
    models: tuple[str, ...] | None = None

    def is_of(self, key: Credential) -> bool:
        """Whether this is the digest of a key, in a time that does not tell how much of it is right."""
        return hmac.compare_digest(self.digest, key.digest)


# Keys that were looked at, by the SHA-256 of what was presented: the digest is needed for each request anyway.
_seen: dict[tuple[bytes, bool], Credential] = {}
_seen_tokens: dict[tuple[bytes, bool], Credential] = {}  # which are long
_MAX_SEEN, _MAX_TOKENS = 4096, 256


def presented_key(headers: Headers) -> Credential | None:
    """Return the key that these headers present; see `Request.key`."""
    shown: Credential | None = None
    for name, value, _, _ in headers.credential_fields():
        if name == b"authorization":
            scheme, _, token = value.partition(b" ")
            if scheme.lower() != b"bearer":
                raise ApiError.invalid_key("the Authorization header must be `Bearer YOUR_KEY`")
            found = _credential(token, authorization=True)
        elif name == b"sec-websocket-protocol":
            tokens = key_protocols(value)
            if not tokens:
                continue
            found = _credential(tokens[0], authorization=True)
            if any(token != tokens[0] for token in tokens):
                raise ApiError.invalid_key("two different keys were presented; send one")
        else:
            found = _credential(value, authorization=False)
        if shown is not None and found.value != shown.value:
            raise ApiError.invalid_key(
                "two different keys were presented; send one, as `Authorization: Bearer` or as `api-key`"
            )
        if shown is None or found.bearer:
            shown = found
    return shown


def key_protocols(value: bytes) -> list[bytes]:
    """Return the keys among the subprotocols of a WebSocket's handshake."""
    prefix = KEY_PROTOCOL.encode()
    offered = [each.strip(b" \t") for each in value.split(b",")]
    return [each[len(prefix) :] for each in offered if each.lower().startswith(prefix)]


def _credential(raw: bytes, *, authorization: bool) -> Credential:
    place = hashlib.sha256(raw).digest(), authorization
    found = _seen.get(place) or _seen_tokens.get(place)
    if found is None:
        text = _key_text(raw)
        found = Credential(text, bearer=authorization and is_jwt(text))
        seen, most = (_seen, _MAX_SEEN) if len(raw) <= _MAX_KEY else (_seen_tokens, _MAX_TOKENS)
        if len(seen) >= most:
            seen.clear()
        seen[place] = found
    return found


def _key_text(raw: bytes) -> str:
    text = raw.strip().decode("latin-1")
    if not text:
        raise ApiError.invalid_key("the key is empty; send `Authorization: Bearer YOUR_KEY`")
    if not is_key(text):
        raise ApiError.invalid_key("what was presented as a key cannot be one")
    return text


def is_key(text: str) -> bool:
    """Whether a text can be a key or a token: nothing else may become a header to Azure."""
    return _KEY.fullmatch(text) is not None and len(text) <= (_MAX_TOKEN if is_jwt(text) else _MAX_KEY)


def is_jwt(text: str) -> bool:
    """Whether a key looks like a JSON Web Token, as Entra's tokens do."""
    return _JWT.fullmatch(text) is not None


def new_key() -> str:
    """Return a new key, of 256 random bits; many clients look for the `sk-` of OpenAI's keys."""
    return "sk-gw-" + secrets.token_urlsafe(32)


def key_digest(key: str) -> str:
    """Return `sha256:` and the hexadecimal SHA-256 of a key: how the configuration and counters name it."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()
