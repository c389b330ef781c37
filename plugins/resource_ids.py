"""`resource_ids`: what was made in one of several Azure resources is found there again."""

import re
from base64 import b32encode
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from gateway import ApiError, Event, EventFilter, Next, Request, Response, Services, Stage

# How the ids begin of what lives in one resource; what lives inside them (messages, runs) is found through them.
KINDS = rb"(?:resp|conv|file|assistant|batch|vs|thread|asst|ftjob|cntr|eval|video|upload|chatcmpl)[-_][A-Za-z0-9_-]+"
# An id as it is given to clients: Azure's, a full stop, and the mark of its resource.
MARK = rb"\.(r[a-z2-7]{6})"
# The fields that hold an id, besides `id` and `..._id`; those that hold a list of them end with `_ids`.
FIELD = rb'("(?:id|[a-z_]+_id|conversation|container|training_file|validation_file)"\s*:\s*")'
LIST = re.compile(rb'"(?:[a-z_]+_ids|result_files)"\s*:\s*\[[^\[\]]*\]')
# What users keep beside their objects is theirs: text, whatever it looks like.
# (Possessive: what is no such object is left after one look.)
METADATA = re.compile(rb'("(?:metadata|attributes)"\s*:\s*\{(?:[^"{}\\]++|"(?:[^"\\]++|\\.)*+")*+\})')
ONE = re.compile(FIELD + b"(" + KINDS + b')(?=")')
LISTED = re.compile(b'(")(' + KINDS + rb')(?="(?!\s*:))')
ONE_MARKED = re.compile(FIELD + b"(" + KINDS + b")" + MARK + b'(?=")')
LISTED_MARKED = re.compile(b'(")(' + KINDS + b")" + MARK + rb'(?="(?!\s*:))')
IN_PATH = re.compile(
    rf"(?<![A-Za-z0-9_-])({KINDS.decode().removesuffix('+')}{{1,128}})\.(r[a-z2-7]{{6}})(?![A-Za-z0-9_.-])"
)
MOST = 64 * 1024 * 1024  # of a JSON answer, in bytes
FAMILIES = frozenset(
    ("responses", "conversations", "files", "batches", "vector_stores", "threads", "assistants", "fine_tuning",
     "containers", "evals", "videos", "uploads")
)  # fmt: skip


@dataclass
class ResourceIds(Stage):
    """Mark ids with the resource that they are from, and send later requests with them there.

    Responses, conversations, files, batches, vector stores, threads and all else that Azure keeps live in the
    resource that made them. A mark is made from the resource's endpoint, so nothing is stored, and restarts and
    other workers know it too. Only where the team's models are in several resources is anything marked.
    """

    needs = ("deployment",)
    must_precede = ("choice",)  # where an id is from decides, and not whoever has room

    def __post_init__(self) -> None:
        self._resources: dict[str, Any] = {}
        self._marks: dict[str, str] = {}

    async def start(self, services: Services) -> None:
        # Two with one endpoint, by different keys, are one place to Azure.
        self.idle = len({resource.endpoint for resource in services.reachable.values()}) < 2
        for name, resource in services.reachable.items():
            self._marks[name] = mark = mark_of(resource.endpoint)
            self._resources.setdefault(mark, resource)

    async def __call__(self, request: Request, call_next: Next) -> Response:
        if not await self._concerns(request):
            return await call_next(request)
        await self._send_home(request)
        response = await call_next(request)
        # A stage below may have asked another resource than the target names.
        target = request.last_target
        mark = self._marks.get(target.resource.name) if target is not None and target.resource is not None else None
        if mark is None or response.error is not None or "content" in (request.operation or "").split("."):
            return response  # a file's content is the user's own
        if response.is_event_stream or response.status == 101:
            response.pipe(MarkEvents(mark.encode()))
            if response.status == 101:
                response.pipe(UnmarkEvents(mark.encode(), frozenset(map(str.encode, self._resources))), direction="up")
        elif response.media_type == "application/json":
            response.body = marked(await response.read(MOST), mark.encode())
            response.headers.remove("content-length")
        return response

    async def _concerns(self, request: Request) -> bool:
        operation = request.operation or ""
        if operation == "chat.completions":
            # Only stored ones are kept; but files may be named in any.
            body = await request.body()
            return b'"store"' in body or any(f'.{mark}"'.encode() in body for mark in self._resources)
        return operation.partition(".")[0] in FAMILIES or operation.startswith("chat.completions.")

    async def _send_home(self, request: Request) -> None:
        """Take the marks off a request's ids, and send it to the resource that they name."""
        found: dict[str, str] = {}

        def in_path(match: re.Match[str]) -> str:
            found.setdefault(match.group(2), match.group())
            return match.group(1)

        def in_body(match: re.Match[bytes]) -> bytes:
            mark = match.group(3).decode()
            if mark not in self._resources:
                return match.group()
            found.setdefault(mark, (match.group(2) + b"." + match.group(3)).decode())
            return match.group(1) + match.group(2)

        request.path = IN_PATH.sub(in_path, request.path)
        request.query = IN_PATH.sub(in_path, request.query)
        strange = [example for mark, example in found.items() if mark not in self._resources]
        if strange:
            raise ApiError(404, f"{strange[0]} is from an Azure resource that is not in use for you", code="not_found")
        if request.method == "POST" and not media_type(request.headers.get("content-type")).startswith("multipart/"):
            body = await request.body()
            if any(f'.{mark}"'.encode() in body for mark in self._resources):
                made = outside_metadata(body, lambda data: changed(data, ONE_MARKED, LISTED_MARKED, in_body))
                if made != body:
                    request.set_body(made)
        if len(found) > 1:
            raise ApiError(
                400,
                f"{' and '.join(found.values())} are in different Azure resources; what is used together must not be",
                code="resource_mismatch",
            )
        for mark, example in found.items():
            chosen = request.target.resource
            if chosen is not None and self._marks.get(chosen.name) == mark:
                continue
            home = self._resources[mark]
            there = request.target.within(home) if request.target.pool is not None else None
            if there is not None:
                request.target = there
                continue
            if request.target.pool is not None or (chosen is not None and request.target.deployment is not None):
                raise ApiError(
                    400,
                    f"the model is in another Azure resource than {example}; use a model of that resource, "
                    "or make it anew where the model is",
                    param="model",
                    code="resource_mismatch",
                )
            request.target = request.target.replace(resource=home)


