"""Resources: TLS, credentials and timeouts of each."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import web

from gateway.config import load
from gateway.config.diff import diff
from gateway.process.generations import GenerationSwitch
from gateway.testing import FakeAzure
from tests.conftest import CHAT, Gateway, StartGateway, raw_upstream, until, write_files

YAML = """
auth: none
resources: {azure: {endpoint: "${ENDPOINT}", %s}}
pipeline:
  - access_log
  - model_map: {unmapped: own_name_without_dots}
  - api_version: 2024-10-21
  - openai_errors
"""


async def ask(gateway: Gateway) -> tuple[int, Any]:
    """Send a request without a key, and return the status and the JSON of its answer."""
    async with gateway.post(json=CHAT, key=None) as answer:
        return answer.status, await answer.json()


# -- TLS -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def tls_azure(context: ssl.SSLContext) -> AsyncIterator[str]:
    """Run a resource behind TLS; yields its URL."""

    async def answer(request: web.BaseRequest) -> web.Response:
        certificate = request.transport.get_extra_info("peercert") if request.transport is not None else None
        return web.json_response({"shown": bool(certificate)})

    server = web.Server(answer)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0, ssl=context)
    try:
        yield f"https://localhost:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()
        await server.shutdown(timeout=0.1)


def files(folder: Path) -> tuple[ssl.SSLContext, trustme.CA]:
    """Write a CA and a client certificate; return the context of a server that requires one, and the CA."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_OPTIONAL
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    client = authority.issue_cert("gateway@example.com")
    client.private_key_pem.write_to_path(str(folder / "client.key"))
    client.cert_chain_pems[0].write_to_path(str(folder / "client.pem"))
    return context, authority


async def test_a_private_ca(start_gateway: StartGateway, tmp_path: Path) -> None:
    """Without it the certificate is not valid; with it the request succeeds."""
    context, _ = files(tmp_path)
    async with tls_azure(context) as endpoint:
        gateway = await start_gateway(endpoint, YAML % "api_key: k")
        status, content = await ask(gateway)
        assert (status, content["error"]["code"]) == (502, "upstream_error")
        assert "certificate" in content["error"]["message"]
        gateway = await start_gateway(endpoint, YAML % "api_key: k, tls: ca.pem")
        assert await ask(gateway) == (200, {"shown": False})


async def test_a_client_certificate(start_gateway: StartGateway, tmp_path: Path) -> None:
    """It is sent if it is set; a resource that requires one refuses connections without it."""
    context, _ = files(tmp_path)
    async with tls_azure(context) as endpoint:
        own = YAML % "api_key: k, tls: {ca: ca.pem, certificate: client.pem, key: client.key}"
        assert await ask(await start_gateway(endpoint, own)) == (200, {"shown": True})
        context.verify_mode = ssl.CERT_REQUIRED
        assert (await ask(await start_gateway(endpoint, YAML % "api_key: k, tls: ca.pem")))[0] == 502
        assert (await ask(await start_gateway(endpoint, own)))[0] == 200


async def test_a_ca_is_for_its_resource_alone(start_gateway: StartGateway, tmp_path: Path) -> None:
    """Another resource at the same endpoint does not trust it, and shares no connection."""
    context, _ = files(tmp_path)
    async with tls_azure(context) as endpoint:
        yaml = (YAML % "api_key: k, tls: ca.pem").replace(
            "resources: {azure:", 'resource: azure\nresources: {other: {endpoint: "${ENDPOINT}", api_key: k}, azure:'
        )
        yaml = yaml.replace("model_map: {", "model_map: {models: {elsewhere: other/x}, ")
        gateway = await start_gateway(endpoint, yaml)
        assert (await ask(gateway))[0] == 200
        async with gateway.post(json={**CHAT, "model": "elsewhere"}, key=None) as answer:
            assert answer.status == 502


# -- credentials ---------------------------------------------------------------------------------------


@dataclass
class Entra:
    """A token endpoint that takes `delay` seconds, or fails while it is `away`."""

    delay: float = 0.0
    away: bool = False
    forms: list[dict[str, str]] = field(default_factory=list)
    url: str = ""

    async def answer(self, request: web.BaseRequest) -> web.Response:
        form = {name: value for name, _, value in (pair.partition("=") for pair in (await request.text()).split("&"))}
        self.forms.append({**form, "path": request.path})
        await asyncio.sleep(self.delay)
        if self.away:
            return web.json_response({"error": "x", "error_description": "AADSTS90033: a transient error"}, status=503)
        number = len(self.forms)
        return web.json_response({"access_token": f"eyJ0.token{number}.x", "expires_in": 3600})

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Entra]:
        server = web.Server(self.answer)
        listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            listener.close()
            await server.shutdown(timeout=0.1)


