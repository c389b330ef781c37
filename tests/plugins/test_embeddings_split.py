"""`embeddings_split`: sends too many inputs in parts, and merges the responses."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any

import msgspec
import openai
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from gateway import ApiError, Next, Request, Response, Stage
from gateway.testing import FakeAzure, Sent, running, send
from gateway.testing.azure import Seen
from plugins.embeddings_split import EmbeddingsSplit
from plugins.openai_errors import OpenAIErrors
from plugins.rate_limit import RateLimit
from tests.conftest import KEY, YAML, StartGateway, until

MODEL = "text-embedding-3-small"


class Azure:
    """Responds like Azure: an embedding for each input, with numbers that a float cannot represent."""

    def __init__(self, change: Callable[[int, dict[str, Any]], object] | None = None) -> None:
        self.bodies: list[bytes] = []
        self._change = change

    async def __call__(self, request: Request) -> Response:
        self.bodies.append(await request.body())
        given_input = json.loads(self.bodies[-1])["input"]
        inputs = given_input if isinstance(given_input, list) and not isinstance(given_input[0], int) else [given_input]
        data = [
            {"object": "embedding", "index": place, "embedding": msgspec.Raw(b"[1.50, %d]" % len(str(each)))}
            for place, each in enumerate(inputs)
        ]
        count = len(inputs)
        usage = {"prompt_tokens": count, "total_tokens": count, "prompt_tokens_details": {"cached_tokens": 1}}
        answer: Any = {"object": "list", "data": data, "model": f"{MODEL}-{len(self.bodies)}", "usage": usage}
        if self._change is not None:
            answer = self._change(len(self.bodies), answer) or answer
        if isinstance(answer, Response):
            return answer
        headers = {"content-type": "application/json", "x-ratelimit-remaining-requests": str(10 - len(self.bodies))}
        return Response(200, msgspec.json.encode(answer), headers)


async def embed(stage: EmbeddingsSplit, body: bytes, azure: Azure) -> Sent:
    return await send([stage], "POST", "/embeddings", body=body, response=azure)


async def test_many_inputs_are_sent_in_parts_and_answered_as_one() -> None:
    """`data` in order with its own indices, `usage` summed, other fields of the first response, headers of the last."""
    azure = Azure()
    body = b'{"model":"m", "n": 1.50 ,"input": ["a" ,"b, \\"]",  "c\\u0041", "d","e"],"dimensions":256}'
    sent = await embed(EmbeddingsSplit(2, header=True), body, azure)
    assert azure.bodies == [
        b'{"model":"m","n":1.50,"input":["a" ,"b, \\"]"],"dimensions":256}',
        b'{"model":"m","n":1.50,"input":["c\\u0041", "d"],"dimensions":256}',
        b'{"model":"m","n":1.50,"input":["e"],"dimensions":256}',
    ]
    answer = sent.json()
    assert [each["index"] for each in answer["data"]] == [0, 1, 2, 3, 4]
    assert sent.body.count(b'"embedding":[1.50, ') == 5
    assert [each["embedding"][1] for each in answer["data"]] == [1, 5, 2, 1, 1]
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 3}}
    assert (answer["object"], answer["model"]) == ("list", f"{MODEL}-1")
    assert sent.headers.get("x-ratelimit-remaining-requests") == "7"
    assert sent.headers.get("x-gateway-adapted") == "input: sent in 3 parts"
    assert sent.reached is not None
    assert sent.reached.notes["adapted"] == ["input: sent in 3 parts"]
    assert sent.outcome.counts == {"EmbeddingsSplit": 1}


@pytest.mark.parametrize(
    "given_input",
    [
        b'"one text, two, three, four"', b'["a","b"]', b'["a, b, c, d, e"]', b"[1, 2, 3, 4, 5]",
        b"[[1,2,3],[4,5,6]]",
        b"[]", b"null", b"5", b'{"a":[1,2,3,4]}', b'["a", 1, "b", 2]', b'["a",["b"],"c","d"]', b'["a","b","c",1]',
        b'[["a","b"],["c"],["d"]]',
        b"[[1],[2],[[3]]]", b"[true,true,true]", b"[1.5,2,3]",
    ],
)  # fmt: skip
async def test_what_is_few_inputs_or_none_goes_as_it_came(given_input: bytes) -> None:
    """Byte for byte: an array of numbers is one input, and Azure rejects invalid inputs."""
    body = b' {"input" : %b,"model": "m", "a":1e400} ' % given_input
    sent = await send([EmbeddingsSplit(2)], "POST", "/embeddings", body=body)
    assert sent.reached is not None
    assert await sent.reached.body() == body
    assert "adapted" not in sent.reached.notes


async def test_without_an_input_and_for_other_operations() -> None:
    """The stage does nothing; it only reads embeddings requests."""
    for path, body in (("/embeddings", b'{"model":"m"}'), ("/responses", b'{"input":["a","b"]}'), ("/files", b"a,b")):
        sent = await send([EmbeddingsSplit(1)], "POST", path, body=body)
        assert sent.reached is not None
        assert await sent.reached.body() == body


async def test_more_than_may_be_sent_is_a_400() -> None:
    """Nothing is sent, and counting stops at the limit."""
    for most_parts, status in ((2, 400), (3, 200)):
        azure = Azure()
        sent = await embed(EmbeddingsSplit(2, most_parts=most_parts), b'{"input":["a","b","c","d","e"]}', azure)
        assert sent.status == status
        assert bool(azure.bodies) == (status == 200)
    # What comes behind the one too many is not looked at.
    assert (await embed(EmbeddingsSplit(1, most_parts=2), b'{"input":["a","b","c",1]}', Azure())).status == 400
    error = (await embed(EmbeddingsSplit(), b'{"input":[' + b'"",' * 1_000_000 + b'""]}', Azure())).json()["error"]
    assert error["param"] == "input"
    assert "more than 32768 entries" in error["message"]


texts = st.text(st.sampled_from('ab,"\\[]{}\n ü\x00😀'), max_size=6)
arrays = st.one_of(
    st.lists(texts, min_size=1, max_size=12),
    st.lists(st.lists(st.integers(0, 99999), max_size=3), min_size=1, max_size=12),
)


@given(arrays, st.integers(1, 6), st.booleans())
def test_parts_together_answer_what_one_request_would(inputs: list[Any], most: int, spaced: bool) -> None:
    """For any inputs, however they are encoded."""
    coded = msgspec.json.encode(inputs)
    if spaced:
        coded = msgspec.json.format(coded, indent=1)
    whole, parts = Azure(), Azure()
    body = b'{"model":"m","input":%b}' % coded
    wanted = asyncio.run(embed(EmbeddingsSplit(100), body, whole)).json()
    found = asyncio.run(embed(EmbeddingsSplit(most), body, parts)).json()
    count = len(parts.bodies)
    assert count == -(-len(inputs) // most)
    wanted["usage"]["prompt_tokens_details"]["cached_tokens"] = count
    assert found == wanted
    assert [each for sent in parts.bodies for each in msgspec.json.decode(sent)["input"]] == inputs


async def test_half_a_surrogate_pair_is_an_input_too() -> None:
    """JavaScript sends it; it reaches Azure unchanged."""
    azure = Azure()
    sent = await embed(EmbeddingsSplit(1), b'{"input":["\\ud83d","b"]}', azure)
    assert sent.status == 200
    assert azure.bodies == [b'{"input":["\\ud83d"]}', b'{"input":["b"]}']


async def test_a_part_s_error_is_the_answer() -> None:
    """With its status, headers and body unchanged; no further part is sent, and the log event names the failed one."""

    def fail(number: int, _: object) -> Response | None:
        return Response(429, b'{"error": {"code": "429"} }', {"retry-after": "7"}) if number == 2 else None

    azure = Azure(fail)
    sent = await embed(EmbeddingsSplit(1, header=True), b'{"input":["a","b","c"]}', azure)
    assert (sent.status, sent.body, sent.headers.get("retry-after")) == (429, b'{"error": {"code": "429"} }', "7")
    assert len(azure.bodies) == 2
    assert sent.reached is not None
    assert sent.reached.notes["adapted"] == ["input: sent in 3 parts", "input: part 2 of 3 failed"]
    assert sent.headers.get("x-gateway-adapted") == "input: sent in 3 parts"


async def test_errors_of_the_gateway_s_own_are_answers_too() -> None:
    """For example a failed connection to Azure."""

    async def fail(request: Request) -> Response:
        raise ApiError(504, "too slow")

    sent = await send([EmbeddingsSplit(1)], "POST", "/embeddings", body=b'{"input":["a","b"]}', response=fail)
    assert (sent.status, sent.json()["error"]["message"]) == (504, "too slow")


def without(name: str) -> Callable[[int, dict[str, Any]], object]:
    return lambda number, answer: answer.pop(name) and None if number == 2 else None


def entry(**fields: Any) -> Callable[[int, dict[str, Any]], object]:
    return lambda number, answer: answer["data"][0].update(fields) if number == 2 else None


def body_of(body: bytes) -> Callable[[int, dict[str, Any]], object]:
    return lambda number, _: Response(200, body) if number == 2 else None


@pytest.mark.parametrize(
    "change",
    [
        without("data"), without("usage"), entry(index=1), entry(index="0"), entry(index=None), entry(index=-1),
        lambda number, answer: answer["data"].append(answer["data"][0]) if number == 2 else None,
        lambda number, answer: answer["data"].clear() if number == 2 else None,
        lambda number, answer: answer["data"][0].pop("embedding") and None if number == 2 else None,
        body_of(b""), body_of(b"<html>"), body_of(b"[]"), body_of(b'{"data": "x", "usage": {}}'),
        body_of(b'{"data": [{"index": 0, "embedding": NaN}], "usage": {}}'), body_of(b"[" * 100_000),
    ],
)  # fmt: skip
async def test_an_answer_that_cannot_be_put_together_is_a_502(change: Any) -> None:
    """It names the part; the client never gets half a response."""
    sent = await embed(EmbeddingsSplit(1, header=True), b'{"input":["a","b"]}', Azure(change))
    assert sent.status == 502
    assert "part 2 of 2 of `input`" in sent.json()["error"]["message"]
    assert sent.headers.get("x-gateway-adapted") == "input: sent in 2 parts"


class Above(Stage):
    """Keeps the request."""

    async def __call__(self, request: Request, call_next: Next) -> Response:
        self.request = request
        return await call_next(request)


async def test_the_request_itself_stays_as_it_is() -> None:
    """A stage above may send it again, to another deployment."""
    above, body = Above(), b'{"input":["a","b" , "c"]}'
    await send([above, EmbeddingsSplit(1)], "POST", "/embeddings", body=body, response=Azure())
    assert await above.request.body() == body


async def test_entries_of_an_answer_in_another_order() -> None:
    """Their indices determine the order."""

    def turned(_: int, answer: dict[str, Any]) -> None:
        answer["data"].reverse()

    sent = await embed(EmbeddingsSplit(2), b'{"input":["a","bb","ccc"]}', Azure(turned))
    assert [(each["index"], each["embedding"][1]) for each in sent.json()["data"]] == [(0, 1), (1, 2), (2, 3)]


async def test_a_rate_limit_above_counts_one_request() -> None:
    """Regardless of the number of parts."""
    stages = [RateLimit(requests_per_minute=2, per="team"), EmbeddingsSplit(1)]
    async with running(*stages, response=Azure()) as run:
        statuses = [(await run.send("POST", "/embeddings", body=b'{"input":["a","b","c"]}')).status for _ in range(3)]
    assert statuses == [200, 200, 429]


SPLIT = YAML + "  - embeddings_split: {most_inputs: 16, most_parts: 4}\n  - openai_errors\n"


async def sixteen(seen: Seen, _: web.BaseRequest) -> web.StreamResponse | None:
    """Reject more than sixteen inputs, as Azure did."""
    if len(seen.json()["input"]) <= 16:
        return None
    error = {"message": "Too many inputs. The max number of inputs is 16.", "type": "invalid_request_error"}
    return web.json_response({"error": {**error, "param": None, "code": None}}, status=400)


async def test_openai_python_gets_its_embeddings(start_gateway: StartGateway) -> None:
    """The SDK requests base64; without the stage it is a 400. All parts use one connection."""
    texts_ = [f"text {number}" for number in range(40)]
    async with FakeAzure(respond=sixteen) as azure:
        for yaml in (YAML, SPLIT):
            gateway = await start_gateway(azure.endpoint, yaml)
            async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{gateway.url}/v1", max_retries=0) as client:
                if yaml == YAML:
                    with pytest.raises(openai.BadRequestError, match="Too many inputs"):
                        await client.embeddings.create(model=MODEL, input=texts_)
                    continue
                answer = await client.embeddings.create(model=MODEL, input=texts_)
        assert [each.index for each in answer.data] == list(range(40))
        assert answer.data[39].embedding == [0.25, -0.5, 0.125]
        assert answer.usage.prompt_tokens == 40
        assert [len(seen.json()["input"]) for seen in azure.requests[1:]] == [16, 16, 8]
        assert {seen.json()["encoding_format"] for seen in azure.requests} == {"base64"}
        assert azure.connections == 2  # one of each gateway


async def test_a_client_that_leaves_between_parts_ends_it(start_gateway: StartGateway) -> None:
    """No further part is sent."""
    reached, waiting = asyncio.Event(), asyncio.Event()

    async def slow(seen: Seen, _: web.BaseRequest) -> web.StreamResponse | None:
        if b"text 16" in seen.body:
            reached.set()
            await waiting.wait()
        return None

    async with FakeAzure(respond=slow) as azure:
        gateway = await start_gateway(azure.endpoint, SPLIT)
        body = {"model": MODEL, "input": [f"text {number}" for number in range(40)]}
        asking = asyncio.ensure_future(gateway.post("/v1/embeddings", json=body).__aenter__())
        await asyncio.wait_for(reached.wait(), 30)
        asking.cancel()
        await asyncio.wait((asking,))
        await gateway.idle()
        await until(lambda: azure.requests[-1].left)
        assert len(azure.requests) == 2
        assert gateway.exchanges()[-1]["ended_by"] == "client"


def test_the_base64_of_a_part_is_not_decoded() -> None:
    """Nor checked."""

    def coded(_: int, answer: dict[str, Any]) -> None:
        for each in answer["data"]:
            each["embedding"] = msgspec.Raw(b'"' + base64.b64encode(b"\\/x").replace(b"/", b"\\/") + b'"')

    sent = asyncio.run(embed(EmbeddingsSplit(1), b'{"input":["a","b"]}', Azure(coded)))
    assert sent.body.count(b'"embedding":"XC94"') == 2


async def test_errors_below_are_in_openai_s_words_already() -> None:
    """`openai_errors` is below, nearest Azure, and converts each part's error."""
    answer = Response(401, b'{"error":{"code":"401","message":"no"}}')
    stages = [EmbeddingsSplit(1), OpenAIErrors()]
    sent = await send(stages, "POST", "/embeddings", body=b'{"input":["a","b"]}', response=answer)
    assert sent.json()["error"]["code"] == "invalid_api_key"


async def test_answers_that_cannot_be_kept_are_told_before_they_are_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first part shows how large the responses become; if a later one is too large, the error names it."""
    monkeypatch.setattr("plugins.embeddings_split.MAX_TOTAL", 1000)
    azure = Azure()
    sent = await embed(EmbeddingsSplit(2), json.dumps({"input": ["a"] * 20}).encode(), azure)
    assert (sent.status, sent.json()["error"]["param"], len(azure.bodies)) == (400, "input", 1)
    assert "base64" in sent.json()["error"]["message"]
    large = Azure(lambda number, answer: {**answer, "more": "x" * 2000} if number == 3 else None)
    sent = await embed(EmbeddingsSplit(2), json.dumps({"input": ["a"] * 6}).encode(), large)
    assert (sent.status, len(large.bodies)) == (502, 3)
    assert "at part 3 of 3" in sent.json()["error"]["message"]
    assert sent.reached is not None
    assert sent.reached.notes["adapted"] == ["input: sent in 3 parts", "input: part 3 of 3 failed"]
