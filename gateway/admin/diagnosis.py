"""Diagnosis: the messages of `gateway doctor` for a failed probe, which say what to change."""

from __future__ import annotations

import re

from gateway.azure.error_body import ErrorBody
from gateway.azure.resources import Resource
from gateway.errors import ApiError, UpstreamError

__all__ = (
    "TOO_OLD",
    "diagnose_error",
    "diagnose_region",
    "diagnose_status",
    "expects_other_limit_name",
    "is_cut_off",
    "lacks_operation",
    "message_of",
)

_UNSUPPORTED = re.compile(r"operation does not work|OperationNotSupported|does not support", re.IGNORECASE)
_NETWORK = re.compile(r"virtual network|firewall|private endpoint|public access|private link", re.IGNORECASE)
_CUT_OFF = re.compile(r"max_tokens or model output limit was reached", re.IGNORECASE)
_REGIONAL = re.compile(r"https?://[a-z0-9]+\.api\.cognitive\.microsoft\.")
TOO_OLD = "api-version too old"
_REASONS = {
    "dns": "host name not found: the endpoint is misspelt, or the resource was deleted",
    "dns_timeout": "host name not resolved in time: the name servers do not reply",
    "connect": "connection failed: a firewall on the way, or the wrong port",
    "connect_timeout": "no connection in time: a firewall on the way, or an unreachable private endpoint",
    "timeout": "no response in time",
    "stalled": "the response stopped before its end",
    "redirect": "redirect: the endpoint has another URL, or begins with https:// instead of http://",
    "encoding": "the response has a content coding that the gateway cannot decode",
    "broken_off": "connection closed, or the response is not HTTP",
}


def diagnose_error(error: ApiError) -> str:
    """Return the message for an error that the gateway raised."""
    if isinstance(error, UpstreamError):
        return _REASONS.get(error.fault, error.message)
    if error.code == "operation_not_supported":
        return f"{TOO_OLD}: {error.message}"
    return error.message


def diagnose_status(resource: Resource, status: int, body: str, version: str | None, *, by_token: bool) -> str:
    """Return the message for an error response; `version` is None if the request was for the resource's models."""
    message = message_of(body)
    if status == 404 and "DeploymentNotFound" in body:
        return "unknown deployment: the resource has no deployment of this name (a new one takes some minutes)"
    if status == 404:
        named = f" {version}" if version else ""
        return (
            f"api-version{named} too old or unknown (Azure has nothing at this URL), or wrong base path of the endpoint"
        )
    if status == 401 and by_token:
        return "wrong token: it has another scope or tenant, or the resource does not accept tokens"
    if status == 401:
        regional = _REGIONAL.match(resource.endpoint) is not None
        return "wrong key" + (", or a key of another region: this endpoint is for one region only" if regional else "")
    if status == 403 and _NETWORK.search(body):
        return "network rules of the resource refuse this machine: a firewall, or a private endpoint"
    if status == 403:
        return "permission denied: the identity needs a role such as Cognitive Services OpenAI User"
    if re.search("api[- ]version", message, re.IGNORECASE):
        return f"api-version too old or unknown: {message}"
    return f"status {status}: {message}"


def diagnose_region(resource: Resource, region: str | None) -> str | None:
    """Return the message for a region that differs from the configured one, or None."""
    if region is None or resource.region is None or _normalized(region) == _normalized(resource.region):
        return None
    return f"wrong region: the resource is in {region}, not in {resource.region}"


def is_cut_off(body: str) -> bool:
    """Whether a reasoning model used up its one token before any output."""
    return _CUT_OFF.search(body) is not None


def expects_other_limit_name(body: str) -> bool:
    """Whether a model expects the output limit under another name."""
    return "max_tokens" in body or "max_completion_tokens" in body


def lacks_operation(body: str) -> bool:
    """Whether a model does not support the operation."""
    return _UNSUPPORTED.search(body) is not None


def message_of(body: str) -> str:
    """Return the message of an error's body, on one line."""
    return " ".join((ErrorBody(body.encode()).message or body).split())[:300]


def _normalized(region: str) -> str:
    """Normalize a region's name: `Sweden Central` becomes `swedencentral`."""
    return re.sub(r"[^a-z0-9]", "", region.lower())
