"""`make fuzz` in small, and that it fails where something is wrong: it must not pass because it looks at nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.protocol.http1_response import parse_response
from tests.fuzz import readings
from tests.fuzz.answers import BadAnswer, read_answers
from tests.fuzz.fuzzing import differ, fuzz
from tests.fuzz.mutants import Mutant, make
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
    "an answer that is kept": (
        "last, before = await call_next(request), last\n        return before or last",
        "an answer of another request",
    ),
    "a canary's answer that is kept": (
        "last, before = Response.json({'nonce': request.headers.get('x-nonce')}), last\n        return before or last",
        "a canary on another connection got no answer of its own",
    ),
    "an error of its own": ("return Response.json({}, 503)", "a 503 for a mutated request"),
    "a task that stays": (
        "tasks.append(asyncio.create_task(asyncio.sleep(3600)))",
        "tasks or descriptors are left when all is over",
    ),
    "a key that is shown": ("return Response.json({'k': request.headers.get('authorization')})", "a key in an answer"),
    "a body that is changed": (
        "(await request.json())['user'] = 'x'; request.set_json({'model': 'gpt-4o', 'user': 'x'})",
        "Azure got another body than was sent",
    ),
}


async def test_mutants_do_no_harm() -> None:
    """Of two hundred requests and answers none breaks the gateway, and both readers see the same boundaries."""
    report = await fuzz(14, range(200))

    assert not report.failures, "\n".join(report.lines(14))
    assert report.mutants == 200
    assert report.agreed > 100
    assert report.statuses["request 200"] > 10, "some mutants are still sound"
    assert report.statuses["answer 200"] > 10


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_gateway_is_found(name: str) -> None:
    """Each kind of harm that a mutant may do is told by its name."""
    source, kind = BROKEN[name]

    report = await fuzz(14, range(0, 160, 2), stage=STAGE.format(source), smaller=False)

    assert f"request: {kind}" in report.failures, list(report.lines(14))


async def test_a_reader_that_takes_an_empty_read_for_the_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that holds framing and nothing else moves the end of a body."""
    take = readings._take

    def early(body: Any, data: bytes) -> tuple[bytes, bytes, bool]:
        taken, rest, done = take(body, data)
        return taken, rest, done or not taken

    monkeypatch.setattr(readings, "_take", early)
    moved = [number for number in range(0, 2000, 2) if _moves(make(14, number))]
    assert moved


async def test_a_reader_that_overlooks_chunks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer in chunks that is read until its connection closes ends elsewhere."""
    monkeypatch.setattr(
        readings, "parse_response", lambda head: parse_response(head)._replace(chunked=False, length=None)
    )
    assert any(_moves(make(14, number)) for number in range(1, 200, 2))


def _moves(mutant: Mutant) -> bool:
    difference = differ(mutant, asyncio.get_running_loop())
    return difference is not None and difference.moved


def test_a_mutant_is_found_again() -> None:
    """The same seed and number make the same bytes, and others make others."""
    assert make(1, 7) == make(1, 7)
    assert len({make(1, number).data for number in range(100)}) > 50
    assert make(1, 8) != make(2, 8)


async def test_a_failing_mutant_is_made_smaller() -> None:
    """What does not matter goes: cuts, lines and bytes."""

    async def fails(mutant: Mutant) -> bool:
        return b"bad" in mutant.data and mutant.ending == "reset"

    mutant = Mutant("answer", b"HTTP/1.1 200 OK\r\nX: a\r\nY: bad\r\n\r\nbody" * 3, (3, 9), "reset", late=b"late")
    small = await shrink(mutant, fails)
    assert small == Mutant("answer", b"bad", (), "reset")


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
    """The client that judges its answers takes no malformed one."""
    with pytest.raises(BadAnswer):
        read_answers(data, ["GET"], ended=True)
