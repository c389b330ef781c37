"""Why an attempt to ask a deployment has failed, and whether the request may be sent to another one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from gateway.azure.error_body import ErrorBody
from gateway.errors import ApiError, UpstreamError
from gateway.protocol.retry_after import cooldown

if TYPE_CHECKING:
    from gateway.response import Response

__all__ = ("AttemptFailure", "of_answer", "of_error", "of_status")

# The shortest rest behind a 429, in seconds: a deployment that fails fast has little in flight, and would get all.
_LEAST = 0.1
# What a deployment that is not there is called, by Azure and by the stage openai_errors.
_NO_DEPLOYMENT = frozenset(("DeploymentNotFound", "model_not_found"))
# The faults that come before a body is read.
_UNREAD = frozenset(("connect", "connect_timeout", "dns", "dns_timeout", "tls", "credential"))


class AttemptFailure(msgspec.Struct):
    """Why an attempt has failed.

    `again` says whether the request may be sent again: if it was surely not processed, if it is repeatable, or never.
    `rest` is for how many seconds Azure asks to be left alone, `certain` that the deployment cannot answer any request,
    `fails` whether it is the deployment that has failed, and `by_request` that it may be the request's own fault.
    `words` are Azure's, or the gateway's, for the log.
    """

    reason: str
    again: Literal["surely", "if_repeatable", "never"] = "if_repeatable"
    rest: float | None = None
    certain: bool = False
    fails: bool = True
    by_request: bool = False
    words: str = ""

    @property
    def unread(self) -> bool:
        """Whether nothing of the request's body had been read when it came."""
        return self.reason in _UNREAD


async def of_answer(response: Response, *, own_credential: bool, seconds: float) -> AttemptFailure | None:
    """Return what an answer that is no stream means; None where every deployment would answer so.

    `own_credential` says that Azure was shown the gateway's, so that a refusal of it is not the client's fault.
    An error's words are waited for so many seconds.
    """
    if isinstance(response.error, UpstreamError):
        return of_error(response.error)
    if response.error is not None or response.status < 400:
        return None  # the gateway's own refusal, or none
    error = ErrorBody(await _beginning(response, seconds))
    message = error.message or error.text
    if response.status == 404:
        return (
            AttemptFailure("no_deployment", "surely", certain=True, words=message)
            if error.code in _NO_DEPLOYMENT
            else None
        )
    if response.status in (401, 403):
        # (A 403 may be about what this request is for.)
        return (
            AttemptFailure("refused", "surely", certain=response.status == 401, words=message)
            if own_credential
            else None
        )
    return of_status(response, response.status, message)


async def _beginning(response: Response, seconds: float) -> bytes:
    """Return what an error says, or as much of it as is worth looking at; it stays in the answer."""
    try:
        return await response.peek(lambda _: False, seconds)
    except ApiError:
        return b""


def of_error(error: UpstreamError) -> AttemptFailure:
    """Return what an error of the connection means."""
    if error.fault == "deadline":
        return AttemptFailure("deadline", "never", fails=False, words=error.message)
    # (A kept connection that was closed says nothing of a deployment.)
    return AttemptFailure(
        error.fault, "surely" if error.unsent else "if_repeatable", fails=error.fault != "stale", words=error.message
    )


def of_status(response: Response, status: int, message: str) -> AttemptFailure | None:
    """Return what a status means; None where every deployment would answer so."""
    rest = cooldown(status, response.headers, message)
    if status == 429:
        penalty = (response.headers.get("x-ratelimit-abusepenalty-active") or "").strip().lower() == "true"
        reason = "abuse_penalty" if penalty else "rate_limited"
        return AttemptFailure(
            reason, "never" if penalty else "surely", max(rest or 0.0, _LEAST), fails=False, words=message
        )
    if status == 408 or (status >= 500 and status not in (501, 505)):
        return AttemptFailure(f"status_{status}", rest=rest or None, by_request=True, words=message)
    return None
