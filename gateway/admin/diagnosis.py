"""What `gateway doctor` says of an answer, or of none: in words that tell the operator what to change."""

from __future__ import annotations

import re

from gateway.azure.error_body import ErrorBody
from gateway.azure.resources import Resource
from gateway.errors import ApiError, UpstreamError

__all__ = (
    "TOO_OLD",
    "cuts_off",
    "lacks_operation",
    "message_of",
    "of_error",
    "of_region",
    "of_status",
    "wants_other_limit",
)

_UNSUPPORTED = re.compile(r"operation does not work|OperationNotSupported|does not support", re.IGNORECASE)
_NETWORK = re.compile(r"virtual network|firewall|private endpoint|public access|private link", re.IGNORECASE)
_CUT_OFF = re.compile(r"max_tokens or model output limit was reached", re.IGNORECASE)
_REGIONAL = re.compile(r"https?://[a-z0-9]+\.api\.cognitive\.microsoft\.")
TOO_OLD = "api-version too old"
_WHY = {
    "dns": "its host name is not found: the endpoint is misspelt, or the resource is gone",
    "dns_timeout": "its host name could not be looked up in time: the name servers do not answer",
    "connect": "it takes no connection: a firewall on the way, or the wrong port",
    "connect_timeout": "it takes no connection in time: a firewall on the way, or a private endpoint out of reach",
    "timeout": "it did not answer in time",
    "stalled": "it stopped in the middle of its answer",
    "redirect": "it answers with a redirect: the endpoint is another one, or begins with http where it is https",
    "encoding": "its answers are compressed in a way that the gateway does not read",
    "broken_off": "it broke the connection off, or what it answered is no HTTP",
}


def of_error(error: ApiError) -> str:
    """Return what an error means that the gateway itself raised."""
    if isinstance(error, UpstreamError):
        return _WHY.get(error.fault, error.message)
    if error.code == "operation_not_supported":
        return f"{TOO_OLD}: {error.message}"
    return error.message


def of_status(resource: Resource, status: int, body: str, version: str | None, *, by_token: bool) -> str:
    """Return what an error's status and body mean; `version` is None where the resource was asked for its models."""
    message = message_of(body)
    if status == 404 and "DeploymentNotFound" in body:
        return "unknown deployment: the resource has none of this name (a new one takes some minutes)"
    if status == 404:
        asked = f" {version}" if version else ""
        return f"api-version{asked} too old, or unknown: Azure has nothing there; or the endpoint has another base path"
    if status == 401 and by_token:
        return "wrong token: it is for another scope or tenant, or the resource does not take tokens"
    if status == 401:
        regional = _REGIONAL.match(resource.endpoint) is not None
        return "wrong key" + (", or a key of another region: this endpoint is for one alone" if regional else "")
    if status == 403 and _NETWORK.search(body):
        return "its network rules refuse this machine: a firewall, or a private endpoint"
    if status == 403:
        return "the identity may not: it lacks a role such as Cognitive Services OpenAI User"
    if re.search("api[- ]version", message, re.IGNORECASE):
        return f"api-version too old, or unknown: {message}"
    return f"status {status}: {message}"


def of_region(resource: Resource, region: str | None) -> str | None:
    """Return what is wrong with the region that Azure says a resource is in, or None."""
    if region is None or resource.region is None or _plain(region) == _plain(resource.region):
        return None
    return f"wrong region: it is in {region}, not in {resource.region}"


def cuts_off(body: str) -> bool:
    """Whether a model has used its one token before it had said anything, as those do that think."""
    return _CUT_OFF.search(body) is not None


def wants_other_limit(body: str) -> bool:
    """Whether a model takes the limit of its answer by another name."""
    return "max_tokens" in body or "max_completion_tokens" in body


def lacks_operation(body: str) -> bool:
    """Whether a model is not one for what it was asked."""
    return _UNSUPPORTED.search(body) is not None


def message_of(body: str) -> str:
    """Return the message of an error's body, on one line."""
    return " ".join((ErrorBody(body.encode()).message or body).split())[:300]


def _plain(region: str) -> str:
    """Return a region's name as it is written without spaces: `Sweden Central` is `swedencentral`."""
    return re.sub(r"[^a-z0-9]", "", region.lower())
