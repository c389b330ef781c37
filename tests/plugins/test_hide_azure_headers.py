"""`hide_azure_headers`: responses do not show where in Azure they come from."""

from __future__ import annotations

import pytest

from gateway import ApiError, Headers, Response
from gateway.testing import post
from plugins.hide_azure_headers import HideAzureHeaders

# The fields of a true answer of 2026-03.
AZURE = {
    "Content-Type": "application/json",
    "apim-request-id": "f93b3050-42ab-44dd-936f-7bc80fba2799",
    "azureml-model-session": "d20260330170902-0e618f323d34",
    "skip-error-remapping": "true",
    "x-accel-buffering": "no",
    "x-content-type-options": "nosniff",
    "X-MS-Deployment-Name": "openllmetry-testing",
    "x-ms-is-spilled-over": "false",
    "x-ms-rai-invoked": "true",
    "x-ms-region": "East US 2",
    "x-ratelimit-abusepenalty-active": "False",
    "x-ratelimit-limit-requests": "120",
    "x-ratelimit-remaining-tokens": "119986",
    "x-request-id": "13ca6804-8e49-485c-a60b-559c68c76671",
    "retry-after-ms": "5",
}


async def test_what_tells_the_region_the_deployment_or_the_machines_is_gone() -> None:
    """Headers that clients use stay; counted once for a response, also for errors."""
    for status in (200, 429):
        sent = await post(HideAzureHeaders(), response=Response(status, b"{}", Headers(AZURE)), json={})
        assert [name for name, _ in sent.headers] == [
            "Content-Type", "x-accel-buffering", "x-content-type-options", "x-ratelimit-limit-requests",
            "x-ratelimit-remaining-tokens", "x-request-id", "retry-after-ms",
        ]  # fmt: skip
        assert dict(sent.outcome.counts) == {"HideAzureHeaders": 1}


async def test_the_names_can_be_others() -> None:
    """Case-insensitive; `*` matches any characters, a full stop only itself; an empty list turns the stage off."""
    headers = {"X-One": "1", "x-two-a": "2", "x.three": "3", "x-three": "4"}
    answer = Response(200, b"", Headers(headers))
    sent = await post(HideAzureHeaders(["x-oNE", "x-two*", "x.three"]), response=answer, json={})
    assert [name for name, _ in sent.headers] == ["x-three"]
    assert len((await post(HideAzureHeaders([]), response=answer, json={})).headers) == 4


async def test_an_answer_without_them_is_not_counted() -> None:
    """For example an error of the gateway itself."""
    sent = await post(HideAzureHeaders(), response=ApiError(400, "no"), json={})
    assert sent.outcome.counts == {}


async def test_what_is_no_name_is_a_mistake() -> None:
    """With its index in the list."""
    with pytest.raises(AssertionError, match=r"names\.1: 'x ms' is not a valid header name"):
        await post(HideAzureHeaders(["x-ms-*", "x ms"]), json={})
