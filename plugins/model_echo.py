"""`model_echo`: responses name the model that the client requested."""

import math
from dataclasses import dataclass
from typing import Any

from gateway import Event, EventFilter, Next, Request, Response, Stage

# Largest body that is decoded, in bytes.
MAX_BODY = 4 * 1024 * 1024


@dataclass
class ModelEcho(Stage):
    """Put the client's name of the model in responses, in place of Azure's base model or deployment.

    In JSON and in each event of a stream: the field `model`, also in a `response` inside it. An empty one, as in
    Azure's first chunk, stays empty. A body above 4 MiB stays unchanged.
    """

    async def __call__(self, request: Request, call_next: Next) -> Response:
        model = await request.model()
        response = await call_next(request)
        if model is None or response.error is not None or response.status >= 400:
            return response
        if response.is_event_stream:
            response.pipe(EchoEvents(model))
        elif response.media_type == "application/json" and length(response) <= MAX_BODY:
            content = with_model(await response.read_json(), model)
            if content is not None:
                response.set_json(content)
        return response


def length(response: Response) -> float:
    """Return the length of a body, infinite if it is unknown."""
    if isinstance(response.body, bytes):
        return len(response.body)
    value = response.headers.get("content-length") or ""
    return int(value) if value.isdigit() else math.inf


class EchoEvents(EventFilter):
    """Puts the client's name of the model in events."""

    contains = (b'"model"',)

    def __init__(self, model: str) -> None:
        self._model = model

    def event(self, event: Event) -> Event:
        if (content := with_model(event.json(), self._model)) is not None:
            event.set_json(content)
        return event


def with_model(content: Any, model: str) -> Any:
    """Return content that names `model`, or None if nothing changes."""
    if not isinstance(content, dict):
        return None
    if isinstance(inner := content.get("response"), dict):
        changed = with_model(inner, model)
        return None if changed is None else {**content, "response": changed}
    if not content.get("model") or content["model"] == model:
        return None
    return {**content, "model": model}
