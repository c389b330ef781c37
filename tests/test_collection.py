"""The example calls of `deploy/`: each works, each family of operations has some, and Postman's are the same."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest
import yaml

from gateway.azure.operations import OPERATIONS, Operation, find_operation
from gateway.testing import FakeAzure
from gateway.testing.demo import MODELS
from tests.collection import POSTMAN, SOURCE, Call, fill, postman, read
from tests.conftest import KEY, StartGateway

COLLECTION = read(SOURCE.read_text())
OPERATING = (Path(__file__).parents[1] / "docs" / "operating.md").read_text()
GOOD = """
@host = http://127.0.0.1:8080

### files: upload
# It says what it is.
POST {{host}}/v1/files
Content-Type: multipart/form-data; boundary=part

--part
Content-Disposition: form-data; name="file"; filename="a.txt"
Content-Type: text/plain

Hello
--part--
"""


def operation_of(call: Call) -> Operation:
    """Return the operation of a call."""
    row = find_operation(call.method, urlsplit(fill(call.url, COLLECTION.variables)).path.removeprefix("/v1"))
    assert row is not None, call.name
    return row


def test_every_family_that_azure_has_is_in_it() -> None:
    """By the operation table, without WebSockets, which these clients do not speak."""
    families = {row.name.split(".")[0] for row in OPERATIONS if row.on_azure and row.method != "WS"}
    asked = [operation_of(call) for call in COLLECTION.calls]
    assert {row.name.split(".")[0] for row in asked} == families
    assert all(row.on_azure for row in asked)


@pytest.mark.parametrize(
    "name",
    [
        "audio.speech", "audio.transcriptions", "audio.translations", "images.generations", "images.edits",
        "chat.completions", "chat.completions.list", "responses", "responses.retrieve", "responses.input_items.list",
        "responses.cancel", "responses.delete", "responses.compact", "assistants.create", "threads.runs.create",
        "realtime.sessions.create", "realtime.client_secrets.create",
    ],
)  # fmt: skip
def test_what_a_family_has_of_different_kinds_is_in_it(name: str) -> None:
    """If one call cannot represent the others."""
    assert name in [operation_of(call).name for call in COLLECTION.calls]


@pytest.mark.parametrize("call", COLLECTION.calls, ids=lambda call: f"{call.folder}: {call.name}")
def test_a_comment_says_which_api_version_has_it(call: Call) -> None:
    """As in the operation table. A JSON body is valid JSON, and each call has its key in the same header."""
    row = operation_of(call)
    assert call.note.endswith(
        f" Needs {'no api-version: the gateway answers' if row.local else row.supported_versions}."
    )
    assert call.headers[0] == ("Authorization", "Bearer {{key}}")
    if call.body and call.boundary is None:
        assert isinstance(json.loads(call.body), dict)
        assert dict(call.headers)["Content-Type"] == "application/json"


async def test_every_call_works(start_gateway: StartGateway) -> None:
    """In the order of the file, with the setting of docs/operating.md, and with ids copied as the comments say."""
    [setting] = re.findall(r"```yaml\n(- api_version:.*?)```", OPERATING, re.DOTALL)
    models = {value: f"my-{value}" for name, value in COLLECTION.variables.items() if name.endswith("_model")}
    pipeline = ["auth_passthrough", {"model_map": {"models": models, "unmapped": "refuse"}}, *yaml.safe_load(setting)]
    async with FakeAzure(deployments=tuple(models.values()), own_ids=True) as azure:
        resources = {"azure": {"endpoint": azure.endpoint}}
        gateway = await start_gateway(azure.endpoint, json.dumps({"resources": resources, "pipeline": pipeline}))
        values = {**COLLECTION.variables, "host": gateway.url, "key": KEY}
        for call in COLLECTION.calls:
            azure.requests.clear()
            headers = {name: fill(value, values) for name, value in call.headers}
            data = call.payload(values) or None
            url = fill(call.url, values)
            async with gateway.session.request(call.method, url, data=data, headers=headers) as answer:
                text = await answer.read()
                assert answer.status // 100 == 2, f"{call.folder}: {call.name}: {text!r}"
            row = operation_of(call)
            if row.local:
                assert not azure.requests
                continue
            [seen] = azure.requests
            path = urlsplit(url.removeprefix(gateway.url)).path.removeprefix("/v1")
            assert (seen.method, seen.path) == (call.method, expected(row, call, path, models))
            assert ("api-version", "2025-04-01-preview") in seen.query or row.classic is None
            assert set(seen.query) >= set(parse_qsl(urlsplit(url).query))
            for name in re.findall(r"put its id into @(\w+)", call.note, re.IGNORECASE):
                values[name] = json.loads(text)["id"]


def expected(row: Operation, call: Call, path: str, models: dict[str, str]) -> str:
    """Return Azure's path of a call: on v1 if only v1 has it, else on a dated api-version."""
    if row.classic is None:
        return f"/openai/v1{path}"
    if row.classic == "deployment":
        [model] = re.findall(r"\{\{(\w+_model)\}\}", call.body)
        return f"/openai/deployments/{models[COLLECTION.variables[model]]}{path}"
    return f"/openai{path if row.classic_path == row.path else row.classic_path}"


