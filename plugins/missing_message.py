"""`missing_message`: a completion that Azure's filter withheld has the `message` that clients read."""

from dataclasses import dataclass
from typing import Any

from gateway import Next, Request, Response, Stage

MESSAGE = {"role": "assistant", "content": "", "refusal": None}
MOST = 64 * 1024 * 1024  # of a completion, in bytes


@dataclass
class MissingMessage(Stage):
    """Give a choice of a chat completion an empty `message` where Azure's filter took it away.

    Such a choice has the `finish_reason` `content_filter` and nothing else to read; programs that read
    `choices[0].message.content` fail on it.
    """

    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        if request.operation != "chat.completions" or response.status != 200:
            return response
        if response.media_type != "application/json":
            return response  # a stream may have come without its own type
        # (At hand, it need not be waited for.)
        body = response.body
        if not isinstance(body, bytes) or response.filters:
            body = await response.read(MOST)
        if b'"content_filter"' in body and (made := completed(await response.read_json(MOST))) is not None:
            response.set_json(made)
            request.count(self.id)
        return response


def completed(content: Any) -> Any:
    """Return a completion whose choices all have a message, or None where nothing lacks one."""
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, list) or not any(lacks_message(each) for each in choices):
        return None
    return {**content, "choices": [{**each, "message": MESSAGE} if lacks_message(each) else each for each in choices]}


def lacks_message(choice: Any) -> bool:
    """Whether something is a choice without a message."""
    return isinstance(choice, dict) and not isinstance(choice.get("message"), dict)
