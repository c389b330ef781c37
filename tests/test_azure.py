"""The operation table, and the URL of one exchange."""

from __future__ import annotations

import pytest

from gateway import ApiError, Target
from gateway.azure import BY_NAME, OPERATIONS, find_operation, unknown_operation, upstream_path

CHAT = BY_NAME["chat.completions"]


def test_every_row_is_found_by_its_method_and_path() -> None:
    """And nothing else is."""
    for row in OPERATIONS:
        assert find_operation(row.method, row.path.replace("{model}", "gpt-4")) is row
    for method, path in (
        ("GET", "/chat/completions"),
        ("POST", "/models"),
        ("GET", "/models/"),
        ("GET", "/models/a/b"),
    ):
        assert find_operation(method, path) is None


@pytest.mark.parametrize(
    ("version", "query", "path"),
    [
        ("2024-10-21", "", "/openai/deployments/d/chat/completions?api-version=2024-10-21"),
        (
            "2024-10-21",
            "api-version=1&a=b&API-KEY=x",
            "/openai/deployments/d/chat/completions?api-version=2024-10-21&a=b",
        ),
        ("v1", "", "/openai/v1/chat/completions"),
        (
            "v1",
            "api%2dversion=preview&a=b&API-KEY=x&c;api-version=3&+api-version=4",
            "/openai/v1/chat/completions?a=b",
        ),
    ],
)
def test_classic_and_v1_urls(version: str, query: str, path: str) -> None:
    """The api-version and the key are never the client's to choose."""
    assert upstream_path(CHAT, Target(deployment="d", api_version=version), query) == path


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a b", "", "a%2fb", "-a", "a" * 65, "a?b", "a#b", "é", None])
def test_a_deployment_s_name_cannot_leave_its_place_in_the_path(name: str | None) -> None:
    """A rule: anything but a plain name is a 404."""
    with pytest.raises(ApiError) as caught:
        upstream_path(CHAT, Target(deployment=name, api_version="2024-10-21"))
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_what_v1_lacks_says_so() -> None:
    """Completions are on dated versions only."""
    with pytest.raises(ApiError, match="v1 API does not have completions"):
        upstream_path(BY_NAME["completions"], Target(deployment="d", api_version="v1"))


def test_unknown_operations_name_what_is_offered() -> None:
    """A 404 that lists the operations; a wrong method is a 405 with the right one."""
    assert unknown_operation("POST", "/images").status == 404
    assert "POST /v1/embeddings" in unknown_operation("POST", "/images").message
    error = unknown_operation("DELETE", "/embeddings")
    assert (error.status, error.headers) == (405, {"allow": "POST"})
