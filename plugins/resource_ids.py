"""`resource_ids`: a request with an id goes to the Azure resource that made the id."""

import re
from base64 import b32encode
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from gateway import ApiError, Event, EventFilter, Next, Request, Response, Services, Stage

# Prefixes of the ids of objects that one resource keeps. Objects inside them (messages, runs) are found through them.
ID = rb"(?:resp|conv|file|assistant|batch|vs|thread|asst|ftjob|cntr|eval|video|upload|chatcmpl)[-_][A-Za-z0-9_-]+"
# Clients get Azure's id, a full stop, and the mark of its resource.
MARK = rb"\.(r[a-z2-7]{6})"
# Fields with an id: `id`, `..._id` and these others. Fields with a list of ids end with `_ids`.
FIELD = rb'("(?:id|[a-z_]+_id|conversation|container|training_file|validation_file)"\s*:\s*")'
LIST = re.compile(rb'"(?:[a-z_]+_ids|result_files)"\s*:\s*\[[^\[\]]*\]')
# Users' own data on an object: never changed, even if it looks like an id.
# (Possessive quantifiers: a text that does not match is scanned once.)
METADATA = re.compile(rb'("(?:metadata|attributes)"\s*:\s*\{(?:[^"{}\\]++|"(?:[^"\\]++|\\.)*+")*+\})')
ONE = re.compile(FIELD + b"(" + ID + b')(?=")')
LISTED = re.compile(b'(")(' + ID + rb')(?="(?!\s*:))')
ONE_MARKED = re.compile(FIELD + b"(" + ID + b")" + MARK + b'(?=")')
LISTED_MARKED = re.compile(b'(")(' + ID + b")" + MARK + rb'(?="(?!\s*:))')
IN_PATH = re.compile(
    rf"(?<![A-Za-z0-9_-])({ID.decode().removesuffix('+')}{{1,128}})\.(r[a-z2-7]{{6}})(?![A-Za-z0-9_.-])"
)
MAX_BODY = 64 * 1024 * 1024  # of a JSON response, in bytes
FAMILIES = frozenset(
    ("responses", "conversations", "files", "batches", "vector_stores", "threads", "assistants", "fine_tuning",
     "containers", "evals", "videos", "uploads")
)  # fmt: skip


@dataclass
class ResourceIds(Stage):
    """Mark each id with the resource that made it, and send later requests with that id there.

    Azure keeps responses, conversations, files, batches, vector stores, threads and so on in the resource that made
    them. A mark is a hash of the resource's endpoint: nothing is stored, and it stays valid after restarts and in
    other workers. Nothing is marked if all of the team's models are in one resource.
    """

    needs = ("deployment",)
    must_precede = ("choice",)  # the id decides, and not the load

    def __post_init__(self) -> None:
        self._resources: dict[str, Any] = {}
        self._marks: dict[str, str] = {}

    async def start(self, services: Services) -> None:
        # Two resources with one endpoint and different keys are one resource to Azure.
        self.idle = len({resource.endpoint for resource in services.reachable.values()}) < 2
        for name, resource in services.reachable.items():
            self._marks[name] = mark = mark_of(resource.endpoint)
            self._resources.setdefault(mark, resource)

    async def __call__(self, request: Request, call_next: Next) -> Response:
        if not await self._is_affected(request):
            return await call_next(request)
        await self._route(request)
        response = await call_next(request)
        # A stage below may have chosen another resource than the target names.
        target = request.last_target
        mark = self._marks.get(target.resource.name) if target is not None and target.resource is not None else None
        if mark is None or response.error is not None or "content" in (request.operation or "").split("."):
            return response  # the content of a file is the user's
        if response.is_event_stream or response.status == 101:
            response.pipe(MarkEvents(mark.encode()))
            if response.status == 101:
                response.pipe(UnmarkEvents(mark.encode(), frozenset(map(str.encode, self._resources))), direction="up")
        elif response.media_type == "application/json":
            response.body = marked(await response.read(MAX_BODY), mark.encode())
            response.headers.remove("content-length")
        return response

    async def _is_affected(self, request: Request) -> bool:
        """Whether the operation uses ids that a resource keeps."""
        operation = request.operation or ""
        if operation == "chat.completions":
            # Azure keeps only stored ones; but any of them may name a file.
            body = await request.body()
            return b'"store"' in body or any(f'.{mark}"'.encode() in body for mark in self._resources)
        return operation.partition(".")[0] in FAMILIES or operation.startswith("chat.completions.")

    async def _route(self, request: Request) -> None:
        """Remove the marks from a request's ids, and send it to the resource that they name."""
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
        unknown = [example for mark, example in found.items() if mark not in self._resources]
        if unknown:
            raise ApiError(404, f"{unknown[0]} is from an Azure resource that your team does not use", code="not_found")
        if request.method == "POST" and not request.media_type.startswith("multipart/"):
            body = await request.body()
            if any(f'.{mark}"'.encode() in body for mark in self._resources):
                unmarked = outside_metadata(body, lambda data: replace_ids(data, ONE_MARKED, LISTED_MARKED, in_body))
                if unmarked != body:
                    request.set_body(unmarked)
        if len(found) > 1:
            raise ApiError(
                400,
                f"{' and '.join(found.values())} are in different Azure resources; use ids of one resource",
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
                    "or create the object again with this model",
                    param="model",
                    code="resource_mismatch",
                )
            request.target = request.target.replace(resource=home)


class MarkEvents(EventFilter):
    """Marks the ids in events."""

    def __init__(self, mark: bytes) -> None:
        self._mark = mark

    def event(self, event: Event) -> Event:
        raw = marked(event.raw, self._mark)
        return event if raw == event.raw else Event(raw)


class UnmarkEvents(EventFilter):
    """Removes the marks from ids that a client sends on a WebSocket, which is open to one resource."""

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
                    f"{marked_id} is in another Azure resource than this WebSocket; open one to that resource",
                    code="resource_mismatch",
                )
            return match.group(1) + match.group(2)

        return Event(outside_metadata(event.raw, lambda data: replace_ids(data, ONE_MARKED, LISTED_MARKED, unmarked)))


def mark_of(endpoint: str) -> str:
    """Return a resource's mark: `r` and six letters or digits that depend on its endpoint alone."""
    return "r" + b32encode(blake2b(endpoint.lower().encode(), digest_size=4).digest())[:6].decode().lower()


def marked(data: bytes, mark: bytes) -> bytes:
    """Return JSON with the mark after each id of an object that Azure keeps; every other byte stays."""

    def add_mark(match: re.Match[bytes]) -> bytes:
        return match.group() + b"." + mark

    return outside_metadata(data, lambda part: replace_ids(part, ONE, LISTED, add_mark))


def replace_ids(
    data: bytes, one: re.Pattern[bytes], listed: re.Pattern[bytes], replace: Callable[[re.Match[bytes]], bytes]
) -> bytes:
    """Replace each id, in a field and in lists."""
    return LIST.sub(lambda found: listed.sub(replace, found.group()), one.sub(replace, data))


def outside_metadata(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Change JSON, except users' metadata."""
    if b'"metadata"' not in data and b'"attributes"' not in data:
        return change(data)
    parts: list[bytes] = METADATA.split(data)
    return b"".join([part if index % 2 else change(part) for index, part in enumerate(parts)])
