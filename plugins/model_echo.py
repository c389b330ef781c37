"""`model_echo`: answers name the model that the client asked for."""

import math
from dataclasses import dataclass
from typing import Any

from gateway import Event, EventFilter, Next, Request, Response, Stage

# What is decoded at most, in bytes.
MOST = 4 * 1024 * 1024


@dataclass
class ModelEcho(Stage):
    """Put the client's own name of the model in answers, where Azure puts its base model or deployment.

    In JSON and in each event of a stream: the field `model`, also that of a `response` in it. An empty one,
    as in Azure's first chunk, stays empty, and an answer above 4 MB stays as it is.
    """

    async def __call__(self, request: Request, call_next: Next) -> Response:
        model = await request.model()
        response = await call_next(request)
        if model is None or response.error is not None or response.status >= 400:
            return response
        if response.is_event_stream:
            response.pipe(EchoEvents(model))
        elif response.media_type == "application/json" and length(response) <= MOST:
            content = named(await response.read_json(), model)
            if content is not None:
                response.set_json(content)
        return response


def length(response: Response) -> float:
    """Return the length of an answer, infinite where it is not told."""
    if isinstance(response.body, bytes):
        return len(response.body)
    told = response.headers.get("content-length") or ""
    return int(told) if told.isdigit() else math.inf


class EchoEvents(EventFilter):
    """Names the model in events."""

    contains = (b'"model"',)

    def __init__(self, model: str) -> None:
        self._model = model

    def event(self, event: Event) -> Event:
        if (content := named(event.json(), self._model)) is not None:
            event.set_json(content)
        return event


def named(content: Any, model: str) -> Any:
    """Return an answer that names `model`; None where nothing is to be changed."""
    if not isinstance(content, dict):
        return None
    if isinstance(inner := content.get("response"), dict):
        changed = named(inner, model)
        return None if changed is None else {**content, "response": changed}
    if not content.get("model") or content["model"] == model:
        return None
    return {**content, "model": model}
