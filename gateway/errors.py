"""What can go wrong, split by who has to act.

GatewayError
+-- ConfigError          the operator: every mistake in the configuration, each with file:line:column
+-- StartError           the operator: a sound configuration that cannot be started here and now
+-- ApiError             the client: becomes an OpenAI-shaped answer
|   +-- UpstreamError    Azure broke or could not be reached (502)
|       +-- UpstreamTimeout  Azure was too slow (504)
+-- BodyConsumed         a stage's author: the body was streamed away and is asked for again
+-- StreamBroken         an answer's stream cannot go on (raised while it is being sent)
+-- TokenUnavailable     no Entra token can be had (in `entra.py`); becomes an UpstreamError (503)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

__all__ = (
    "ApiError",
    "BodyConsumed",
    "ConfigError",
    "Fault",
    "GatewayError",
    "Mistake",
    "StartError",
    "StreamBroken",
    "UpstreamError",
    "UpstreamTimeout",
    "error_body",
)

# The `type` OpenAI gives an error of each status, where the raiser names none.
_TYPES = {429: "requests"}


class GatewayError(Exception):
    """The root of every error that the gateway raises on purpose."""


@dataclass(frozen=True, order=True)
class Mistake:
    """One mistake in the configuration, and where it stands."""

    file: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.message}"


class ConfigError(GatewayError):
    """The configuration cannot be used; `mistakes` holds all of them, in file order."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = tuple(sorted(set(mistakes)))
        super().__init__("\n".join(map(str, self.mistakes)))


class StartError(GatewayError):
    """The gateway cannot start: an address that is taken, a stage that fails to get ready."""


class ApiError(GatewayError):
    """An error that the client is told, in OpenAI's shape.

    `status` is the HTTP status; `type`, `param` and `code` are OpenAI's fields of the same name
    (platform.openai.com/docs/guides/error-codes). The message should say what to do.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,  # noqa: A002 -- OpenAI's own word
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or _TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if status == 503:
            # Every 503 says when to come back; an error may set another time.
            self.headers.setdefault("retry-after", "1")

    @staticmethod
    def invalid_key(message: str = "invalid API key; ask the operator of this gateway for a valid one") -> ApiError:
        """Return the 401 for a missing or wrong key; by default, the same for every wrong one."""
        return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def body(self) -> bytes:
        """Return the answer's JSON body."""
        return error_body(self.message, self.type, self.param, self.code)


Fault = Literal[
    "connect",
    "connect_timeout",
    "dns",
    "dns_timeout",
    "tls",
    "credential",
    "timeout",
    "deadline",
    "stalled",
    "stale",
    "broken_off",
    "redirect",
    "encoding",
]


class UpstreamError(ApiError):
    """Azure could not be reached, or what it answered is not a whole HTTP answer.

    `fault` says in one word what went wrong, for logs and counters. `unsent` tells that not one byte of the request
    was sent, so that it surely was not processed.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 502,
        type: str | None = None,  # noqa: A002 -- OpenAI's own word
        param: str | None = None,
        code: str = "upstream_error",
        fault: Fault = "broken_off",
    ) -> None:
        super().__init__(status, message, type=type, param=param, code=code)
        self.fault = fault
        self.unsent = False


class UpstreamTimeout(UpstreamError):
    """Azure did not connect, begin to answer, or go on answering in time."""

    def __init__(self, message: str, *, fault: Fault = "timeout") -> None:
        super().__init__(message, status=504, code="upstream_timeout", fault=fault)


class BodyConsumed(GatewayError):
    """The request's body was already streamed to Azure; `await request.buffer(limit)` before a second call."""


class StreamBroken(GatewayError):
    """A stream cannot go on, by the gateway's own judgement: an event too large, an unreadable encoding."""


def error_body(message: str, type: str, param: str | None, code: str | None) -> bytes:  # noqa: A002
    """Return `{"error": {...}}` with OpenAI's four fields, always all of them."""
    error: dict[str, Any] = {"message": message, "type": type, "param": param, "code": code}
    return msgspec.json.encode({"error": error})
