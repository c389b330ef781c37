"""`parameters`: renames or removes parameters that the base model or the api-version rejects."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from gateway import Response
from gateway.azure.resources import Resource
from gateway.config import load
from gateway.errors import ConfigError
from gateway.services import Services
from gateway.testing import FakeAzure, Sent, send
from gateway.testing.azure import Seen
from plugins.api_version import ApiVersion
from plugins.model_map import ModelMap
from plugins.parameters import Parameters, Rule, base_model
from tests.conftest import CHAT, KEY, YAML, StartGateway, write_files

PATHS = {
    "chat.completions": "/chat/completions", "completions": "/completions", "responses": "/responses",
    "embeddings": "/embeddings",
}  # fmt: skip


async def through(
    stage: Parameters, fields: dict[str, Any], *, model: str = "gpt-4o", version: str = "v1",
    operation: str = "chat.completions", models: dict[str, str] | None = None, **more: Any,
) -> Sent:  # fmt: skip
    stages = [ModelMap(models or {}, unmapped="own_name"), ApiVersion(version), stage]
    return await send(stages, "POST", PATHS[operation], json={"model": model, **fields}, **more)


async def reached(stage: Parameters, fields: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return the fields that reach Azure, as in YAML."""
    sent = await through(stage, fields, **more)
    assert sent.reached is not None
    return {name: value for name, value in (await sent.reached.json()).items() if name != "model"}


@pytest.mark.parametrize(
    ("model", "reasons"),
    [
        ("o1", True), ("o1-mini", True), ("o3", True), ("o3-mini", True), ("o3-deep-research", True),
        ("o4-mini", True), ("gpt-5", True), ("gpt-5-mini", True), ("gpt-5-nano-2025-08-07", True), ("gpt-5.1", True),
        ("gpt-5.1-chat", True), ("gpt-5.2-chat", True), ("gpt-5-pro", True), ("gpt-5.1-codex-max", True),
        ("codex-mini", True), ("gpt-chat-latest", True),
        ("gpt-5-chat", False), ("gpt-5-chat-latest", False), ("gpt-4o", False), ("gpt-4.1", False),
        ("gpt-4.5-preview", False), ("gpt-3.5-turbo", False), ("gpt-oss-120b", False), ("Llama-3", False),
        ("phi-3o1", False),
    ],
)  # fmt: skip
async def test_reasoning_models_get_no_sampling(model: str, reasons: bool) -> None:
    """Their limit has another name, and rejected parameters are removed; `gpt-5-chat` is not one of them."""
    sampling = {
        "temperature": 0.5, "top_p": 0.5, "presence_penalty": 1, "frequency_penalty": 1, "logprobs": True,
        "top_logprobs": 2, "logit_bias": {"50256": -100},
    }  # fmt: skip
    given_fields = {**sampling, "max_tokens": 5, "stop": None, "n": 1}
    kept = {"max_completion_tokens": 5, "stop": None, "n": 1}
    assert await reached(Parameters(), given_fields, model=model) == (kept if reasons else given_fields)


async def test_each_operation_has_its_own_rules() -> None:
    """The Responses API's limit is `max_output_tokens` for all models; completions keep `max_tokens`."""
    for operation, asked, wanted in (
        ("responses", {"max_output_tokens": 5, "temperature": 1, "top_p": 1, "top_logprobs": 1}, ["max_output_tokens"]),
        ("completions", {"max_tokens": 5, "temperature": 1}, ["max_tokens", "temperature"]),
        ("embeddings", {"input": "x", "dimensions": 3}, ["input", "dimensions"]),
    ):
        assert list(await reached(Parameters(), asked, model="gpt-5", operation=operation)) == wanted


async def test_parallel_tool_calls_of_models_that_make_one() -> None:
    """Removed for the o-series and the pro models; the others support it."""
    for model, operation, there in (
        ("o3-mini", "chat.completions", False),
        ("gpt-5-pro", "responses", False),
        ("gpt-5", "chat.completions", True),
        ("gpt-4o", "chat.completions", True),
    ):
        fields = await reached(Parameters(), {"parallel_tool_calls": True}, model=model, operation=operation)
        assert ("parallel_tool_calls" in fields) is there, model


