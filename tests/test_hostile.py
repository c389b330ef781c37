"""Hostile and broken input: raw requests by the letter of RFC 9112, and requests that try to steer the gateway.

The rows of `data/*.jsonl` each name a rule; rows too large for a file are made here.
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from gateway.testing import FakeAzure
from tests.conftest import KEY, StartGateway, raw_request

pytestmark = [pytest.mark.slow, pytest.mark.both_loops]

DATA = Path(__file__).parent / "data"
KEY_B = "another-team-key"
HOST = "GET / HTTP/1.1\r\nHost: gw.test\r\n"
CHUNKED = "POST / HTTP/1.1\r\nHost: gw.test\r\nTransfer-Encoding: chunked\r\n\r\n"

# Where this gateway is stricter than a row, and why: it is no forward proxy, and decides on one form of the path.
STRICTER = {
    "line-absolute": "targets come from the configuration alone",
    "line-pct-slash": "an encoded slash may be read as one further on",
    "line-dotdot": "dot segments may be resolved further on",
}


def rows(name: str) -> list[Any]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def large(name: str, level: str, raw: str) -> dict[str, Any]:
    return {"id": name, "expect": "reject", "level": level, "raw": raw}


LARGE = [
    large("cl-5000-digits", "must", f"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {'1' * 5000}\r\n\r\n"),
    large("chunk-ext-16k", "should", CHUNKED + f"5;a={'x' * 16_384}\r\nhello\r\n0\r\n\r\n"),
    large("chunk-ext-flood", "policy", CHUNKED + f"1;{'x' * 1000}\r\na\r\n" * 200 + "0\r\n\r\n"),
    large("chunk-zeros-8k", "policy", CHUNKED + f"{'0' * 8192}5\r\nhello\r\n0\r\n\r\n"),
    large("chunk-trailers", "should", CHUNKED + "0\r\n" + "".join(f"X-{n}: y\r\n" for n in range(5000)) + "\r\n"),
    large("method-64k", "policy", "A" * 65_536 + " / HTTP/1.1\r\nHost: a\r\n\r\n"),
    large("field-70k", "policy", HOST + f"X: {'a' * 70_000}\r\n\r\n"),
    large("fields-20000", "policy", HOST + "".join(f"X-{n}: y\r\n" for n in range(20_000)) + "\r\n"),
    large("fields-1m", "policy", HOST + "".join(f"X-{n}: {'a' * 8000}\r\n" for n in range(125)) + "\r\n"),
    large("cookies-64", "policy", HOST + f"Cookie: {'a' * 500}\r\n" * 64 + "\r\n"),
]


# So short that the gateway itself ends each connection on which nothing more comes.
SOON = {"head": 0.5, "client": 0.5, "keep_alive": 0.1}


def status_of(received: bytes) -> int:
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", received)
    return int(found.group(1)) if found else 0


@pytest.mark.parametrize("row", [*rows("hostile_requests.jsonl"), *LARGE], ids=lambda row: row["id"])
async def test_raw_request(row: dict[str, Any], start_gateway: StartGateway, azure: FakeAzure) -> None:
    """A malformed request is refused with a 4xx, or closed on; a good one is answered; none is ever a 5xx."""
    gateway = await start_gateway(azure.endpoint, timeouts=SOON)
    raw = row["raw"].encode("latin-1")

    received = await raw_request(gateway.port, raw)

    status = status_of(received)
    assert status < 500
    rejected = status in (0, 400, 408, 413, 414, 415, 417, 431, 501)
    wanted = {"reject"} if row["id"] in STRICTER else {row["expect"], row.get("also_ok")}
    if row.get("level", "must") == "must":
        assert ("reject" if rejected else "accept") in wanted, received[:300]
    if rejected and status:
        assert b'"error"' in received
    assert len(re.findall(rb"HTTP/1\.1 \d", received)) <= 1 + raw.count(b"/second") + raw.count(b"/smuggled")


async def test_raw_requests_of_lower_level(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Of the rows that are a recommendation or a policy, at least 95 of 100 are as they say."""
    gateway = await start_gateway(azure.endpoint, timeouts=SOON)
    wrong = []
    checked = [row for row in [*rows("hostile_requests.jsonl"), *LARGE] if row.get("level", "must") != "must"]
    answers = await asyncio.gather(*(raw_request(gateway.port, row["raw"].encode("latin-1")) for row in checked))
    for row, received in zip(checked, answers, strict=True):
        rejected = status_of(received) in (0, 400, 408, 413, 414, 415, 417, 431, 501)
        if ("reject" if rejected else "accept") not in {row["expect"], row.get("also_ok")}:
            wrong.append(row["id"])
    assert len(wrong) <= len(checked) * 0.05, wrong


