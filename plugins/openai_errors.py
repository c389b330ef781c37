"""`openai_errors`: Azure's errors in OpenAI's shape, with OpenAI's codes."""

import asyncio
import json
import math
from dataclasses import dataclass
from typing import Any

from gateway import ApiError, ErrorBody, Next, Request, Response, Stage, Target

# OpenAI's SDKs retry by themselves, but not after a Retry-After longer than this, in seconds.
MAX_SDK_WAIT = 120
MAX_BODY = 256 * 1024  # bytes
READ_TIMEOUT = 10.0  # seconds for an error's body, which may drip
FIELDS = ("message", "type", "param", "code")


@dataclass
class OpenAIErrors(Stage):
    """Give Azure's errors OpenAI's shape and `code`, and keep Azure's original error under `innererror`.

    A 429 always has `retry-after` and `retry-after-ms`, even if Azure gives the time only in its message. A 404
    tells an unknown deployment from an api-version that lacks the operation.
    """

    must_precede = ("errors",)  # converts the errors that are found in streams, too

    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        if response.status < 400 or response.error is not None:
            return response
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                data = await response.read(MAX_BODY)
        except (ApiError, TimeoutError):
            data = response.body = b""
        body = ErrorBody(data)
        error = openai_error(request, response.status, body)
        wait = response.cooldown(error["message"])
        if wait is not None:
            response.headers.set("retry-after", str(math.ceil(wait)))
            response.headers.set("retry-after-ms", str(math.ceil(round(wait * 1000, 3))))
            if wait > MAX_SDK_WAIT:
                error["message"] += (
                    f" (Azure asks for a wait of {math.ceil(wait)} s; OpenAI's SDKs do not retry after more than "
                    f"{MAX_SDK_WAIT} s)"
                )
        keep_original(error, body.fields)
        response.headers.set("content-type", "application/json")
        if {"error": error} != body.content:
            response.headers.remove("content-encoding")
            response.body = json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "replace")
        return response


def openai_error(request: Request, status: int, body: ErrorBody) -> dict[str, Any]:
    """Return an error in OpenAI's shape, with all other fields of Azure's."""
    fields = body.fields
    code, param, kind = fields.get("code"), fields.get("param"), fields.get("type")
    message = body.message or f"Azure answered with status {status} and no message"
    code = code if isinstance(code, str) and not code.isdigit() else None
    if status == 401:
        code, kind = "invalid_api_key", "invalid_request_error"
    elif code == "DeploymentNotFound":
        code, param = "model_not_found", "model"
        deployment = sent_target(request).deployment
        message += f" (the model is mapped to the deployment {deployment!r})" if deployment else " (no model was named)"
    elif status == 404 and message.rstrip(".").lower() == "resource not found":
        code = "operation_not_supported"
        message = not_found_message(request)
    elif status == 429:
        code = code if code and code != "TooManyRequests" else "rate_limit_exceeded"
    error: dict[str, Any] = {
        "message": message,
        "type": kind if isinstance(kind, str) and kind else ApiError(status, "").type,
        "param": param if isinstance(param, str) else None,
        "code": code,
    }
    error.update({name: value for name, value in fields.items() if name not in FIELDS})
    return error


def sent_target(request: Request) -> Target:
    """Return the target that the request was sent to: a stage below may have chosen it."""
    return request.last_target or request.target


def keep_original(error: dict[str, Any], fields: dict[str, Any]) -> None:
    """Keep Azure's original fields under `innererror`, if any of them was changed."""
    if "innererror" not in fields and any(fields.get(name) not in (None, error[name]) for name in FIELDS):
        error["innererror"] = {name: fields[name] for name in FIELDS if name in fields}


def not_found_message(request: Request) -> str:
    """Explain "Resource not found": Azure says it of an unknown path and of an unknown api-version alike."""
    version = sent_target(request).api_version or ""
    problem = f"Azure has nothing at the path of {request.operation} with api-version {version}. "
    preview = "preview" in request.supported_versions and not version.endswith("preview") and version != "v1"
    if preview:
        return problem + f"The api-version is the likely cause: the operation needs {request.supported_versions}."
    return problem + (
        "That api-version has the operation, so the likely cause is the resource: its endpoint has another base path, "
        "or its region does not offer the operation."
    )
