"""Which operations use tokens, and which of them report it in the response."""

from __future__ import annotations

__all__ = ("METERED", "PROMPTED", "UNREPORTED")

PROMPTED = frozenset({"chat.completions", "completions", "responses", "embeddings"})
"""Operations with a text prompt: the gateway can count their tokens itself."""

METERED = PROMPTED | {
    "audio.speech",
    "audio.transcriptions",
    "audio.translations",
    "images.edits",
    "images.generations",
    "realtime.connect",
    "responses.compact",
    "responses.connect",
    "threads.create_and_run",
    "threads.runs.create",
    "threads.runs.submit_tool_outputs",
}
"""Operations that use tokens. Other responses can hold a `usage`, too: a file has any content, a stored response has
its old usage."""

UNREPORTED = frozenset({
    "batches.create",
    "evals.runs.create",
    "fine_tuning.alpha.graders.run",
    "fine_tuning.jobs.create",
    "realtime.calls.create",
    "realtime.client_secrets.create",
    "realtime.sessions.create",
    "realtime.transcription_sessions.create",
    "realtime.translations.client_secrets.create",
    "threads.create_and_run",
    "threads.runs.create",
    "threads.runs.submit_tool_outputs",
    "videos.create",
    "videos.edit",
    "videos.extend",
    "videos.remix",
})  # fmt: skip
"""Operations that use tokens without reporting them: Azure does the work later, or the client then talks to Azure
directly (with a session's secret or a call's SDP)."""
