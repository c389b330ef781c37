"""`embeddings_split`: an embeddings request with more inputs than Azure takes at once is sent in parts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from gateway import ApiError, Meta, Next, Request, Response, Stage, UpstreamError

# What is kept of the answers to one request, in bytes: some 20,000 embeddings of 1,536 numbers in base64.
MOST = 256 * 1024 * 1024

# One entry of an array, behind what stands between entries. Only these two kinds are several inputs; an array of
# numbers is one, in tokens. Each is passed in one go, without a way back: what clients send cannot make it slow.
FIRST = re.compile(rb'\[\s*(["\[])')
TEXT = re.compile(rb'[\s,]*("[^"\\]*+(?:\\.[^"\\]*+)*+")')
TOKENS = re.compile(rb"[\s,]*(\[[^\[\]\"]*+\])")


class Part(msgspec.Struct):
    """What is read of an answer to a part; everything else of it keeps its bytes."""

    data: list[dict[str, msgspec.Raw]]
    usage: dict[str, Any]


answer_of = msgspec.json.Decoder(Part)
fields_of = msgspec.json.Decoder(dict[str, msgspec.Raw])
index_of = msgspec.json.Decoder(int)


@dataclass
class EmbeddingsSplit(Stage):
    """Send an embeddings request with many inputs as several, one after the other, and answer with all of theirs.

    Inputs are texts or arrays of tokens; one text, or one array of numbers, is one input. `data` is in the order of the
    inputs and `usage` is summed; all else is the first answer's, the headers are the last one's. If a part fails, its
    error is the answer. In parts or not, every embedding keeps its bytes.
    """

    most_inputs: Annotated[int, Meta(gt=0, description="the most inputs of one request to Azure")] = 2048
    most_parts: Annotated[
        int,
        Meta(gt=0, description="the most requests that one may become; with more inputs than these take, it is a 400"),
    ] = 16
    header: Annotated[bool, Meta(description="say in the answer's header x-gateway-adapted how many parts it was")] = (
        False
    )

    async def __call__(self, request: Request, call_next: Next) -> Response:
        if request.operation != "embeddings":
            return await call_next(request)
        given = (await request.fields("input")).get("input", b"")
        spans = self._spans(given)
        if len(spans) <= self.most_inputs:
            return await call_next(request)
        if len(spans) > self.most_inputs * self.most_parts:
            most = self.most_inputs * self.most_parts
            raise ApiError(
                400, f"`input` has more than the {most} entries that one request may have here", param="input"
            )
        parts = [spans[place : place + self.most_inputs] for place in range(0, len(spans), self.most_inputs)]
        change = f"input: sent in {len(parts)} parts"
        request.record_adaptation(change)
        request.count(self.id)
        try:
            response = await self._merged(request, call_next, given, parts)
        except ApiError as exc:
            response = Response.from_error(exc)
        if self.header:
            response.headers.add("x-gateway-adapted", change)
        return response

    def _spans(self, given: bytes) -> Sequence[tuple[int, int]]:
        """Return where each input stands; none where they cannot be too many, or are not all of one kind.

        No more are looked at than may be sent, however many there are.
        """
        if (first := FIRST.match(given)) is None:
            return ()
        kind, begins, signs = (TEXT, b'"', 2) if first.group(1) == b'"' else (TOKENS, b"[", 1)
        # Nearly always this tells already that there are few, and nothing is looked at one by one.
        if given.count(begins, 1) // signs <= self.most_inputs:
            return ()
        spans: list[tuple[int, int]] = []
        place = 1
        while (found := kind.match(given, place)) is not None:
            spans.append(found.span(1))
            place = found.end()
            if len(spans) > self.most_inputs * self.most_parts:
                return spans
        return spans if given[place:].strip() == b"]" else ()

    async def _merged(
        self, request: Request, call_next: Next, given: bytes, parts: list[Sequence[tuple[int, int]]]
    ) -> Response:
        fields = await request.fields()
        first: dict[str, msgspec.Raw] = {}
        data: list[dict[str, msgspec.Raw]] = []
        usage: dict[str, Any] = {}
        left = MOST
        for number, part in enumerate(parts, 1):
            asked = request.copy()
            # From the first input's first byte to the last one's last: nothing in between is written anew.
            asked.set_fields({**fields, "input": b"[%b]" % given[part[0][0] : part[-1][1]]})
            response = await call_next(asked)
            if response.error is not None or response.status != 200:
                request.record_adaptation(f"input: part {number} of {len(parts)} failed")
                return response
            try:
                body = await response.read(left)
            except UpstreamError:
                raise
            except ApiError:  # it is larger
                body = b""
                left = 0
            left -= len(body)
            if left <= 0:
                request.record_adaptation(f"input: part {number} of {len(parts)} failed")
                raise UpstreamError(
                    f"the answers to `input` are larger than the {MOST} bytes that are kept, at part {number} of "
                    f"{len(parts)}; send fewer inputs at once, or ask for `encoding_format` base64"
                )
            if number == 1 and len(body) * (len(parts) - 1) > MOST:
                raise ApiError(
                    400,
                    f"the answers to the {len(parts)} parts of `input` would be larger than the {MOST} bytes that are "
                    "kept; send fewer inputs at once, or ask for `encoding_format` base64",
                    param="input",
                )
            try:
                answer = answer_of.decode(body)
                data += numbered(answer.data, len(data), len(part))
                usage = added(usage, answer.usage)
                first = first or fields_of.decode(body)
            except (ValueError, RecursionError) as exc:
                raise UpstreamError(
                    f"Azure's answer to part {number} of {len(parts)} of `input` is none to put together: {exc}"
                ) from None
        request.reserve_memory(MOST - left)  # the answers are kept until all are put together
        first["data"] = msgspec.Raw(msgspec.json.encode(data))
        first["usage"] = msgspec.Raw(msgspec.json.encode(usage))
        response.body = msgspec.json.encode(first)
        response.headers.remove("content-length")
        return response


def numbered(data: list[dict[str, msgspec.Raw]], before: int, inputs: int) -> list[dict[str, msgspec.Raw]]:
    """Return the embeddings of a part, with their indices among those of all parts, in order. Raises ValueError."""
    made: dict[int, dict[str, msgspec.Raw]] = {}
    for each in data:
        if "embedding" not in each or "index" not in each:
            raise ValueError("an entry of `data` lacks its `embedding` or its `index`")
        index = index_of.decode(each["index"])
        made[index] = {**each, "index": msgspec.Raw(b"%d" % (before + index))}
    if len(data) != inputs or sorted(made) != list(range(inputs)):
        raise ValueError(f"`data` has not one entry for each of the {inputs} inputs")
    return [made[index] for index in range(inputs)]


def added(usage: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return the sum of two usages, also of what is counted in them in detail."""
    sums = dict(usage)
    for name, value in more.items():
        before = sums.get(name)
        if isinstance(value, dict):
            sums[name] = added(before if isinstance(before, dict) else {}, value)
        elif isinstance(value, (int, float)) and isinstance(before, (int, float)):
            sums[name] = before + value
        elif before is None:
            sums[name] = value
    return sums