def identity(entra: Entra) -> str:
    who = "kind: client_secret, tenant: tid, client_id: app, client_secret: hidden"
    return f'credential: {{{who}, authority: "{entra.url}"}}'


async def test_azure_is_shown_a_token(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """The configured identity's, as `Authorization: Bearer`; one for many requests, fetched at the start."""
    async with Entra().running() as entra:
        gateway = await start_gateway(azure.endpoint, YAML % identity(entra))
        await until(lambda: entra.forms)
        assert {status for status, _ in await asyncio.gather(*(ask(gateway) for _ in range(20)))} == {200}
        assert {seen.headers.get("authorization") for seen in azure.requests} == {"Bearer eyJ0.token1.x"}
        assert {seen.headers.get("api-key") for seen in azure.requests} == {None}
        (form,) = entra.forms
        assert form["path"] == "/tid/oauth2/v2.0/token"
        assert (form["client_id"], form["client_secret"], form["grant_type"]) == ("app", "hidden", "client_credentials")
        assert not any("hidden" in str(event) or "token1" in str(event) for event in gateway.events)


async def test_a_request_waits_only_where_there_is_no_token_yet(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Then all wait for one fetch; while a new token is fetched, requests use the current one."""
    async with Entra(delay=0.3).running() as entra:
        gateway = await start_gateway(azure.endpoint, YAML % identity(entra))
        assert {status for status, _ in await asyncio.gather(*(ask(gateway) for _ in range(10)))} == {200}
        assert len(entra.forms) == 1


async def test_without_a_token_the_client_gets_a_503_with_retry_after(
    start_gateway: StartGateway, azure: FakeAzure
) -> None:
    """A 503 without details of the identity; the log has Entra's reason. It recovers automatically."""
    async with Entra(away=True).running() as entra:
        gateway = await start_gateway(azure.endpoint, YAML % identity(entra))
        async with gateway.post(json=CHAT, key=None) as answer:
            content = await answer.json()
            assert answer.status == 503
            assert int(answer.headers["retry-after"]) >= 1
        assert "tid" not in content["error"]["message"]
        assert azure.requests == []
        reasons = [event["reason"] for event in gateway.events if event["event"] == "entra_token_fetch_failed"]
        assert any("AADSTS90033" in reason for reason in reasons)
        entra.away = False
        async with asyncio.timeout(30):
            while (await ask(gateway))[0] != 200:
                await asyncio.sleep(0.1)


async def test_a_pool_goes_on_without_one_resource_s_tokens(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """The others respond, and no request is lost."""
    async with Entra(away=True).running() as entra:
        yaml = (YAML % identity(entra)).replace(
            "resources: {azure:", 'resources: {other: {endpoint: "${ENDPOINT}", api_key: azure-key}, azure:'
        )
        yaml = yaml.replace(
            "pipeline:", "pools: {chat: [azure/gpt-4o, {deployment: other/gpt-4o, priority: 2}]}\npipeline:"
        )
        yaml = yaml.replace(
            "model_map: {unmapped: own_name_without_dots}",
            'model_map: {models: {gpt-4o: "pool:chat"}, unmapped: refuse}\n  - balance',
        )
        gateway = await start_gateway(azure.endpoint, yaml)
        assert (await ask(gateway))[0] == 200
        await until(lambda: gateway.exchanges())
        assert [each["reason"] for each in gateway.exchanges()[0]["attempts"][:1]] == ["credential"]


async def test_a_key_in_a_file_is_read_again(azure: FakeAzure, tmp_path: Path, start_gateway: StartGateway) -> None:
    """When the file changes, which triggers a reload; that shows neither key."""
    (tmp_path / "key").write_text("old-key\n")
    yaml = YAML % "api_key: '${file:key}'"
    gateway = await start_gateway(azure.endpoint, yaml)
    path = tmp_path / "gateway.yaml"
    env = {"ENDPOINT": azure.endpoint}
    loaded = load(path, env, gateway.server.shared)
    renewal = GenerationSwitch(gateway.server, loaded, lambda shared, sources: load(path, env, shared, sources=sources))
    assert (await ask(gateway))[0] == 401
    (tmp_path / "key").write_text("azure-key\n")
    assert loaded.sources.now() != loaded.sources
    prepared = await renewal.reload()
    assert prepared.report.changes == ["resource azure: api_key: *** -> *** (changed)"]
    assert (await ask(gateway))[0] == 200


async def test_tokens_outlive_a_reload(azure: FakeAzure, tmp_path: Path, start_gateway: StartGateway) -> None:
    """The token of an unchanged identity is not fetched again; that of another one is."""
    async with Entra().running() as entra:
        gateway = await start_gateway(azure.endpoint, YAML % identity(entra))
        await until(lambda: entra.forms)
        path, env = tmp_path / "gateway.yaml", {"ENDPOINT": azure.endpoint}
        loaded = load(path, env, gateway.server.shared)
        renewal = GenerationSwitch(
            gateway.server, loaded, lambda shared, sources: load(path, env, shared, sources=sources)
        )
        assert (await ask(gateway))[0] == 200
        path.write_text((YAML % identity(entra)).replace("2024-10-21", "2024-06-01"))
        assert not (await renewal.reload()).report.mistakes
        assert (await ask(gateway))[0] == 200
        assert len(entra.forms) == 1
        path.write_text((YAML % identity(entra)).replace("client_id: app", "client_id: another"))
        assert not (await renewal.reload()).report.mistakes
        assert (await ask(gateway))[0] == 200
        assert [form["client_id"] for form in entra.forms] == ["app", "another"]


# -- time-outs, versions, and what a reload says -------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "timeouts", "words"),
    [
        (b"", "first_byte: 0.2", "did not begin to respond within 0.2 s"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab", "idle: 0.2", "sent nothing for 0.2 s"),
    ],
)
async def test_its_own_timeouts(answer: bytes, timeouts: str, words: str, start_gateway: StartGateway) -> None:
    """They override the global ones."""
    async with raw_upstream(answer, keep_open=True) as upstream:
        gateway = await start_gateway(upstream.endpoint, YAML % f"api_key: k, timeouts: {{{timeouts}}}")
        status, content = await ask(gateway)
        assert status == 504
        assert words in content["error"]["message"]


async def test_its_own_api_version(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """It overrides the stage's `version`; if each resource has one, the stage is not needed."""
    gateway = await start_gateway(azure.endpoint, YAML % "api_key: azure-key, api_version: 2024-06-01")
    assert (await ask(gateway))[0] == 200
    assert azure.requests[0].query == [("api-version", "2024-06-01")]
    yaml = (YAML % "api_key: azure-key, api_version: v1").replace("  - api_version: 2024-10-21\n", "")
    gateway = await start_gateway(azure.endpoint, yaml)
    assert (await ask(gateway))[0] == 200
    assert azure.requests[1].path == "/openai/v1/chat/completions"


def test_what_a_reload_says_has_changed(tmp_path: Path) -> None:
    """Changes of resources and pools, without secrets."""
    files(tmp_path)

    def loaded(name: str, resource: str, pool: str, health: str) -> Any:
        yaml = f"""
auth: none
resources: {{azure: {{endpoint: "https://a.invalid", {resource}}}}}
pools: {{chat: [{pool}]}}
health: {{{health}}}
pipeline: [model_map, balance, api_version]
"""
        return load(write_files(tmp_path, {f"{name}/gateway.yaml": yaml}).parent / name / "gateway.yaml", {})

    secret = "credential: {kind: client_secret, tenant: t, client_id: c, client_secret: %s}"
    one = loaded("one", f"{secret % 'hidden'}, region: a", "azure/x", "rest: 1")
    other = loaded(
        "other",
        f"{secret % 'other'}, region: b, tls: ../ca.pem, timeouts: {{idle: 9}}",
        "azure/y, {deployment: azure/x, weight: 2}",
        "rest: 2",
    )
    assert diff(one, other) == [
        "health.rest: 1.0 -> 2.0",
        "resource azure: credential: client_secret -> client_secret (changed)",
        "resource azure: region: a -> b",
        "resource azure: timeouts.idle: 9.0 added",
        "resource azure: tls: custom added",
        "pool chat: azure/x: priority 1, weight 1 -> priority 1, weight 2",
        "pool chat: azure/y: priority 1, weight 1 added",
    ]


def test_the_environment_of_app_service_is_known(tmp_path: Path) -> None:
    """Only if both variables are set: other hosts have one of that name."""
    yaml = YAML % "credential: managed_identity"
    both = {
        "ENDPOINT": "https://a.invalid",
        "IDENTITY_ENDPOINT": "http://127.0.0.1:1/token",
        "IDENTITY_HEADER": "secret",
    }
    path = write_files(tmp_path, {"gateway.yaml": yaml})
    for env, endpoint in ((both, "http://127.0.0.1:1/token"), ({**both, "IDENTITY_HEADER": ""}, None)):
        tokens = load(path, env).resources["azure"].tokens
        assert tokens is not None
        assert tokens.identity.endpoint == endpoint
        assert "secret" not in repr(tokens.identity)
