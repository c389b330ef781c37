"""`openai_errors`: Azure's errors, in the words and the shape that OpenAI's clients read."""

import asyncio
import json
import math
from dataclasses import dataclass
from typing import Any

from gateway import ApiError, Next, Request, Response, Stage, Target

# The SDKs of OpenAI retry by themselves, but not where they are told to wait for longer than this, in seconds.
LONGEST = 120
# What a 429 says that names no time, in seconds: about what a client waits that is told nothing.
UNTOLD = 1.0
MOST = 256 * 1024
PATIENCE = 10.0  # seconds for an error's body, which may drip
FIELDS = ("message", "type", "param", "code")


@dataclass
class OpenAIErrors(Stage):
    """Give Azure's errors OpenAI's shape, what it means as `code`, and Azure's own words under `innererror`.

    A 429 always says when to try again, as `retry-after` and `retry-after-ms`, if only its text does. A 404
    tells a deployment that is not there from an api-version that lacks the operation.
    """

    must_precede = ("errors",)  # those that are found in a stream are put into these words, too

    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        if response.status < 400 or response.error is not None:
            return response
        try:
            async with asyncio.timeout(PATIENCE):
                data = await response.read(MOST)
        except (ApiError, TimeoutError):
            data = response.body = b""
        error = read_error(data)
        made = spoken(request, response.status, error)
        wait = response.retry_after(made["message"])
        if wait is None and response.status == 429:
            wait = UNTOLD
        if wait is not None:
            response.headers.set("retry-after", str(math.ceil(wait)))
            response.headers.set("retry-after-ms", str(math.ceil(round(wait * 1000, 3))))
            if wait > LONGEST:
                made["message"] += (
                    f" (Azure asks for a wait of {math.ceil(wait)} s; above {LONGEST} s OpenAI's clients do not retry)"
                )
        keep_own(made, error)
        response.headers.set("content-type", "application/json")
        if {"error": made} != parsed(data):
            response.headers.remove("content-encoding")
            response.body = json.dumps({"error": made}, ensure_ascii=False).encode("utf-8", "replace")
        return response


def parsed(data: bytes) -> Any:
    """Return what is JSON, else None; what is no number in JSON becomes null."""
    try:
        return json.loads(data, parse_constant=lambda _: None, parse_float=finite)
    except (ValueError, RecursionError):
        return None


def finite(text: str) -> float | None:
    """Return a number, or None where it is too large for one."""
    return number if math.isfinite(number := float(text)) else None


def read_error(data: bytes) -> dict[str, Any]:
    """Return Azure's error from any of the shapes it has been seen in: its own, API Management's, a page."""
    content = parsed(data)
    if isinstance(content, dict):
        error: Any = content.get("error", content)
        if isinstance(error, dict):
            # The specification spells it otherwise than Azure does.
            return {"innererror": error["inner_error"], **error} if "inner_error" in error else error
        return {**content, "message": content.get("message") or str(error)}
    text = data.decode("utf-8", "replace").strip()
    if not text or text.startswith("<"):
        return {}
    return {"message": text[:1000]}


def spoken(request: Request, status: int, own: dict[str, Any]) -> dict[str, Any]:
    """Return an error as OpenAI would say it, with all else that is in Azure's own."""
    code, param, kind = own.get("code"), own.get("param"), own.get("type")
    said = [text for name in ("message", "detail", "title") if isinstance(text := own.get(name), str) and text]
    message = said[0] if said else f"Azure answered with status {status} and no reason"
    code = code if isinstance(code, str) and not code.isdigit() else None
    if status == 401:
        code, kind = "invalid_api_key", "invalid_request_error"
    elif code == "DeploymentNotFound":
        code, param = "model_not_found", "model"
        named = asked(request).deployment
        message += f" (the deployment {named!r}, which the model is mapped to)" if named else " (no model was named)"
    elif status == 404 and message.rstrip(".").lower() == "resource not found":
        code = "operation_not_supported"
        message = not_found(request)
    elif status == 429:
        code = code if code and code != "TooManyRequests" else "rate_limit_exceeded"
    made: dict[str, Any] = {
        "message": message,
        "type": kind if isinstance(kind, str) and kind else ApiError(status, "").type,
        "param": param if isinstance(param, str) else None,
        "code": code,
    }
    made.update({name: value for name, value in own.items() if name not in FIELDS})
    return made


def asked(request: Request) -> Target:
    """Return where Azure was asked: a stage below may have chosen it."""
    return request.last_target or request.target


def keep_own(made: dict[str, Any], own: dict[str, Any]) -> None:
    """Put what Azure said under `innererror`, where another thing was put in its place."""
    if "innererror" not in own and any(own.get(name) not in (None, made[name]) for name in FIELDS):
        made["innererror"] = {name: own[name] for name in FIELDS if name in own}


def not_found(request: Request) -> str:
    """Say what "Resource not found" means: Azure says it of a path and of an api-version that it does not know."""
    version = asked(request).api_version or ""
    said = f"Azure has nothing at the path of {request.operation} with api-version {version}. "
    preview = "preview" in request.supported_versions and not version.endswith("preview") and version != "v1"
    if preview:
        return said + f"The api-version is the likely cause: the operation is known from {request.supported_versions}."
    return said + (
        "That api-version is known to have it, so the likely cause is the resource: its endpoint has another base "
        "path, or its region does not offer the operation."
    )
