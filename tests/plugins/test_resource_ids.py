"""`resource_ids`: a request with an id goes to the resource that made the id, also after a restart."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from gateway.testing import FakeAzure, Seen
from plugins.resource_ids import mark_of, marked
from tests.azure.test_deployment_field import BOUNDARY, HEADERS, form
from tests.conftest import KEY, Gateway, StartGateway

YAML = """
resources:
  east: {endpoint: "${ENDPOINT}"}
  west: {endpoint: "${WEST}"}
  other: {endpoint: "${OTHER:-http://127.0.0.1:9}"}
resource: east
pipeline:
  - access_log
  - auth_passthrough
  - model_map: {models: {gpt-4o: gpt-4o, far: west/gpt-4o}, unmapped: refuse}
  - api_version: {version: v1, operations: {"threads.*": 2025-04-01-preview}}
  - resource_ids
  - openai_errors
"""


@contextlib.asynccontextmanager
async def two(start_gateway: StartGateway) -> AsyncIterator[tuple[Gateway, FakeAzure, FakeAzure]]:
    """Two resources with similar ids, each of which knows only its own."""
    async with FakeAzure(tag="e", own_ids=True) as east, FakeAzure(tag="w", own_ids=True) as west:
        yield await start_gateway(east.endpoint, YAML, env={"WEST": west.endpoint}), east, west


async def made(gateway: Gateway, path: str, body: object, **more: Any) -> str:
    async with gateway.post(path, body, **more) as answer:
        content = await answer.json()
        assert answer.status == 200, content
        made: str = content["id"]
        return made


async def test_a_response_is_found_in_the_resource_of_its_model(start_gateway: StartGateway) -> None:
    """For reading, continuing, cancelling and deleting; Azure gets its own ids."""
    async with two(start_gateway) as (gateway, east, west):
        for model, azure in (("gpt-4o", east), ("far", west)):
            made_id = await made(gateway, "/v1/responses", {"model": model, "input": "x"})
            [own] = azure.ids
            assert made_id == f"{own}.{mark_of(azure.endpoint)}"
            for path in (f"/v1/responses/{made_id}", f"/openai/v1/responses/{made_id}/input_items?after={made_id}"):
                async with gateway.get(path) as answer:
                    assert answer.status == 200, await answer.text()
            async with gateway.get(f"/v1/responses/{made_id}") as answer:
                assert (await answer.json())["id"] == made_id
            body = {"model": model, "input": "y", "previous_response_id": made_id}
            async with gateway.post("/v1/responses", body) as answer:
                content = await answer.json()
            assert content["previous_response_id"] == made_id
            assert content["id"].endswith(mark_of(azure.endpoint))
            assert azure.requests[-1].json() == {"model": "gpt-4o", "input": "y", "previous_response_id": own}
            async with gateway.post(f"/v1/responses/{made_id}/cancel", {}) as answer:
                assert answer.status == 200
            async with gateway.session.delete(
                f"{gateway.url}/v1/responses/{made_id}", headers={"api-key": "azure-key"}
            ) as answer:
                assert (await answer.json())["id"] == made_id
        assert {seen.path for seen in west.requests} & {seen.path for seen in east.requests} == {"/openai/v1/responses"}


async def test_streamed_ids_are_marked(start_gateway: StartGateway) -> None:
    """In every event that has one."""
    async with two(start_gateway) as (gateway, _, west):
        async with gateway.post("/v1/responses", {"model": "far", "input": "x", "stream": True}) as answer:
            text = await answer.text()
        [own] = west.ids
        assert text.count(f'"id":"{own}.{mark_of(west.endpoint)}"') == 2
        assert text.startswith("event: response.created\ndata: {")


async def test_messages_of_a_websocket_have_marked_ids(start_gateway: StartGateway) -> None:
    """In both directions: Azure gets its own ids; an id of another resource is an error event."""
    heard: list[str] = []

    async def speak(seen: Seen, opened: web.WebSocketResponse) -> None:
        async for message in opened:
            heard.append(message.data)
            await opened.send_str('{"type":"response.created","response":{"id":"resp_e1"}}')

    async with two(start_gateway) as (gateway, east, _):
        east.speak = speak
        far = await made(gateway, "/v1/responses", {"model": "far", "input": "x"})
        url, headers = f"{gateway.url}/v1/responses", {"Authorization": f"Bearer {KEY}"}
        async with gateway.session.ws_connect(url, headers=headers) as socket:
            await socket.send_str('{"type":"response.create","model":"gpt-4o"}')
            created = (await socket.receive_json())["response"]["id"]
            assert created == f"resp_e1.{mark_of(east.endpoint)}"
            await socket.send_str(f'{{"type":"response.create","previous_response_id":"{created}"}}')
            await socket.receive_json()
            await socket.send_str(f'{{"type":"response.create","previous_response_id":"{far}"}}')
            told = await socket.receive_json()
            assert (told["type"], told["error"]["code"]) == ("error", "resource_mismatch")
            assert far in told["error"]["message"]
    assert heard[1:] == ['{"type":"response.create","previous_response_id":"resp_e1"}']


async def test_ids_survive_a_restart(start_gateway: StartGateway) -> None:
    """Nothing is stored: another gateway with the same resources, or another worker, knows them too."""
    async with two(start_gateway) as (gateway, east, west):
        made_id = await made(gateway, "/v1/responses", {"model": "far", "input": "x"})
        await gateway.server.stop()
        again = await start_gateway(east.endpoint, YAML, env={"WEST": west.endpoint})
        async with again.get(f"/v1/responses/{made_id}") as answer:
            assert (answer.status, (await answer.json())["id"]) == (200, made_id)


async def test_files_batches_and_what_uses_them_stay_together(start_gateway: StartGateway) -> None:
    """A batch goes to the resource of its file, which is that of the models in its lines."""
    async with two(start_gateway) as (gateway, east, west):
        line = json.dumps({"custom_id": "1", "body": {"model": "far"}}).encode()
        data = io.BytesIO(form(purpose="batch", file=line))
        file = await made(gateway, "/v1/files", None, data=data, headers=HEADERS)
        assert file.endswith(mark_of(west.endpoint))
        batch = await made(gateway, "/v1/batches", {"input_file_id": file, "endpoint": "/v1/responses"})
        assert west.requests[-1].json()["input_file_id"] == file.partition(".")[0]
        for path in (f"/v1/batches/{batch}", f"/v1/files/{file}", f"/v1/files/{file}/content"):
            async with gateway.get(path) as answer:
                assert answer.status == 200
        store = await made(gateway, "/v1/vector_stores", {"file_ids": [file], "name": "n"})
        assert west.requests[-1].json()["file_ids"] == [file.partition(".")[0]]
        async with gateway.get(f"/v1/vector_stores/{store}/files/{file}") as answer:
            assert answer.status == 200
        assert west.requests[-1].path.endswith(
            f"/vector_stores/{store.partition('.')[0]}/files/{file.partition('.')[0]}"
        )
        assert not east.requests


async def test_without_a_mark_it_is_the_team_s_own_resource(start_gateway: StartGateway) -> None:
    """For new threads, lists, and ids without a mark."""
    async with two(start_gateway) as (gateway, east, west):
        thread = await made(gateway, "/v1/threads", {})
        async with gateway.get(f"/v1/threads/{thread}") as answer:
            assert answer.status == 200
        async with gateway.get(f"/v1/threads/{thread.partition('.')[0]}") as answer:
            assert answer.status == 200
        async with gateway.get("/v1/files") as answer:
            assert answer.status == 200
        assert (len(east.requests), len(west.requests)) == (4, 0)


async def test_what_cannot_be_together_is_said(start_gateway: StartGateway) -> None:
    """Ids of two resources, a model of another one, and a resource of another team."""
    async with two(start_gateway) as (gateway, east, west):
        near = await made(gateway, "/v1/responses", {"model": "gpt-4o", "input": "x"})
        far = await made(gateway, "/v1/responses", {"model": "far", "input": "x"})
        asked = len(east.requests) + len(west.requests)
        async with gateway.post("/v1/responses", {"model": "gpt-4o", "input": "x", "previous_response_id": far}) as a:
            assert (a.status, (await a.json())["error"]["code"]) == (400, "resource_mismatch")
        async with gateway.get(f"/v1/responses/{near}?after={far}") as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (400, "resource_mismatch")
        for mark in (mark_of("http://127.0.0.1:9"), "raaaaaa"):
            async with gateway.get(f"/v1/responses/resp_1.{mark}") as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (404, "not_found")
        assert asked == len(east.requests) + len(west.requests)


async def test_files_in_chats_and_bodies_of_any_type_lead_back(start_gateway: StartGateway) -> None:
    """Curl labels JSON as a web form; a chat may name a file."""
    async with two(start_gateway) as (gateway, east, west):
        far = await made(gateway, "/v1/responses", {"model": "far", "input": "x"})
        own = far.partition(".")[0]
        body = {"model": "far", "input": "x", "previous_response_id": far}
        data, headers = json.dumps(body), {"Content-Type": "application/x-www-form-urlencoded"}
        async with gateway.post("/v1/responses", None, data=data, headers=headers) as answer:
            assert answer.status == 200
        assert west.requests[-1].json()["previous_response_id"] == own
        content = [{"type": "file", "file": {"file_id": f"file-1.{mark_of(west.endpoint)}"}}]
        chat = {"model": "far", "messages": [{"role": "user", "content": content}]}
        async with gateway.post("/v1/chat/completions", chat) as answer:
            assert answer.status == 200
        assert west.requests[-1].json()["messages"][0]["content"][0]["file"] == {"file_id": "file-1"}
        async with gateway.post("/v1/chat/completions", {**chat, "model": "gpt-4o"}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (400, "resource_mismatch")
        assert len(east.requests) == 0


async def test_what_is_the_user_s_own_stays(start_gateway: StartGateway) -> None:
    """Metadata, texts and the content of files; also an upload whose boundary contains json."""

    async def respond(seen: Seen, request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"id": "resp_1", "metadata": {"ticket_id": "thread-42", "x": '"{'}})

    async with two(start_gateway) as (gateway, east, west):
        marked_id = f"resp_abc.{mark_of(west.endpoint)}"
        body = {"model": "gpt-4o", "input": f"what is {marked_id}", "metadata": {"file_id": marked_id}}
        async with gateway.post("/v1/responses", body) as answer:
            assert answer.status == 200
        assert east.requests[-1].json() == body
        data = form(purpose="assistants", file=f'see "{marked_id}"'.encode()).replace(BOUNDARY.encode(), b"json")
        headers = {"Content-Type": "multipart/form-data; boundary=json"}
        async with gateway.post("/v1/files", None, data=data, headers=headers) as answer:
            assert answer.status == 200
        assert east.requests[-1].body == data
        east.respond = respond
        async with gateway.post("/v1/responses", {"model": "gpt-4o"}) as answer:
            metadata = {"ticket_id": "thread-42", "x": '"{'}
            assert await answer.json() == {"id": f"resp_1.{mark_of(east.endpoint)}", "metadata": metadata}
        async with gateway.get("/v1/files/file-1/content") as answer:
            assert (await answer.json())["id"] == "resp_1"


async def test_evaluations_go_where_their_models_are(start_gateway: StartGateway) -> None:
    """And not to the resource of another id."""
    async with two(start_gateway) as (gateway, east, west):
        path = f"/v1/evals/eval_1.{mark_of(west.endpoint)}/runs"
        async with gateway.post(path, {"data_source": {"type": "completions", "model": "gpt-4o"}}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (400, "resource_mismatch")
        assert not east.requests
        assert not west.requests


async def test_a_deployment_in_the_path_chooses_the_resource(start_gateway: StartGateway) -> None:
    """If nothing else does: a thread or a file can be created beside a model in another resource."""
    async with two(start_gateway) as (gateway, east, west):
        thread = await made(gateway, "/openai/deployments/far/threads", {})
        assert thread.endswith(mark_of(west.endpoint))
        assert west.requests[0].path == "/openai/threads"
        assert not east.requests


async def test_a_stage_below_may_ask_another_resource(start_gateway: StartGateway) -> None:
    """The mark is that of the resource that responded."""
    stage = """
