"""`auth_passthrough`: the client's key goes to Azure, in Azure's format."""

from __future__ import annotations

import pytest

from gateway.testing import FakeAzure, post
from plugins.auth_passthrough import AuthPassthrough
from tests.conftest import StartGateway

JWT = "eyJhbGciOiJSUzI1NiJ9.eyJhdWQiOiJjb2duaXRpdmUifQ.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer K1"},
        {"authorization": "bearer K1"},
        {"AUTHORIZATION": "BEARER  K1 "},
        {"api-key": "K1"},
        {"Api-Key": " K1"},
        {"Authorization": "Bearer K1", "api-key": "K1"},
    ],
)
async def test_a_key_becomes_an_api_key(headers: dict[str, str]) -> None:
    """From either header; the caller is identified by its digest alone."""
    sent = await post(AuthPassthrough(), headers=headers)
    assert sent.reached is not None
    credential = sent.reached.target.credential
    assert credential is not None
    assert (credential.value, credential.bearer) == ("K1", False)
    assert sent.reached.caller == credential.digest
    assert "sha256:" in credential.digest
    assert "K1" not in repr(credential)


async def test_an_entra_token_stays_a_bearer() -> None:
    """A JSON Web Token is not a key: Azure expects it as Authorization."""
    sent = await post(AuthPassthrough(), headers={"Authorization": f"Bearer {JWT}"})
    assert sent.reached is not None
    assert sent.reached.target.credential is not None
    assert sent.reached.target.credential.bearer


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "K1"},
        {"Authorization": "Basic K1"},
        {"Authorization": "Bearer K1 K2"},
        {"Authorization": "Bearer K\u00e9"},
        {"Authorization": "Bearer " + "A" * 5000},
        {"api-key": ""},
        {"Authorization": "Bearer K1", "api-key": "K2"},
    ],
)
async def test_no_key_or_no_good_one_is_a_401(headers: dict[str, str]) -> None:
    """In OpenAI's shape, with what to send; nothing goes to Azure, and the key is not repeated."""
    sent = await post(AuthPassthrough(), headers=headers)
    assert sent.status == 401
    error = sent.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)
    assert "K1" not in error["message"]
    assert sent.reached is None


async def test_on_the_wire(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """A key reaches Azure as `api-key` and never as Authorization; a token only as Authorization."""
    gateway = await start_gateway(azure.endpoint)
    async with gateway.post(headers={"Authorization": "bEaReR azure-key"}, key=None) as answer:
        assert answer.status == 200
    async with gateway.post(headers={"api-key": "azure-key"}, key=None) as answer:
        assert answer.status == 200
    async with gateway.post(key=JWT) as answer:
        assert answer.status == 200
    async with gateway.post(key="wrong") as answer:
        assert answer.status == 401
        assert "subscription key" in (await answer.json())["error"]["message"]
    first, second, third, _ = azure.requests
    for seen in (first, second):
        assert (seen.headers.get("api-key"), seen.headers.get("authorization")) == ("azure-key", None)
    assert (None, f"Bearer {JWT}") == (third.headers.get("api-key"), third.headers.get("authorization"))
