"""The operation table: every line is found by what a client sends, and by nothing else."""

from __future__ import annotations

import re

import pytest

from gateway.azure.operations import BY_NAME, OPERATIONS, Operation, find_operation, unknown_operation


def filled(row: Operation) -> str:
    """Return a line's path with an id for each parameter."""
    return re.sub(r"\{(\w+)\}", r"\1-1", row.path)


def test_every_line_is_found_by_its_method_and_path() -> None:
    """And says where it was seen that Azure has it, or that it has not."""
    for row in OPERATIONS:
        assert find_operation(row.method, filled(row)) is row
        assert row.evidence
        assert row.on_azure or (row.model is None and row.since is None)


def test_no_two_lines_are_one() -> None:
    """Neither by name, nor by method and path whatever their parameters are called."""
    assert len({row.name for row in OPERATIONS}) == len(OPERATIONS)
    assert len({(row.method, re.sub(r"\{\w+\}", "{}", row.path)) for row in OPERATIONS}) == len(OPERATIONS)


def test_a_parameter_gives_way_to_a_word() -> None:
    """`/threads/runs` is an operation of its own, and no thread."""
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
def test_what_is_no_operation_is_not_found(method: str, path: str) -> None:
    """Not by another method, and not with an empty parameter."""
    assert find_operation(method, path) is None


def test_what_azure_lacks_is_named() -> None:
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
def test_what_is_nearly_right_is_told_what_would_be(method: str, path: str, status: int, words: str) -> None:
    """A method that only Azure lacks, a WebSocket, a slash or a /v1 too many."""
    error = unknown_operation(method, path)
    assert error.status == status
    assert words in error.message


def test_what_is_known_of_api_versions() -> None:
    """A dated one has what is as old as it; v1 is none of them."""
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


def test_what_only_previews_have() -> None:
    """Of the dated api-versions; v1 is its own matter."""
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
