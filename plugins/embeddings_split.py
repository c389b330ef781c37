"""`embeddings_split`: sends an embeddings request with too many inputs for Azure in parts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from gateway import ApiError, Meta, Next, Request, Response, Stage, UpstreamError

# Limit for the responses to one request, in bytes: some 20,000 embeddings of 1,536 numbers in base64.
MAX_TOTAL = 256 * 1024 * 1024

# One entry of an array, after the separator. Texts and arrays of tokens are several inputs; an array of numbers is one
# input, in tokens. Possessive quantifiers: no input can cause backtracking.
FIRST = re.compile(rb'\[\s*(["\[])')
TEXT = re.compile(rb'[\s,]*("[^"\\]*+(?:\\.[^"\\]*+)*+")')
TOKENS = re.compile(rb"[\s,]*(\[[^\[\]\"]*+\])")


class Part(msgspec.Struct):
    """The parsed fields of a part's response; all others keep their bytes."""

    data: list[dict[str, msgspec.Raw]]
    usage: dict[str, Any]


decode_part = msgspec.json.Decoder(Part)
decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
decode_index = msgspec.json.Decoder(int)


@dataclass
class EmbeddingsSplit(Stage):
    """Split an embeddings request with many inputs into several, sent one after the other, and merge the responses.

    Inputs are texts or arrays of tokens; one text, or one array of numbers, is one input. `data` is in the order of the
    inputs and `usage` is the sum; all other fields are those of the first response, the headers those of the last one.
    If a part fails, its error is the response. Every embedding keeps its bytes.
    """

    most_inputs: Annotated[int, Meta(gt=0, description="maximum number of inputs in one request to Azure")] = 2048
    most_parts: Annotated[
        int,
        Meta(gt=0, description="maximum number of parts; a request that needs more is a 400"),
    ] = 16
    header: Annotated[bool, Meta(description="report the number of parts in the response header x-gateway-adapted")] = (
        False
    )

    async def __call__(self, request: Request, call_next: Next) -> Response:
        if request.operation != "embeddings":
            return await call_next(request)
        value = (await request.fields("input")).get("input", b"")
        spans = self._spans(value)
        if len(spans) <= self.most_inputs:
            return await call_next(request)
        if len(spans) > self.most_inputs * self.most_parts:
            limit = self.most_inputs * self.most_parts
            raise ApiError(400, f"`input` has more than {limit} entries; send it in several requests", param="input")
        parts = [spans[start : start + self.most_inputs] for start in range(0, len(spans), self.most_inputs)]
        change = f"input: sent in {len(parts)} parts"
        request.record_adaptation(change)
        request.count(self.id)
        try:
            response = await self._merged(request, call_next, value, parts)
        except ApiError as exc:
            response = Response.from_error(exc)
        if self.header:
            response.headers.add("x-gateway-adapted", change)
        return response

    def _spans(self, value: bytes) -> Sequence[tuple[int, int]]:
        """Return the span of each input; none if there are few enough, or if they are not all of one kind.

        Stops after one more than the limit.
        """
        if (first := FIRST.match(value)) is None:
            return ()
        entry, opening, per_entry = (TEXT, b'"', 2) if first.group(1) == b'"' else (TOKENS, b"[", 1)
        # Fast path, nearly always: counting is enough, and the entries are not scanned one by one.
        if value.count(opening, 1) // per_entry <= self.most_inputs:
            return ()
        spans: list[tuple[int, int]] = []
        position = 1
        while (found := entry.match(value, position)) is not None:
            spans.append(found.span(1))
            position = found.end()
            if len(spans) > self.most_inputs * self.most_parts:
                return spans
        return spans if value[position:].strip() == b"]" else ()

    async def _merged(
        self, request: Request, call_next: Next, value: bytes, parts: list[Sequence[tuple[int, int]]]
    ) -> Response:
        fields = await request.fields()
        first: dict[str, msgspec.Raw] = {}
        data: list[dict[str, msgspec.Raw]] = []
        usage: dict[str, Any] = {}
        left = MAX_TOTAL
        for number, part in enumerate(parts, 1):
            partial = request.copy()
            # From the first byte of the first input to the last byte of the last one: bytes in between stay.
            partial.set_fields({**fields, "input": b"[%b]" % value[part[0][0] : part[-1][1]]})
            response = await call_next(partial)
            if response.error is not None or response.status != 200:
                request.record_adaptation(f"input: part {number} of {len(parts)} failed")
                return response
            try:
                body = await response.read(left)
            except UpstreamError:
                raise
            except ApiError:  # too large
                body = b""
                left = 0
            left -= len(body)
            if left <= 0:
                request.record_adaptation(f"input: part {number} of {len(parts)} failed")
                raise UpstreamError(
                    f"the responses to `input` exceed {MAX_TOTAL} bytes at part {number} of {len(parts)}; send fewer "
                    "inputs in a request, or use `encoding_format` base64"
                )
            if number == 1 and len(body) * (len(parts) - 1) > MAX_TOTAL:
                raise ApiError(
                    400,
                    f"the responses to the {len(parts)} parts of `input` would exceed {MAX_TOTAL} bytes; send fewer "
                    "inputs in a request, or use `encoding_format` base64",
                    param="input",
                )
            try:
                decoded = decode_part.decode(body)
                data += numbered(decoded.data, len(data), len(part))
                usage = summed(usage, decoded.usage)
                first = first or decode_fields.decode(body)
            except (ValueError, RecursionError) as exc:
                raise UpstreamError(
                    f"Azure's response to part {number} of {len(parts)} of `input` cannot be merged: {exc}"
                ) from None
        request.reserve_memory(MAX_TOTAL - left)  # until all responses are merged
        first["data"] = msgspec.Raw(msgspec.json.encode(data))
        first["usage"] = msgspec.Raw(msgspec.json.encode(usage))
        response.body = msgspec.json.encode(first)
        response.headers.remove("content-length")
        return response


def numbered(data: list[dict[str, msgspec.Raw]], offset: int, inputs: int) -> list[dict[str, msgspec.Raw]]:
    """Return the embeddings of a part in order, with their indices in the whole input. Raises ValueError."""
    by_index: dict[int, dict[str, msgspec.Raw]] = {}
    for each in data:
        if "embedding" not in each or "index" not in each:
            raise ValueError("an entry of `data` lacks its `embedding` or its `index`")
        index = decode_index.decode(each["index"])
        by_index[index] = {**each, "index": msgspec.Raw(b"%d" % (offset + index))}
    if len(data) != inputs or sorted(by_index) != list(range(inputs)):
        raise ValueError(f"`data` does not have one entry for each of the {inputs} inputs")
    return [by_index[index] for index in range(inputs)]


def summed(usage: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return the sum of two usages, including their details."""
    sums = dict(usage)
    for name, value in more.items():
        before = sums.get(name)
        if isinstance(value, dict):
            sums[name] = summed(before if isinstance(before, dict) else {}, value)
        elif isinstance(value, (int, float)) and isinstance(before, (int, float)):
            sums[name] = before + value
        elif before is None:
            sums[name] = value
    return sums
