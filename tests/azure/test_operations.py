"""The operation table: a request finds its line, and no other request does."""

from __future__ import annotations

import re

import pytest

from gateway.azure.operations import BY_NAME, OPERATIONS, Operation, find_operation, unknown_operation


def filled(row: Operation) -> str:
    """Return a line's path with an id for each parameter."""
    return re.sub(r"\{(\w+)\}", r"\1-1", row.path)


def test_every_line_is_found_by_its_method_and_path() -> None:
    """Each line has its evidence that Azure has the operation, or does not have it."""
    for row in OPERATIONS:
        assert find_operation(row.method, filled(row)) is row
        assert row.evidence
        assert row.on_azure or (row.model is None and row.since is None)


def test_lines_are_unique() -> None:
    """By name, and by method and path, whatever the names of the parameters."""
    assert len({row.name for row in OPERATIONS}) == len(OPERATIONS)
    assert len({(row.method, re.sub(r"\{\w+\}", "{}", row.path)) for row in OPERATIONS}) == len(OPERATIONS)


def test_a_fixed_segment_is_preferred_to_a_parameter() -> None:
    """`/threads/runs` is an operation, and not the thread `runs`."""
    for method, path, name in (
        ("POST", "/threads/runs", "threads.create_and_run"),
        ("POST", "/threads/t1", "threads.update"),
        ("GET", "/models/gpt-4o", "models.retrieve"),
        ("POST", "/responses/compact", "responses.compact"),
        ("GET", "/responses/r1", "responses.retrieve"),
    ):
        found = find_operation(method, path)
        assert found is not None
        assert found.name == name


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", "/chat/completions"), ("POST", "/models"), ("GET", "/models/"), ("GET", "/models/a/b"), ("GET", "")],
)
def test_other_requests_find_no_operation(method: str, path: str) -> None:
    """Such as one with another method, or with an empty parameter."""
    assert find_operation(method, path) is None


def test_an_operation_that_azure_lacks_is_named() -> None:
    """A 404 that names the operation; a wrong method is a 405 with the right ones; a wrong path lists its family."""
    error = unknown_operation("POST", "/moderations")
    assert (error.status, error.code) == (404, "operation_not_supported")
    assert "Azure OpenAI does not have the operation moderations" in error.message
    assert "images.variations" in unknown_operation("POST", "/images/variations").message
    error = unknown_operation("DELETE", "/embeddings")
    assert (error.status, error.headers) == (405, {"allow": "POST"})
    error = unknown_operation("PUT", "/files/f1")
    assert (error.status, error.headers) == (405, {"allow": "DELETE, GET"})
    error = unknown_operation("POST", "/images")
    assert error.status == 404
    assert "POST /v1/images/generations" in error.message
    assert unknown_operation("POST", "/nonsense").code == "unknown_url"


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/moderations", 404, "Azure OpenAI does not have the operation moderations"),
        ("GET", "/responses", 405, "GET is not allowed on /v1/responses; use POST"),
        ("GET", "/realtime", 426, "realtime.connect is a WebSocket"),
        ("GET", "/live/sessions", 404, "Azure OpenAI does not have the operation live.sessions.connect"),
        ("POST", "/chat/completions/", 404, "remove the slash at the end"),
        ("POST", "/embeddings/", 404, "remove the slash at the end"),
        ("POST", "/v1/chat/completions", 404, "the base URL has one /v1 too many"),
    ],
)
def test_an_almost_correct_request_gets_a_hint(method: str, path: str, status: int, words: str) -> None:
    """For a method that only Azure lacks, a WebSocket, or one slash or /v1 too many."""
    error = unknown_operation(method, path)
    assert error.status == status
    assert words in error.message


def test_an_api_version_supports_an_operation() -> None:
    """A dated version has operations that are as old as itself; v1 is independent of dates."""
    for name, version, there in (
        ("chat.completions", "2024-10-21", True),
        ("responses", "2025-02-01-preview", False),
        ("responses", "2025-03-01-preview", True),
        ("responses", "v1", True),
        ("threads.create", "v1", False),
        ("videos.create", "2025-04-01-preview", False),
        ("files.list", "2023-05-15", True),
        ("models.list", "v1", True),
        ("moderations", "v1", False),
        ("moderations", "2024-10-21", False),
    ):
        assert BY_NAME[name].supported_in(version) is there, (name, version)


def test_an_operation_of_previews_only() -> None:
    """Among the dated api-versions; v1 is independent of that."""
    row = BY_NAME["realtime.connect"]
    assert [
        row.supported_in(version) for version in ("2024-10-21", "2024-10-01-preview", "2025-04-01-preview", "v1")
    ] == [
        False,
        True,
        True,
        True,
    ]
    assert row.supported_versions == "2024-10-01-preview or a later preview, or v1"
