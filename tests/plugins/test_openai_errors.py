"""`openai_errors`: every shape of Azure's errors becomes OpenAI's."""

from __future__ import annotations

import json
from email.utils import formatdate
from time import time
from typing import Any

import pytest
from aiohttp import web

from gateway import ApiError, Response
from gateway.testing import FakeAzure, post, send
from plugins.api_version import ApiVersion
from plugins.model_map import ModelMap
from plugins.openai_errors import OpenAIErrors
from tests.conftest import CHAT, YAML, StartGateway

FILTERED = {"hate": {"filtered": True, "severity": "high"}}
CASES: list[tuple[str, int, Any, dict[str, Any]]] = [
    (
        "401 of 2026",
        401,
        {"error": {"code": "401", "message": "Access denied due to invalid subscription key."}},
        {"message": "Access denied due to invalid subscription key.", "code": "invalid_api_key", "param": None},
    ),
    (
        "401 of API Management",
        401,
        {"statusCode": 401, "message": "Unauthorized. Access token is missing, invalid or expired."},
        {"message": "Unauthorized. Access token is missing, invalid or expired.", "code": "invalid_api_key"},
    ),
    (
        "401 by code",
        401,
        {"error": {"code": "PermissionDenied", "message": "Principal does not have access to API/Operation."}},
        {"code": "invalid_api_key"},
    ),
    (
        "403",
        403,
        {"error": {"code": "AccessDenied", "message": "Access denied due to Virtual Network/Firewall rules."}},
        {"code": "AccessDenied", "message": "Access denied due to Virtual Network/Firewall rules."},
    ),
    (
        "429 of a deployment",
        429,
        {"error": {"code": "429", "message": "Requests have exceeded the limit. Please retry after 7 seconds."}},
        {"type": "requests", "code": "rate_limit_exceeded"},
    ),
    (
        "429 of API Management",
        429,
        {"statusCode": 429, "message": "Rate limit is exceeded. Try again in 2 seconds."},
        {
            "type": "requests",
            "code": "rate_limit_exceeded",
            "message": "Rate limit is exceeded. Try again in 2 seconds.",
        },
    ),
    (
        "a filtered prompt",
        400,
        {
            "error": {
                "message": "The response was filtered.",
                "type": None,
                "param": "prompt",
                "code": "content_filter",
                "status": 400,
                "innererror": {"code": "ResponsibleAIPolicyViolation", "content_filter_result": FILTERED},
            }
        },
        {
            "type": "invalid_request_error",
            "param": "prompt",
            "code": "content_filter",
            "innererror": {"code": "ResponsibleAIPolicyViolation", "content_filter_result": FILTERED},
        },
    ),
    (
        "a filtered prompt, spelled as the specification has it",
        400,
        {"error": {"message": "m", "code": "content_filter", "inner_error": {"content_filter_results": FILTERED}}},
        {"code": "content_filter", "innererror": {"content_filter_results": FILTERED}},
    ),
    (
        "an unknown argument",
        400,
        {
            "error": {
                "message": "Unrecognized request argument supplied: x",
                "type": "invalid_request_error",
                "param": None,
                "code": None,
            }
        },
        {"message": "Unrecognized request argument supplied: x", "code": None},
    ),
    ("a text for an error", 400, {"error": "model not loaded"}, {"message": "model not loaded", "code": None}),
    (
        "ASP.NET's problem details",
        400,
        {"title": "One or more errors", "status": 400},
        {"message": "One or more errors"},
    ),
    ("500", 500, {"error": {"code": "InternalServerError", "message": "Backend"}}, {"type": "server_error"}),
    ("an empty body", 503, b"", {"message": "Azure answered with status 503 and no message", "type": "server_error"}),
    (
        "a page",
        502,
        b"<html><h1>502 Bad Gateway</h1></html>",
        {"message": "Azure answered with status 502 and no message"},
    ),
    (
        "plain text",
        413,
        b"Request body too large",
        {"message": "Request body too large", "type": "invalid_request_error"},
    ),
    ("no text at all", 400, b"\xff\xfe{", {"type": "invalid_request_error"}),
    ("JSON of another kind", 400, b"[1, 2]", {"type": "invalid_request_error"}),
    ("deep JSON", 400, b"[" * 100_000, {"type": "invalid_request_error"}),
]


