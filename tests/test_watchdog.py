"""The watchdog: the log names code that blocks the event loop."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway import logs, watchdog
from gateway.process.event_loop import loop_factory
from gateway.testing import FakeAzure
from tests.conftest import CHAT, KEY, Gateway, StartGateway, until

# The blocking calls end when the log names them, or after a timeout.
STAGE = """
import re, time
from dataclasses import dataclass
from typing import Literal
from gateway import Stage

named = []  # filled by the test
deadline = 60.0

def wait_by_sleeping():
    end = time.monotonic() + deadline
    while not named and time.monotonic() < end:
        time.sleep(0.5)

def wait_in_c():
    end = time.monotonic() + deadline
    text = "a" * 24
    while not named and time.monotonic() < end:
        text += "a" if len(text) < 30 else ""
        re.fullmatch("(a+)+b", text)

class Slow:
    "A filter that blocks."
    def feed(self, data):
        wait_by_sleeping()
        return data
    def close(self):
        return b""

@dataclass
class Block(Stage):
    "Block the event loop."
    how: Literal["sleep", "c", "filter", "never"] = "never"

    async def __call__(self, request, call_next):
        if self.how == "sleep":
            wait_by_sleeping()
        if self.how == "c":
            wait_in_c()
        response = await call_next(request)
        if self.how == "filter":
            response.pipe(Slow())
        return response
"""
YAML = """
plugins_path: mine
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline:
  - block as sluggish: HOW
  - auth_passthrough
  - model_map: {unmapped: own_name_without_dots}
  - api_version: 2024-10-21
"""
BLOCKED = "event_loop_blocked"


@pytest.fixture
async def start(start_gateway: StartGateway, azure: FakeAzure, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """Start a gateway with a watchdog; the stage stops blocking when it is logged."""
    running: list[Gateway] = []

    async def started(how: str) -> Gateway:
        gateway = await start_gateway(azure.endpoint, YAML.replace("HOW", how), {"mine/block.py": STAGE})
        running.append(gateway)
        module = sys.modules["gateway_plugins_path.mine.block"]

        class Named:
            def __bool__(self) -> bool:
                return bool(blocked(gateway))

        monkeypatch.setattr(module, "named", Named())
        gateway.server.watchdog.start()
        return gateway

    yield started
    for gateway in running:
        gateway.server.watchdog.stop()


def blocked(gateway: Gateway) -> list[dict[str, Any]]:
    return [each for each in gateway.events if each["event"] == BLOCKED]


@pytest.mark.parametrize(("how", "line"), [("sleep", "in wait_by_sleeping"), ("c", "in wait_in_c")])
async def test_a_stage_that_blocks_is_named(how: str, line: str, start: Any, tmp_path: Path) -> None:
    """By its id, its team and file:line, whether it sleeps or a C function holds the GIL."""
    gateway = await start(how)
    async with gateway.post(json=CHAT, headers={"api-key": KEY, "x-request-id": "r-1"}) as answer:
        assert answer.status == 200
    (event,) = blocked(gateway)
    assert event["stage"] == "sluggish"
    assert event["team"] == "default"
    assert event["request_id"] == "r-1"
    place, _, function = event["at"].partition(" in ")
    file, number = place.rsplit(":", 1)
    assert file == str(tmp_path / "mine" / "block.py")
    assert f"in {function}" == line
    assert STAGE.splitlines()[int(number) - 1].strip()
    assert event["level"] == "warning"


async def test_a_filter_that_blocks_is_named(start: Any, azure: FakeAzure) -> None:
    """By the file of its stage, and by the team and the request of its stream."""
    azure.words = ["x"] * 3
    gateway = await start("filter")
    async with gateway.post(json={**CHAT, "stream": True}, headers={"api-key": KEY, "x-request-id": "r-2"}) as answer:
        assert answer.status == 200
        await answer.read()
    (event,) = blocked(gateway)
    assert event["stage"] == "block"
    assert event["team"] == "default"
    assert event["request_id"] == "r-2"
    assert "block.py:" in event["at"]


async def test_a_healthy_loop_is_not_named(start: Any, azure: FakeAzure) -> None:
    """However long requests wait for Azure, and while nothing runs; the watchdog still checks."""
    azure.words, azure.delay = ["x"] * 20, 0.03
    gateway = await start("never")
    looks: list[bool] = []
    idle = watchdog._is_idle

    def looked(ident: int) -> bool:
        looks.append(True)
        return idle(ident)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watchdog, "_is_idle", looked)
        async with gateway.post(json={**CHAT, "stream": True}, headers={"api-key": KEY}) as answer:
            await answer.read()
        await until(lambda: len(looks) >= 3)
    assert blocked(gateway) == []


async def test_it_sleeps_while_nothing_runs_and_a_request_wakes_it(start: Any, azure: FakeAzure) -> None:
    """It checks an idle gateway once a second."""
    gateway = await start("never")
    dog = gateway.server.watchdog
    await until(lambda: dog.asleep)
    azure.words, azure.delay = ["x"] * 3, 0.05
    async with gateway.post(json={**CHAT, "stream": True}, headers={"api-key": KEY}) as answer:
        assert not dog.asleep
        await answer.read()
    await until(lambda: dog.asleep)


async def test_one_function_is_logged_once_per_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another function is logged immediately; the number of remembered functions is bounded."""
    events: list[str] = []

    class Log:
        def warning(self, event: str, **facts: Any) -> None:
            events.append(named[-1])

    monkeypatch.setattr(watchdog, "get_logger", Log)
    monkeypatch.setattr(watchdog, "_MAX_FUNCTIONS", 2)
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    here = iter(["a", "a", "b", "a", "a", "c"])
    named: list[str] = []

    def function(_: object) -> str:
        named.append(next(here))
        return named[-1]

    monkeypatch.setattr(watchdog, "_function", function)
    monkeypatch.setattr(watchdog, "_frames", lambda ident: [sys._getframe()])
    dog = watchdog.Watchdog([])
    for step in (0, 5, 0, 4, 1, 0):  # seconds since the last one
        now += step
        dog._report(0)
    assert events == ["a", "b", "a", "c"]
    assert len(dog._logged) <= 2


def test_it_works_with_every_loop_and_ends_with_it(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On asyncio's loop and on uvloop; the thread ends by itself when its loop is closed."""
    logs.configure("info", "json", sys.stderr)
    for factory in (asyncio.SelectorEventLoop, loop_factory()):
        dog = watchdog.Watchdog([object()])

        async def block(dog: watchdog.Watchdog = dog) -> None:
            dog.start()
            await asyncio.sleep(0.05)
            end = time.monotonic() + 60
            while not dog._logged and time.monotonic() < end:
                time.sleep(0.1)  # noqa: ASYNC251 -- as a stage should not

        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(block())
        thread = dog._thread
        assert thread is not None
        assert list(dog._logged)
        assert all("test_watchdog.py " in each for each in dog._logged)
        dog.stop()
        assert not thread.is_alive()
    assert capfd.readouterr().err.count(BLOCKED) == 2
