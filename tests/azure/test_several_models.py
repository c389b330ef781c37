"""Requests that name several models: every one is mapped. Batch files are in test_batch_files."""

from __future__ import annotations

from tests.azure.test_deployment_field import V1, azure
from tests.conftest import StartGateway


async def test_every_model_of_an_evaluation(start_gateway: StartGateway) -> None:
    """Those of graders, even nested ones, and of the data source are mapped; a field `model` in the data stays."""
    async with azure() as fake:
        gateway = await start_gateway(fake.endpoint, V1)
        item = {"item": {"model": "gpt-4o"}}
        criteria = [
            {"type": "label_model", "model": "gpt-4o"},
            {"type": "multi", "graders": {"a": {"type": "score_model", "model": "gpt-4o"}}},
            {"type": "string_check", "name": "n"},
        ]
        async with gateway.post("/v1/evals", {"testing_criteria": criteria, "data_source_config": item}) as answer:
            assert answer.status == 200
        seen = fake.requests[0].json()
        assert seen["testing_criteria"][0]["model"] == "prod-4o"
        assert seen["testing_criteria"][1]["graders"]["a"]["model"] == "prod-4o"
        assert seen["data_source_config"] == item
        source = {"type": "completions", "model": "gpt-4o", "source": {"content": [item]}}
        async with gateway.post("/v1/evals/eval_1/runs", {"data_source": source}) as answer:
            assert answer.status == 200
        assert fake.requests[1].json() == {"data_source": {**source, "model": "prod-4o"}}
        async with gateway.post("/v1/evals", {"testing_criteria": [{"type": "label_model", "model": "no"}]}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (404, "model_not_found")
