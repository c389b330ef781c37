"""API keys: the key that a client presents, the credential that Azure gets, and their digests. Never print a key."""

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

# A WebSocket in a browser cannot set headers: it presents its key as a subprotocol with this prefix.
KEY_PROTOCOL = "openai-insecure-api-key."

# The alphabet of bearer tokens (RFC 6750, 2.1). Keys of Azure and OpenAI use it, too.
_KEY = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_JWT = re.compile(r"eyJ[A-Za-z0-9_-]*\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
_MAX_KEY = 512
_MAX_TOKEN = 16_384


@dataclass(frozen=True, slots=True)
class Credential:
    """A credential for Azure: an `api-key`, or an Entra token for `Authorization: Bearer`."""

    value: str = field(repr=False)
    bearer: bool = False
    digest: str = field(init=False)
    """`sha256:` and 64 hexadecimal digits: the name of the key in logs and counters."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", key_digest(self.value))


@dataclass(frozen=True, slots=True)
class ListedKey:
    """A key in the configuration of a team, which has only its digest.

    `expires` is in seconds since the epoch. `models` are the models that the key can use (names or globs); None for all
    models of its team.
    """

    digest: str
    label: str | None = None
    expires: float | None = None
    disabled: bool = False
    models: tuple[str, ...] | None = None

    def is_of(self, key: Credential) -> bool:
        """Whether this is the digest of a key. The comparison takes constant time."""
        return hmac.compare_digest(self.digest, key.digest)


# Parsed keys, by the SHA-256 of the header value. Tokens are long and have a smaller cache.
_cached_keys: dict[tuple[bytes, bool], Credential] = {}
_cached_tokens: dict[tuple[bytes, bool], Credential] = {}
_MAX_CACHED_KEYS, _MAX_CACHED_TOKENS = 4096, 256


def presented_key(headers: Headers) -> Credential | None:
    """Return the key in these headers; see `Request.key`."""
    presented: Credential | None = None
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
                raise ApiError.invalid_key("the request has two different keys; send one")
        else:
            found = _credential(value, authorization=False)
        if presented is not None and found.value != presented.value:
            raise ApiError.invalid_key(
                "the request has two different keys; send one, as `Authorization: Bearer` or as `api-key`"
            )
        if presented is None or found.bearer:
            presented = found
    return presented


def key_protocols(value: bytes) -> list[bytes]:
    """Return the keys among the subprotocols of a WebSocket handshake."""
    prefix = KEY_PROTOCOL.encode()
    offered = [each.strip(b" \t") for each in value.split(b",")]
    return [each[len(prefix) :] for each in offered if each.lower().startswith(prefix)]


def _credential(raw: bytes, *, authorization: bool) -> Credential:
    cache_key = hashlib.sha256(raw).digest(), authorization
    found = _cached_keys.get(cache_key) or _cached_tokens.get(cache_key)
    if found is None:
        text = _key_text(raw)
        found = Credential(text, bearer=authorization and is_jwt(text))
        if len(raw) <= _MAX_KEY:
            cache, max_size = _cached_keys, _MAX_CACHED_KEYS
        else:
            cache, max_size = _cached_tokens, _MAX_CACHED_TOKENS
        if len(cache) >= max_size:
            cache.clear()
        cache[cache_key] = found
    return found


def _key_text(raw: bytes) -> str:
    text = raw.strip().decode("latin-1")
    if not text:
        raise ApiError.invalid_key("the key is empty; send `Authorization: Bearer YOUR_KEY`")
    if not is_key(text):
        raise ApiError.invalid_key("the key is malformed; send `Authorization: Bearer YOUR_KEY`")
    return text


def is_key(text: str) -> bool:
    """Whether a text can be a key or a token. Nothing else can become a header to Azure."""
    return _KEY.fullmatch(text) is not None and len(text) <= (_MAX_TOKEN if is_jwt(text) else _MAX_KEY)


def is_jwt(text: str) -> bool:
    """Whether a key looks like a JSON Web Token. Entra's tokens do."""
    return _JWT.fullmatch(text) is not None


def new_key() -> str:
    """Return a new key with 256 random bits. Many clients expect OpenAI's prefix `sk-`."""
    return "sk-gw-" + secrets.token_urlsafe(32)


def key_digest(key: str) -> str:
    """Return `sha256:` and the hexadecimal SHA-256 of a key: its name in the configuration and in counters."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()
