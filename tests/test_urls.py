"""What a client's path says, and the URL of an exchange."""

from __future__ import annotations

import pytest

from gateway import ApiError, Target
from gateway.azure import BY_NAME
from gateway.urls import place_of, upstream_path

CHAT = BY_NAME["chat.completions"]


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/v1/chat/completions", ("", "/chat/completions", None)),
        ("/research/v1/chat/completions", ("/research", "/chat/completions", None)),
        ("/openai/v1/files/f-1", ("", "/files/f-1", None)),
        ("/a/b/openai/v1/files", ("/a/b", "/files", None)),
        ("/openai/files", ("", "/files", None)),
        ("/openai/deployments/gpt-4o/chat/completions", ("", "/chat/completions", "gpt-4o")),
        ("/openai/deployments/v1/chat/completions", ("", "/chat/completions", "v1")),
        ("/x/openai/deployments/d/batches", ("/x", "/batches", "d")),
        ("/v1/engines/text-embedding-ada-002/embeddings", ("", "/embeddings", "text-embedding-ada-002")),
        ("/v1/engines/a%20b/embeddings", ("", "/embeddings", "a b")),
        ("/v1/openai/v1/files", ("", "/openai/v1/files", None)),
        ("/v1/threads/v1/messages", ("", "/threads/v1/messages", None)),
        ("/openai/deployments/d", None),
        ("/openai/deployments//chat/completions", None),
        ("/chat/completions", None),
        ("/v1", None),
        ("/", None),
    ],
)
def test_openai_s_and_azure_s_paths_say_the_same(path: str, place: tuple[str, str, str | None] | None) -> None:
    """A prefix for the team, the path of the operation, and the model where the path names it."""
    assert place_of(path) == place


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
    assert upstream_path(CHAT, Target(deployment="d", api_version=version), "/chat/completions", query) == path


def test_operations_without_a_deployment_are_at_the_resource() -> None:
    """With their ids as the client wrote them; one is at another path on the classic API."""
    target = Target(api_version="2025-04-01-preview")
    path = "/threads/thread_1/messages"
    assert upstream_path(BY_NAME["threads.messages.list"], target, path, "limit=2") == (
        "/openai/threads/thread_1/messages?api-version=2025-04-01-preview&limit=2"
    )
    sessions = BY_NAME["realtime.sessions.create"]
    assert upstream_path(sessions, target.replace(deployment="d"), sessions.path) == (
        "/openai/realtimeapi/sessions?api-version=2025-04-01-preview"
    )


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a b", "", "a%2fb", "-a", "a" * 65, "a?b", "a#b", "é", None])
def test_a_deployment_s_name_cannot_leave_its_place_in_the_path(name: str | None) -> None:
    """A rule: anything but a plain name is a 404."""
    with pytest.raises(ApiError) as caught:
        upstream_path(CHAT, Target(deployment=name, api_version="2024-10-21"), "/chat/completions")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("name", "version", "needed"),
    [
        ("completions", "v1", "it needs a dated api-version"),
        ("responses", "2024-10-21", "it needs 2025-03-01-preview or later, or v1"),
        ("responses", "2025-02-01-preview", "it needs 2025-03-01-preview or later, or v1"),
        ("containers.list", "2025-04-01-preview", "it needs v1"),
        ("threads.create", "v1", "it needs 2024-02-15-preview or later"),
        ("audio.translations", "2023-05-15", "it needs 2023-09-01-preview or later"),
    ],
)
def test_an_api_version_without_the_operation_says_which_has_it(name: str, version: str, needed: str) -> None:
    """Before anything is sent: Azure itself would only say that the resource was not found."""
    with pytest.raises(ApiError) as caught:
        upstream_path(BY_NAME[name], Target(deployment="d", api_version=version), BY_NAME[name].path)
    assert (caught.value.status, caught.value.code) == (404, "operation_not_supported")
    assert needed in caught.value.message
    assert name in caught.value.message


def test_the_first_api_version_of_an_operation_has_it() -> None:
    """And so have those after it, previews or not."""
    for version in ("2025-03-01-preview", "2025-04-01-preview"):
        assert upstream_path(BY_NAME["responses"], Target(api_version=version), "/responses")
