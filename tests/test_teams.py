"""The team of a request: by path prefix, host name or key digest, else the default team."""

from __future__ import annotations

import pytest

from gateway.auth.credentials import key_digest
from gateway.testing import FakeAzure
from tests.conftest import CHAT, StartGateway

pytestmark = pytest.mark.both_loops

YAML = """
resources: {azure: {endpoint: "${ENDPOINT}"}}
teams: teams/*.yaml
pipeline: [access_log, auth_passthrough, model_map: {models: {m: default}, unmapped: refuse}, api_version]
"""
FILES = {
    "teams/path.yaml": "match: {path_prefix: [/research, /deep/er]}\nchange: {model_map: {models: {m: path}}}\n",
    "teams/host.yaml": "match: {host: sales.example.com}\nchange: {model_map: {models: {m: host}}}\n",
    "teams/key.yaml": f"match: {{keys: [{key_digest('key-of-key')}]}}\nchange: {{model_map: {{models: {{m: key}}}}}}\n",
}
BODY = {**CHAT, "model": "m"}


@pytest.fixture
def azure_with_teams(azure: FakeAzure) -> FakeAzure:
    azure.deployments = ("default", "path", "host", "key")
    return azure


@pytest.mark.parametrize(
    ("path", "host", "key", "deployment"),
    [
        ("/v1", "gw", "any-key", "default"),
        ("/research/v1", "gw", "any-key", "path"),
        ("/deep/er/v1", "gw", "any-key", "path"),
        ("/v1", "sales.example.com", "any-key", "host"),
        ("/v1", "SALES.example.com:8080", "any-key", "host"),
        ("/v1", "gw", "key-of-key", "key"),
        ("/research/v1", "sales.example.com", "any-key", "path"),
    ],
)
async def test_team_of_a_request(
    path: str, host: str, key: str, deployment: str, start_gateway: StartGateway, azure_with_teams: FakeAzure
) -> None:
    """The path decides first, then the host, then the key."""
    azure_with_teams.api_key = key
    gateway = await start_gateway(azure_with_teams.endpoint, YAML, FILES)
    async with gateway.post(f"{path}/chat/completions", BODY, key=key, headers={"Host": host}) as answer:
        assert answer.status == 200, await answer.text()
    assert azure_with_teams.requests[0].path.split("/")[3] == deployment
    await gateway.idle()
    assert gateway.exchanges()[0]["team"] == deployment


@pytest.mark.parametrize(("path", "host"), [("/research/v1", "gw"), ("/v1", "sales.example.com")])
async def test_a_key_of_one_team_on_another_s_url_is_a_401(
    path: str, host: str, start_gateway: StartGateway, azure_with_teams: FakeAzure
) -> None:
    """A key of one team does not work on the URL of another team."""
    gateway = await start_gateway(azure_with_teams.endpoint, YAML, FILES)
    async with gateway.post(f"{path}/chat/completions", BODY, key="key-of-key", headers={"Host": host}) as answer:
        assert answer.status == 401
        assert (await answer.json())["error"]["code"] == "invalid_api_key"
    assert not azure_with_teams.requests


async def test_a_prefix_of_no_team_is_a_404(start_gateway: StartGateway, azure_with_teams: FakeAzure) -> None:
    """The default team does not get the request."""
    gateway = await start_gateway(azure_with_teams.endpoint, YAML, FILES)
    for path in ("/nobody/v1/chat/completions", "/research/x/v1/models", "//v1/models"):
        async with gateway.post(path, BODY) as answer:
            assert answer.status == 404


async def test_models_of_each_team(start_gateway: StartGateway, azure_with_teams: FakeAzure) -> None:
    """`/v1/models` lists the team's own map."""
    files = {**FILES, "teams/host.yaml": "match: {host: s}\nchange: {model_map: {models: {only-here: host}}}\n"}
    gateway = await start_gateway(azure_with_teams.endpoint, YAML, files)
    async with gateway.session.get(gateway.url + "/v1/models", headers={"Host": "s", "api-key": "k"}) as answer:
        assert [model["id"] for model in (await answer.json())["data"]] == ["only-here"]
