"""Parsing a client's path, and the URL at the resource."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from gateway import ApiError, Headers, Request, Target
from gateway.azure.operations import BY_NAME, OPERATIONS, Operation
from gateway.azure.urls import parse_client_path, upstream_path
from gateway.body.request_body import Body
from gateway.exchange import Exchange

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
def test_openai_s_and_azure_s_paths_are_parsed_alike(path: str, place: tuple[str, str, str | None] | None) -> None:
    """Into the team's prefix, the path of the operation, and the model if the path names it."""
    assert parse_client_path(path) == place


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
    """The client never selects the api-version or the key."""
    assert upstream_path(CHAT, Target(deployment="d", api_version=version), "/chat/completions", query) == path


def test_operations_without_a_deployment_are_at_the_resource() -> None:
    """With the client's ids; one operation has another path on the classic API."""
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
def test_a_deployment_s_name_cannot_leave_its_segment_of_the_path(name: str | None) -> None:
    """Anything but a plain name is a 404."""
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
def test_the_error_for_an_unsupported_api_version_names_supported_ones(name: str, version: str, needed: str) -> None:
    """Before anything is sent: Azure itself would only respond that the resource was not found."""
    with pytest.raises(ApiError) as caught:
        upstream_path(BY_NAME[name], Target(deployment="d", api_version=version), BY_NAME[name].path)
    assert (caught.value.status, caught.value.code) == (404, "operation_not_supported")
    assert needed in caught.value.message
    assert name in caught.value.message


def test_the_first_api_version_of_an_operation_has_it() -> None:
    """Later ones have it too, previews or not."""
    for version in ("2025-03-01-preview", "2025-04-01-preview"):
        assert upstream_path(BY_NAME["responses"], Target(api_version=version), "/responses")


FILES = BY_NAME["files.retrieve"]
WITH_IDS = [row for row in OPERATIONS if row.on_azure and row.has_ids]


@pytest.mark.parametrize(
    "name",
    [
        "file-abc123",
        "resp_68a1b2c3d4e5f60718293a4b5c6d7e8f",
        "ftjob-0e208cf33a6a466994aff31a08aba678",
        "ft:gpt-4o-mini-2024-07-18:org:suffix:9abcDEF",
        "gpt-35-turbo-0125.ft-0e208cf33a6a466994aff31a08aba678",
        "file-abc.rabc234",
        "resp_bGl0ZWxsbTpjdXN0b20=",
        "_x~1",
        "1",
    ],
)
def test_valid_ids(name: str) -> None:
    """Letters, digits and a few more characters, plain or escaped; they are sent to Azure unescaped."""
    target = Target(api_version="v1")
    escaped = "".join(f"%{ord(each):02x}" if each in ":~=" else each for each in name)
    for written in (name, escaped):
        assert upstream_path(FILES, target, f"/files/{written}") == f"/openai/v1/files/{name}"


@pytest.mark.parametrize(
    "name",
    [
        "..;",
        "..",
        "%2e%2e",
        "%252e%252e",
        "%252e",
        "file-1%3F",
        "file-1%3Fapi-version=1",
        "%c0%ae%c0%ae",
        "%C0%AE",
        "file-1;a=b",
        "file-1%23",
        "a%2fb",
        "a%252fb",
        "a%5cb",
        "-1",
        ".x",
        "a b",
        "a%20b",
        "a%00",
        "a%0d%0a",
        "é",
        "%C3%A9",
        "a*b",
        "a@b",
        "a,b",
        "a+b",
        "x" * 513,
    ],
)
def test_invalid_ids(name: str) -> None:
    """A 400 that names the id: text that servers could decode, resolve or cut off never reaches Azure."""
    with pytest.raises(ApiError) as caught:
        upstream_path(FILES, Target(api_version="v1"), f"/files/{name}")
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_id", "file_id")
    assert "files.retrieve" in caught.value.message


@settings(deadline=None)
@given(
    st.sampled_from(WITH_IDS),
    st.lists(st.text(st.sampled_from("aZ09._:~=-%;/?#@&+*\\ \x00é23fFeEcC"), max_size=12), min_size=6, max_size=6),
)
def test_any_path_has_the_segments_of_its_operation(row: Operation, ids: list[str]) -> None:
    """By two independent parsers: the same number of segments, fixed ones unchanged, others plain names."""
    parts = iter(ids)
    path = "/".join(next(parts) if segment.startswith("{") else segment for segment in row.path.split("/"))
    target = Target(deployment="d", api_version="v1" if row.v1 else "2099-01-01-preview")
    try:
        sent = upstream_path(row, target, path)
    except ApiError:
        return
    segments = row.path.split("/")[1:]
    url = f"https://azure.invalid{sent}"
    for parsed in (unquote(urlsplit(url).path), URL(url).path, URL(url, encoded=True).path):
        found = parsed.split("/")[-len(segments) :]
        assert len(parsed.split("/")) == len(segments) + (3 if row.v1 else 2)
        for segment, name in zip(segments, found, strict=True):
            assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._:~=-]*", name) if segment.startswith("{") else segment == name
    assert urlsplit(url).query == ("" if row.v1 else "api-version=2099-01-01-preview")


def test_a_path_of_another_operation_is_refused() -> None:
    """A stage that changes the path cannot leave the operation."""
    for path in ("/files", "/files/a/content", "/batches/a", "/files/a/"):
        with pytest.raises(ApiError):
            upstream_path(FILES, Target(api_version="v1"), path)


def test_stages_see_the_ids_that_are_sent_to_azure() -> None:
    """An escaped id is decoded before any stage reads it; an invalid id stays unchanged."""
    for written, seen in (("file%2D1%3a2", "file-1:2"), ("file%252D1", "file%252D1"), ("a%3Fb", "a%3Fb")):
        request = Request(
            id="r", operation=FILES, method="GET", path=f"/files/{written}", headers=Headers(), body=Body(b""),
            team="t", target=Target(), exchange=Exchange(),
        )  # fmt: skip
        assert request.path == f"/files/{seen}"