NEWER = {
    "stream_options": {"include_usage": True}, "parallel_tool_calls": False, "store": True, "metadata": {"a": "b"},
    "reasoning_effort": "low", "prediction": {"type": "content", "content": "x"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("version", "left_out"),
    [
        ("2024-02-01", set(NEWER)),
        ("2024-08-01-preview", set(NEWER)),
        ("2024-09-01-preview", {"store", "metadata", "reasoning_effort", "prediction"}),
        ("2024-10-21", {"store", "metadata", "reasoning_effort", "prediction"}),
        ("2024-12-01-preview", {"prediction"}),
        ("2025-01-01-preview", set()),
        ("v1", set()),
    ],
)
async def test_an_api_version_gets_what_it_knows(version: str, left_out: set[str]) -> None:
    """By the first version with a parameter; v1 has all."""
    assert set(NEWER) - set(await reached(Parameters(), NEWER, version=version)) == left_out


async def test_what_would_change_the_answer_s_kind_is_azure_s_to_refuse() -> None:
    """Its error explains it; a response of another kind would not."""
    fields = {"audio": {"voice": "x"}, "modalities": ["audio"], "response_format": {"type": "json_object"}, "tools": []}
    assert await reached(Parameters(), fields, version="2024-02-01") == fields


async def test_the_limit_before_it_had_its_new_name() -> None:
    """`max_completion_tokens` becomes `max_tokens` at an old api-version, except for reasoning models."""
    for model, name in (("gpt-4o", "max_tokens"), ("o3-mini", "max_completion_tokens")):
        fields = await reached(Parameters(), {"max_completion_tokens": 7}, model=model, version="2024-06-01")
        assert fields == {name: 7}
    fields = await reached(Parameters(), {"max_completion_tokens": 7}, version="2024-10-21")
    assert fields == {"max_completion_tokens": 7}


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({"max_tokens": 1, "max_completion_tokens": 2}, {"max_completion_tokens": 2}),
        ({"max_completion_tokens": 2, "max_tokens": 1}, {"max_completion_tokens": 2}),
        ({"max_completion_tokens": None, "max_tokens": 1}, {"max_completion_tokens": 1}),
        ({"max_tokens": 1, "max_completion_tokens": None}, {"max_completion_tokens": 1}),
        ({"max_tokens": None}, {"max_completion_tokens": None}),
    ],
)
async def test_of_both_names_the_known_one_stays(asked: dict[str, Any], wanted: dict[str, Any]) -> None:
    """In any order; a null is not a limit."""
    assert await reached(Parameters(), asked, model="gpt-5") == wanted


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("prod-gpt-5-mini", "gpt-5-mini"), ("gpt5-mini", "gpt-5-mini"), ("xc_GPT4o_eu", "gpt-4o-eu"),
        ("gpt-51-chat", "gpt-51-chat"), ("my-o3", "o3"), ("o1mini", None), ("proto3", None), ("o365", None),
        ("chat", None), ("gpt-image-1", None), ("gpt-oss-20b", "gpt-oss-20b"), ("", None),
    ],
)  # fmt: skip
def test_what_a_name_tells(name: str, expected: str | None) -> None:
    """From the beginning of the model; also without dots, as in Azure's older names."""
    assert base_model(name) == expected


async def test_whose_name_counts() -> None:
    """From `base_models`: a resource's deployment, any deployment, or a model; then from the two names."""
    resources = {name: Resource(name, f"https://{name}.invalid") for name in ("east", "west")}
    stage = Parameters(base_models={"told": "gpt-5-mini", "west/gpt-5": "gpt-4o", "alias": "o3", "gpt-5-not": "gpt-4o"})
    models = {"gpt-5": "gpt-4o-prod", "a": "told", "alias": "chat", "b": "west/gpt-5", "c": "gpt-5-not", "gpt-5.1": "x"}
    for model, reasons in (
        ("gpt-5", False), ("a", True), ("alias", True), ("b", False), ("c", False), ("gpt-5.1", True), ("none", False),
    ):  # fmt: skip
        more: dict[str, Any] = {"model": model, "models": models, "resources": resources, "resource": "east"}
        assert await reached(stage, {"temperature": 1}, **more) == ({} if reasons else {"temperature": 1}), model


