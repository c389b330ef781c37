"""Adds up the usage of an exchange: reported by Azure, or else counted or estimated from the bodies."""

from __future__ import annotations

from gateway.errors import ApiError
from gateway.protocol.json_fields import raw_fields
from gateway.usage.metered_operations import PROMPTED
from gateway.usage.tokenizer import COUNTED_AT_ONCE, max_output_tokens, prompt_tokens
from gateway.usage.usage_fields import SOURCES, Usage
from gateway.usage.usage_scanner import UsageScanner

__all__ = ("UsageMeter",)

# Estimated output tokens of a background response without `max_output_tokens`.
_BACKGROUND_OUTPUT = 4096


def _in_background(body: bytes) -> bool:
    try:
        return raw_fields(body, ("background",)).get("background") == b"true"
    except ApiError:
        return False


class UsageMeter:
    """The usage of one exchange: the sum over all its requests to Azure."""

    __slots__ = ("_requests",)

    def __init__(self) -> None:
        self._requests: list[tuple[UsageScanner, str, bytes | None, str | None]] = []

    def watch(self, operation: str, body: bytes | None, model: str | None) -> UsageScanner:
        """Return the reader for the response to a request that is about to be sent with this body."""
        reader = UsageScanner(model, each=operation in ("realtime.connect", "responses.connect"))
        self._requests.append((reader, operation, body, model))
        return reader

    @property
    def asked(self) -> int:
        """The number of requests to Azure so far."""
        return len(self._requests)

    def forget(self, asked: int) -> None:
        """Count nothing for the requests after the first `asked` ones: they failed."""
        del self._requests[asked:]

    def usage(self, *, abandoned: bool) -> Usage | None:
        """Return the total usage. Returns None if nothing is known to have been used.

        `abandoned` says that the client ended the exchange: Azure may have worked without reporting it.
        """
        total: Usage | None = None
        for request in self._requests:
            one = self._of(*request, abandoned=abandoned)
            if one is not None:
                total = one if total is None else total + one
        return total

    def _of(
        self, reader: UsageScanner, operation: str, body: bytes | None, model: str | None, *, abandoned: bool
    ) -> Usage | None:
        if reader.reported is not None:
            return reader.reported
        status = reader.status
        if operation not in PROMPTED or status >= 400 or (status == 0 and not (abandoned and reader.sent)):
            return None
        # (Nothing can wait here until a long prompt is counted.)
        input_tokens, source = prompt_tokens(body, model, COUNTED_AT_ONCE) if body else (0, "estimated")
        if operation == "embeddings" or status == 0:
            return Usage(input_tokens, 0, source=source)
        if operation == "responses" and body is not None and _in_background(body):
            # Azure responds before it does the work, and never reports its usage here.
            return Usage(input_tokens, max_output_tokens(body) or _BACKGROUND_OUTPUT, source="estimated")
        output_tokens, output_source = reader.output()
        return Usage(input_tokens, output_tokens, source=max(source, output_source, key=SOURCES.index))
