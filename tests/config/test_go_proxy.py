"""Configurations of the Go proxy: loaded directly, and converted to the gateway's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml as pyyaml
from hypothesis import given
from hypothesis import strategies as st
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from gateway.config import import_go_proxy, load
from gateway.config.show import show
from gateway.config.write import write
from gateway.errors import ConfigError
from gateway.testing import FakeAzure
from tests.conftest import CHAT, Gateway, StartGateway, write_files
from tests.proxies import ConnectProxy

# As that proxy's own example has it, and an entry that never counted.
EXAMPLE = """\
api_base: "/v1"
deployment_config:
  - deployment_name: "forgotten"
    model_name: "gpt-4o"
    endpoint: "{east}/"
    api_key: "sesame-forgotten"
    api_version: "2023-05-15"
  - deployment_name: "xxx"
    model_name: "gpt-3.5-turbo"
    endpoint: "{east}/"
    api_key: "sesame-east"
    api_version: 2023-05-15
  - deployment_name: "yyy"
    model_name: "gpt-4o"
    endpoint: "{west}/"
    api_key: "sesame-west"
    api_version: "2024-02-01"
  - deployment_name: "zzz"
    model_name: "text-embedding-ada-002"
    endpoint: "{west}/"
    api_key: "sesame-west"
    api_version: "2024-02-01"
"""
REAL = EXAMPLE.format(east="https://xxx-east-us.openai.azure.com", west="https://yyy.openai.azure.com")


def imported(text: str, folder: Path) -> tuple[str, str, dict[str, str]]:
    """Return the imported YAML, the notes and the keys."""
    path = folder / "config.yaml"
    path.write_text(text)
    made = import_go_proxy(path)
    notes = "".join(f"{note}\n" for note in sorted(made.notes)).replace(f"{folder}/", "")
    return write(made.root, made.comments), notes, made.keys


def mistakes(text: str, folder: Path, *, importing: bool) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        _ = import_go_proxy(path) if importing else load(path, {})
    return str(caught.value).replace(f"{folder}/", "")


async def ask(gateway: Gateway, model: str, path: str = "chat/completions", **more: Any) -> tuple[int, Any]:
    async with gateway.post(f"/v1/{path}", {**CHAT, "input": "x", "model": model}, **more) as answer:
        return answer.status, await answer.json()


@pytest.mark.parametrize("way", ["imported", "as it is"])
async def test_requests_go_where_they_went(way: str, start_gateway: StartGateway, tmp_path: Path) -> None:
    """Each model to its endpoint, deployment and api-version with its key, with any key of the client, or none."""
    async with (
        FakeAzure(api_key="sesame-east", deployments=["xxx"]) as east,
        FakeAzure(api_key="sesame-west", deployments=["yyy", "zzz"]) as west,
    ):
        yaml = EXAMPLE.format(east=east.endpoint, west=west.endpoint)
        keys: dict[str, str] = {}
        if way == "imported":
            yaml, _, keys = imported(yaml, tmp_path)
            assert sorted(keys.values()) == ["sesame-east", "sesame-west"]
        gateway = await start_gateway("", yaml, env=keys)
        for key in (None, "anything"):
            assert (await ask(gateway, "gpt-3.5-turbo", key=key))[0] == 200
            assert (await ask(gateway, "gpt-4o", key=key))[0] == 200
            assert (await ask(gateway, "text-embedding-ada-002", "embeddings", key=key))[0] == 200
        status, answer = await ask(gateway, "gpt-4", key=None)
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        seen = {(each.path, each.query[0][1]) for each in east.requests}
        assert seen == {("/openai/deployments/xxx/chat/completions", "2023-05-15")}
        assert {(each.path, each.query[0][1]) for each in west.requests} == {
            ("/openai/deployments/yyy/chat/completions", "2024-02-01"),
            ("/openai/deployments/zzz/embeddings", "2024-02-01"),
        }
        async with gateway.get("/v1/models", key=None) as models:
            names = [model["id"] for model in (await models.json())["data"]]
        assert names == ["gpt-3.5-turbo", "gpt-4o", "text-embedding-ada-002"]
        assert "sesame" not in str(gateway.events)


@pytest.mark.parametrize("way", ["imported", "as it is"])
async def test_without_stored_keys_the_client_s_own_key_is_used(
    way: str, start_gateway: StartGateway, tmp_path: Path
) -> None:
    """It is passed on, and required."""
    async with FakeAzure(api_key="the-client's".replace("'", ""), deployments=["xxx"]) as azure:
        yaml = f"deployment_config: [{{deployment_name: xxx, model_name: m$1, endpoint: '{azure.endpoint}', "
        yaml += "api_key: , api_version: 2024-02-01}]\n"
        if way == "imported":
            yaml, notes, keys = imported(yaml, tmp_path)
            assert (notes, keys) == ("", {})
            assert "auth" not in yaml.replace("auth_passthrough", "")
        gateway = await start_gateway("", yaml)
        assert (await ask(gateway, "m$1", key="the-clients"))[0] == 200
        assert (await ask(gateway, "m$1", key="another"))[0] == 401
        assert (await ask(gateway, "m$1", key=None))[0] == 401
        assert [each.headers.get("api-key") for each in azure.requests] == ["the-clients", "another"]


@pytest.mark.parametrize("way", ["imported", "as it is"])
async def test_the_proxy_s_variables_count(way: str, start_gateway: StartGateway, tmp_path: Path) -> None:
    """AZURE_OPENAI_HTTP_PROXY and AZURE_OPENAI_SOCKS_PROXY apply to every endpoint, as before."""
    async with FakeAzure(api_key="sesame-west", deployments=["yyy"]) as azure, ConnectProxy() as proxy:
        yaml = EXAMPLE.format(east=azure.endpoint, west=azure.endpoint)
        keys: dict[str, str] = {}
        if way == "imported":
            yaml, _, keys = imported(yaml, tmp_path)
        gateway = await start_gateway("", yaml, env={**keys, "AZURE_OPENAI_HTTP_PROXY": proxy.url()})
        assert (await ask(gateway, "gpt-4o"))[0] == 200
        assert proxy.connections == 1


def test_what_importing_prints(tmp_path: Path) -> None:
    """Readable YAML: names from the hosts, variables for the keys, and a comment that explains `auth: none`."""
    text, _, keys = imported(REAL, tmp_path)
    assert (
        text
        == """\
