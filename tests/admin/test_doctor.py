"""`gateway doctor`: messages for problems of resources and deployments, and a status for scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from gateway.admin.doctor import Finding, examine, plan
from gateway.auth.credentials import Credential
from gateway.cli import main
from gateway.config import load
from gateway.testing import FakeAzure, Seen
from gateway.upstream import Upstream
from tests.cli.test_cli import run
from tests.cluster import closed_port, slow_tls
from tests.conftest import write_files

YAML = """
auth: none
resources:
  east: {endpoint: "ENDPOINT", api_key: azure-key%s}
pools: {chat: [east/gpt-4o]}
pipeline:
  - model_map: {models: {gpt-4o: "pool:chat", embed: text-embedding-3-small, "~x-(.+)": '\\1'}, unmapped: refuse}
  - balance
  - api_version: 2024-10-21
"""


def is_chat(seen: Seen) -> bool:
    return seen.path.endswith("chat/completions")


async def with_models(seen: Seen, request: web.BaseRequest) -> web.StreamResponse | None:
    """Respond as Azure does for an embeddings model, and with a region for the models."""
    if "text-embedding" in seen.path and is_chat(seen):
        return problem(400, "OperationNotSupported", "The chatCompletion operation does not work with this model")
    if "gpt-4o" in seen.path and seen.path.endswith("/embeddings"):
        return problem(400, "OperationNotSupported", "The embeddings operation does not work with this model")
    if seen.path.endswith("/models"):
        return web.json_response({"object": "list", "data": []}, headers={"x-ms-region": "Sweden Central"})
    return None


def problem(status: int, code: str, message: str) -> web.Response:
    error = {"error": {"code": code, "message": message}}
    return web.json_response(error, status=status)


async def examined(
    folder: Path, azure: FakeAzure | str, yaml: str = YAML % "", key: str | None = None, seconds: float = 5.0
) -> list[Finding]:
    """Return the doctor's findings."""
    endpoint = azure if isinstance(azure, str) else azure.endpoint
    loaded = load(write_files(folder, {"gateway.yaml": yaml.replace("ENDPOINT", endpoint)}), {})
    upstream = Upstream(loaded.settings.timeouts)
    await upstream.start()
    try:
        credential = None if key is None else Credential(key)
        return [each async for each in examine(plan(loaded), upstream, credential, seconds)]
    finally:
        await loaded.teams.shared.close()
        await upstream.close()


def outcomes(findings: list[Finding]) -> list[tuple[str | None, str, bool]]:
    return [(each.deployment, each.probe, each.ok) for each in findings]


def wrong(findings: list[Finding]) -> str:
    """Return the verdict of the only failed probe."""
    (found,) = [each.verdict for each in findings if not each.ok]
    return found


async def test_all_is_well(tmp_path: Path) -> None:
    """Each resource's models; for each deployment a chat and a stream, or an embedding, of at most one token."""
    async with FakeAzure(respond=with_models) as azure:
        findings = await examined(tmp_path, azure, YAML % ", region: swedencentral")
        assert outcomes(findings) == [
            (None, "models", True), ("gpt-4o", "chat", True), ("gpt-4o", "stream", True),
            ("text-embedding-3-small", "embeddings", True),
        ]  # fmt: skip
        assert findings[0].verdict == "in Sweden Central"
        assert findings[2].verdict == "content filter synchronous"
        assert all(each.ms is not None and each.ms >= 0 for each in findings)
        bodies = [seen.json() for seen in azure.requests if seen.body]
        assert [body.get("max_completion_tokens") for body in bodies if "messages" in body] == [1, 1, 1]
        assert [body["messages"] for body in bodies if "messages" in body] == [[{"role": "user", "content": "Hi"}]] * 3
        assert [body["input"] for body in bodies if "input" in body] == ["Hi"]
        assert {seen.headers.get("api-key") for seen in azure.requests} == {"azure-key"}


