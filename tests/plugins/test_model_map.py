"""`model_map`: maps the requested model to a deployment."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest

from gateway.auth.credentials import ListedKey, key_digest
from gateway.azure.resources import Resource
from gateway.services import Services
from gateway.testing import FakeAzure, post, send
from plugins.auth_keys import AuthKeys
from plugins.model_map import ModelMap
from tests.conftest import CHAT, YAML, StartGateway

RESOURCES = {name: Resource(name, f"https://{name}.invalid") for name in ("east", "west")}


async def deployment(stage: ModelMap, model: str, **more: Any) -> str:
    sent = await post(stage, json={**CHAT, "model": model}, **more)
    if sent.reached is None:
        return str(sent.status)
    target = sent.reached.target
    assert target.resource is not None
    return f"{target.resource.name}/{target.deployment}"


def findings(stage: ModelMap, **more: Any) -> list[str]:
    services = Services("t", "model_map", {"azure": Resource("azure", "https://x")}, Resource("azure", "https://x"))
    return [f"{'.'.join(map(str, path))}: {message}" for path, message in stage.check(more.get("services", services))]


async def test_exact_names_then_patterns_in_order() -> None:
    """Exact names come first; globs and expressions count in the order of the file."""
    stage = ModelMap(
        {
            "gpt-4o-*": "glob",
            r"~gpt-(\d)\.(\d)-(?P<kind>\w+)": r"prod-\1\2-\g<kind>",
            "~gpt-.*": "late",
            "gpt-4o-mini": "exact",
            "o[13]": "class",
        }
    )
    for model, wanted in (
        ("gpt-4o-mini", "exact"),
        ("gpt-4o-2024-08-06", "glob"),
        ("gpt-3.5-turbo", "prod-35-turbo"),
        ("gpt-anything", "late"),
        ("o1", "class"),
        (" gpt-4o-mini ", "exact"),
    ):
        assert f"azure/{wanted}" == await deployment(stage, model), model


async def test_a_group_cannot_make_a_name_that_is_none() -> None:
    """An expression turns a client's text into a valid deployment name, or the model is a 404."""
    stage = ModelMap({"~x-(.*)": r"\1"})
    assert await deployment(stage, "x-ok") == "azure/ok"
    for model in ("x-../../admin", "x-a/b", "x-", "x-" + "a" * 65, "x-a?b", "x-a%2fb"):
        assert await deployment(stage, model) == "404"


@pytest.mark.parametrize(
    ("stage", "wanted"),
    [
        (ModelMap(), "azure/gpt-35-turbo"),
        (ModelMap(unmapped="own_name"), "azure/gpt-3.5-turbo"),
        (ModelMap(unmapped="refuse"), "404"),
        (ModelMap(default="catch-all"), "azure/catch-all"),
        (ModelMap(default="catch-all", unmapped="refuse"), "azure/catch-all"),
    ],
)
async def test_what_an_unmapped_model_does_is_a_setting(stage: ModelMap, wanted: str) -> None:
    """Its own name without dots or unchanged, a default deployment, or a 404."""
    assert wanted == await deployment(stage, "gpt-3.5-turbo")


async def test_a_refusal_names_the_model_and_what_is_mapped() -> None:
    """A 404 `model_not_found` in OpenAI's shape."""
    sent = await post(ModelMap({"gpt-4": "a", "o*": "b"}, unmapped="refuse"), json={**CHAT, "model": "gpt-5"})
    error = sent.json()["error"]
    assert (sent.status, error["code"], error["param"]) == (404, "model_not_found", "model")
    for name in ("gpt-5", "gpt-4", "o*"):
        assert name in error["message"]


async def test_deployments_of_other_resources() -> None:
    """`RESOURCE/NAME` goes there; a bare name goes to the team's resource."""
    stage = ModelMap({"a": "west/dep", "b": "east/dep", "~c-(.+)": r"west/\1"}, unmapped="refuse")
    for model, wanted in (("a", "west/dep"), ("b", "east/dep"), ("c-x", "west/x")):
        assert wanted == await deployment(stage, model, resources=RESOURCES)


