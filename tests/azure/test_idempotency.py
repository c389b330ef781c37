"""Idempotent requests, which may be sent twice."""

from __future__ import annotations

from typing import Any

import pytest

from gateway import Next, Request, Response, Stage
from gateway.azure.operations import OPERATIONS
from gateway.testing import send

SAFE = {
    "audio.speech", "audio.transcriptions", "audio.translations", "chat.completions", "completions", "embeddings",
    "images.edits", "images.generations", "responses.compact",
    "responses.input_tokens",
}  # fmt: skip


class Ask(Stage):
    """Notes whether the request is idempotent."""

    answers: bool

    async def __call__(self, request: Request, call_next: Next) -> Response:
        self.answers = await request.is_idempotent()
        return await call_next(request)


async def asked(method: str, path: str, body: Any = None) -> bool:
    """Return whether a request is idempotent."""
    stage = Ask()
    await send([stage], method, path, json=body)
    return stage.answers


@pytest.mark.parametrize("row", [row for row in OPERATIONS if row.on_azure], ids=lambda row: row.name)
async def test_every_operation(row: Any) -> None:
    """Requests that read, open a WebSocket, or have an unstored response are idempotent; all others are not."""
    path = row.path
    for name in ("{", "}"):
        path = path.replace(name, "")
    body = {"model": "m"} if row.method == "POST" else None
    assert await asked(row.method, path, body) == (row.method in ("GET", "WS") or row.name in SAFE)


@pytest.mark.parametrize(
    ("path", "body", "repeatable"),
    [
        ("/chat/completions", {"store": True}, False),
        ("/chat/completions", {"store": False}, True),
        ("/chat/completions", {"store": None}, True),
        ("/chat/completions", {"store": 1}, False),
        ("/responses", {}, False),
        ("/responses", {"store": True}, False),
        ("/responses", {"store": False}, True),
        ("/responses", [], True),
        ("/responses", {"store": False, "tools": [{"type": "function", "name": "f"}, {"type": "custom"}]}, True),
        ("/responses", {"store": False, "tools": []}, True),
        ("/responses", {"store": False, "tools": [{"type": "mcp", "require_approval": "never"}]}, False),
        ("/responses", {"store": False, "tools": {"type": "function"}}, False),
        ("/responses", {"store": False, "background": True}, False),
    ],
)
async def test_a_stored_response_is_not_idempotent(path: str, body: Any, repeatable: bool) -> None:
    """Completions are stored on request, responses unless `store` is false; tools may have side effects."""
    assert await asked("POST", path, body) == repeatable
