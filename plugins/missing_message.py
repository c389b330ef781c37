"""`missing_message`: a completion that Azure's filter withheld has the `message` that clients read."""

import json
import math
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
        if request.operation != "chat.completions" or response.status != 200 or not is_json(response):
            return response
        # (At hand, it need not be waited for.)
        body = response.body
        if not isinstance(body, bytes) or response.filters:
            body = await response.read(MOST)
        if b'"content_filter"' in body and (made := completed(body)) is not None:
            response.body = json.dumps(made).encode()
            response.headers.remove("content-length")
            request.count(self.id)
        return response


def is_json(response: Response) -> bool:
    """Whether an answer is JSON, by its media type: a stream may have come without its own."""
    return (response.headers.get("content-type") or "").partition(";")[0].strip().lower() == "application/json"


def finite(text: str) -> float:
    """Return a number that JSON can say again. Raises ValueError."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is none")
    return number


def completed(body: bytes) -> Any:
    """Return a completion whose choices all have a message, or None where nothing lacks one."""
    try:
        content = json.loads(body, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError):
        return None
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, list) or not any(lacks_message(each) for each in choices):
        return None
    return {**content, "choices": [{**each, "message": MESSAGE} if lacks_message(each) else each for each in choices]}


def lacks_message(choice: Any) -> bool:
    """Whether something is a choice without a message."""
    return isinstance(choice, dict) and not isinstance(choice.get("message"), dict)