async def test_pairs_in_one_text() -> None:
    """As in the environment variable of the Go proxy; spaces are ignored."""
    stage = ModelMap(" gpt-3.5-turbo = xc-gpt-35 , gpt-4=my-gpt4,")
    assert findings(stage) == []
    assert await deployment(stage, "gpt-3.5-turbo") == "azure/xc-gpt-35"
    assert await deployment(stage, "gpt-4") == "azure/my-gpt4"


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (ModelMap("gpt-4=a,gpt-4o"), "'gpt-4o' is not model=deployment"),
        (ModelMap("a=b=c"), "'a=b=c' is not model=deployment"),
        (ModelMap("a=b,,c=d"), "'' is not model=deployment"),
        (ModelMap("=b"), "both need a name"),
        (ModelMap({"a": " "}), "both need a name"),
        (ModelMap({"gpt-4": "a", " gpt-4 ": "b"}), "'gpt-4' is listed twice"),
        (ModelMap("gpt-4=a, gpt-4=b"), "'gpt-4' is listed twice"),
        (ModelMap({"a": "b/c"}), "there is no resource 'b'"),
        (ModelMap({"a": "../x"}), "no resource '..'"),
        (ModelMap({"a": "x y"}), "is not a valid deployment name"),
        (ModelMap({"~(": "a"}), "is invalid"),
        (ModelMap({"~a": r"x-\1"}), "group"),
        (ModelMap(default="a b"), "is not a valid deployment name"),
    ],
)
def test_mistakes_are_found_at_load(stage: ModelMap, words: str) -> None:
    """Each with an explanation."""
    found = findings(stage)
    assert len(found) == 1
    assert words in found[0]


def test_a_bare_deployment_needs_a_resource_where_there_are_several() -> None:
    """The stage does not guess."""
    services = Services("t", "model_map", RESOURCES, None)
    assert "names no resource" in findings(ModelMap({"a": "b"}, unmapped="refuse"), services=services)[0]


async def test_models_are_listed_from_the_map() -> None:
    """Exact names and the names in `list:`; never a pattern."""
    stage = ModelMap({"gpt-4": "a", "gpt-4o-*": "b", "~x": "c", "a=b": "d"}, list=["gpt-4o-mini", "gpt-4"])
    sent = await send([stage], "GET", "/models")
    body = sent.json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == ["gpt-4", "a=b", "gpt-4o-mini"]
    assert {"id", "object", "created", "owned_by"} == set(body["data"][0])


async def test_one_model() -> None:
    """A model with a target is found, whatever its mapping; one without is a 404."""
    stage = ModelMap({"gpt-4": "a", "ft:*": "b"}, unmapped="refuse")
    for name, status in (("gpt-4", 200), ("ft%3Ax", 200), ("gpt-5", 404)):
        sent = await send([stage], "GET", f"/models/{name}")
        assert status == sent.status
    assert (await send([stage], "GET", "/models/ft%3Ax")).json()["id"] == "ft:x"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"{}", b'{"model": 1}', b'{"model": null}', b'{"model": ""}', b"null"]
)
async def test_bodies_without_a_model_are_400s(body: bytes) -> None:
    """In OpenAI's shape, with the missing field."""
    sent = await post(ModelMap(), body=body)
    assert sent.status == 400
    assert sent.reached is None


@pytest.mark.parametrize("model", ["west/gpt-4", "team-west/gpt-4", "/gpt-4"])
async def test_a_client_never_chooses_the_resource(model: str) -> None:
    """`RESOURCE/` counts in the configuration, never in a client's model."""
    for stage in (ModelMap(), ModelMap(unmapped="own_name"), ModelMap({"~team-(.+)": r"\1", "*": "east/x"})):
        found = await deployment(stage, model, resources=RESOURCES, resource="east")
        assert found in ("404", "east/x")


def test_unmapped_models_need_a_resource_too() -> None:
    """With several resources and none for the team, an unmapped model has no target."""
    services = Services("t", "model_map", RESOURCES, None)
    assert "have no resource" in findings(ModelMap({"a": "east/b"}), services=services)[0]
    assert not findings(ModelMap({"a": "east/b"}, unmapped="refuse"), services=services)


async def test_a_team_has_its_own_models() -> None:
    """A model that is not in `allow`, or is in `deny`, is a 404 like an unknown one."""
    stage = ModelMap({"gpt-4o": "a", "gpt-4o-mini": "b", "o3": "c"}, allow=["gpt-4o*", "~o\\d"], deny=["gpt-4o-mini"])
    assert await deployment(stage, "gpt-4o") == "azure/a"
    assert await deployment(stage, "o3") == "azure/c"
    assert await deployment(stage, "gpt-4o-mini") == "404"
    assert await deployment(stage, "gpt-4") == "404"
    sent = await post(stage, json={**CHAT, "model": "gpt-4o-mini"})
    assert b"available models: gpt-4o, o3" in sent.body
    assert b"model_not_found" in sent.body


async def test_the_list_shows_what_may_be_used() -> None:
    """`/v1/models` has the team's models and no others."""
    stage = ModelMap({"gpt-4o": "a", "o3": "c"}, list=["gpt-5"], deny=["o3"])
    listed = (await send([stage], "GET", "/models")).body
    assert b"gpt-4o" in listed
    assert b"gpt-5" in listed
    assert b"o3" not in listed
    assert (await send([stage], "GET", "/models/gpt-4o")).status == 200
    assert (await send([stage], "GET", "/models/o3")).status == 404


