"""Batch files: the model in each line becomes its deployment."""

from __future__ import annotations

import asyncio
import io
import json
import os
import threading
from typing import IO, Any, cast

import pytest

from gateway import ApiError
from gateway.azure import batch_files as batch
from gateway.azure.batch_files import _chunks, _FileSource, _LineMapper
from gateway.azure.resources import Target
from gateway.testing import FakeAzure
from tests.azure.test_deployment_field import HEADERS, form
from tests.body.test_spooled_file import open_files
from tests.conftest import StartGateway, until

YAML = """
resources: {east: {endpoint: "${ENDPOINT}"}, west: {endpoint: "${WEST}"}}
resource: east
pipeline:
  - access_log
  - auth_passthrough
  - model_map: {models: {gpt-4o: prod-4o, o3: prod-o3, far: west/far-4o}, unmapped: refuse}
  - api_version: VERSION
"""
VERSIONS = ["2024-10-21", "v1"]


def line(number: int, model: object = "gpt-4o", **more: Any) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "1.50 \ud83d\ude00"}], "n": 1, **more}
    return json.dumps({"custom_id": f"r-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body})


async def upload(
    start_gateway: StartGateway, east: FakeAzure, west: FakeAzure, version: str = "v1", **fields: str | bytes
) -> tuple[int, Any, Any]:
    yaml = YAML.replace("VERSION", version)
    gateway = await start_gateway(east.endpoint, yaml, env={"WEST": west.endpoint})
    async with gateway.post("/v1/files", None, data=io.BytesIO(form(**fields)), headers=HEADERS) as answer:
        content = await answer.json()
    await gateway.idle()
    return answer.status, content, gateway.exchanges()[-1]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("first", ["purpose", "file"])
async def test_10_000_lines(version: str, first: str, start_gateway: StartGateway) -> None:
    """Each gets its deployment; the order and all other bytes stay, and the purpose may follow the file."""
    lines = [line(number, "gpt-4o" if number % 3 else "o3") for number in range(10_000)]
    file = "\n".join(lines).encode()
    fields: dict[str, str | bytes] = {"purpose": "batch", "file": file}
    if first == "file":
        fields = {"file": file, "purpose": "batch"}
    async with FakeAzure() as east, FakeAzure() as west:
        status, content, event = await upload(start_gateway, east, west, version, **fields)
        assert (status, content["id"][:5]) == (200, "file-")
        [seen] = east.requests
        assert not west.requests
    start = seen.body.index(b"{")
    came = seen.body[start : start + seen.body[start:].index(b"\r\n--")]
    fields["file"] = came
    assert seen.body == form(**fields)
    assert seen.headers.get("content-length") == str(len(seen.body))
    made = came.split(b"\n")
    assert len(made) == 10_000
    for number, (old, new) in enumerate(zip(lines, made, strict=True)):
        expected = json.loads(old)
        expected["body"]["model"] = "prod-4o" if number % 3 else "prod-o3"
        assert json.loads(new) == expected
    assert (event["batch_lines"], event["model"]) == (10_000, "o3, gpt-4o")


async def test_the_models_choose_the_resource(start_gateway: StartGateway) -> None:
    """A file goes to the resource of its models; a line with a model in another resource is an error."""
    async with FakeAzure() as east, FakeAzure() as west:
        status, _, _ = await upload(start_gateway, east, west, purpose="batch", file=line(1, "far").encode())
        assert (status, len(east.requests), len(west.requests)) == (200, 0, 1)
        mixed = f"{line(1)}\n\n{line(2, 'far')}\n".encode()
        status, content, _ = await upload(start_gateway, east, west, purpose="batch", file=mixed)
        assert status == 400
        assert "line 3 of the batch file" in content["error"]["message"]
        assert "another Azure resource" in content["error"]["message"]
        assert len(east.requests) == 0


@pytest.mark.parametrize(
    ("second", "why", "status"),
    [
        ("{", "not a JSON object", 400),
        ("[]", "not a JSON object", 400),
        ('{"custom_id": "x"}', "it has no `body`", 400),
        ('{"body": {}}', "it has no `body.model`", 400),
        ('{"body": {"model": 4}}', "must be text", 400),
        ('{"body": "x"}', "not a JSON object", 400),
        (r'{"body": {"model": "gpt-4o", "x": "\ud83d", "n": 1e400}}', "not a JSON object", 400),
        (line(2, "unknown"), "the model 'unknown' is not mapped", 404),
        ("[" * 100_000, "not a JSON object", 400),
    ],
)
async def test_an_invalid_line_is_named_in_the_error(
    second: str, why: str, status: int, start_gateway: StartGateway
) -> None:
    """Nothing is uploaded."""
    async with FakeAzure() as east, FakeAzure() as west:
        file = f"{line(1)}\r\n{second}\r\n{line(3)}".encode()
        got, content, _ = await upload(start_gateway, east, west, purpose="batch", file=file)
        assert got == status
        assert "line 2 of the batch file" in content["error"]["message"]
        assert why in content["error"]["message"]
        assert content["error"]["param"] == "file"
        assert not east.requests


async def test_a_line_keeps_a_lone_surrogate(start_gateway: StartGateway) -> None:
    """JSON allows it, and JavaScript sends it."""
    async with FakeAzure() as east, FakeAzure() as west:
        half = rb'{"custom_id":"1","body":{"model":"gpt-4o","x":"\ud83d"}}'
        status, _, _ = await upload(start_gateway, east, west, purpose="batch", file=half)
        assert status == 200
        assert rb'{"custom_id":"1","body":{"model":"prod-4o","x":"\ud83d"}}' in east.requests[0].body


async def test_lines_are_bounded(start_gateway: StartGateway) -> None:
    """In length, in the length of the model's name, and in number; an error does not quote text that is too long."""
    async with FakeAzure() as east, FakeAzure() as west:
        for file, why in (
            (line(1, "m" * 2_000_000).encode(), "line 1 of the batch file is invalid: `model` must be 1 to 256"),
            (line(1, input="x" * 17_000_000).encode(), "line 1 of the batch file is invalid: it is longer than"),
            (b"\n" * 200_001, "the file has more than 200000 lines"),
        ):
            status, content, _ = await upload(start_gateway, east, west, purpose="batch", file=file)
            assert status == 400
            assert why in content["error"]["message"]
            assert len(content["error"]["message"]) < 200
        assert not east.requests


async def test_a_client_that_disconnects_leaves_no_thread_and_no_file(start_gateway: StartGateway) -> None:
    """The thread stops, and no file stays open."""
    async with FakeAzure() as east, FakeAzure() as west:
        gateway = await start_gateway(east.endpoint, YAML.replace("VERSION", "v1"), env={"WEST": west.endpoint})
        before = open_files()
        data = form(purpose="batch", file=f"{line(1)}\n".encode() * 150_000)
        post = asyncio.create_task(gateway.post("/v1/files", None, data=io.BytesIO(data), headers=HEADERS).__aenter__())
        await until(lambda: batch._queued)
        post.cancel()
        await gateway.idle()
        await until(lambda: not batch._queued and open_files() == before)
        assert not east.requests


async def test_one_caller_cannot_fill_the_queue() -> None:
    """Above half of the queue, one caller gets a 503, and the files of others are still processed."""
    go_on = threading.Event()

    def find(name: str) -> Target:
        go_on.wait(30)
        raise ApiError(404, "there is no such model")

    def read(holder: str) -> asyncio.Task[IO[bytes]]:
        body = line(1).encode()
        return asyncio.create_task(batch._in_thread(body, 0, len(body), _LineMapper(find), holder))

    greedy = [read("one") for _ in range(20)]
    await asyncio.sleep(0)
    try:
        refused = [each for each in greedy if each.done()]
        other = read("another")
        await asyncio.sleep(0)
        assert not other.done()
    finally:
        go_on.set()
        await asyncio.wait((*greedy, other))
    statuses = [cast(ApiError, each.exception()).status for each in (*greedy, other)]
    assert statuses == [404] * 8 + [503] * 12 + [404]
    assert len(refused) == 12
    assert not batch._queued


async def test_line_ends_blank_lines_and_a_byte_order_mark_do_no_harm(start_gateway: StartGateway) -> None:
    """They stay, except the byte order mark."""
    async with FakeAzure() as east, FakeAzure() as west:
        file = b"\xef\xbb\xbf" + f"{line(1)}\r\n\r\n{line(2)}\r\n".encode()
        status, _, event = await upload(start_gateway, east, west, purpose="batch", file=file)
        assert (status, event["batch_lines"]) == (200, 2)
        assert east.requests[0].body.count(b'"model":"prod-4o"') == 2
        assert b"}\r\n\r\n{" in east.requests[0].body


async def test_a_stage_can_read_every_model(start_gateway: StartGateway) -> None:
    """In a batch file, small or on disk, before or after mapping; the file is sent afterwards."""
    stage = """
from gateway import ApiError, Stage

class Allowed(Stage):
    "Let some models through."
    async def __call__(self, request, call_next):
        for name in await request.models():
            if name == "o3":
                raise ApiError(403, f"{name} is not for you", code="model_not_allowed")
        return await call_next(request)
"""
    yaml = "plugins_path: mine\n" + YAML.replace("VERSION", "v1").replace("  - model_map", "  - allowed\n  - model_map")
    criteria = [{"type": "label_model", "model": "o3"}]
    async with FakeAzure() as east, FakeAzure() as west:
        gateway = await start_gateway(east.endpoint, yaml, {"mine/allowed.py": stage}, env={"WEST": west.endpoint})
        for count in (1, 20_000):
            good = f"{line(1)}\n".encode() * count
            for file, status in ((good, 200), (good + line(2, "o3").encode(), 403)):
                data = io.BytesIO(form(file=file, purpose="batch"))
                async with gateway.post("/v1/files", None, data=data, headers=HEADERS) as answer:
                    assert answer.status == status, await answer.text()
            assert east.requests[-1].body.count(b'"model":"prod-4o"') == count
        async with gateway.post("/v1/evals", {"testing_criteria": criteria}) as answer:
            assert answer.status == 403
        assert len(east.requests) == 2


async def test_a_batch_can_be_sent_twice(start_gateway: StartGateway) -> None:
    """A stage that keeps the body can send it again, small or on disk: each copy maps the original body."""
    stage = """
from gateway import Stage

class Twice(Stage):
    "Ask twice."
    async def __call__(self, request, call_next):
        await request.buffer(100_000_000)
        await call_next(request.copy())
        return await call_next(request.copy())
"""
    yaml = "plugins_path: mine\n" + YAML.replace("VERSION", "v1").replace("  - model_map", "  - twice\n  - model_map")
    async with FakeAzure() as east, FakeAzure() as west:
        gateway = await start_gateway(east.endpoint, yaml, {"mine/twice.py": stage}, env={"WEST": west.endpoint})
        for count in (1, 20_000):
            data = io.BytesIO(form(file=f"{line(1)}\n".encode() * count, purpose="batch"))
            async with gateway.post("/v1/files", None, data=data, headers=HEADERS) as answer:
                assert answer.status == 200, await answer.text()
            one, two = east.requests[-2:]
            assert one.body == two.body
            assert one.body.count(b'"model":"prod-4o"') == count


async def test_other_files_are_uploaded_unchanged(start_gateway: StartGateway) -> None:
    """Whatever they contain, to the team's resource."""
    async with FakeAzure() as east, FakeAzure() as west:
        for fields in (
            {"purpose": "assistants", "file": line(1).encode()},
            {"file": os.urandom(500_000), "purpose": "x"},
        ):
            status, _, event = await upload(start_gateway, east, west, **fields)  # type: ignore[arg-type]
            assert status == 200
            assert east.requests[-1].body == form(**fields)  # type: ignore[arg-type]
            assert "batch_lines" not in event
        assert not west.requests


async def test_a_truncated_file_is_an_error() -> None:
    """The rewritten form is read in chunks to its end; a file that has become shorter raises an error."""
    made = _FileSource(io.BytesIO(b"x" * 600_000))
    parts = []
    while (part := await made.read()) is not None:
        assert part
        parts.append(part)
    assert b"".join(parts) == b"x" * 600_000
    assert await made.read() is None
    file = io.BytesIO(b"x" * 600_000)
    cut = _FileSource(file)
    await cut.read()
    file.truncate(300_000)
    with pytest.raises(OSError, match="shorter"):
        await cut.rest(None)
    file.close()
    with pytest.raises(ValueError, match="closed"):
        await cut.read()
    with pytest.raises(OSError, match="shorter"):
        list(_chunks(io.BytesIO(b"x" * 10), 11))
