"""Parsing of heads: `gateway/protocol/` and aiohttp's compiled parser: `python -m tests.bench.parsers`.

The heads are those of the OpenAI SDK and of Azure. aiohttp's parser also takes the body of 1 KB that follows, which
the gateway cuts from the read. The fastest of 20 rounds counts: interference only adds time.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Callable

import aiohttp
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParser, HttpResponseParser

from gateway.protocol.http1_fields import HEAD_END
from gateway.protocol.http1_request import HeadReader
from gateway.protocol.http1_response import parse_response

# More heads than lines are kept, so that a new line is new in each round.
ROUNDS, HEADS = 20, 5000
BODY = b"x" * 1000
REQUEST = b"""POST /v1/chat/completions HTTP/1.1
host: 127.0.0.1:8080
accept-encoding: gzip, deflate
connection: keep-alive
accept: application/json
content-type: application/json
user-agent: OpenAI/Python 1.99.0
x-stainless-lang: python
x-stainless-package-version: 1.99.0
x-stainless-os: Linux
x-stainless-arch: x64
x-stainless-runtime: CPython
x-stainless-runtime-version: 3.11.2
authorization: Bearer 0123456789abcdef0123456789abcdef
x-stainless-async: false
x-stainless-retry-count: 0
x-stainless-read-timeout: 600
content-length: 1000""".replace(b"\n", b"\r\n")
RESPONSE = b"""HTTP/1.1 200 OK
content-length: 1000
content-type: application/json
x-request-id: 0123456789
apim-request-id: 0123456789
x-ms-region: East US
x-ratelimit-remaining-requests: 99
x-ratelimit-remaining-tokens: 9999
date: Mon, 01 Jan 2026 00:00:00 GMT""".replace(b"\n", b"\r\n")


def fastest(parse: Callable[[bytes], object], heads: list[bytes]) -> float:
    """Return microseconds of CPU for each head, in the fastest round."""
    rounds = []
    for _ in range(ROUNDS):
        begun = time.process_time()
        for head in heads:
            parse(head)
        rounds.append((time.process_time() - begun) / len(heads) * 1e6)
    return min(rounds)


async def main() -> None:
    """Print the table."""
    loop = asyncio.get_running_loop()
    numbers = itertools.count()

    def heads(of: bytes, line: bytes, changing: int) -> list[bytes]:
        """Return heads that repeat after `changing` of them."""
        ends = [b"%b\r\n%b: %d" % (of, line, next(numbers)) for _ in range(changing)]
        return [ends[number % changing] for number in range(HEADS)]

    ours = {
        "request, like the last one of its connection": heads(REQUEST, b"x-request-id", 1),
        "request, all lines known": heads(REQUEST, b"x-request-id", 2),
        "request, one line new": heads(REQUEST, b"x-request-id", HEADS),
        "response, one line new": heads(RESPONSE, b"x-envoy-upstream-service-time", HEADS),
    }
    sys.stdout.write(f"| us of CPU for a head | aiohttp {aiohttp.__version__} | gateway |\n|---|---|---|\n")
    for name, given in ours.items():
        if name.startswith("request"):
            theirs: Callable[[bytes], object] = HttpRequestParser(BaseProtocol(loop), loop, 2**16).feed_data
            reader = HeadReader()
            took = fastest(lambda head, reader=reader: reader.read(head, 1 << 20), given)  # type: ignore[misc]
        else:
            theirs = HttpResponseParser(BaseProtocol(loop), loop, 2**16).feed_data
            took = fastest(parse_response, given)
        sys.stdout.write(
            f"| {name} | {fastest(theirs, [head + HEAD_END + BODY for head in given]):.1f} | {took:.1f} |\n"
        )


if __name__ == "__main__":
    asyncio.run(main())