@pytest.mark.parametrize(
    ("field", "value", "yaml", "verdict"),
    [
        ("api_key", "another", YAML % "", "wrong key"),
        ("deployments", ("text-embedding-3-small",), YAML % "", "unknown deployment"),
        (
            "respond",
            with_models,
            YAML % ", region: eastus2",
            "wrong region: the resource is in Sweden Central, not in eastus2",
        ),
        ("respond", with_models, (YAML % "").replace("2024-10-21", "2022-12-01"), "api-version too old"),
    ],
)
async def test_what_is_wrong(field: str, value: Any, yaml: str, verdict: str, tmp_path: Path) -> None:
    """The message says what to change; further probes are not sent."""
    async with FakeAzure(respond=with_models) as azure:
        azure.respond = None if field == "api_key" else with_models
        setattr(azure, field, value)
        assert wrong(await examined(tmp_path, azure, yaml)).startswith(verdict)
        if verdict == "wrong key":
            assert len(azure.requests) == 1


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (problem(401, "401", "Access denied due to invalid subscription key"), "wrong key"),
        (
            problem(403, "403", "Public access is disabled. Please configure private endpoint."),
            "network rules of the resource",
        ),
        (
            problem(403, "PermissionDenied", "The principal lacks the required data action"),
            "permission denied: the identity",
        ),
        (problem(404, "404", "Resource not found"), "api-version 2024-10-21 too old or unknown"),
        (problem(404, "DeploymentNotFound", "The API deployment does not exist"), "unknown deployment"),
        (problem(400, "BadRequest", "Unsupported api version"), "api-version too old or unknown"),
        (problem(500, "500", "The server had\nan error"), "status 500: The server had an error"),
    ],
    ids=lambda value: value.status if isinstance(value, web.Response) else "",
)
async def test_what_a_deployment_answers(answer: web.Response, verdict: str, tmp_path: Path) -> None:
    """After an error in the chat, no stream is requested."""

    async def respond(seen: Seen, request: web.BaseRequest) -> web.StreamResponse | None:
        if "gpt-4o" in seen.path:
            return web.Response(status=answer.status, body=answer.body, content_type="application/json")
        return await with_models(seen, request)

    async with FakeAzure(respond=respond) as azure:
        findings = await examined(tmp_path, azure)
        assert wrong(findings).startswith(verdict)
        assert sum("gpt-4o" in seen.path for seen in azure.requests) == 1


async def test_models_that_think_and_quotas_that_are_used_up_are_there(tmp_path: Path) -> None:
    """Also one that expects the token limit under the other name: every request is for one token."""

    async def respond(seen: Seen, request: web.BaseRequest) -> web.StreamResponse | None:
        if "gpt-4o" not in seen.path:
            return await with_models(seen, request)
        if "max_completion_tokens" in seen.json():
            message = "Unsupported parameter: 'max_completion_tokens'. Use 'max_tokens' instead."
            return problem(400, "unsupported_parameter", message)
        if seen.json().get("stream"):
            return problem(429, "429", "Rate limit is exceeded. Try again in 9 seconds.")
        return problem(400, "x", "Could not finish the message because max_tokens or model output limit was reached.")

    async with FakeAzure(respond=respond) as azure:
        findings = await examined(tmp_path, azure)
        assert all(each.ok for each in findings)
        verdicts = [each.verdict for each in findings if each.deployment == "gpt-4o"]
        assert verdicts == [
            "a reasoning model; no token was left for output",
            "the deployment exists, but its quota is used up for 9 s",
        ]


async def test_one_that_is_for_neither_is_there(tmp_path: Path) -> None:
    """A model for images or audio: no further probe is sent."""

    async def respond(seen: Seen, request: web.BaseRequest) -> web.StreamResponse | None:
        if "gpt-4o" in seen.path:
            return problem(400, "OperationNotSupported", "The operation does not work with the model, dall-e-3")
        return await with_models(seen, request)

    async with FakeAzure(respond=respond) as azure:
        findings = await examined(tmp_path, azure)
        assert "supports neither chats nor embeddings" in findings[1].verdict
        assert all(each.ok for each in findings)


async def test_the_asynchronous_filter_is_reported(tmp_path: Path) -> None:
    """By filter results with an offset; the time is the one to the first byte."""
    async with FakeAzure(respond=with_models, asynchronous_filter=True, delay=0.05, words=("a", "b", "c")) as azure:
        findings = await examined(tmp_path, azure)
        (stream,) = [each for each in findings if each.probe == "stream"]
        assert stream.verdict == "content filter asynchronous"
        assert stream.ms is not None
        assert stream.ms < 100