def big_rows() -> list[dict[str, Any]]:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: gw.test\r\nAuthorization: Bearer {KEY}\r\n"

    def row(name: str, expect: str, body: str) -> dict[str, Any]:
        return {"id": name, "expect": expect, "raw": f"{head}Content-Length: {len(body)}\r\n\r\n{body}"}

    return [
        row("json-deep", "either", "[" * 100_000),
        row("json-deep-object", "either", '{"model":"gpt-4o","a":' + "[" * 50_000 + "]" * 50_000 + "}"),
        row("json-not-utf8", "reject", '{"model":"\xff\xfe"}'),
        row("model-long", "reject", '{"model":"' + "a" * 10_000 + '"}'),
    ]


@pytest.mark.parametrize("row", [*rows("gateway_inputs.jsonl"), *big_rows()], ids=lambda row: row["id"])
async def test_gateway_input(row: dict[str, Any], start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Nothing in a request steers where it goes or which key goes along, and none makes the gateway fail."""
    azure.deployments = ("gpt-4",)
    gateway = await start_gateway(azure.endpoint, timeouts=SOON)
    raw = row["raw"].replace("{KEYB}", KEY_B).replace("{KEY}", KEY).encode("latin-1")

    received = await raw_request(gateway.port, raw)

    status = status_of(received)
    assert 200 <= status < 500 or (status == 0 and not received)
    if row["expect"] == "reject" and not row["id"].startswith("model-23"):
        assert status >= 400, received[:200]
    if row["expect"] in ("accept", "no-effect"):
        assert status == 200, received[:300]
    if row["id"].startswith(("model-type", "auth")) and row["expect"] == "reject":
        assert not azure.requests
    for seen in azure.requests:
        assert re.fullmatch(r"/openai/deployments/[A-Za-z0-9._-]+/chat/completions", seen.path)
        assert ".." not in seen.path
        assert [pair for pair in seen.query if pair[0] == "api-version"] == [("api-version", "2024-10-21")]
        assert not {"api-key", "subscription-key"} & {name for name, _ in seen.query}
        assert seen.headers.get("api-key") == KEY
        assert f"127.0.0.1:{azure.port}" == seen.headers.get("host")
        for name in ("authorization", "te", "upgrade", "via", "forwarded", "proxy", "x-forwarded-host", "max-forwards"):
            assert name not in seen.headers
    await gateway.idle()
    log = json.dumps(gateway.events, default=str)
    assert KEY not in log
    assert KEY_B not in log
    # The next request is fine.
    azure.requests.clear()
    async with gateway.post(json={"model": "gpt-4", "messages": []}) as answer:
        assert answer.status == 200


@pytest.mark.parametrize("kind", ["bearer", "api-key"])
async def test_keys_of_malformed_requests_are_neither_logged_nor_echoed(
    kind: str, start_gateway: StartGateway, azure: FakeAzure, capfd: pytest.CaptureFixture[str]
) -> None:
    """Aiohttp prints malformed header lines whole; here nothing of them is seen anywhere."""
    gateway = await start_gateway(azure.endpoint)
    secret = "sk-very-secret-0123456789"
    line = f"Authorization: Bearer {secret}" if kind == "bearer" else f"api-key: {secret}"
    for raw in (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n{line}\x00\r\n\r\n",
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n{line.replace(':', ' :')}\r\n\r\n",
        f"POST /v1/chat/completions HTTP/1.1\r\n{line}\r\n\r\n",
        f"POST http://[{secret}/ HTTP/1.1\r\nHost: a\r\n\r\n",
        f"POST /v1/{secret}\x01 HTTP/1.1\r\nHost: a\r\n\r\n",
    ):
        received = await raw_request(gateway.port, raw.encode("latin-1"))
        assert status_of(received) == 400
        assert secret.encode() not in received
    shown = capfd.readouterr()
    assert secret not in shown.out + shown.err + json.dumps(gateway.events, default=str)
