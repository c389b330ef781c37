"""The operations of the fake Azure, and its responses except completions and embeddings.

Written from Azure's specifications and documents, independently of the gateway's own table, so that each checks the
other.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ("BINARY", "content_of", "ids_of", "needs_deployment", "on_deployment", "on_resource", "on_socket", "on_v1")

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
# First segment of a path: first api-version that has it.
_RESOURCE = {
    "assistants": "2024-02-15",
    "threads": "2024-02-15",
    "vector_stores": "2024-05-01",
    "batches": "2024-07-01",
    "uploads": "2024-08-01",
    "realtimeapi": "2024-10-01",
    "realtime": "2024-10-01",
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

# Collection: prefix of the ids that a POST creates in it. A POST to anything else acts on an existing object.
_PREFIXES = {
    "responses": "resp_",
    "conversations": "conv_",
    "files": "file-",
    "containers/files": "cfile_",
    "batches": "batch_",
    "vector_stores": "vs_",
    "vector_stores/file_batches": "vsfb_",
    "threads": "thread_",
    "threads/runs": "run_",
    "threads/messages": "msg_",
    "assistants": "asst_",
    "fine_tuning/jobs": "ftjob-",
    "evals": "eval_",
    "evals/runs": "evalrun_",
    "uploads": "upload_",
    "uploads/parts": "part_",
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


def on_socket(path: str, version: str) -> bool:
    """Whether the resource has a WebSocket at the path (after `/openai/`) at an api-version: only previews do."""
    return path == "realtime" and version.endswith("-preview")


def on_v1(path: str) -> bool:
    """Whether the v1 API has the path (after `/openai/v1/`)."""
    return _V1.fullmatch(path) is not None


def needs_deployment(method: str, path: str) -> bool:
    """Whether the body must name a deployment."""
    return method == "POST" and _WITH_MODEL.fullmatch(path) is not None


def collection_of(path: str) -> str:
    """Return a path without its ids: `threads/thread_1/runs` is `threads/runs`."""
    parts = path.split("/")
    first = "/".join(parts[:2]) if parts[0] in ("fine_tuning", "chat") else parts[0]
    rest = parts[first.count("/") + 1 :]
    return "/".join([first, *rest[1::2]])


def ids_of(path: str) -> set[str]:
    """Return the ids in a path, of the kinds that the fake creates."""
    return {part for part in path.split("/") if part.startswith(tuple(_PREFIXES.values()))}


def content_of(method: str, path: str, number: str) -> tuple[dict[str, Any], bool]:
    """Return a response's JSON, and whether it created an object; `number` is the end of a created id."""
    parts = path.split("/")
    collection = collection_of(path)
    at_collection = len(parts) % 2 == (0 if parts[0] in ("fine_tuning", "chat") else 1)
    if method == "DELETE":
        return {"id": parts[-1], "object": "deleted", "deleted": True}, False
    if method == "GET" and at_collection:
        return {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}, False
    if parts[0] == "audio":
        return {"text": "Hello there!"}, False
    if parts[0] == "images":
        return {"created": 0, "data": [{"b64_json": "aGVsbG8="}]}, False
    if path == "realtime/client_secrets":
        return {"value": f"ek_{number}", "expires_at": 0, "session": {"type": "realtime"}}, False
    creates = method == "POST" and at_collection and collection in _PREFIXES
    content = {"id": _PREFIXES[collection] + number} if creates else {"id": parts[min(1, len(parts) - 1)]}
    if method != "POST" or not creates:
        content = {"id": parts[-1] if method == "GET" else content["id"]}
    if parts[0] == "responses":
        text = {"type": "output_text", "text": "Hello there!", "annotations": []}
        message = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [text]}
        return {**content, "object": "response", "status": "completed", "output": [message], "created_at": 0}, creates
    return {**content, "object": parts[0], "status": "completed"}, creates
