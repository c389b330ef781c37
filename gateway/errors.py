"""Errors of the gateway, by who has to act.

GatewayError
+-- ConfigError          operator: mistakes in the configuration, each with file:line:column
+-- StartError           operator: a valid configuration that cannot start
+-- ApiError             client: becomes a response in the shape of OpenAI's errors
|   +-- UpstreamError    Azure failed or cannot be reached (502)
|       +-- UpstreamTimeout  Azure was too slow (504)
+-- BodyConsumed         author of a stage: the body was already streamed and cannot be read again
+-- StreamBroken         the stream of a response cannot continue (raised while it is being sent)
+-- TokenUnavailable     no Entra token is available (in `auth/entra_tokens.py`); becomes an UpstreamError (503)
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

# OpenAI's `type` for errors of a status, unless the raiser sets one.
_TYPES = {429: "requests"}


class GatewayError(Exception):
    """The base class of the gateway's own errors."""


@dataclass(frozen=True, order=True)
class Mistake:
    """One mistake in the configuration, and its location."""

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
    """The gateway cannot start, for instance because an address is in use or a stage fails to start."""


class ApiError(GatewayError):
    """An error that the client gets, in the shape of OpenAI's errors.

    `status` is the HTTP status; `type`, `param` and `code` are OpenAI's fields of the same name
    (platform.openai.com/docs/guides/error-codes). The message says what happened and what to do.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,  # noqa: A002 -- OpenAI's name
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
            # Every 503 has Retry-After; an error may set another value.
            self.headers.setdefault("retry-after", "1")

    @staticmethod
    def invalid_key(message: str = "invalid API key; ask the operator of this gateway for a valid one") -> ApiError:
        """Return the 401 for a missing or wrong key; by default, the same for every wrong one."""
        return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def body(self) -> bytes:
        """Return the JSON body of the response."""
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
    """Azure cannot be reached, or its response is not a complete HTTP response.

    `fault` names the kind of failure, for logs and counters. `unsent` is True if no byte of the request was sent, so
    that Azure cannot have processed it.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 502,
        type: str | None = None,  # noqa: A002 -- OpenAI's name
        param: str | None = None,
        code: str = "upstream_error",
        fault: Fault = "broken_off",
    ) -> None:
        super().__init__(status, message, type=type, param=param, code=code)
        self.fault = fault
        self.unsent = False


class UpstreamTimeout(UpstreamError):
    """Azure did not connect, begin its response, or continue it in time."""

    def __init__(self, message: str, *, fault: Fault = "timeout") -> None:
        super().__init__(message, status=504, code="upstream_timeout", fault=fault)


class BodyConsumed(GatewayError):
    """The request's body was already streamed to Azure; call `await request.buffer(limit)` before a second call."""


class StreamBroken(GatewayError):
    """The gateway ends a stream itself: an event is too large, or an encoding is not readable."""


def error_body(message: str, type: str, param: str | None, code: str | None) -> bytes:  # noqa: A002
    """Return `{"error": {...}}` with all four of OpenAI's fields."""
    error: dict[str, Any] = {"message": message, "type": type, "param": param, "code": code}
    return msgspec.json.encode({"error": error})