def media_type(content_type: str | None) -> str:
    """Return a Content-Type without its parameters."""
    return (content_type or "").partition(";")[0].strip().lower()


class MarkEvents(EventFilter):
    """Marks the ids in events."""

    def __init__(self, mark: bytes) -> None:
        self._mark = mark

    def event(self, event: Event) -> Event:
        raw = marked(event.raw, self._mark)
        return event if raw == event.raw else Event(raw)


class UnmarkEvents(EventFilter):
    """Takes the marks off the ids in what a client sends on a WebSocket, which leads to one resource."""

    def __init__(self, mark: bytes, known: frozenset[bytes]) -> None:
        self._mark = mark
        self._known = known
        self.contains = [b"." + each + b'"' for each in known]

    def event(self, event: Event) -> Event:
        def unmarked(match: re.Match[bytes]) -> bytes:
            if match.group(3) not in self._known:
                return match.group()
            if match.group(3) != self._mark:
                marked_id = (match.group(2) + b"." + match.group(3)).decode()
                raise ApiError(
                    400,
                    f"{marked_id} is in another Azure resource than the one that this WebSocket is open to",
                    code="resource_mismatch",
                )
            return match.group(1) + match.group(2)

        return Event(outside_metadata(event.raw, lambda data: changed(data, ONE_MARKED, LISTED_MARKED, unmarked)))


def mark_of(endpoint: str) -> str:
    """Return a resource's mark: `r` and six letters or digits, always the same for an endpoint."""
    return "r" + b32encode(blake2b(endpoint.lower().encode(), digest_size=4).digest())[:6].decode().lower()


def marked(data: bytes, mark: bytes) -> bytes:
    """Return JSON with the mark behind each id of what is kept; every other byte stays."""

    def put(match: re.Match[bytes]) -> bytes:
        return match.group() + b"." + mark

    return outside_metadata(data, lambda part: changed(part, ONE, LISTED, put))


def changed(
    data: bytes, one: re.Pattern[bytes], listed: re.Pattern[bytes], change: Callable[[re.Match[bytes]], bytes]
) -> bytes:
    """Change each id, in fields of its own and in lists."""
    return LIST.sub(lambda found: listed.sub(change, found.group()), one.sub(change, data))


def outside_metadata(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Change JSON, but for users' metadata."""
    if b'"metadata"' not in data and b'"attributes"' not in data:
        return change(data)
    parts: list[bytes] = METADATA.split(data)
    return b"".join([part if place % 2 else change(part) for place, part in enumerate(parts)])
