"""`strip_azure_fields`: answers have no fields but those that OpenAI's own have."""

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
MOST = 64 * 1024 * 1024  # of a JSON answer, in bytes


@dataclass
class StripAzureFields(Stage):
    """Take Azure's own fields out of chunks, completions and responses, for clients that refuse what they do not know.

    They are looked for where Azure puts them: in the answer itself, in its `choices` or `data`, and in the
    `response` of an event; never inside what a user or a model wrote.
    """

    fields: Annotated[list[str], Meta(description="the names of the fields")] = field(
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
            body = await response.read(MOST)
            if (
                any(name in body for name in self.contains)
                and (made := self.stripped(await response.read_json(MOST))) is not None
            ):
                response.set_json(made)
                request.count(self.id)
        return response

    def stripped(self, content: Any) -> dict[str, Any] | None:
        """Return an answer without the fields; None where it has none of them."""
        if not isinstance(content, dict):
            return None
        made = {name: value for name, value in content.items() if name not in self._names}
        changed = len(made) != len(content)
        for name in ("choices", "data"):
            if isinstance(each := made.get(name), list):
                inner = [self.stripped(one) for one in each]
                if any(one is not None for one in inner):
                    made[name] = [old if new is None else new for old, new in zip(each, inner, strict=True)]
                    changed = True
        if (answer := self.stripped(made.get("response"))) is not None:
            made["response"], changed = answer, True
        return made if changed else None


class Strip(EventFilter):
    """Takes the fields out of events."""

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
        if (made := self._stripped(event.json())) is not None:
            event.set_json(made)
            self._count()
        return event