from gateway import Stage

class Elsewhere(Stage):
    "Ask the other resource."
    async def start(self, services):
        self.west = services.resources["west"]

    async def __call__(self, request, call_next):
        return await call_next(request.copy(target=request.target.replace(resource=self.west)))
"""
    yaml = "plugins_path: mine\n" + YAML.replace("  - openai_errors", "  - elsewhere")
    async with FakeAzure(tag="e") as east, FakeAzure(tag="w") as west:
        gateway = await start_gateway(east.endpoint, yaml, {"mine/elsewhere.py": stage}, env={"WEST": west.endpoint})
        made_id = await made(gateway, "/v1/responses", {"model": "gpt-4o", "input": "x"})
        assert made_id.endswith(mark_of(west.endpoint))


@pytest.mark.parametrize("body", [b'"metadata":{\\"' * 20_000, b'{"metadata":{' + b" " * 3_000_000 + b"}}"])
@pytest.mark.timeout(20)
def test_hostile_metadata_takes_no_time(body: bytes) -> None:
    """It is scanned once, wherever its braces and quotes are."""
    assert marked(body, b"M") == body


async def test_what_only_looks_like_a_mark_is_left_alone(start_gateway: StartGateway) -> None:
    """In a query: `plan.revised` is not an id."""
    async with two(start_gateway) as (gateway, east, _):
        async with gateway.get("/v1/files?name=plan.revised") as answer:
            assert answer.status == 200
        assert ("name", "plan.revised") in east.requests[0].query


async def test_long_paths_take_no_time(start_gateway: StartGateway) -> None:
    """The pattern does not backtrack; with backtracking, these took a second each."""
    async with two(start_gateway) as (gateway, _, _):
        async with asyncio.timeout(30):
            for name in ("a", "a-", "a_", "-", "resp_") * 5:
                async with gateway.get(f"/v1/files?after={name * (15_000 // len(name))}") as answer:
                    assert answer.status in (200, 400)  # the fake takes no line that long


async def test_only_what_azure_keeps_is_marked(start_gateway: StartGateway) -> None:
    """A chat completion only if it is stored."""
    async with two(start_gateway) as (gateway, _, _):
        for body, kept in (({}, False), ({"store": True}, True)):
            async with gateway.post("/v1/chat/completions", {"model": "far", "messages": [], **body}) as answer:
                assert ("." in (await answer.json())["id"]) is kept


async def test_with_one_resource_nothing_is_touched(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Clients get Azure's own ids."""
    yaml = YAML.replace(", far: west/gpt-4o", "")
    gateway = await start_gateway(azure.endpoint, yaml, env={"WEST": "http://127.0.0.1:9"})
    assert await made(gateway, "/v1/responses", {"model": "gpt-4o", "input": "x"}) in azure.ids