async def answered(status: int, content: Any, headers: dict[str, str] | None = None, **more: Any) -> Any:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    sent = await post(OpenAIErrors(), response=Response(status, data, headers), json=CHAT, **more)
    return sent, json.loads(sent.body)["error"]


@pytest.mark.parametrize(("name", "status", "content", "expected"), CASES, ids=[case[0] for case in CASES])
async def test_every_shape(name: str, status: int, content: Any, expected: dict[str, Any]) -> None:
    """All four fields, the type never null, always `application/json`; replaced fields are kept."""
    sent, error = await answered(status, content, {"content-type": "text/html"})
    assert sent.status == status
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["message"]
    assert error["type"]
    assert {key: error[key] for key in expected} == expected
    assert sent.headers.getall("content-type") == ["application/json"]
    own = content.get("error") if isinstance(content, dict) else None
    if isinstance(own, dict) and own.get("code") not in (None, error["code"]):
        assert error["innererror"]["code"] == own["code"]


async def test_what_is_openai_s_shape_already_keeps_its_bytes() -> None:
    """Except for the content type."""
    body = b'{ "error": {"message": "no", "type": "invalid_request_error", "param": null, "code": "x"} }'
    sent, _ = await answered(400, body, {"content-type": "text/plain"})
    assert (sent.body, sent.headers.get("content-type")) == (body, "application/json")


@pytest.mark.parametrize(
    ("headers", "text", "seconds", "milliseconds"),
    [
        ({"retry-after": "7"}, "x", "7", "7000"),
        ({"retry-after-ms": "1234"}, "x", "2", "1234"),
        ({"retry-after": "30", "retry-after-ms": "29500.5"}, "x", "30", "29501"),
        ({}, "Please retry after 12 seconds.", "12", "12000"),
        ({}, "Try again in 2 seconds.", "2", "2000"),
        ({}, "please retry after 350 milliseconds", "1", "350"),
        ({}, "Please try again in 350ms.", "1", "350"),
        ({}, "Please try again in 6m0s.", "360", "360000"),
        ({}, "Please retry after 1.5s", "2", "1500"),
        ({}, "Please retry after 1 day.", "86400", "86400000"),
        ({"retry-after": "soon"}, "Please retry after 2 minutes", "120", "120000"),
        ({}, "The system is currently experiencing high demand.", "1", "1000"),
    ],
)
async def test_a_429_says_when_to_try_again(
    headers: dict[str, str], text: str, seconds: str, milliseconds: str
) -> None:
    """In both headers that OpenAI's SDKs read; from the text if no header has the time."""
    sent, _ = await answered(429, {"error": {"code": "429", "message": text}}, headers)
    assert sent.headers.getall("retry-after") == [seconds]
    assert sent.headers.getall("retry-after-ms") == [milliseconds]


@pytest.mark.parametrize("digits", ["9" * 400, "9" * 20, "1e400"])
async def test_a_wait_that_is_no_time_breaks_nothing(digits: str) -> None:
    """Azure may echo a client's text."""
    sent, error = await answered(400, {"error": {"message": f"Invalid value: retry after {digits} seconds"}})
    assert (sent.status, error["type"]) == (400, "invalid_request_error")


async def test_what_is_no_json_number_becomes_null() -> None:
    """Python reads NaN and 1e999, which JSON does not have."""
    sent, _ = await answered(400, b'{"error": {"message": "x", "a": NaN, "b": 1e999, "c": 1.5}}')
    error = json.loads(sent.body, parse_constant=lambda name: pytest.fail(name))["error"]
    assert (error["a"], error["b"], error["c"]) == (None, None, 1.5)


async def test_a_request_without_a_model_is_told_so() -> None:
    """Azure finds no deployment, because the request names none."""
    body = json.dumps({"error": {"code": "DeploymentNotFound", "message": "It does not exist."}}).encode()
    sent = await send([OpenAIErrors()], "POST", "/responses", json={"input": "x"}, response=Response(404, body))
    assert json.loads(sent.body)["error"]["message"] == "It does not exist. (no model was named)"


