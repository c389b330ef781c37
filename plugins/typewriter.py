"""`typewriter`: events that Azure sends in lumps leave one after the other."""

from dataclasses import dataclass
from typing import Annotated

from gateway import Meta, Next, Request, Response, Stage


@dataclass
class Typewriter(Stage):
    """Spread the events of a lump over time, so that text appears as if it were typed.

    Azure's content filter looks at a piece of text at a time, and lets go of all its events at once. Each event
    leaves at the latest `delay` seconds after it came; the fewer wait, the further apart they leave.
    """

    delay: Annotated[float, Meta(gt=0, le=10, description="seconds that an event waits at most")] = 0.5

    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        if response.is_event_stream:
            response.pace = self.delay
        return response
