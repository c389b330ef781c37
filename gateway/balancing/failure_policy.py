"""The failure policy: what a status or an error means for a deployment, and whether another one may be tried.

It decides both on retries and on health: `cooldown` and `permanent` take the deployment out of the rotation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from gateway.azure.error_body import ErrorBody
from gateway.errors import ApiError, UpstreamError

if TYPE_CHECKING:
    from gateway.response import Response

__all__ = ("AttemptFailure", "of_error", "of_response", "of_status")

# Minimum cooldown after a 429, in seconds. Without it, a deployment that refuses at once would have the fewest requests
# in flight, and get all further ones.
_MIN_COOLDOWN = 0.1
# The error codes for a missing deployment, of Azure and of the stage openai_errors.
_NO_DEPLOYMENT = frozenset(("DeploymentNotFound", "model_not_found"))
# The faults that occur before the body is read.
_BEFORE_BODY = frozenset(("connect", "connect_timeout", "dns", "dns_timeout", "tls", "credential"))


class AttemptFailure(msgspec.Struct):
    """Why an attempt failed.

    `retry`: when the request may be sent again: "always", because Azure certainly did not process it; "if_idempotent";
    or "never".
    `cooldown`: for how many seconds Azure asks for no requests.
    `permanent`: the deployment fails every request.
    `blames_deployment`: the failure counts against the deployment's health.
    `maybe_request`: the request itself may be the cause.
    `message`: the text of Azure or the gateway, for the log.
    """

    reason: str
    retry: Literal["always", "if_idempotent", "never"] = "if_idempotent"
    cooldown: float | None = None
    permanent: bool = False
    blames_deployment: bool = True
    maybe_request: bool = False
    message: str = ""

    @property
    def before_body(self) -> bool:
        """Whether the attempt failed before any of the request's body was read."""
        return self.reason in _BEFORE_BODY


async def of_response(response: Response, *, own_credential: bool, seconds: float) -> AttemptFailure | None:
    """Return the failure that a response means, unless it is a stream; None if every deployment would respond the same.

    `own_credential`: the request has the gateway's credential, so that the client has not caused a 401. Reads an
    error's body for at most `seconds`.
    """
    if isinstance(response.error, UpstreamError):
        return of_error(response.error)
    if response.error is not None or response.status < 400:
        return None  # an error of the gateway's own, or no error
    error = ErrorBody(await _beginning(response, seconds))
    message = error.message or error.text
    if response.status == 404:
        return (
            AttemptFailure("no_deployment", "always", permanent=True, message=message)
            if error.code in _NO_DEPLOYMENT
            else None
        )
    if response.status in (401, 403):
        # (A 403 may be about this request's operation.)
        return (
            AttemptFailure("refused", "always", permanent=response.status == 401, message=message)
            if own_credential
            else None
        )
    return of_status(response, response.status, message)


async def _beginning(response: Response, seconds: float) -> bytes:
    """Return the beginning of an error's body; it stays in the response."""
    try:
        return await response.peek(lambda _: False, seconds)
    except ApiError:
        return b""


def of_error(error: UpstreamError) -> AttemptFailure:
    """Return the failure that a connection error means."""
    if error.fault == "deadline":
        return AttemptFailure("deadline", "never", blames_deployment=False, message=error.message)
    # (A closed keep-alive connection says nothing about a deployment.)
    return AttemptFailure(
        error.fault,
        "always" if error.unsent else "if_idempotent",
        blames_deployment=error.fault != "stale",
        message=error.message,
    )


def of_status(response: Response, status: int, message: str) -> AttemptFailure | None:
    """Return the failure that a status means; None if every deployment would respond the same."""
    cooldown = response.cooldown(message)
    if status == 429:
        penalty = (response.headers.get("x-ratelimit-abusepenalty-active") or "").strip().lower() == "true"
        reason = "abuse_penalty" if penalty else "rate_limited"
        retry: Literal["always", "never"] = "never" if penalty else "always"
        cooldown = max(cooldown or 0.0, _MIN_COOLDOWN)
        return AttemptFailure(reason, retry, cooldown, blames_deployment=False, message=message)
    if status == 408 or (status >= 500 and status not in (501, 505)):
        return AttemptFailure(f"status_{status}", cooldown=cooldown or None, maybe_request=True, message=message)
    return None