def test_ids_are_put_where_a_later_call_reads_them() -> None:
    """One comment names each variable for an id, and only calls below it read the variable."""
    made: list[str] = []
    for call in COLLECTION.calls:
        read_here = re.findall(r"\{\{(\w+_id)\}\}", call.url + call.body)
        assert set(read_here) <= set(made), f"{call.folder}: {call.name}"
        made += re.findall(r"@(\w+)", call.note)
    assert sorted(made) == sorted(name for name in COLLECTION.variables if name.endswith("_id"))


def test_an_upload_has_the_length_that_it_tells() -> None:
    """OpenAI refuses to complete an upload whose parts have another length."""
    calls = {call.name: call for call in COLLECTION.calls if call.folder == "uploads"}
    [(_, _, _, content)] = calls["add a part"].parts()
    assert json.loads(calls["create"].body)["bytes"] == len(content)


def test_folders_are_whole() -> None:
    """The calls of a folder are next to each other, so that Postman has the order of the file."""
    folders = [call.folder for call in COLLECTION.calls]
    assert len(set(folders)) == 1 + sum(a != b for a, b in pairwise(folders))


def test_postman_has_the_same_calls() -> None:
    """The collection is generated from the file: `python -m tests.collection`."""
    assert POSTMAN.read_text() == postman(COLLECTION)


def test_a_form_goes_to_postman_as_postman_has_forms() -> None:
    """A form with a file from disk becomes fields, and Postman chooses the boundary; other forms stay byte for byte."""
    [item] = json.loads(postman(read(GOOD)))["item"][0]["item"]
    assert item["request"]["body"]["raw"].startswith("--part\r\nContent-Disposition: ")
    [item] = json.loads(postman(read(GOOD.replace("Hello", "< ./a.txt"))))["item"][0]["item"]
    field = {"key": "file", "type": "file", "src": "a.txt", "contentType": "text/plain"}
    assert (item["request"]["header"], item["request"]["body"]["formdata"]) == ([], [field])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("@host = http://127.0.0.1:8080", "@host http://127.0.0.1:8080", "line 2: @name = value"),
        ("@host = ", "host = ", "line 2: neither"),
        ("### files: upload", "### upload", "line 4: ### folder: name"),
        ("# It says what it is.", "# @name upload", "line 5: # and a comment"),
        ("POST {{host}}/v1/files", "POST {{host}}/v1/files HTTP/1.1", "line 6: METHOD"),
        ("{{host}}", "{{host}}/{{nobody}}", "line 6: there is no variable 'nobody'"),
        ("Content-Type: multipart", "Content-Type multipart", "line 7: Header: value"),
        ("Hello", "# Hello", "line 13: a body's line"),
        ("Hello", "// Hello", "line 13: a body's line"),
        ("Hello", "> {% script %}", "line 13: a body's line"),
        ("Hello", "<@ ./a.txt", "line 13: a body's line"),
        ("--part--", "--part", "line 14: the form does not end"),
        ("\n### files", "\n### files: none\n\n### files", "line 4: a title, a comment and a request"),
    ],
)
def test_what_one_client_alone_understands_is_refused(old: str, new: str, message: str) -> None:
    """With the number of the line."""
    assert read(GOOD).calls[0].payload({}).endswith(b"\r\n\r\nHello\r\n--part--")
    assert GOOD.count(old) >= 1
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        read(GOOD.replace(old, new, 1))


async def test_the_shipped_configuration_has_them_all(start_gateway: StartGateway) -> None:
    """As `gateway demo` runs it, each operation finds an api-version that has it."""
    shipped = (Path(__file__).parents[1] / "config" / "gateway.yaml").read_text()
    async with FakeAzure(deployments=[f"my-{name}" for name in MODELS], own_ids=True) as azure:
        mapper = ",".join(f"{name}=my-{name}" for name in MODELS)
        env = {"AZURE_OPENAI_ENDPOINT": azure.endpoint, "AZURE_OPENAI_MODEL_MAPPER": mapper}
        gateway = await start_gateway(azure.endpoint, shipped, env=env)
        values = {**COLLECTION.variables, "host": gateway.url, "key": KEY}
        for call in COLLECTION.calls:
            headers = {name: fill(value, values) for name, value in call.headers}
            async with gateway.session.request(
                call.method, fill(call.url, values), data=call.payload(values) or None, headers=headers
            ) as answer:
                assert answer.status == 200, (call.name, await answer.text())
                for name in re.findall(r"put its id into @(\w+)", call.note, re.IGNORECASE):
                    values[name] = (await answer.json())["id"]