async def test_a_date_to_try_again_at() -> None:
    """As seconds from now."""
    sent, _ = await answered(503, {}, {"retry-after": formatdate(time() + 60, usegmt=True)})
    assert 50 <= int(sent.headers.get("retry-after") or 0) <= 60
    assert 50_000 <= int(sent.headers.get("retry-after-ms") or 0) <= 60_000


async def test_only_a_429_has_a_wait_that_nobody_named() -> None:
    """The gateway does not decide whether other errors can be retried."""
    sent, _ = await answered(500, {"error": {"message": "x"}})
    assert "retry-after" not in sent.headers


async def test_a_wait_that_sdks_do_not_keep_is_told() -> None:
    """SDKs do not retry after more than 120 seconds: the message says so."""
    _, error = await answered(429, {"error": {"message": "Please retry after 86400 seconds."}})
    assert "a wait of 86400 s" in error["message"]
    assert "Please retry after 86400 seconds." in error["message"]
    assert error["innererror"]["message"] == "Please retry after 86400 seconds."
    _, error = await answered(429, {"error": {"message": "Please retry after 120 seconds."}})
    assert error["message"] == "Please retry after 120 seconds."


@pytest.mark.parametrize(
    ("version", "method", "path", "words"),
    [
        ("2024-10-21", "POST", "/audio/speech", "the operation needs 2024-02-15-preview or later, or v1"),
        ("2024-10-21", "GET", "/threads/t", "the operation needs 2024-02-15-preview or later"),
        ("2025-04-01-preview", "POST", "/responses", "the likely cause is the resource"),
        ("v1", "POST", "/responses", "the likely cause is the resource"),
    ],
)
async def test_resource_not_found_says_which(version: str, method: str, path: str, words: str) -> None:
    """Azure has the same error for a wrong path and a wrong api-version."""
    answer = Response(404, b'{"error":{"code":"404","message": "Resource not found"}}')
    stages = [OpenAIErrors(), ModelMap(), ApiVersion(version)]
    sent = await send(stages, method, path, response=answer, json=CHAT if method == "POST" else None)
    error = json.loads(sent.body)["error"]
    assert error["code"] == "operation_not_supported"
    assert words in error["message"]
    assert version in error["message"]
    assert error["innererror"] == {"message": "Resource not found", "code": "404"}


async def test_a_missing_deployment_is_openai_s_model_not_found(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Azure's error has no content type; the message names the deployment."""
    gateway = await start_gateway(azure.endpoint, YAML + "  - openai_errors\n")
    async with gateway.post(json={**CHAT, "model": "gpt-9"}) as answer:
        assert (answer.status, answer.content_type) == (404, "application/json")
        error = (await answer.json())["error"]
    assert (error["code"], error["param"], error["type"]) == ("model_not_found", "model", "invalid_request_error")
    assert "'gpt-9'" in error["message"]
    assert error["innererror"]["code"] == "DeploymentNotFound"
    async with gateway.post(key="wrong") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (401, "invalid_api_key")


async def test_an_error_as_a_stream_and_one_too_long(start_gateway: StartGateway) -> None:
    """They become JSON errors, with Azure's status."""

    async def respond(seen: Any, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(status=429, headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'{"error": {"message": "slow down"}}' if len(azure.requests) == 1 else b"x" * 400_000)
        await response.write_eof()
        return response

    async with FakeAzure(respond=respond) as azure:
        gateway = await start_gateway(azure.endpoint, YAML + "  - openai_errors\n")
        for message in ("slow down", "Azure answered with status 429 and no message"):
            async with gateway.post() as answer:
                assert (answer.status, answer.content_type) == (429, "application/json")
                assert (await answer.json())["error"]["message"] == message


async def test_answers_and_the_gateway_s_own_errors_pass() -> None:
    """Only Azure's errors are read and changed."""
    sent = await post(OpenAIErrors(), response=Response(200, b"{}", {"content-type": "x/y"}))
    assert (sent.body, sent.headers.get("content-type")) == (b"{}", "x/y")

    async def refuses(request: Any) -> Response:
        raise ApiError(429, "ours", code="rate_limit_exceeded")

    sent = await post(OpenAIErrors(), response=refuses)
    assert json.loads(sent.body)["error"]["message"] == "ours"
    assert "retry-after" not in sent.headers
