"""Log events, as lines."""

from __future__ import annotations

import io
import json
import logging

from gateway import logs


def test_json_lines() -> None:
    """One JSON object a line; hostile text cannot break out of it."""
    stream = io.StringIO()
    logs.configure("info", "auto", stream)
    logs.get_logger().info("exchange", model='x\n{"event": "forged"}\x1b[2J', number=1)
    logs.get_logger().debug("not shown")
    [line] = stream.getvalue().splitlines()
    event = json.loads(line)
    assert (event["event"], event["number"], event["level"]) == ("exchange", 1, "info")
    assert "\x1b" not in line


def test_text_for_people_is_printable() -> None:
    """Control characters of a client's text do not steer the terminal."""
    stream = io.StringIO()
    logs.configure("info", "text", stream)
    logs.get_logger().info("exchange", model="x\n\x1b[2Jforged")
    assert "\x1b[2J" not in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 1


def test_masking() -> None:
    """Every occurrence in every text, also in lists."""
    facts = {"message": "key sk-1 of sk-1", "frames": ["at sk-1"], "number": 1}
    assert logs.masked(facts, ["sk-1"]) == {"message": "key *** of ***", "frames": ["at ***"], "number": 1}


def test_aiohttp_s_logger_says_nothing(capfd: object) -> None:
    """Its messages may hold header lines."""
    logger = logs.quiet_logger()
    assert logger.disabled
    assert not logger.isEnabledFor(logging.CRITICAL)


def test_a_log_that_cannot_be_written_harms_nothing() -> None:
    """A closed pipe, a full disk or text that no encoding has: the event is lost or escaped, nothing is raised."""

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
