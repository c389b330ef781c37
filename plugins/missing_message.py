"""`missing_message`: an empty `message` for a completion that Azure's content filter withheld."""

from dataclasses import dataclass
from typing import Any

from gateway import Next, Request, Response, Stage

MESSAGE = {"role": "assistant", "content": "", "refusal": None}
MAX_BODY = 64 * 1024 * 1024  # bytes


@dataclass
class MissingMessage(Stage):
    """Give a choice of a chat completion an empty `message` if Azure's content filter removed it.

    Such a choice has the `finish_reason` `content_filter` and no message; programs that read
    `choices[0].message.content` fail on it.
    """

    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        if request.operation != "chat.completions" or response.status != 200:
            return response
        if response.media_type != "application/json":
            return response  # a stream may have the wrong media type
        # (Bytes that have arrived need no await.)
        body = response.body
        if not isinstance(body, bytes) or response.filters:
            body = await response.read(MAX_BODY)
        if b'"content_filter"' in body and (fixed := completed(await response.read_json(MAX_BODY))) is not None:
            response.set_json(fixed)
            request.count(self.id)
        return response


def completed(content: Any) -> Any:
    """Return a completion in which every choice has a message, or None if none is missing."""
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, list) or not any(lacks_message(each) for each in choices):
        return None
    return {**content, "choices": [{**each, "message": MESSAGE} if lacks_message(each) else each for each in choices]}


def lacks_message(choice: Any) -> bool:
    """Whether a choice has no message."""
    return isinstance(choice, dict) and not isinstance(choice.get("message"), dict)
