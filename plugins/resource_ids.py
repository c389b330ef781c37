"""`resource_ids`: what was made in one of several Azure resources is found there again."""

import re
from base64 import b32encode
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from gateway import ApiError, Event, EventFilter, Next, Request, Response, Services, Stage

# How the ids begin of what lives in one resource; what lives inside them (messages, runs) is found through them.
KINDS = rb"resp|conv|file|assistant|batch|vs|thread|asst|ftjob|cntr|eval|video|upload|chatcmpl"
# The value of a field `id`, `..._id`, or `conversation`; and the list of a field `..._ids`.
ONE = re.compile(rb'("(?:id|[a-z_]+_id|conversation)"\s*:\s*")((?:' + KINDS + rb')[-_][A-Za-z0-9_-]+)(?=")')
SEVERAL = re.compile(rb'"[a-z_]+_ids"\s*:\s*\[[^\[\]]*\]')
LISTED = re.compile(rb'(")((?:' + KINDS + rb')[-_][A-Za-z0-9_-]+)(?="(?!\s*:))')
# An id as it is given to clients: Azure's, a full stop, and the mark of its resource.
MARKED = re.compile(r"([A-Za-z0-9_-]+)\.(r[a-z2-7]{6})(?![A-Za-z0-9_.-])")
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

    def __post_init__(self) -> None:
        self._resources: dict[str, Any] = {}
        self._marks: dict[str, str] = {}

    async def start(self, services: Services) -> None:
        if len(services.reachable) < 2:
            return
        for name, resource in services.reachable.items():
            mark = mark_of(resource.endpoint)
            if mark in self._resources:
                raise ValueError(f"the resource {name!r} has the endpoint of another one")
            self._resources[mark] = resource
            self._marks[name] = mark

    async def __call__(self, request: Request, call_next: Next) -> Response:
        if not self._resources or not await self._concerns(request):
            return await call_next(request)
        await self._send_home(request)
        response = await call_next(request)
        resource = request.target.resource
        mark = self._marks.get(resource.name) if resource is not None else None
        if mark is None or response.error is not None:
            return response
        if response.event_stream:
            response.pipe(MarkEvents(mark.encode()))
        elif "json" in (response.headers.get("content-type") or ""):
            response.body = marked(await response.read(), mark.encode())
            response.headers.remove("content-length")
        return response

    async def _concerns(self, request: Request) -> bool:
        operation = request.operation or ""
        if operation == "chat.completions":
            return b'"store"' in await request.body()  # only stored ones are kept
        return operation.partition(".")[0] in FAMILIES or operation.startswith("chat.completions.")

    async def _send_home(self, request: Request) -> None:
        """Take the marks off a request's ids, and send it to the resource that they name."""
        found: dict[str, str] = {}

        def unmarked(match: re.Match[str]) -> str:
            found.setdefault(match.group(2), match.group(1))
            return match.group(1)

        request.path = MARKED.sub(unmarked, request.path)
        request.query = MARKED.sub(unmarked, request.query)
        strangers = [mark for mark in found if mark not in self._resources]
        if strangers:
            raise ApiError(
                404,
                f"{found[strangers[0]]}.{strangers[0]} is from an Azure resource that is not in use for you",
                code="not_found",
            )
        if request.method == "POST" and "json" in (request.headers.get("content-type") or ""):
            body = await request.body()
            marks = [mark for mark in self._resources if f'.{mark}"'.encode() in body]
            for mark in marks:
                found.setdefault(mark, "an id of the body")
                body = body.replace(f'.{mark}"'.encode(), b'"')
            if marks:
                request.set_body(body)
        if len(found) > 1:
            raise ApiError(
                400,
                f"{' and '.join(found.values())} are in different Azure resources; what is used together must not be",
                code="resource_mismatch",
            )
        for mark, example in found.items():
            resource, chosen = self._resources[mark], request.target.resource
            if request.target.deployment is not None and chosen is not None and chosen.name != resource.name:
                raise ApiError(
                    400,
                    f"the model is in another Azure resource than {example}; use the model that made it",
                    param="model",
                    code="resource_mismatch",
                )
            request.target = request.target.replace(resource=resource)


class MarkEvents(EventFilter):
    """Marks the ids in events."""

    def __init__(self, mark: bytes) -> None:
        self._mark = mark

    def event(self, event: Event) -> Event:
        raw = marked(event.raw, self._mark)
        return event if raw == event.raw else Event(raw)


def mark_of(endpoint: str) -> str:
    """Return a resource's mark: `r` and six letters or digits, always the same for an endpoint."""
    return "r" + b32encode(blake2b(endpoint.lower().encode(), digest_size=4).digest())[:6].decode().lower()


def marked(data: bytes, mark: bytes) -> bytes:
    """Return JSON with the mark behind each id of what is kept; every other byte stays."""
    data = ONE.sub(rb"\g<1>\g<2>." + mark, data)
    return SEVERAL.sub(lambda listed: LISTED.sub(rb"\g<1>\g<2>." + mark, listed.group()), data)