# Every interface, as with the Go proxy. If nginx is in front: 127.0.0.1:8080
listen: ${GATEWAY_LISTEN:-:8080}

resources:
  xxx-east-us:
    endpoint: https://xxx-east-us.openai.azure.com
    api_key: ${AZURE_OPENAI_KEY_XXX_EAST_US}
    proxy: ${AZURE_OPENAI_SOCKS_PROXY:-${AZURE_OPENAI_HTTP_PROXY:-}}
  yyy:
    endpoint: https://yyy.openai.azure.com
    api_key: ${AZURE_OPENAI_KEY_YYY}
    proxy: ${AZURE_OPENAI_SOCKS_PROXY:-${AZURE_OPENAI_HTTP_PROXY:-}}

# For requests that name no model: files, threads, lists.
resource: xxx-east-us

# ANYONE WHO REACHES THIS GATEWAY CAN SPEND THE KEYS ABOVE, with any key or none: nothing
# authenticates clients, as with the Go proxy. Restrict access to it, or add a stage that authenticates.
auth: none

pipeline:
  - access_log
  - model_map:
      models:
        gpt-3.5-turbo: xxx-east-us/xxx
        gpt-4o: yyy/yyy
        text-embedding-ada-002: yyy/zzz
      # Models that are not listed are refused, as with the Go proxy. Other values: gateway stages model_map
      unmapped: refuse
  - api_version:
      version: 2024-02-01
      otherwise:
        - v1
        - 2025-04-01-preview
      models:
        gpt-3.5-turbo: 2023-05-15
  - missing_message
  - missing_fields
  - missing_delta
  - prompt_filter_chunk
  - resource_ids
  - openai_errors
  - sse_newline
