"""The test kit for plugin authors: FakeAzure responds like Azure."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway import ApiError, Event, EventFilter, Next, Request, Response, Stage
from gateway.testing import FakeAzure, serving, talk
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
    """A 404 `DeploymentNotFound` with an empty content type, as recorded."""
    status, body, headers = await ask(azure, PATH.replace("gpt-4o", "nothing"))
    assert (status, body["error"]["code"]) == (404, "DeploymentNotFound")
    assert not headers.get("content-type")


async def test_answers_carry_filter_results(azure: FakeAzure) -> None:
    """OpenAI's responses do not have them."""
    _, body, _ = await ask(azure)
    assert "prompt_filter_results" in body
    assert "content_filter_results" in body["choices"][0]


@pytest.mark.parametrize("ending", [b"data: [DONE]\n\n", b"data: [DONE]\n", b"data: [DONE]"])
async def test_streams_begin_and_end_as_azure_s(ending: bytes) -> None:
    """An empty first chunk, usage only on request, and each ending that Azure has used."""
    async with FakeAzure(ending=ending) as azure:
        _, body, _ = await ask(azure, json={**CHAT, "stream": True})
        assert body.startswith(b'data: {"choices":[],"created":0,"id":""')
        assert body.endswith(b"}\n\n" + ending)
        assert b'"total_tokens"' not in body
        _, body, _ = await ask(azure, json={**CHAT, "stream": True, "stream_options": {"include_usage": True}})
        assert b'"total_tokens":12' in body


async def test_embeddings_as_numbers_and_base64(azure: FakeAzure) -> None:
    """openai-python requests base64 by default."""
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


class Echo(EventFilter):
    def __init__(self, word: str) -> None:
        self.word = word

    def event(self, event: Event) -> Event | None:
        content = event.json()
        if content == "refuse":
            raise ApiError(400, "not this")
        if content == "drop":
            return None
        event.set_json([self.word, content])
        return event


class Both(Stage):
    async def __call__(self, request: Request, call_next: Next) -> Response:
        if request.query == "closed":
            raise ApiError(403, "no")
        response = await call_next(request)
        response.pipe(Echo(f"down {self.id}"))
        response.pipe(Echo(f"up {self.id}"), direction="up")
        return response


async def test_messages_go_through_the_stages_of_a_websocket() -> None:
    """Down nearest Azure first, up nearest the client first; the client gets ApiErrors; a rejection raises."""
    first, second = Both(), Both()
    first.id, second.id = "first", "second"
    talked = await talk([first, second], up=[1, "drop", "refuse"], down=[2])
    assert talked.to_azure == [["up second", ["up first", 1]]]
    assert talked.to_client[0]["error"]["message"] == "not this"
    assert talked.to_client[1] == ["down first", ["down second", 2]]
    assert (talked.sent.status, talked.sent.reached.operation) == (101, "realtime.connect")  # type: ignore[union-attr]
    with pytest.raises(AssertionError, match="failed with 403"):
        await talk([Both()], query="closed")


async def test_a_gateway_of_one_s_own_is_served(azure: FakeAzure, tmp_path: Path) -> None:
    """On a free port, with variables; nothing listens afterwards."""
    (tmp_path / "gateway.yaml").write_text(
        'resources: {azure: {endpoint: "${WHERE}"}}\npipeline: [auth_passthrough, model_map, api_version]\n'
    )
    async with (
        serving(tmp_path / "gateway.yaml", WHERE=azure.endpoint) as url,
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/chat/completions", json=CHAT, headers={"api-key": azure.api_key}) as answer,
    ):
        assert answer.status == 200
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientConnectionError):
            await session.get(f"{url}/healthz")


async def test_the_fake_speaks_on_websockets(azure: FakeAzure) -> None:
    """Like the Realtime API, if the key, the version and the deployment are right."""
    url = azure.endpoint.replace("http", "ws") + "/openai/realtime?api-version={}&deployment={}"
    async with aiohttp.ClientSession(headers={"api-key": azure.api_key}) as session:
        for version, deployment in (("2024-10-21", "gpt-4o"), ("2025-04-01-preview", "other")):
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await session.ws_connect(url.format(version, deployment))
            assert caught.value.status == 404
        async with session.ws_connect(url.format("2025-04-01-preview", "gpt-4o")) as socket:
            assert (await socket.receive_json())["type"] == "session.created"
            await socket.send_json({"type": "response.create"})
            types = [(await socket.receive_json())["type"] for _ in range(5)]
    assert types == ["response.created", *["response.output_text.delta"] * 3, "response.done"]
