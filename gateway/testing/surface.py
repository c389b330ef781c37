"""What the fake Azure has, and how it answers what is neither a completion nor an embedding.

Written from Azure's specifications and documents, apart from the gateway's own table, so that one is a check of
the other.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ("BINARY", "content_of", "needs_deployment", "on_deployment", "on_resource", "on_v1", "prefix_of")

_FIRST = {
    "completions": "2022-12-01",
    "embeddings": "2022-12-01",
    "chat/completions": "2023-03-15",
    "audio/transcriptions": "2023-09-01",
    "audio/translations": "2023-09-01",
    "images/generations": "2023-12-01",
    "audio/speech": "2024-02-15",
    "images/edits": "2025-04-01",
}
# The first segment of a path, and the first api-version with it.
_RESOURCE = {
    "assistants": "2024-02-15",
    "threads": "2024-02-15",
    "vector_stores": "2024-05-01",
    "batches": "2024-07-01",
    "uploads": "2024-08-01",
    "realtimeapi": "2024-10-01",
    "chat": "2025-02-01",
    "responses": "2025-03-01",
    "evals": "2025-04-01",
    "files": "2023-05-15",
    "fine_tuning": "2023-10-01",
    "models": "2022-12-01",
}
_V1 = re.compile(
    r"chat/completions|embeddings|images/(generations|edits)|audio/(speech|transcriptions)"
    r"|(responses|models|files|vector_stores|containers|evals|fine_tuning|batches|videos|conversations|realtime)(/.*)?"
)
_WITH_MODEL = re.compile(
    r"chat/completions|completions|embeddings|images/.*|audio/.*|responses|responses/compact|videos"
)
BINARY = re.compile(r"(?!vector_stores/).*/content|audio/speech|realtime/calls")

# How ids begin, by the path's first segment; the second where there are two kinds below it.
_PREFIXES = {
    "responses": "resp_",
    "conversations": "conv_",
    "files": "file-",
    "batches": "batch_",
    "vector_stores": "vs_",
    "threads": "thread_",
    "assistants": "asst_",
    "fine_tuning": "ftjob-",
    "evals": "eval_",
    "uploads": "upload_",
    "containers": "cntr_",
    "videos": "video_",
}


def on_deployment(operation: str, version: str) -> bool:
    """Whether a deployment has the operation at an api-version."""
    return operation in _FIRST and version[:10] >= _FIRST[operation]


def on_resource(path: str, version: str) -> bool:
    """Whether the resource has the path (after `/openai/`) at an api-version."""
    first = path.split("/", maxsplit=1)[0]
    return first in _RESOURCE and version[:10] >= _RESOURCE[first]


def on_v1(path: str) -> bool:
    """Whether the v1 API has the path (after `/openai/v1/`)."""
    return _V1.fullmatch(path) is not None


def needs_deployment(method: str, path: str) -> bool:
    """Whether the body must name a deployment."""
    return method == "POST" and _WITH_MODEL.fullmatch(path) is not None


def prefix_of(path: str) -> str:
    """Return how the ids of what a path makes begin."""
    return _PREFIXES.get(path.split("/", maxsplit=1)[0], "obj_")


def content_of(method: str, path: str, made: str) -> dict[str, Any]:
    """Return an answer's JSON; `made` is the id of what a POST makes."""
    parts = path.split("/")
    if method == "DELETE":
        return {"id": parts[-1], "object": "deleted", "deleted": True}
    if method == "GET" and len(parts) % 2:
        return {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    if parts[0] == "audio":
        return {"text": "Hello there!"}
    if parts[0] == "images":
        return {"created": 0, "data": [{"b64_json": "aGVsbG8="}]}
    if parts[0] == "responses":
        text = {"type": "output_text", "text": "Hello there!", "annotations": []}
        message = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [text]}
        return {
            "id": parts[1] if len(parts) > 1 and parts[1] != "compact" else made,
            "object": "response",
            "status": "completed",
            "output": [message],
            "created_at": 0,
        }
    if method == "GET" or len(parts) > 1:
        return {"id": parts[min(1, len(parts) - 1)], "object": parts[0], "status": "completed"}
    return {"id": made, "object": parts[0], "status": "completed"}