async def test_rules_go_above_the_table() -> None:
    """A later rule overrides an earlier one; each for its models and operations."""
    rules = [
        Rule("gpt-oss-*", rename={"max_tokens": "max_completion_tokens"}, drop=["temperature"]),
        Rule("gpt-5.1*", keep=["temperature", "top_p"]),
        Rule("GPT-5.1-chat*", drop=["top_p", "user"], operations=["chat.completions"]),
        Rule("o3*", rename={"max_completion_tokens": "max_tokens"}),
        Rule("Llama*", drop=["seed"]),
        Rule("gpt-4.1", drop=["user", "seed"]),
        Rule("gpt-4.1", rename={"seed": "user"}),
    ]
    asked = {"max_tokens": 5, "temperature": 1, "top_p": 1, "user": "u", "seed": 1}
    for model, operation, wanted in (
        ("gpt-oss-120b", "chat.completions", {"max_completion_tokens", "top_p", "user", "seed"}),
        ("gpt-oss-120b", "completions", set(asked)),
        ("gpt-5.1", "chat.completions", {"max_completion_tokens", "temperature", "top_p", "user", "seed"}),
        ("gpt-5.1-chat", "chat.completions", {"max_completion_tokens", "temperature", "seed"}),
        ("gpt-5.1-chat", "responses", set(asked)),
        ("o3", "chat.completions", {"max_tokens", "user", "seed"}),
        ("Llama-4", "chat.completions", set(asked) - {"seed"}),
        ("gpt-4.1", "chat.completions", set(asked) - {"seed"}),
    ):
        found = await reached(Parameters(rules=rules), asked, model=model, operation=operation)
        assert set(found) == wanted, model


def test_mistakes_are_found_at_load() -> None:
    """With the location of each."""
    rules = [
        Rule("a"),
        Rule("b", drop=["x"], keep=["x"]),
        Rule("c", drop=["x"], operations=["chat", "responses"]),
        Rule("d", rename={"x": "y", "y": "x"}),
        Rule("e", drop=["model"]),
        Rule("gpt-oss-*", rename={"max_tokens": "max_completion_tokens"}, keep=["temperature"]),
        Rule("~gpt-.*", drop=["x"]),
        Rule("gpt-[4", drop=["x"]),
        Rule("f", rename={"user": "model"}),
        Rule("g", rename={"a": "c", "b": "c"}),
    ]
    stage = Parameters(base_models={"north/x": "gpt-5", "x": " ", "east/y": "o1"}, rules=rules)
    services = Services("t", "parameters", {"east": Resource("east", "https://x")})
    assert list(stage.check(services)) == [
        (("base_models", "north/x"), "there is no resource 'north' for 'north/x'; there is east"),
        (("base_models", "x"), "x:   is not `deployment: base model`; both need a name"),
        (("rules", 0), "the rule for 'a' is empty; add rename, drop or keep"),
        (("rules", 1), "the rule for 'b' has 'x' twice"),
        (
            ("rules", 2, "operations"),
            "'chat' is not an operation with parameters: chat.completions, completions, responses, embeddings",
        ),
        (("rules", 3, "rename", "x"), "'x' cannot be renamed to 'y', which is itself renamed"),
        (("rules", 3, "rename", "y"), "'y' cannot be renamed to 'x', which is itself renamed"),
        (("rules", 4), "'model' is not a parameter that a rule may change"),
        (
            ("rules", 6, "models"),
            "'~gpt-.*' is not a valid glob, such as gpt-oss-*; rules do not support regular expressions",
        ),
        (
            ("rules", 7, "models"),
            "'gpt-[4' is not a valid glob, such as gpt-oss-*; rules do not support regular expressions",
        ),
        (
            ("rules", 8, "rename", "user"),
            "'user' cannot be renamed to 'model', which is a required field or the new name of two parameters",
        ),
        (
            ("rules", 9, "rename", "a"),
            "'a' cannot be renamed to 'c', which is a required field or the new name of two parameters",
        ),
        (
            ("rules", 9, "rename", "b"),
            "'b' cannot be renamed to 'c', which is a required field or the new name of two parameters",
        ),
    ]


