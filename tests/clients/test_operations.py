"""Every operation that OpenAI's SDKs can call, through running gateways, has its line in the operation table.

A new version of an SDK that adds an operation fails here until `gateway/azure/operations.txt` has a line for it.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from openai._resource import SyncAPIResource

from gateway.azure.operations import OPERATIONS, Operation, find_operation
from gateway.azure.urls import parse_client_path
from gateway.testing import FakeAzure
from tests.conftest import KEY, Gateway, StartGateway

pytestmark = [pytest.mark.clients, pytest.mark.timeout(300)]

HERE = Path(__file__).parent
YAML = """
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline: [auth_passthrough, model_map, api_version: VERSION, openai_errors]
"""
VERSIONS = ["v1", "2025-04-01-preview"]
MODES = ["plain", "v1", "azure"]

_SENDS = re.compile(r"self\._(get|post|put|patch|delete|get_api_list)\(")
_VALUES: dict[str, Any] = {
    "model": "gpt-4o",
    "messages": [{"role": "user", "content": "hi"}],
    "file": ("a.jsonl", b"{}"),
    "image": ("a.png", b"png"),
    "video": ("a.mp4", b"mp4"),
    "audio_sample": ("a.wav", b"wav"),
    "recording": ("a.wav", b"wav"),
    "data": ("a.bin", b"bin"),
    "session": {"type": "realtime", "model": "gpt-4o"},
    "purpose": "assistants",
}


@dataclass
class Call:
    """One request of an SDK and its outcome."""

    name: str
    method: str
    path: str
    status: int
    message: str


# -- openai-python -------------------------------------------------------------------------------------


def python_methods(resource: Any, name: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield each method of a client's resources that sends a request."""
    for attribute in dir(type(resource)):
        if attribute.startswith(("_", "with_")):
            continue
        value = getattr(resource, attribute)
        if isinstance(value, SyncAPIResource):
            yield from python_methods(value, f"{name}{attribute}.")
        elif isinstance(resource, SyncAPIResource) and inspect.ismethod(value):
            # Without the wrapper that requires one of several sets of arguments.
            function = inspect.unwrap(value.__func__)
            if _SENDS.search(inspect.getsource(function)):
                yield name + attribute, function.__get__(resource)


def python_arguments(method: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments of a method: ids for its path, and a value for each argument without a default."""
    arguments: dict[str, Any] = {}
    for parameter in inspect.signature(method).parameters.values():
        needed = parameter.default is inspect.Parameter.empty
        name, kind = parameter.name, str(parameter.annotation)
        if not needed and name not in ("model", "session"):
            continue
        if name in _VALUES and not (name == "session" and "Realtime" not in kind):
            arguments[name] = _VALUES[name]
        elif "FileTypes" in kind:
            arguments[name] = ("a.bin", b"bin")
        elif any(word in kind for word in ("Iterable", "List", "Sequence")) and "Union[str" not in kind:
            arguments[name] = []
        elif needed:
            arguments[name] = {} if "Param" in kind and "str" not in kind else f"{name}-1"
    return arguments


def python_calls(gateway: Gateway, mode: str) -> list[Call]:
    """Call every method; runs in its own thread."""
    sent: list[Any] = []
    http = openai.DefaultHttpxClient(event_hooks={"request": [sent.append]})
    common: dict[str, Any] = {"api_key": KEY, "max_retries": 0, "http_client": http}
    if mode == "azure":
        client: openai.OpenAI = openai.AzureOpenAI(azure_endpoint=gateway.url, api_version="2024-10-21", **common)
    else:
        base = f"{gateway.url}/v1" if mode == "plain" else f"{gateway.url}/openai/v1/"
        client = openai.OpenAI(base_url=base, admin_api_key=KEY, **common)
    calls = []
    with client:
        for name, method in python_methods(client, ""):
            sent.clear()
            status, message = 200, ""
            try:
                method(**python_arguments(method))
            except openai.APIStatusError as exc:
                status, message = exc.status_code, exc.message
            assert sent, f"{name} sent nothing"
            calls.append(Call(name, sent[0].method, sent[0].url.path, status, message))
    return calls


# -- npm openai ----------------------------------------------------------------------------------------


async def node_calls(gateway: Gateway, mode: str) -> list[Call]:
    """Call every method in `operations.mjs`."""
    process = await asyncio.create_subprocess_exec(
        "node", str(HERE / "operations.mjs"), gateway.url, KEY, mode,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 240)
    assert process.returncode == 0, err.decode()
    return [Call(**each) for each in json.loads(out)]


# -- expected outcomes ---------------------------------------------------------------------------------


def checked(call: Call, version: str, azure: FakeAzure) -> Operation:
    """Check one call against the table and the requests of the fake Azure; return its line."""
    place = parse_client_path(call.path)
    assert place is not None, call
    row = find_operation(call.method, place.path)
    assert row is not None, f"{call.method} {place.path} ({call.name}): operations.txt says neither yes nor no of it"
    if row.local:
        return row
    there = row.v1 if version == "v1" else row.classic is not None
    if not row.on_azure or not there:
        assert (call.status, row.name in call.message) == (404, True), call
        return row
    assert call.status == 200, call
    if version == "v1":
        expected = f"/openai/v1{place.path}"
    elif row.classic == "deployment":
        expected = f"/openai/deployments/gpt-4o{place.path}"
    else:
        expected = "/openai" + (place.path if row.classic_path == row.path else row.classic_path)
    assert any((seen.method, seen.path) == (call.method, expected) for seen in azure.requests), (call, expected)
    return row


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sdk", ["python", "node"])
async def test_every_call_has_its_line(sdk: str, mode: str, version: str, start_gateway: StartGateway) -> None:
    """If the api-version has the operation, Azure gets the call; otherwise a 404 names the operation."""
    async with FakeAzure() as azure:
        gateway = await start_gateway(azure.endpoint, YAML.replace("VERSION", version))
        if sdk == "python":
            calls = await asyncio.to_thread(python_calls, gateway, mode)
        else:
            calls = await node_calls(gateway, mode)
        rows = {checked(call, version, azure).name for call in calls}
    # Conversely, an SDK can call the operation of each line.
    missing = {row.name for row in OPERATIONS if row.method != "WS"} - rows
    assert not missing, f"{sdk} has no {sorted(missing)}"
