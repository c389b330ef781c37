"""The test kit for plugin authors: FakeAzure answers as Azure does."""

from __future__ import annotations

import base64
from typing import Any

import aiohttp
import pytest

from gateway.testing import FakeAzure
from tests.conftest import CHAT

PATH = "/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21"


async def ask(azure: FakeAzure, path: str = PATH, json: Any = CHAT, **headers: str) -> tuple[int, Any, Any]:
    given = headers or {"api-key": azure.api_key}
    given = {name.replace("_", "-"): value for name, value in given.items()}
    async with (
        aiohttp.ClientSession() as session,
        session.post(azure.endpoint + path, json=json, headers=given) as answer,
    ):
        stream = answer.content_type == "text/event-stream"
        return answer.status, await answer.read() if stream else await answer.json(content_type=None), answer.headers


async def test_keys_and_versions_are_checked(azure: FakeAzure) -> None:
    """A wrong key is Azure's 401; a missing, doubled or unknown version is `Resource not found`."""
    status, body, _ = await ask(azure, api_key="wrong")
    assert (status, body["error"]["code"]) == (401, "401")
    for query in ("", "?api-version=", "?api-version=2024-10-21&api-version=2024-10-21", "?api-version=latest"):
        status, body, _ = await ask(azure, PATH.partition("?")[0] + query)
        assert (status, body["error"]["message"]) == (404, "Resource not found")
    status, _, _ = await ask(azure, Authorization=f"Bearer {azure.api_key}")
    assert status == 401, "a plain key as a bearer is for v1 only"
    status, _, _ = await ask(azure, "/openai/v1/chat/completions", Authorization=f"Bearer {azure.api_key}")
    assert status == 200


async def test_unknown_deployment(azure: FakeAzure) -> None:
    """A 404 `DeploymentNotFound` whose content type is empty, as recorded."""
    status, body, headers = await ask(azure, PATH.replace("gpt-4o", "nothing"))
    assert (status, body["error"]["code"]) == (404, "DeploymentNotFound")
    assert not headers.get("content-type")


async def test_answers_carry_filter_results(azure: FakeAzure) -> None:
    """What OpenAI's answers do not have."""
    _, body, _ = await ask(azure)
    assert "prompt_filter_results" in body
    assert "content_filter_results" in body["choices"][0]


@pytest.mark.parametrize("ending", [b"data: [DONE]\n\n", b"data: [DONE]\n", b"data: [DONE]"])
async def test_streams_begin_and_end_as_azure_s(ending: bytes) -> None:
    """An empty first chunk, usage only where asked for, and each ending that Azure has used."""
    async with FakeAzure(ending=ending) as azure:
        _, body, _ = await ask(azure, json={**CHAT, "stream": True})
        assert body.startswith(b'data: {"choices":[],"created":0,"id":""')
        assert body.endswith(b"}\n\n" + ending)
        assert b'"total_tokens"' not in body
        _, body, _ = await ask(azure, json={**CHAT, "stream": True, "stream_options": {"include_usage": True}})
        assert b'"total_tokens":12' in body


async def test_embeddings_as_numbers_and_base64(azure: FakeAzure) -> None:
    """openai-python asks for base64 by itself."""
    path = "/openai/deployments/text-embedding-3-small/embeddings?api-version=2024-10-21"
    _, body, _ = await ask(azure, path, {"input": "a"})
    assert body["data"][0]["embedding"] == [0.25, -0.5, 0.125]
    _, body, _ = await ask(azure, path, {"input": ["a", "b"], "encoding_format": "base64"})
    assert len(base64.b64decode(body["data"][1]["embedding"])) == 12


async def test_it_records_what_it_saw(azure: FakeAzure) -> None:
    """Method, path, query, headers, body."""
    await ask(azure)
    [seen] = azure.requests
    assert (seen.method, seen.path, seen.json()) == ("POST", PATH.partition("?")[0], CHAT)
    assert (seen.query, seen.headers.get("api-key")) == ([("api-version", "2024-10-21")], "azure-key")