"""
    )
    assert keys == {"AZURE_OPENAI_KEY_XXX_EAST_US": "sesame-east", "AZURE_OPENAI_KEY_YYY": "sesame-west"}


def test_both_ways_come_to_the_same(tmp_path: Path) -> None:
    """The imported YAML loads to the same configuration as the file, including the address."""
    text, _, keys = imported(REAL, tmp_path)
    direct = load(write_files(tmp_path, {"gateway.yaml": REAL}), {})
    own = load(write_files(tmp_path, {"gateway.yaml": text}), keys)
    assert show(direct) == show(own)
    assert (str(direct.settings.listen), own.differences) == ("0.0.0.0:8080", None)
    assert direct.differences
    assert direct.resources == own.resources
    assert "sesame" not in show(direct) + repr(direct) + repr(own) + text


ODD = """\
API_BASE: /v1/
cors: true
listen: 127.0.0.1:9000
colour: blue
Deployment_Config:
  - {deployment_name: a, model_name: m, endpoint: "https://e.openai.azure.com/base?code=sesame", api_key: sesame}
  - {Deployment_Name: b, MODEL_NAME: m, endpoint: https://e.openai.azure.com, api_key: sesame, api_version: ~}
  - {deployment_name: c, model_name: "gpt-4*", endpoint: https://e.openai.azure.com, api_key: other, api_version: v1}
  - {deployment_name: d, model_name: theirs, endpoint: https://e.openai.azure.com, api_version: v1, region: west}
  - {deployment_name: e, api_key: sesame}
"""


def test_what_is_different_now_is_said_with_its_place(tmp_path: Path) -> None:
    """Every setting that is left out, or differs; never a key."""
    text, notes, keys = imported(ODD, tmp_path)
    assert notes.splitlines() == [
        "config.yaml:4:1: 'colour' is not a setting of the Go proxy; it is left out",
        (
            "config.yaml:6:5: the model 'm' appears again further down, and the last entry counts, as with the Go "
            "proxy; this one is left out"
        ),
        (
            "config.yaml:7:5: the model 'm' has no api_version, for which the Go proxy sent an empty one, which Azure "
            "refuses; it is 2024-10-21 now"
        ),
        (
            "config.yaml:7:88: this file has keys and nothing authenticates clients: anyone who reaches the gateway "
            "can spend them (`auth: none`), as with the Go proxy; restrict access to the gateway"
        ),
        (
            "config.yaml:9:5: the model 'theirs' has no api_key, but others have one: the gateway cannot use the "
            "client's key for some models and a stored one for others; it is left out"
        ),
        "config.yaml:9:101: 'region' is not a setting of deployment_config; it is left out",
        "config.yaml:10:5: this entry has no model_name and no endpoint, so it cannot work; it is left out",
    ]
    assert "listen: 127.0.0.1:9000" in text
    assert "auth: none" in text
    assert '"~gpt\\\\-4\\\\*": e-2/c' in text, "a name is no pattern there"
    assert keys == {"AZURE_OPENAI_KEY_E": "sesame", "AZURE_OPENAI_KEY_E_2": "other"}
    left_out = ODD.replace("deployment_name: a, model_name: m", "deployment_name: a, model_name: n")
    _, notes, _ = imported(left_out, tmp_path)
    assert "config.yaml:6:51: the path after the endpoint's host is left out; the Go proxy did not use it" in notes


@pytest.mark.parametrize("way", ["imported", "as it is"])
async def test_cors_lets_every_page_in(way: str, start_gateway: StartGateway, tmp_path: Path) -> None:
    """Its `cors: true` becomes the stage `cors`, which responds to preflights before a stage asks for a key."""
    async with FakeAzure(api_key="sesame", deployments=["xxx"]) as azure:
        yaml = "cors: true\ndeployment_config: [{deployment_name: xxx, model_name: gpt-4o, "
        yaml += f"endpoint: '{azure.endpoint}', api_version: 2024-02-01}}]\n"
        if way == "imported":
            yaml, notes, _ = imported(yaml, tmp_path)
            assert notes == ""
            assert (
                """
pipeline:
  - access_log
  - cors:
      # Browsers may call this gateway from any page, as with the Go proxy's `cors`. Better list the
      # origins of your own pages: gateway stages cors
      origins:
        - "*"
  - auth_passthrough
"""
                in yaml
            )
        gateway = await start_gateway("", yaml)
        asked = {"Origin": "https://any.test", "Access-Control-Request-Method": "POST"}
        async with gateway.session.options(f"{gateway.url}/v1/chat/completions", headers=asked) as answer:
            assert (answer.status, answer.headers["access-control-allow-origin"]) == (204, "*")
        async with gateway.post(key="sesame", headers={"Origin": "https://any.test"}) as answer:
            assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "*")
    assert "cors" not in imported(REAL, tmp_path)[0]
    assert "cors" not in imported(f"cors: false\n{REAL}", tmp_path)[0]


@pytest.mark.parametrize(
    ("pipeline", "expected"),
    [
        ("[access_log, auth_passthrough, MORE]", ["access_log", "cors", "auth_passthrough"]),
        ("[access_log as log, auth_passthrough, MORE]", ["log", "cors", "auth_passthrough"]),
        ("[auth_passthrough, MORE]", ["cors", "auth_passthrough", "model_map"]),
        ("[access_log, cors: ['https://a.test'], auth_passthrough, MORE]", ["access_log", "cors", "auth_passthrough"]),
        ("[cors as pages: ['https://a.test'], auth_passthrough, MORE]", ["pages", "auth_passthrough"]),
    ],
)
def test_the_flag_adds_the_stage_where_there_is_none(pipeline: str, expected: list[str], tmp_path: Path) -> None:
    """In any configuration: after `access_log`, above stages that ask for a key; teams that inherit have it, too."""
    yaml = "resources: {azure: {endpoint: https://x.openai.azure.com}}\nteams: team.yaml\npipeline: "
    yaml += pipeline.replace("MORE", "model_map, api_version")
    files = {"gateway.yaml": yaml, "team.yaml": "match: {path_prefix: /team}\npipeline: [inherit, sse_newline]"}
    loaded = load(write_files(tmp_path, files), {}, cors=True)
    for team in loaded.teams.all:
        assert [stage.id for stage in team.stages][: len(expected)] == expected
    assert ("origins=[*]" in show(loaded)) == ("a.test" not in pipeline)


def test_the_flag_hides_no_mistake(tmp_path: Path) -> None:
    """A pipeline that is not a list, or has an invalid stage, is still reported."""
    for pipeline, words in (
        ("access_log", "pipeline must be a list"),
        ("[{}, [a]]", "each entry of the pipeline must be one stage"),
        ("", "there is no `pipeline:`"),
    ):
        path = write_files(tmp_path, {"gateway.yaml": f"pipeline: {pipeline}\n"})
        with pytest.raises(ConfigError, match=words):
            load(path, {}, cors=True)


@pytest.mark.parametrize("importing", [False, True], ids=["as it is", "imported"])
@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("https://yyy", "yyy", "config.yaml:15:15: resource 'azure': endpoint must be a URL"),
        ("https://yyy", "https://u:sesame@yyy", "config.yaml:15:15: resource 'u': endpoint must not contain a user"),
        ('"2024-02-01"', '"2024/02/01"', "config.yaml:17:18: stage 'api_version': version must be text like"),
        ('"xxx"', '"x y"', "config.yaml:8:22: stage 'model_map': 'x y' is not a valid deployment name"),
        (
            '"sesame-west"',
            '"sesame west"',
            "config.yaml:16:14: resource 'yyy': api_key is empty, or has characters that no key has",
        ),
        ('"sesame-west"', "[sesame]", "config.yaml:16:14: api_key must be text"),
        (
            '"sesame-west"',
            '"${HOME}"',
            "config.yaml:16:14: resource 'yyy': api_key is empty, or has characters that no key has",
        ),
        ("model_name", "endpoint", "config.yaml:5:5: 'endpoint' appears twice; the first is on line 4"),
        (REAL, "deployment_config: sesame", "config.yaml:1:20: deployment_config must be a list"),
        (REAL, "deployment_config: [sesame]", "config.yaml:1:21: an entry of deployment_config must be a mapping"),
        (REAL, "deployment_config: []", "config.yaml:1:20: deployment_config has no usable entry"),
        (REAL, "deployment_config: [{api_key: sesame}]", "config.yaml:1:20: deployment_config has no usable"),
        (REAL, "deployment_config:", "config.yaml:1:19: deployment_config must be a list"),
        (REAL, "deployment_config: [", "config.yaml:2:1: not valid YAML"),
        ("api_base:", "listen: here\napi_base:", "config.yaml:1:9: listen: 'here' is not HOST:PORT"),
    ],
)
def test_mistakes_are_reported_where_they_stand(
    old: str, new: str, expected: str, importing: bool, tmp_path: Path
) -> None:
    """In the original file, although the converted one is loaded; no key is shown."""
    text = mistakes(REAL.replace(old, new), tmp_path, importing=importing)
    assert expected in text
    assert "sesame" not in text.replace("'${HOME}'", "")


def test_another_base_than_v1(tmp_path: Path) -> None:
    """Loaded directly, each request would get a 404: a mistake; imported, a note with advice."""
    for base in ("/openai", "api/v1", "[x]"):
        odd = REAL.replace('"/v1"', base)
        assert mistakes(odd, tmp_path, importing=False).startswith("config.yaml:1:11: api_base must be /v1")
        assert "config.yaml:1:11: api_base is" in imported(odd, tmp_path)[1]
    for base in ("v1", "/v1/", "", "/"):
        assert "api_base" not in imported(REAL.replace('"/v1"', base), tmp_path)[1]


def test_our_own_files_are_not_imported(tmp_path: Path) -> None:
    """The message says what is missing; a missing file is a mistake."""
    assert "1:1: this is not a configuration of azure-openai-proxy" in mistakes(
        "listen: :1\n", tmp_path, importing=True
    )
    with pytest.raises(ConfigError, match="cannot read this file"):
        import_go_proxy(tmp_path / "nothing.yaml")


def node(content: Any) -> Node:
    """Return plain data as nodes, without marks, which writing does not need."""
    if isinstance(content, dict):
        return MappingNode("", [(node(key), node(value)) for key, value in content.items()])
    if isinstance(content, list):
        return SequenceNode("", [node(each) for each in content])
    return ScalarNode("", content)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    [
        "null",
        "~",
        "No",
        "a: b",
        "a #b",
        "a:",
        "- a",
        "${A:-${B:-}}",
        "{}",
        "[]",
        "2024-02-01",
        "\u2028",
        "\ufeff",
        "\x7f",
    ]
)
CONTENT = st.recursive(
    TEXT, lambda inside: st.lists(inside, max_size=3) | st.dictionaries(TEXT, inside, max_size=3), max_leaves=12
)


@given(st.dictionaries(TEXT, CONTENT, min_size=1, max_size=4))
def test_written_yaml_says_what_it_was_made_of(content: dict[str, Any]) -> None:
    """For any text; and a word with another meaning in YAML is quoted."""
    text = write(node(content), {(next(iter(content)),): "why\nso"})  # type: ignore[arg-type] # it is a mapping
    assert pyyaml.load(text, pyyaml.BaseLoader) == content  # noqa: S506 -- it makes nothing but text


def test_words_that_yaml_takes_for_something_else_are_in_quotes() -> None:
    """For the gateway's reader only `null` is special; for an editor, all of them are."""
    for word in ("null", "true", "False", "off", "No", "yes", "ON", "~", ""):
        assert pyyaml.safe_load(write(node({"a": word}), {})) == {"a": word}  # type: ignore[arg-type] # a mapping


def test_a_key_that_is_a_word_of_yaml_is_a_key(tmp_path: Path) -> None:
    """With `null`, the configuration is the same as with any other key."""
    entry = "{deployment_name: a, model_name: m, endpoint: https://a.test, api_key: '%s'}"
    shown = [
        show(load(write_files(tmp_path, {"gateway.yaml": f"deployment_config: [{entry % key}]\n"}), {}))
        for key in ("null", "sesame")
    ]
    assert shown[0] == shown[1]


FIELD = st.sampled_from(["deployment_name", "model_name", "endpoint", "api_key", "api_version", "more"])
VALUE = st.sampled_from(
    [
        "gpt-4o",
        "https://a.openai.azure.com",
        "https://b.test:1/",
        "key",
        "2024-02-01",
        "${A}",
        "$$",
        "~x",
        "a/b",
        "null",
    ]
)
SOUND = st.fixed_dictionaries(
    {
        "deployment_name": st.sampled_from(["a", "b.c", "null"]),
        "model_name": st.sampled_from(["m", "${A}", "a*b", "~r", "null", "n o", "#"]),
        "endpoint": st.sampled_from(["https://a.test", "http://a.test:1", "https://[::1]:2/x", "https://a-.test"]),
    },
    optional={"api_key": st.sampled_from(["k", "l"]), "api_version": st.sampled_from(["2024-02-01", "v1", ""])},
)
ENTRIES = st.lists(SOUND, min_size=1, max_size=5) | st.lists(
    SOUND | st.dictionaries(FIELD, VALUE | CONTENT), max_size=4
)


@given(st.fixed_dictionaries({"deployment_config": ENTRIES | CONTENT}, optional={"cors": VALUE, "listen": VALUE}))
def test_any_file_loads_to_what_its_import_loads_to_or_has_mistakes(content: dict[str, Any]) -> None:
    """No file causes a traceback, and the served configuration is the printed one."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_files(Path(folder), {"gateway.yaml": write(node(content), {})})  # type: ignore[arg-type]
        try:
            made = import_go_proxy(path)
        except ConfigError:
            with pytest.raises(ConfigError):
                load(path, {})
            return
        own = write_files(Path(folder) / "own", {"gateway.yaml": write(made.root, made.comments)})
        printed = show(load(own, made.keys))
        assert show(load(path, {})) == printed