def test_a_mistake_has_its_place_in_the_file(tmp_path: Path) -> None:
    """Line and column; the documented example has no mistake."""
    yaml = (
        "resources: {a: https://x.openai.azure.com}\npipeline:\n  - auth_passthrough\n  - model_map\n  - api_version\n"
    )
    good = yaml + "  - parameters: {header: true, rules: [{models: 'x*', drop: [user]}], base_models: {chat: gpt-5}}\n"
    load(write_files(tmp_path, {"gateway.yaml": good}), {})
    section = (Path(__file__).parents[2] / "docs" / "stages.md").read_text().partition("## `parameters`")[2]
    documented = section.partition("```yaml\n")[2].partition("```")[0]
    two = yaml.replace(
        "{a: https://x.openai.azure.com}", "{a: https://x.openai.azure.com, west: https://y.openai.azure.com}"
    )
    load(write_files(tmp_path, {"gateway.yaml": two.replace("pipeline", "resource: a\npipeline") + documented}), {})
    with pytest.raises(ConfigError, match=r"gateway.yaml:8:9: stage 'parameters': the rule for 'x\*' is empty"):
        load(write_files(tmp_path, {"gateway.yaml": yaml + "  - parameters:\n      rules:\n      - models: x*\n"}), {})
    with pytest.raises(ConfigError, match="needs"):
        load(
            write_files(tmp_path, {"gateway.yaml": yaml.replace("  - model_map", "  - parameters\n  - model_map")}), {}
        )


async def test_what_a_rule_drops_is_dropped_under_its_old_name_too() -> None:
    """A later rule overrides the table's renaming."""
    stage = Parameters(rules=[Rule("*", drop=["max_completion_tokens"])])
    assert await reached(stage, {"model": "o3", "max_tokens": 5, "user": "u"}) == {"user": "u"}


async def test_base_models_are_read_like_deployments() -> None:
    """In any spelling; `-prod` is not `-pro`."""
    for base in ("gpt5-mini", "GPT-5-mini", "prod_gpt-5-mini"):
        stage = Parameters(base_models={"gpt-4o": base})
        assert await reached(stage, {"model": "gpt-4o", "temperature": 1}) == {}
    for model, kept in (("gpt-5-mini-prod", True), ("gpt-5-project-x", True), ("gpt-5-pro", False)):
        found = await reached(Parameters(), {"model": model, "parallel_tool_calls": False})
        assert ("parallel_tool_calls" in found) is kept, model


async def test_what_was_changed_is_seen() -> None:
    """In the log event and, if enabled, in a response header; names, never values."""
    fields = {"max_tokens": 12345, "temperature": 0.125}
    changes = ["max_tokens: renamed max_completion_tokens", "temperature: dropped"]
    for header in (False, True):
        for answer in (Response(200, b"{}"), Response(429, b"{}"), RuntimeError("a stage below")):
            sent = await through(Parameters(header=header), fields, model="gpt-5", response=answer)
            assert sent.reached is not None
            assert sent.reached.notes["adapted"] == changes
            assert sent.outcome.counts == {"Parameters": 1}
            assert sent.headers.get("x-gateway-adapted") == (", ".join(changes) if header else None)
    sent = await through(Parameters(header=True), {"n": 1}, model="gpt-5")
    assert sent.reached is not None
    assert "adapted" not in sent.reached.notes
    assert "x-gateway-adapted" not in sent.headers


async def test_a_request_that_needs_no_change_keeps_its_bytes() -> None:
    """Byte for byte, with duplicate names, odd numbers and spaces; also if a message mentions parameters."""
    for body in (
        b' {"model": "gpt-5", "a": 1.50, "a": 1e400 , "messages": [{"content": "\\"temperature\\": 1", "top_p": 2}]} ',
        b'{"model": "gpt-5", "t": "\\ud83d"}',
    ):
        stages = [ModelMap(), ApiVersion("v1"), Parameters()]
        sent = await send(stages, "POST", "/chat/completions", body=body)
        assert sent.reached is not None
        assert await sent.reached.body() == body


async def test_other_operations_are_not_read() -> None:
    """A form, or a body that is not JSON, streams through."""
    for path in ("/files", "/images/generations", "/nonsense"):
        sent = await send([Parameters()], "POST", path, body=b"no JSON, temperature")
        assert sent.status == 200


