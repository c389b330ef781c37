"""`api_version`: the version of Azure's API for each request."""

from __future__ import annotations

import pytest

from gateway import Services
from gateway.testing import FakeAzure, post, send
from plugins.api_version import ApiVersion
from tests.conftest import CHAT, StartGateway


async def test_one_version_for_all() -> None:
    """The default is the latest dated version that is generally available."""
    assert (await post(ApiVersion())).reached.target.api_version == "2024-10-21"  # type: ignore[union-attr]
    sent = await post(ApiVersion("2025-04-01-preview"))
    assert sent.reached is not None
    assert sent.reached.target.api_version == "2025-04-01-preview"


async def test_a_version_for_single_models() -> None:
    """One model may need another version than the rest."""
    stage = ApiVersion("v1", models={"gpt-4": "2024-02-01"})
    for model, version in (("gpt-4", "2024-02-01"), (" gpt-4", "2024-02-01"), ("gpt-4o", "v1")):
        sent = await post(stage, json={**CHAT, "model": model})
        assert sent.reached is not None
        assert version == sent.reached.target.api_version


async def test_a_version_for_single_operations() -> None:
    """By name or by group: the most specific one counts, before the model's."""
    stage = ApiVersion(
        "2024-10-21",
        models={"gpt-4o": "2024-02-01"},
        operations={"responses": "v1", "images.*": "2025-04-01-preview", "vector_stores.files.*": "v1"},
    )
    for method, path, version in (
        ("POST", "/responses", "v1"),
        ("GET", "/responses/resp_1", "2024-10-21"),
        ("POST", "/images/generations", "2025-04-01-preview"),
        ("GET", "/vector_stores/vs_1/files", "v1"),
        ("GET", "/vector_stores/vs_1", "2024-10-21"),
        ("POST", "/chat/completions", "2024-02-01"),
    ):
        sent = await send([stage], method, path, json=CHAT if method == "POST" else None)
        assert sent.reached is not None
        assert version == sent.reached.target.api_version, path


async def test_what_the_version_does_not_have_goes_to_one_that_has_it() -> None:
    """The first of `otherwise`; the version itself if it has the operation, or if none has."""
    stage = ApiVersion("2024-10-21", otherwise=["v1", "2025-04-01-preview"], operations={"videos.list": "2024-10-21"})
    for method, path, version in (
        ("POST", "/chat/completions", "2024-10-21"),
        ("POST", "/responses", "v1"),
        ("GET", "/chat/completions", "2025-04-01-preview"),
        ("GET", "/videos", "2024-10-21"),
        ("POST", "/videos", "v1"),
        ("POST", "/moderations", "2024-10-21"),
        ("GET", "/nonsense", "2024-10-21"),
    ):
        sent = await send([stage], method, path, json=CHAT if method == "POST" else None)
        assert sent.reached is not None
        assert version == sent.reached.target.api_version, path
    sent = await send([ApiVersion("v1", otherwise=["v1"])], "GET", "/threads/t")
    assert sent.reached.target.api_version == "v1"  # type: ignore[union-attr]


async def test_an_operation_s_name_must_be_one() -> None:
    """`gateway check` reports each name that is not an operation."""
    names = ["responses", "responses.*", "moderations", "vector_stores.files.*", "embeddings.*", "chat.*"]
    assert list(ApiVersion(operations=dict.fromkeys(names, "v1")).check(Services("t", "s"))) == []
    names = ["/v1/files", "files.", "*", "responsess.*", "file.*"]
    stage = ApiVersion(operations=dict.fromkeys(names, "v1"))
    assert [path for path, _ in stage.check(Services("t", "s"))] == [
        ("operations", "/v1/files"),
        ("operations", "files."),
        ("operations", "*"),
        ("operations", "responsess.*"),
        ("operations", "file.*"),
    ]


async def test_no_body_is_read_where_no_model_has_a_version() -> None:
    """The stage reads the body only if it needs the model."""
    sent = await post(ApiVersion(), body=b"not json")
    assert sent.status == 200


@pytest.mark.parametrize("query", ["api-version=1999-01-01", "api-version=a&api-version=b", "API%2DVersion=x&a=1"])
async def test_the_client_s_own_version_never_doubles_it(
    query: str, start_gateway: StartGateway, azure: FakeAzure
) -> None:
    """Azure gets exactly one api-version, the configured one; other parameters pass through."""
    gateway = await start_gateway(azure.endpoint)
    async with gateway.session.post(
        f"{gateway.url}/v1/chat/completions?{query}", json=CHAT, headers={"api-key": "azure-key"}
    ) as answer:
        assert answer.status == 200
    names = [name.lower() for name, _ in azure.requests[0].query]
    assert names.count("api-version") == 1
    assert ("a" in names) == ("a=1" in query)
