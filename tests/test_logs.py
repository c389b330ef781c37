"""Log events and how they are written."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from datetime import UTC, datetime

from gateway import logs


def test_json_lines() -> None:
    """One JSON object per line; hostile text cannot break out of it."""
    stream = io.StringIO()
    logs.configure("info", "auto", stream)
    logs.get_logger().info("exchange", model='x\n{"event": "forged"}\x1b[2J', number=1)
    logs.get_logger().debug("not shown")
    [line] = stream.getvalue().splitlines()
    event = json.loads(line)
    assert (event["event"], event["number"], event["level"]) == ("exchange", 1, "info")
    assert "\x1b" not in line


def test_text_for_people_is_printable() -> None:
    """Control characters in a client's text do not control the terminal."""
    stream = io.StringIO()
    logs.configure("info", "text", stream)
    logs.get_logger().info("exchange", model="x\n\x1b[2Jforged")
    assert "\x1b[2J" not in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 1


def test_redaction() -> None:
    """Every occurrence in every text, including lists."""
    facts = {"message": "key sk-1 of sk-1", "frames": ["at sk-1"], "number": 1}
    assert logs.redacted(facts, ["sk-1"]) == {"message": "key *** of ***", "frames": ["at ***"], "number": 1}


class Writes(io.StringIO):
    """A stream that counts how often it is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def write(self, text: str) -> int:
        self.count += 1
        return super().write(text)


async def test_events_are_written_in_batches() -> None:
    """The first is written immediately, those shortly after it in one write; none is lost, and the order stays."""
    stream = Writes()
    logs.configure("info", "json", stream)
    logger = logs.get_logger().bind(team="a")
    for number in range(100):
        logger.info("exchange", number=number)
    assert stream.count == 1
    assert len(stream.getvalue().splitlines()) == 1
    async with asyncio.timeout(30):
        while stream.count < 2:
            await asyncio.sleep(0.01)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["number"] for line in lines] == list(range(100))
    assert {line["team"] for line in lines} == {"a"}


async def test_errors_are_written_immediately_after_queued_events() -> None:
    """A warning or an error is not queued: the process may be about to end."""
    for level in ("warning", "error", "critical"):
        stream = Writes()
        logs.configure("info", "json", stream)
        logs.get_logger().info("first")
        getattr(logs.get_logger(), level)("second")
        assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["first", "second"]


async def test_the_queue_is_bounded() -> None:
    """After the first event, every 256 events are written without waiting for the timer."""
    stream = Writes()
    logs.configure("info", "json", stream)
    for number in range(600):
        logs.get_logger().info("exchange", number=number)
    assert stream.count == 3
    assert len(stream.getvalue().splitlines()) == 513


async def test_the_timestamp_is_that_of_the_event() -> None:
    """Not that of the write; and events of all levels stay in order."""
    stream = Writes()
    logs.configure("info", "json", stream)
    logger = logs.get_logger()
    before = datetime.now(UTC).replace(microsecond=0)
    logger.info("first")
    await asyncio.sleep(0.02)
    logger.info("second %s", "formatted")
    logger.error("third")
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["first", "second formatted", "third"]
    times = [datetime.fromisoformat(event["timestamp"]) for event in events]
    assert times == sorted(times)
    assert (times[1] - times[0]).total_seconds() >= 0.02
    assert before <= times[0] <= times[2] <= datetime.now(UTC)


def test_queued_events_are_written_when_the_process_ends() -> None:
    """Even if an exception ends it."""
    program = """
import asyncio
from gateway import logs
logs.configure("info", "json")

async def main():
    logs.get_logger().info("last words")
    raise SystemExit(3)

asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert ended.returncode == 3
    assert b"last words" in ended.stderr


def test_a_log_that_cannot_be_written_harms_nothing() -> None:
    """A closed pipe, a full disk, text without an encoding: the event is lost or escaped, nothing is raised."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    for form in ("json", "text"):
        logs.configure("info", form, Full())
        logs.get_logger().info("lost")
        stream = io.StringIO()
        logs.configure("info", form, stream)
        logs.get_logger().info("odd", model="\udcff", thing=object())
        assert "odd" in stream.getvalue()