async def test_a_team_without_a_default_says_what_is_missing(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """A list of files belongs to one resource, and the configuration does not say which."""
    gateway = await start_gateway(
        azure.endpoint, YAML.replace("resource: east\n", "").replace("gpt-4o: gpt-4o", "gpt-4o: east/gpt-4o"),
        env={"WEST": azure.endpoint + "/x"},
    )  # fmt: skip
    async with gateway.get("/v1/files") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (400, "no_resource")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"id": "resp_1", "model": "m"}', '{"id": "resp_1.M", "model": "m"}'),
        ('{"id":"msg_1","previous_response_id":null}', None),
        (
            '{"file_ids": ["file-1", "assistant-2"], "x_ids": []}',
            '{"file_ids": ["file-1.M", "assistant-2.M"], "x_ids": []}',
        ),
        (
            '{"conversation":"conv_1","o":[{"file_id":"file-3"}]}',
            '{"conversation":"conv_1.M","o":[{"file_id":"file-3.M"}]}',
        ),
        (r'{"text": "\"id\": \"resp_1\"", "name": "file_2024"}', None),
        (
            '{"type": "file_search", "vector_store_ids":["vs_1"]}',
            '{"type": "file_search", "vector_store_ids":["vs_1.M"]}',
        ),
    ],
)
def test_what_is_marked(before: str, after: str | None) -> None:
    """The values of fields with ids, never text that only looks like one; other bytes stay."""
    assert marked(before.encode(), b"M") == (before if after is None else after).encode()