async def test_a_key_s_own_models_narrow_the_team_s() -> None:
    """From the stage that authenticates; they never extend the team's models."""
    keys = [ListedKey(key_digest("K"), models=("gpt-4o", "o3"))]
    stages = [AuthKeys(), ModelMap({"gpt-4o": "a", "gpt-4": "b", "o3": "c"}, deny=["o3"])]
    more: Any = {"headers": {"api-key": "K"}, "keys": keys}
    listed = (await send(stages, "GET", "/models", **more)).body
    assert b'"gpt-4o"' in listed
    assert b'"gpt-4"' not in listed
    for model, status in (("gpt-4o", 200), ("gpt-4", 404), ("o3", 404)):
        assert (await post(*stages, json={**CHAT, "model": model}, **more)).status == status


@pytest.mark.parametrize(
    ("stage", "model"),
    [
        *[(ModelMap(deny=["gpt-3.5-turbo"]), name) for name in ("gpt-3.5-turbo", "gpt-35-turbo", "GPT-35-turbo")],
        (ModelMap(deny=["gpt-4*"]), "GPT-4o"),
        (ModelMap(deny=["gpt-35*"]), "gpt-3.5-turbo"),
        (ModelMap(deny=["~gpt-4.*"]), "GPT-4o"),
        (ModelMap({"~(.+)": r"\1"}, deny=["gpt-4o"]), "GPT-4o"),
        (ModelMap({"gpt-4o": "gpt4o-prod"}, deny=["gpt-4o"]), "gpt4o-prod"),
        (ModelMap({"gpt-4o": "gpt4o-prod"}, deny=["gpt-4o"]), "GPT4o-prod"),
        (ModelMap({"mini": "gpt-4o-mini"}, deny=["mini"]), "gpt-4o-mini"),
        (ModelMap({"~gpt-(.+)": r"prod-\1"}, deny=["gpt-4o"]), "prod-4o"),
        (ModelMap({"gpt-4o*": "big"}, deny=["gpt-4o*"]), "BIG"),
        (ModelMap(deny=["gpt-4[.]1*"]), "GPT-4.1-mini"),
    ],
    ids=lambda each: each if isinstance(each, str) else str(each.deny),
)  # fmt: skip
async def test_no_spelling_gets_round_a_denial(stage: ModelMap, model: str) -> None:
    """Azure ignores the case; dots may be left out; and clients may use a deployment's own name."""
    assert await deployment(stage, model) == "404"
    assert await deployment(stage, "other") == "azure/other"


@pytest.mark.parametrize(("denied", "model"), [("gpt-4.*", "gpt-4o"), ("gpt-4.*", "gpt-4"), ("~gpt-4\\..*", "gpt-4o")])
async def test_a_denial_is_of_what_it_names(denied: str, model: str) -> None:
    """Dots in a pattern match dots."""
    assert await deployment(ModelMap(deny=[denied]), "gpt-4.1") == "404"
    assert await deployment(ModelMap(deny=[denied]), model) == f"azure/{model}"


async def test_the_default_s_deployment_is_not_what_is_denied() -> None:
    """Other models use it, too."""
    stage = ModelMap(default="big", deny=["gpt-4o"])
    assert await deployment(stage, "gpt-4o") == "404"
    assert await deployment(stage, "o3") == "azure/big"


def test_a_wrong_expression_in_a_list_is_found_when_loaded() -> None:
    """With its index in the list."""
    assert findings(ModelMap(allow=["a", "~("]))[0].startswith("allow.1: the regular expression '('")
    assert findings(ModelMap(deny=["~["]))[0].startswith("deny.0: the regular expression '['")


@pytest.mark.parametrize(("model", "status"), [("gpt-4o", 200), ("o3", 404)])
async def test_a_model_cannot_come_in_by_the_lines_of_a_batch(
    model: str, status: int, start_gateway: StartGateway, azure: FakeAzure
) -> None:
    """Every part of a request that names a model is checked."""
    yaml = YAML.replace("{unmapped: own_name_without_dots}", "{deny: [o3]}")
    gateway = await start_gateway(azure.endpoint, yaml)
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {**CHAT, "model": model}}
    form = aiohttp.FormData({"purpose": "batch"})
    form.add_field("file", json.dumps(line).encode(), filename="batch.jsonl", content_type="application/jsonl")
    async with gateway.post("/v1/files", None, data=form) as answer:
        assert answer.status == status, await answer.text()