numbers = st.sampled_from([b"1.50", b"1e400", b"123456789012345678901234567890", b"-0.0", b"1E+2"])
texts = st.sampled_from([b'"a\\u0041"', b'"\\/"', '"ü"'.encode(), b'""'])
values = st.recursive(
    st.one_of(numbers, texts, st.just(b"null"), st.just(b"true")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda parts: b"[ " + b" ,".join(parts) + b"]"),
        inner.map(lambda part: b'{"temperature" :' + part + b"}"),
    ),
    max_leaves=6,
)
parameters = st.dictionaries(
    st.sampled_from(["temperature", "max_tokens", "messages", "x", "top_p", "max_completion_tokens"]), values
)


@given(parameters)
def test_all_other_values_keep_their_bytes(fields: dict[str, bytes]) -> None:
    """Of any type, and in their order."""
    body = b'{"model" : "gpt-5", ' + b"".join(b'"%b":\t%b ,' % (n.encode(), v) for n, v in fields.items()) + b'"z":0}'
    sent = asyncio.run(send([ModelMap(), ApiVersion("v1"), Parameters()], "POST", "/chat/completions", body=body))
    assert sent.reached is not None
    seen = asyncio.run(sent.reached.body())
    if not {"temperature", "top_p", "max_tokens"} & set(fields):
        assert seen == body
        return
    found = {name: bytes(raw) for name, raw in msgspec.json.decode(seen, type=dict[str, msgspec.Raw]).items()}
    kept = {name: value for name, value in fields.items() if name not in ("temperature", "top_p", "max_tokens")}
    limit = kept.get("max_completion_tokens", b"null")
    if "max_tokens" in fields and limit == b"null":
        kept["max_completion_tokens"] = fields["max_tokens"]
    assert found == {"model": b'"gpt-5"', **kept, "z": b"0"}


async def refusing(seen: Seen, _: web.BaseRequest) -> web.StreamResponse | None:
    """Reject what Azure rejects, with its messages."""
    body = seen.json()
    if dict(seen.query)["api-version"] < "2024-09-01" and "stream_options" in body:
        message = "Unrecognized request argument supplied: stream_options"
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        return web.json_response({"error": error}, status=400)
    for name in ("max_tokens", "temperature") if "/gpt-5-prod/" in seen.path else ():
        if name in body:
            message = f"Unsupported parameter: '{name}' is not supported with this model."
            error = {
                "message": message, "type": "invalid_request_error", "param": name, "code": "unsupported_parameter",
            }  # fmt: skip
            return web.json_response({"error": error}, status=400)
    return None


async def test_openai_python_works_with_what_azure_refuses(start_gateway: StartGateway) -> None:
    """`max_tokens` to gpt-5 and `stream_options` to an old api-version: a 400 without the stage, a 200 with it."""
    mapped = YAML.replace("{unmapped: own_name_without_dots}", "{models: {gpt-5: gpt-5-prod}}")
    async with FakeAzure(deployments=("gpt-5-prod", "gpt-4o"), respond=refusing) as azure:
        for stage in ("", "  - parameters: {header: true}\n"):
            gateway = await start_gateway(azure.endpoint, mapped.replace("2024-10-21", "2024-06-01") + stage)
            async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{gateway.url}/v1", max_retries=0) as client:
                for more in (
                    {"model": "gpt-5", "max_tokens": 50, "temperature": 0.5},
                    {"model": "gpt-4o", "stream": True, "stream_options": {"include_usage": True}},
                ):
                    call = client.chat.completions.create(messages=CHAT["messages"], **more)  # type: ignore[call-overload]
                    if not stage:
                        with pytest.raises(openai.BadRequestError, match=r"max_tokens|stream_options"):
                            await call
                        continue
                    answer = await call
                    if "stream" in more:
                        assert "".join([c.choices[0].delta.content or "" async for c in answer if c.choices])
                    else:
                        assert answer.choices[0].message.content == "Hello there!"
            if stage:
                assert azure.requests[-2].json()["max_completion_tokens"] == 50
                await gateway.idle()
                assert [event.get("adapted") for event in gateway.exchanges()] == [
                    ["max_tokens: renamed max_completion_tokens", "temperature: dropped"],
                    ["stream_options: dropped"],
                ]
