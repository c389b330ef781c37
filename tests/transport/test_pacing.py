"""Pacing: bursts of events are spread, and no event exceeds the delay."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.transport.pacing import Pacer


class Clock:
    """An event loop whose time the test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self._calls: list[tuple[float, int, Callable[[], object]]] = []
        self._cancelled: set[int] = set()
        self._count = 0

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Callable[[], object]) -> Any:
        self._count += 1
        number = self._count
        heapq.heappush(self._calls, (when, number, call))

        class Handle:
            def cancel(_) -> None:  # noqa: N805 -- self is the clock
                self._cancelled.add(number)

        return Handle()

    def create_future(self) -> asyncio.Future[None]:
        return asyncio.get_running_loop().create_future()

    def run_to(self, when: float) -> None:
        while self._calls and self._calls[0][0] <= when:
            at, number, call = heapq.heappop(self._calls)
            if number not in self._cancelled:
                self.now = max(self.now, at)
                call()
        self.now = max(self.now, when)


def paced(delay: float, clock: Clock, put: Callable[[bytes], None]) -> Pacer:
    return Pacer(delay, put, clock)  # type: ignore[arg-type] # as much of a loop as it needs


def event(number: int) -> bytes:
    return b"data: %d\n\n" % number


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 40)), min_size=1, max_size=12), st.sampled_from([0.1, 0.5]))
def test_no_event_leaves_late_or_out_of_order(lumps: list[tuple[float, int]], delay: float) -> None:
    """Whatever bursts arrive at whatever times, events leave in order, each within the delay of its arrival."""
    clock, left, came = Clock(), list[tuple[float, bytes]](), list[float]()
    pacer = paced(
        delay, clock, lambda data: left.extend((clock.now, part + b"\n\n") for part in data.split(b"\n\n")[:-1])
    )
    for pause, count in lumps:
        clock.run_to(clock.now + pause)
        numbers = range(len(came), len(came) + count)
        came += [clock.now] * count
        pacer.take(b"".join(map(event, numbers)))
    clock.run_to(clock.now + delay + 1e-6)
    assert [data for _, data in left] == [event(number) for number in range(len(came))]
    assert all(at - since <= delay + 1e-6 for (at, _), since in zip(left, came, strict=True))


def test_a_lump_is_spread_over_the_delay() -> None:
    """Ten events that arrive together leave at ten times, evenly; the first immediately."""
    clock, times = Clock(), list[float]()
    pacer = paced(0.5, clock, lambda _: times.append(round(clock.now, 6)))
    pacer.take(b"".join(map(event, range(10))))
    clock.run_to(1)
    assert times == [round(0.05 * place, 6) for place in range(10)]


def test_an_event_that_comes_alone_leaves_at_once() -> None:
    """A stream without bursts is not delayed."""
    clock, times = Clock(), list[float]()
    pacer = paced(0.5, clock, lambda _: times.append(clock.now))
    for place in range(5):
        clock.run_to(place)
        pacer.take(event(place))
    assert times == [0, 1, 2, 3, 4]


def test_half_an_event_waits_for_its_rest_and_leaves_when_the_stream_breaks() -> None:
    """Only complete events are paced; when the stream breaks, all received bytes leave immediately."""
    clock, left = Clock(), list[bytes]()
    pacer = paced(0.5, clock, left.append)
    pacer.take(event(1) + event(2) + b"data: ha")
    assert left == [event(1)]
    pacer.flush()
    clock.run_to(5)
    assert left == [event(1), event(2) + b"data: ha"]


def test_too_much_to_keep_leaves_at_once() -> None:
    """Memory is bounded: a burst above 256 KiB is not kept."""
    clock, left = Clock(), list[bytes]()
    pacer = paced(0.5, clock, left.append)
    lump = b"data: " + b"x" * 1000 + b"\n\n"
    pacer.take(lump * 300)
    assert sum(map(len, left)) == len(lump) * 300


def test_nothing_leaves_while_the_client_takes_nothing() -> None:
    """Paused events leave when the client reads again, late ones immediately."""
    clock, left = Clock(), list[bytes]()
    pacer = paced(0.5, clock, left.append)
    pacer.take(event(1) + event(2) + event(3))
    pacer.pause()
    clock.run_to(10)
    assert left == [event(1)]
    pacer.resume()
    assert b"".join(left) == event(1) + event(2) + event(3)


async def test_the_end_waits_for_the_last_event_and_keeps_what_no_blank_line_ended() -> None:
    """`end` returns when all events have left, or raises the error of `write`."""
    loop = asyncio.get_running_loop()
    left: list[bytes] = []
    pacer = Pacer(0.02, left.append, loop)
    pacer.take(event(1) + event(2) + b"data: [DONE]")
    await pacer.end()
    assert b"".join(left) == event(1) + event(2) + b"data: [DONE]"

    def fail(_: bytes) -> None:
        if broken:
            raise ConnectionError("gone")

    broken = False
    pacer = Pacer(0.02, fail, loop)
    pacer.take(event(1) + event(2))
    broken = True
    with pytest.raises(ConnectionError):
        await pacer.end()
