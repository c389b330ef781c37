"""A short `make fuzz`, and proof that it fails if something is wrong."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.protocol.http1_response import parse_response
from tests.fuzz import readings
from tests.fuzz.fuzzing import differ, fuzz
from tests.fuzz.mutants import Mutant, make
from tests.fuzz.responses import BadResponse, read_responses
from tests.fuzz.shrink import shrink

pytestmark = pytest.mark.slow

STAGE = """
import asyncio
from gateway import Response, Stage

last = None
tasks = []


class Broken(Stage):
    async def __call__(self, request, call_next):
        global last
        {}
        return await call_next(request)
"""
BROKEN = {
    "a bug": ("assert request.method != 'POST'", "an error in the log"),
    "a response that is kept": (
        "last, before = await call_next(request), last\n        return before or last",
        "a response to another request",
    ),
    "a canary's response that is kept": (
        "last, before = Response.json({'nonce': request.headers.get('x-nonce')}), last\n        return before or last",
        "a canary on another connection got no response of its own",
    ),
    "an error of its own": ("return Response.json({}, 503)", "a 503 for a mutated request"),
    "a task that stays": (
        "tasks.append(asyncio.create_task(asyncio.sleep(3600)))",
        "tasks or descriptors are left at the end",
    ),
    "a key that is shown": ("return Response.json({'k': request.headers.get('authorization')})", "a key in a response"),
    "a body that is changed": (
        "(await request.json())['user'] = 'x'; request.set_json({'model': 'gpt-4o', 'user': 'x'})",
        "Azure got another body than the client sent",
    ),
}


async def test_mutants_do_no_harm() -> None:
    """None of 200 requests and responses breaks the gateway, and both parsers see the same boundaries."""
    report = await fuzz(14, range(200))

    assert not report.failures, "\n".join(report.lines(14))
    assert report.mutants == 200
    assert report.agreed > 100
    assert report.statuses["request 200"] > 10, "some mutants are still valid"
    assert report.statuses["response 200"] > 10


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_gateway_is_found(name: str) -> None:
    """Each kind of harm is reported by its name."""
    source, kind = BROKEN[name]

    report = await fuzz(14, range(0, 160, 2), stage=STAGE.format(source), smaller=False)

    assert f"request: {kind}" in report.failures, list(report.lines(14))


async def test_a_reader_that_takes_an_empty_read_for_the_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parser that takes a read with nothing but framing for the end of a body moves that end."""
    take = readings._take

    def early(body: Any, data: bytes) -> tuple[bytes, bytes, bool]:
        taken, rest, done = take(body, data)
        return taken, rest, done or not taken

    monkeypatch.setattr(readings, "_take", early)
    moved = [number for number in range(0, 2000, 2) if _moves(make(14, number))]
    assert moved


async def test_a_reader_that_overlooks_chunks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunked response that is read until its connection closes ends elsewhere."""
    monkeypatch.setattr(
        readings, "parse_response", lambda head: parse_response(head)._replace(chunked=False, length=None)
    )
    assert any(_moves(make(14, number)) for number in range(1, 200, 2))


def _moves(mutant: Mutant) -> bool:
    difference = differ(mutant, asyncio.get_running_loop())
    return difference is not None and difference.moved


def test_a_mutant_is_found_again() -> None:
    """A seed and a number always make the same bytes; others make other bytes."""
    assert make(1, 7) == make(1, 7)
    assert len({make(1, number).data for number in range(100)}) > 50
    assert make(1, 8) != make(2, 8)


async def test_a_failing_mutant_is_made_smaller() -> None:
    """Cuts, lines and bytes that do not matter are removed."""

    async def fails(mutant: Mutant) -> bool:
        return b"bad" in mutant.data and mutant.ending == "reset"

    mutant = Mutant("response", b"HTTP/1.1 200 OK\r\nX: a\r\nY: bad\r\n\r\nbody" * 3, (3, 9), "reset", late=b"late")
    small = await shrink(mutant, fails)
    assert small == Mutant("response", b"bad", (), "reset")


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nxx\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nxpoison...",
        b"HTTP/1.1 200 OK\r\nx : y\r\n\r\n",
    ],
)
def test_what_the_gateway_may_not_write(data: bytes) -> None:
    """The strict client parser refuses each malformed response."""
    with pytest.raises(BadResponse):
        read_responses(data, ["GET"], ended=True)
