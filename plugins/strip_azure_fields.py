"""`strip_azure_fields`: responses without the fields that only Azure has."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from gateway import Event, EventFilter, Meta, Next, Request, Response, Services, Stage

FIELDS = (
    "prompt_filter_results", "prompt_annotations", "content_filter_results", "content_filter_result",
    "content_filter_offsets", "content_filter_raw", "content_filters", "obfuscation",
)  # fmt: skip
MAX_BODY = 64 * 1024 * 1024  # of a JSON response, in bytes


@dataclass
class StripAzureFields(Stage):
    """Remove Azure's own fields from chunks, completions and responses, for clients that reject unknown fields.

    The stage looks where Azure puts them: at the top level, in `choices` or `data`, and in the `response` of an event;
    never inside the text of a user or a model.
    """

    fields: Annotated[list[str], Meta(description="names of the fields to remove")] = field(
        default_factory=lambda: list(FIELDS)
    )

    async def start(self, services: Services) -> None:
        self.idle = not self.fields
        self._names = frozenset(self.fields)
        self.contains = tuple(json.dumps(name).encode() for name in self.fields)

    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        if response.error is not None or response.status >= 400:
            return response
        if response.is_event_stream:
            response.pipe(Strip(self.contains, self.stripped, partial(request.count, self.id)))
        elif response.media_type == "application/json" and "content" not in (request.operation or "").split("."):
            body = await response.read(MAX_BODY)
            if (
                any(name in body for name in self.contains)
                and (stripped := self.stripped(await response.read_json(MAX_BODY))) is not None
            ):
                response.set_json(stripped)
                request.count(self.id)
        return response

    def stripped(self, content: Any) -> dict[str, Any] | None:
        """Return content without the fields, or None if it has none of them."""
        if not isinstance(content, dict):
            return None
        result = {name: value for name, value in content.items() if name not in self._names}
        changed = len(result) != len(content)
        for name in ("choices", "data"):
            if isinstance(items := result.get(name), list):
                inner = [self.stripped(each) for each in items]
                if any(each is not None for each in inner):
                    result[name] = [old if new is None else new for old, new in zip(items, inner, strict=True)]
                    changed = True
        if (response := self.stripped(result.get("response"))) is not None:
            result["response"], changed = response, True
        return result if changed else None


class Strip(EventFilter):
    """Removes the fields from events."""

    def __init__(
        self,
        contains: Sequence[bytes],
        stripped: Callable[[Any], dict[str, Any] | None],
        count: Callable[[], None],
    ) -> None:
        self.contains = contains
        self._stripped = stripped
        self._count = count

    def event(self, event: Event) -> Event:
        if (stripped := self._stripped(event.json())) is not None:
            event.set_json(stripped)
            self._count()
        return event