async def test_what_cannot_be_reached(tmp_path: Path) -> None:
    """Each with its own message; its deployments are not probed."""
    async with slow_tls(30) as port:
        for endpoint, words in (
            (f"http://127.0.0.1:{closed_port()}", "connection failed"),
            ("http://nowhere.invalid", "host name not found"),
            (f"https://127.0.0.1:{port}", "in time"),
        ):
            findings = await examined(tmp_path, endpoint, seconds=0.5)
            assert outcomes(findings) == [(None, "models", False)]
            assert words in findings[0].verdict


async def test_a_deployment_that_does_not_answer(tmp_path: Path) -> None:
    """Within the timeout of a probe."""

    async def respond(seen: Seen, request: web.BaseRequest) -> web.StreamResponse | None:
        if "gpt-4o" in seen.path:
            import asyncio

            await asyncio.sleep(60)
        return await with_models(seen, request)

    async with FakeAzure(respond=respond) as azure:
        assert "no response in time" in wrong(await examined(tmp_path, azure, seconds=0.3))


async def test_a_resource_without_a_credential_is_shown_the_operator_s(tmp_path: Path) -> None:
    """Without one, the message says what to set."""
    yaml = (
        (YAML % "").replace(", api_key: azure-key", "").replace("  - model_map", "  - auth_passthrough\n  - model_map")
    )
    async with FakeAzure(respond=with_models) as azure:
        assert "set AZURE_OPENAI_API_KEY" in wrong(await examined(tmp_path, azure, yaml))
        assert azure.requests == []
        findings = await examined(tmp_path, azure, yaml, key="azure-key")
        assert all(each.ok for each in findings)


async def test_an_identity_without_tokens(tmp_path: Path) -> None:
    """The message has the reason, without secrets."""
    credential = (
        f"credential: {{kind: client_secret, tenant: t, client_id: c, client_secret: hidden, authority: "
        f'"http://127.0.0.1:{closed_port()}"}}'
    )
    async with FakeAzure() as azure:
        findings = await examined(tmp_path, azure, (YAML % "").replace("api_key: azure-key", credential))
        assert findings[0].verdict.startswith("no Entra token: ")
        assert "hidden" not in findings[0].verdict
        assert len(findings) == 1


async def test_the_api_version_is_the_pipeline_s(tmp_path: Path) -> None:
    """Or the resource's own: v1 uses the v1 API."""
    async with FakeAzure(respond=with_models) as azure:
        assert all(each.ok for each in await examined(tmp_path, azure, YAML % ", api_version: v1"))
        assert {seen.path.split("/")[2] for seen in azure.requests} == {"v1"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It announces the probes, and prints a line or a JSON object per probe; status 1 if one fails."""
    endpoint = f"http://127.0.0.1:{closed_port()}"
    path = write_files(tmp_path, {"gateway.yaml": (YAML % "").replace("ENDPOINT", endpoint)})
    assert main(["doctor", str(path)]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[0] == (
        "gateway: probing 1 resource for models, and 2 deployments for a chat and a stream, or an embedding; "
        "at most one output token per request (4 in all), and prompts of one word"
    )
    assert err.splitlines()[-1] == "gateway: 1 of 1 probes found a problem"
    words = "east models WRONG connection failed: a firewall on the way, or the wrong port"
    assert out.split() == words.split()
    assert main(["doctor", "--json", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["verdict"].startswith("connection failed")
    assert main(["doctor", "--dry-run", str(path)]) == 0
    assert capsys.readouterr().out.split() == ["east/gpt-4o", "east/text-embedding-3-small"]


async def test_the_command_where_all_is_well(tmp_path: Path) -> None:
    """Status 0, in a separate process."""
    import asyncio

    async with FakeAzure(respond=with_models) as azure:
        path = write_files(tmp_path, {"gateway.yaml": (YAML % "").replace("ENDPOINT", azure.endpoint)})
        done = await asyncio.to_thread(run, "doctor", str(path))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("ok") == 4
        assert "azure-key" not in done.stdout + done.stderr
