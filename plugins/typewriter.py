"""`typewriter`: spreads events that Azure sends in bursts."""

from dataclasses import dataclass
from typing import Annotated

from gateway import Meta, Next, Request, Response, Stage


@dataclass
class Typewriter(Stage):
    """Spread the events of a burst over time, so that text appears as if it were typed.

    Azure's content filter checks a piece of text at a time, then releases all its events at once. Each event leaves
    at most `delay` seconds after it arrives; the fewer events wait, the larger the gaps between them.
    """

    delay: Annotated[float, Meta(gt=0, le=10, description="maximum number of seconds that an event waits")] = 0.5

    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        if response.is_event_stream:
            response.pace = self.delay
        return response
