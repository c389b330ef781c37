"""`missing_message`: a completion that Azure's filter withheld has the `message` that clients read."""

import json
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
        if request.operation != "chat.completions" or response.status != 200 or response.event_stream:
            return response
        body = response.body if isinstance(response.body, bytes) else await response.read(MOST)
        if b'"content_filter"' in body and (made := completed(body)) is not None:
            response.body = json.dumps(made).encode()
            response.headers.remove("content-length")
            request.count(self.id)
        return response


def completed(body: bytes) -> Any:
    """Return a completion whose choices all have a message, or None where nothing lacks one."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, list) or not any(lacks_message(each) for each in choices):
        return None
    return {**content, "choices": [{**each, "message": MESSAGE} if lacks_message(each) else each for each in choices]}


def lacks_message(choice: Any) -> bool:
    """Whether something is a choice without a message."""
    return isinstance(choice, dict) and not isinstance(choice.get("message"), dict)
