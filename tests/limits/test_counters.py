"""All stores of counters on this machine, compared to a slow and exact model."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.limits import memory_counters as memory_module
from gateway.limits import shared_counters as shared_module
from gateway.limits.counters import CountersUnavailable
from gateway.limits.memory_counters import MemoryCounters
from gateway.limits.shared_counters import SharedCounters, make_table
from gateway.limits.token_bucket import EMPTY, Charge, Decision, Limit, calendar_period
from gateway.limits.wait_queue import WaitQueue
from tests.conftest import until
from tests.counting import Model, close_to

START = 1_800_000_000.0
LIMITS = [
    Limit(60, "minute"),
    Limit(100, "minute", 7),
    Limit(7, "minute"),
    Limit(1, "minute"),
    Limit(90_000, "minute", 1000),
    Limit(50, "day"),
    Limit(500, "month"),
    Limit(4, "at_once"),
]


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


Make = Callable[[Clock], Any]
STORES: dict[str, Make] = {"memory": MemoryCounters, "shared": lambda clock: SharedCounters(make_table(), clock)}


@pytest.fixture(params=STORES)
def make(request: pytest.FixtureRequest) -> Make:
    """Each store that keeps counters on this machine."""
    return STORES[request.param]


# An event: time passes (in 64ths of a second, which doubles represent exactly), charges are taken, or a decision is
# settled.
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("pass"), st.one_of(st.integers(0, 64 * 30), st.integers(0, 64 * 86_400 * 20))),
        st.tuples(
            st.just("take"),
            st.lists(
                st.tuples(st.integers(0, len(LIMITS) - 1), st.integers(0, 40), st.booleans()),
                min_size=1,
                max_size=3,
                unique_by=lambda each: each[0],
            ),
        ),
        st.tuples(
            st.just("settle"), st.tuples(st.integers(0, 20), st.lists(st.integers(0, 60), min_size=3, max_size=3))
        ),
    ),
    max_size=60,
)


async def play(counters: Any, clock: Clock, events: list[Any], *, in_order: bool) -> None:
    """Replay events on the counters and on the model, and compare the results."""
    model = Model()
    taken: list[tuple[Decision, list[Any]]] = []
    told = list(range(len(LIMITS)))
    for kind, what in events:
        if kind == "pass":
            clock.now += what / 64
        elif kind == "take":
            charges = [
                Charge(f"name {limit}", LIMITS[limit], float(cost), shadow=shadow) for limit, cost, shadow in what
            ]
            decision = await counters.take(charges)
            over, held = model.take(charges, Fraction(clock.now))
            if in_order:
                assert list(decision.over) == over
            else:
                # It never has more room than the model.
                assert set(over) <= set(decision.over)
                if set(over) != set(decision.over):
                    return  # from here on they differ, on the safe side
            if not decision.refused:
                taken.append((decision, held))
        elif taken:
            place, actual = what
            decision, held = taken.pop(0 if in_order else place % len(taken))
            used = [float(each) for each in actual[: len(held)]]
            counters.settle(decision, used)
            model.settle(held, list(used), Fraction(clock.now))
    for limit in told:
        charge = Charge(f"name {limit}", LIMITS[limit], 0.0)
        decision = await counters.take([charge])
        exact = model.level(charge, Fraction(clock.now))
        if charge.limit.period == "at_once" or not in_order:
            continue
        assert close_to(decision.records[0][0], exact), charge


@given(EVENTS)
def test_as_the_exact_model_says_in_memory(events: list[Any]) -> None:
    """Charges that are settled in the order of the takes count exactly."""
    clock = Clock()
    asyncio.run(play(MemoryCounters(clock), clock, events, in_order=True))


@given(EVENTS)
def test_never_more_room_than_the_exact_model_has(events: list[Any]) -> None:
    """Charges that are settled in another order may give back less, never more."""
    clock = Clock()
    asyncio.run(play(MemoryCounters(clock), clock, events, in_order=False))


@given(EVENTS, st.booleans())
def test_as_the_exact_model_says_among_workers(events: list[Any], in_order: bool) -> None:
    """The table that workers share counts the same."""

    async def both() -> None:
        clock = Clock()
        counters = SharedCounters(make_table(), clock)
        await play(counters, clock, events, in_order=in_order)
        await counters.close()

    asyncio.run(both())


@given(
    st.sampled_from([Limit(60, "minute"), Limit(600, "minute", 30), Limit(7, "minute")]),
    st.lists(st.tuples(st.integers(0, 64 * 20), st.integers(1, 30), st.floats(0, 1), st.integers(0, 3)), max_size=80),
)
def test_what_is_used_never_passes_the_limit(limit: Limit, uses: list[tuple[int, int, float, int]]) -> None:
    """In no time is the use above the burst plus the rate, if no use exceeds its estimate.

    However many run at once, and in whatever order they end: that is the bound that `rate_limit` promises.
    """

    async def run() -> None:
        clock = Clock()
        counters = MemoryCounters(clock)
        running: list[tuple[Decision, float, float]] = []
        done: list[tuple[float, float]] = []
        for passed, cost, share, ends in uses:
            clock.now += passed / 64
            decision = await counters.take([Charge("x", limit, float(cost))])
            if not decision.refused:
                running.append((decision, clock.now, float(int(cost * share))))
            for _ in range(min(ends, len(running))):
                decision, began, used = running.pop(len(running) // 2)
                counters.settle(decision, [used])
                done.append((began, used))
        done += [(began, used) for _, began, used in running]
        done.sort()
        for first in range(len(done)):
            total = 0.0
            for began, used in done[first:]:
                total += used
                # (One refill may arrive at once.)
                allowed = limit.capacity + limit.amount / 60 * (began - done[first][0] + limit.refill_interval)
                assert total <= allowed + 1e-6

    asyncio.run(run())


async def test_all_or_none(make: Make) -> None:
    """If one charge has no room, none is taken."""
    counters = make(Clock())
    small, large = Limit(2, "minute"), Limit(100, "minute")
    for _ in range(2):
        assert not (await counters.take([Charge("a", small), Charge("b", large)])).refused
    refused = await counters.take([Charge("b", large), Charge("a", small)])
    assert (refused.refused, list(refused.over)) == (True, [1])
    assert refused.remaining(0) == 98
    assert (await counters.take([Charge("b", large, 0.0)])).remaining(0) == 98


async def test_a_shadow_is_counted_and_refuses_nothing(make: Make) -> None:
    """A shadow charge without room is reported as over, and does not count."""
    counters = make(Clock())
    for number in range(4):
        decision = await counters.take([Charge("a", Limit(2, "minute"), shadow=True), Charge("b", Limit(9, "minute"))])
        assert not decision.refused
        assert list(decision.over) == ([0] if number > 1 else [])
        assert decision.remaining(1) == 8 - number


async def test_a_decision_is_settled_once(make: Make) -> None:
    """A second time changes nothing."""
    counters = make(Clock())
    decision = await counters.take([Charge("a", Limit(10, "day"), 8.0)])
    for _ in range(3):
        counters.settle(decision, [3.0])
    assert (await counters.take([Charge("a", Limit(10, "day"), 0.0)])).remaining(0) == 7


async def test_a_drained_reservation_gives_nothing_back() -> None:
    """A reservation that has drained makes no room for others when its request fails."""
    clock = Clock()
    counters = MemoryCounters(clock)
    limit = Limit(60, "minute")
    first = await counters.take([Charge("a", limit, 60.0)])
    clock.now += 60
    assert not (await counters.take([Charge("a", limit, 60.0)])).refused
    counters.settle(first, [0.0])
    assert (await counters.take([Charge("a", limit, 1.0)])).refused


async def test_use_above_the_estimate_counts() -> None:
    """The excess must be refilled before there is room."""
    clock = Clock()
    counters = MemoryCounters(clock)
    limit = Limit(60, "minute")
    decision = await counters.take([Charge("a", limit, 10.0)])
    counters.settle(decision, [100.0])
    refused = await counters.take([Charge("a", limit, 1.0)])
    assert (refused.refused, refused.remaining(0), refused.retry_after(0)) == (True, 0, 50.0)


async def test_days_and_months_are_the_calendar_s(make: Make) -> None:
    """In UTC; a charge of yesterday gives nothing back today."""
    clock = Clock()
    clock.now = datetime.datetime(2028, 2, 28, 23, 59, 30, tzinfo=datetime.UTC).timestamp()
    counters = make(clock)
    charges = [Charge("day", Limit(10, "day"), 10.0), Charge("month", Limit(25, "month"), 10.0)]
    decision = await counters.take(charges)
    assert (decision.reset(0), decision.reset(1)) == (30.0, 86_430.0)
    assert (await counters.take(charges)).refused
    clock.now += 31
    assert not (await counters.take(charges)).refused
    counters.settle(decision, [0.0, 0.0])
    refused = await counters.take(charges)
    assert list(refused.over) == [0]
    assert refused.remaining(1) == 15
    clock.now += 86_400
    assert not (await counters.take(charges)).refused


@given(st.datetimes(datetime.datetime(1971, 1, 1), datetime.datetime(2200, 1, 1)))
def test_the_month_of_any_moment(moment: datetime.datetime) -> None:
    """Return the start of the period, and of the next one."""
    moment = moment.replace(tzinfo=datetime.UTC)
    start, end = calendar_period("month", moment.timestamp())
    assert start <= moment.timestamp() < end
    for edge in (start, end):
        assert datetime.datetime.fromtimestamp(edge, datetime.UTC).strftime("%d %H:%M:%S") == "01 00:00:00"
    assert end - start < 32 * 86_400


async def test_a_clock_that_is_set_back_gives_nothing_and_takes_nothing(make: Make) -> None:
    """The refill intervals restart."""
    clock = Clock()
    counters = make(clock)
    await counters.take([Charge("a", Limit(60, "minute"), 60.0)])
    clock.now -= 3600
    assert (await counters.take([Charge("a", Limit(60, "minute"))])).refused
    clock.now += 10
    assert not (await counters.take([Charge("a", Limit(60, "minute"), 10.0)])).refused


async def test_a_limit_that_changed_keeps_its_count(make: Make) -> None:
    """The use under a name counts for the new limit, too: a reload does not reset it."""
    counters = make(Clock())
    await counters.take([Charge("a", Limit(100, "minute"), 50.0)])
    assert (await counters.take([Charge("a", Limit(60, "minute"), 11.0)])).refused
    assert not (await counters.take([Charge("a", Limit(60, "minute"), 10.0)])).refused


async def test_a_lowered_limit_does_not_block_callers_for_long(make: Make) -> None:
    """Callers wait for ten minutes at most after the limit was lowered."""
    clock = Clock()
    counters = make(clock)
    await counters.take([Charge("a", Limit(100_000, "minute"), 100_000.0)])
    refused = await counters.take([Charge("a", Limit(1000, "minute"))])
    assert (refused.refused, refused.retry_after(0)) == (True, 610.0)
    clock.now += 700
    assert not (await counters.take([Charge("a", Limit(1000, "minute"))])).refused


async def test_a_charge_from_before_a_reload_is_settled_with_the_new_limit(make: Make) -> None:
    """The rate of the old limit would make room that the new one does not have."""
    clock = Clock()
    counters = make(clock)
    old, new = Limit(60_000, "minute"), Limit(600, "minute")
    before = await counters.take([Charge("a", old, 10.0)])
    await counters.take([Charge("a", old, 500.0)])
    assert (await counters.take([Charge("a", new, 90.0)])).remaining(0) == 0
    clock.now += 10
    counters.settle(before, [10.0 - 1])
    assert (await counters.take([Charge("a", new, 0.0)])).remaining(0) == 100


async def test_invented_names_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names with the smallest use in relation to their limit are dropped first."""
    monkeypatch.setattr(memory_module, "_SWEEP_ABOVE", 50)
    monkeypatch.setattr(memory_module, "_MAX_NAMES", 200)
    counters = MemoryCounters(Clock())
    limit = Limit(100, "day")
    await counters.take([Charge("used up", limit, 100.0)])
    for number in range(2000):
        await counters.take([Charge(f"made up {number}", limit)])
    assert len(counters._records) <= 450
    assert (await counters.take([Charge("used up", limit)])).refused


async def test_unused_names_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names without use are dropped; the others stay."""
    monkeypatch.setattr(memory_module, "_SWEEP_ABOVE", 100)
    clock = Clock()
    counters = MemoryCounters(clock)
    for number in range(100):
        await counters.take([Charge(f"a{number}", Limit(60, "minute"))])
    clock.now += 3600
    for number in range(10):
        await counters.take([Charge(f"b{number}", Limit(60, "minute"))])
    assert len(counters._records) == len(counters._limits) == 10


async def test_a_settlement_after_its_name_was_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settlement gives nothing back to others, and does not fail."""
    monkeypatch.setattr(memory_module, "_SWEEP_ABOVE", 10)
    clock = Clock()
    counters = MemoryCounters(clock)
    late = await counters.take([Charge("late", Limit(60, "minute"), 50.0)])
    clock.now += 3600
    for number in range(12):
        await counters.take([Charge(f"a{number}", Limit(60, "minute"))])
    assert not (await counters.take([Charge("late", Limit(60, "minute"), 60.0)])).refused
    counters.settle(late, [0.0])
    assert (await counters.take([Charge("late", Limit(60, "minute"), 1.0)])).refused
    later = await counters.take([Charge("later", Limit(60, "minute"))])
    clock.now += 3600
    for number in range(30):
        await counters.take([Charge(f"b{number}", Limit(60, "minute"))])
    counters.settle(later, [9.0])
    clock.now += 3600
    for number in range(30):
        await counters.take([Charge(f"c{number}", Limit(60, "minute"))])


async def test_a_request_that_can_never_pass_blocks_no_other() -> None:
    """It is refused at once even if others wait, also after a reload has lowered the limit."""
    queue = WaitQueue(MemoryCounters())
    limit = Limit(1000, "day")
    await queue.take([Charge("a", limit, 500.0)])
    waiting = asyncio.create_task(queue.take([Charge("a", limit, 600.0)], wait=0.3, caller="x"))
    await asyncio.sleep(0.01)
    async with asyncio.timeout(30):
        assert (await queue.take([Charge("a", limit, 5000.0)], wait=3600, caller="y")).refused
        assert not (await queue.take([Charge("a", limit, 0.0)], wait=3600, caller="y")).refused
    assert (await waiting).refused
    async with asyncio.timeout(30):
        assert not (await queue.take([Charge("a", limit, 1.0)], wait=3600, caller="y")).refused


async def test_room_is_available_when_a_waiting_request_leaves() -> None:
    """The requests after it do not wait for the next try."""
    queue = WaitQueue(MemoryCounters())
    limit = Limit(10, "day")
    await queue.take([Charge("a", limit, 5.0)])
    large = asyncio.create_task(queue.take([Charge("a", limit, 6.0)], wait=3600, caller="x"))
    await asyncio.sleep(0.01)
    small = asyncio.create_task(queue.take([Charge("a", limit, 1.0)], wait=3600, caller="y"))
    await asyncio.sleep(0.01)
    large.cancel()
    async with asyncio.timeout(30):
        assert not (await small).refused


# -- the table of a machine's workers ------------------------------------------------------------------


@contextlib.asynccontextmanager
async def two_workers(clock: Clock) -> AsyncIterator[tuple[SharedCounters, SharedCounters]]:
    """The counters of two workers in one table."""
    table = make_table()
    one, two = SharedCounters(table, clock), SharedCounters(os.dup(table), clock)
    yield one, two
    await one.close()
    await two.close()


async def test_workers_share_every_limit() -> None:
    """A take of one worker counts for all; concurrent use counts until it is given back or the worker ends."""
    async with two_workers(Clock()) as (one, two):
        for limit in (Limit(3, "minute"), Limit(3, "day"), Limit(3, "at_once")):
            charge = [Charge(limit.period, limit)]
            decisions = [await each.take(charge) for each in (one, two, one)]
            assert not any(each.refused for each in decisions)
            assert (await one.take(charge)).refused
            assert (await two.take(charge)).refused
            two.settle(decisions[1], [0.0])
            assert not (await one.take(charge)).refused


WORKER = """
import asyncio, sys
from gateway.limits.counters import CountersUnavailable
from gateway.limits.token_bucket import Charge, Limit
from gateway.limits.shared_counters import SharedCounters

async def main():
    counters = SharedCounters(int(sys.argv[1]))

    async def take(*charges):
        while True:  # the process with the lock may be descheduled; takes fail meanwhile
            try:
                return await counters.take(charges)
            except CountersUnavailable:
                await asyncio.sleep(0.01)

    print("ready", flush=True)
    sys.stdin.readline()
    taken = 0
    for _ in range(3000):
        taken += not (await take(Charge("x", Limit(5000, "day")), Charge("y", Limit(10**6, "day")))).refused
    for _ in range(2):
        await take(Charge("held", Limit(10, "at_once")))
    print(taken, flush=True)
    sys.stdin.readline()

asyncio.run(main())
"""


@pytest.fixture
def workers() -> Iterator[tuple[int, list[subprocess.Popen[str]]]]:
    """Three processes that share a table."""
    table = make_table()
    command = [sys.executable, "-c", WORKER, str(table)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, pass_fds=[table], **pipes) for _ in range(3)]
    yield table, processes
    for each in processes:
        each.kill()
        each.communicate()


def say(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.slow
async def test_processes_that_race_keep_the_limit_exactly(workers: tuple[int, list[subprocess.Popen[str]]]) -> None:
    """Three workers try to take 9,000 of 5,000 and get exactly 5,000. A killed worker releases its concurrent use."""
    table, processes = workers
    for each in processes:
        assert hear(each) == "ready"
    for each in processes:
        say(each)
    assert sum(int(hear(each)) for each in processes) == 5000
    counters = SharedCounters(table)
    held = [Charge("held", Limit(10, "at_once"))]
    assert (await counters.take(held)).refused is False
    for each in processes:
        each.kill()
        each.wait()
    after = SharedCounters(os.dup(table))  # as a replacement worker does
    decisions = [await after.take(held) for _ in range(10)]
    assert [each.refused for each in decisions] == [False] * 9 + [True]
    await counters.close()
    await after.close()


HOLDER = """
import fcntl, os, signal, sys
fcntl.lockf(int(sys.argv[1]), fcntl.LOCK_EX)
print("holds it", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.slow
async def test_a_stopped_worker_blocks_no_other() -> None:
    """While a stopped worker holds the lock, takes fail as with an unavailable store, and settlements wait."""
    table = make_table()
    counters = SharedCounters(os.dup(table))
    charge = [Charge("x", Limit(10, "day"), 8.0)]
    decision = await counters.take(charge)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(table)], pass_fds=[table], stdout=subprocess.PIPE, text=True
    )
    try:
        assert hear(holder) == "holds it"
        async with asyncio.timeout(30):
            for _ in range(20):
                with pytest.raises(CountersUnavailable):
                    await counters.take(charge)
            counters.settle(decision, [1.0])
            await until(lambda: Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    finally:
        holder.kill()
        holder.communicate()
    assert (await counters.take([Charge("x", Limit(10, "day"), 0.0)])).remaining(0) == 9
    await counters.close()


async def test_a_process_with_a_reused_pid_is_another() -> None:
    """The start time distinguishes them: the concurrent use of the earlier process is free."""
    table = make_table()
    counters = SharedCounters(os.dup(table))
    await counters.take([Charge("x", Limit(3, "at_once"), 2.0)])
    place, number, began = shared_module._WORKER.unpack_from(counters._table, 0)
    assert (place, number, began) == (os.getpid(), 1, shared_module._start_time(os.getpid()))
    shared_module._WORKER.pack_into(counters._table, 0, os.getpid(), 1, began - 1)
    after = SharedCounters(os.dup(table))
    assert (await after.take([Charge("x", Limit(3, "at_once"), 3.0)])).refused is False
    await after.close()


async def test_a_full_table_drops_the_least_used_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """It logs this once. Expired rows are reused first."""
    monkeypatch.setattr(shared_module, "_ROWS", 64)
    clock = Clock()
    counters = SharedCounters(make_table(), clock)
    await counters.take([Charge("used up", Limit(60, "minute"), 60.0)])
    with pytest.MonkeyPatch.context():
        for number in range(300):
            assert not (await counters.take([Charge(f"a{number}", Limit(1000, "day"))])).refused
        clock.now += 86_400
        for number in range(30):
            await counters.take([Charge(f"b{number}", Limit(10, "day"), 9.0)])
        assert all(
            [(await counters.take([Charge(f"b{number}", Limit(10, "day"), 2.0)])).refused for number in range(30)]
        )
    await counters.close()


# -- waiting for room ----------------------------------------------------------------------------------


async def test_a_waiting_request_gets_released_room() -> None:
    """The request continues as soon as another gives back its use."""
    queue = WaitQueue(MemoryCounters())
    charge = [Charge("a", Limit(1, "at_once"))]
    first = await queue.take(charge)
    waiting = asyncio.create_task(queue.take(charge, wait=3600, caller="x"))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    queue.settle(first, [0.0])
    async with asyncio.timeout(30):
        assert not (await waiting).refused
    assert not queue._queues


async def test_a_waiting_request_gets_refilled_room() -> None:
    """A limit per minute has room after its next refill."""
    queue = WaitQueue(MemoryCounters())
    charge = [Charge("a", Limit(600, "minute", 1))]
    assert not (await queue.take(charge)).refused
    async with asyncio.timeout(30):
        assert not (await queue.take(charge, wait=4)).refused


async def test_a_request_that_waits_in_vain_is_refused() -> None:
    """After its waiting time, also if others are before it in the queue."""
    queue = WaitQueue(MemoryCounters())
    charge = [Charge("a", Limit(1, "day"))]
    await queue.take(charge)
    decisions = await asyncio.gather(*[queue.take(charge, wait=0.05, caller=who) for who in "xxyz"])
    assert [each.refused for each in decisions] == [True] * 4
    await until(lambda: not queue._queues)


async def test_a_cost_above_the_limit_does_not_wait() -> None:
    """A cost above the limit never has room."""
    queue = WaitQueue(MemoryCounters())
    async with asyncio.timeout(30):
        assert (await queue.take([Charge("a", Limit(10, "minute"), 11.0)], wait=3600)).refused


async def test_callers_take_turns() -> None:
    """A caller with many requests does not delay the others; the requests of one caller stay in order."""
    queue = WaitQueue(MemoryCounters())
    charge = [Charge("a", Limit(1, "at_once"))]
    decision = await queue.take(charge)
    order: list[str] = []

    async def wait(name: str) -> Decision:
        taken = await queue.take(charge, wait=3600, caller=name[0])
        order.append(name)
        return taken

    tasks = []
    for name in ("a1", "a2", "a3", "a4", "b1", "c1", "b2"):
        tasks.append(asyncio.create_task(wait(name)))
        await asyncio.sleep(0)
    for _ in range(7):
        queue.settle(decision, [0.0])
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=5)
        (task,) = done
        tasks.remove(task)
        decision = await task
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


LIMIT_OF_TEN = Limit(10, "at_once")


@pytest.mark.parametrize("newer", [LIMIT_OF_TEN, Limit(10, "at_once")], ids=["one limit", "equal ones of two stages"])
async def test_no_waiting_request_is_overtaken(newer: Limit) -> None:
    """A later request waits after the earlier ones even if it had room, also of teams that share a counter."""
    queue = WaitQueue(MemoryCounters())
    decision = await queue.take([Charge("a", LIMIT_OF_TEN, 8.0)])
    large = asyncio.create_task(queue.take([Charge("a", LIMIT_OF_TEN, 5.0)], wait=3600, caller="x"))
    await asyncio.sleep(0.01)
    small = asyncio.create_task(queue.take([Charge("a", newer, 1.0)], wait=3600, caller="y"))
    await asyncio.sleep(0.05)
    assert not small.done()
    queue.settle(decision, [0.0])
    async with asyncio.timeout(30):
        assert not (await large).refused
        assert not (await small).refused


async def test_a_waiting_request_without_room_elsewhere_blocks_no_other() -> None:
    """Its own limit, of another name, does not block the others."""
    queue = WaitQueue(MemoryCounters())
    shared, own = Limit(1, "at_once"), Limit(1, "day")
    await queue.take([Charge("own of x", own)])
    decision = await queue.take([Charge("shared", shared)])
    one = asyncio.create_task(queue.take([Charge("shared", shared)], wait=3600, caller="w"))
    await asyncio.sleep(0.01)
    blocked = asyncio.create_task(
        queue.take([Charge("shared", shared), Charge("own of x", own)], wait=3600, caller="x")
    )
    other = asyncio.create_task(queue.take([Charge("shared", shared)], wait=3600, caller="y"))
    await asyncio.sleep(0.01)
    for task in (one, other):
        queue.settle(decision, [0.0])
        async with asyncio.timeout(30):
            decision = await task
    assert not blocked.done()
    blocked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await blocked


async def test_a_request_that_waits_for_two_limits_is_not_starved() -> None:
    """It waits in the queue of the limit without room, in turn with later requests."""
    queue = WaitQueue(MemoryCounters())
    team, key = Limit(1, "at_once"), Limit(600, "minute", 1)
    decision = await queue.take([Charge("team", team)])
    await queue.take([Charge("key", key)])
    both = asyncio.create_task(queue.take([Charge("team", team), Charge("key", key)], wait=3600, caller="k"))
    others = 0
    async with asyncio.timeout(30):
        while not both.done():
            waiting = [asyncio.create_task(queue.take([Charge("team", team)], wait=3600, caller=who)) for who in "ab"]
            await asyncio.sleep(0.02)
            queue.settle(decision, [0.0])
            done, _ = await asyncio.wait([*waiting, both], return_when=asyncio.FIRST_COMPLETED)
            decision = await done.pop()
            for task in waiting:
                if not task.done():
                    task.cancel()
            others += 1
    assert others < 30


async def test_a_raised_limit_admits_new_requests_at_once() -> None:
    """They do not queue up after requests with the old limit."""
    queue = WaitQueue(MemoryCounters())
    await queue.take([Charge("a", Limit(1, "at_once"))])
    old = asyncio.create_task(queue.take([Charge("a", Limit(1, "at_once"))], wait=0.3, caller="x"))
    await asyncio.sleep(0.01)
    async with asyncio.timeout(30):
        assert not (await queue.take([Charge("a", Limit(100, "at_once"))], wait=3600, caller="y")).refused
    assert (await old).refused


async def test_a_cancelled_request_takes_nothing() -> None:
    """A client that disconnects while it waits takes nothing, even in the moment of its turn."""
    for moment in range(4):
        queue = WaitQueue(MemoryCounters())
        charge = [Charge("a", Limit(1, "at_once"))]
        decision = await queue.take(charge)
        leaving = asyncio.create_task(queue.take(charge, wait=3600, caller="x"))
        staying = asyncio.create_task(queue.take(charge, wait=3600, caller="y"))
        await asyncio.sleep(0.01)
        queue.settle(decision, [0.0])
        for _ in range(moment):
            await asyncio.sleep(0)
        leaving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            queue.settle(await leaving, [0.0])
        async with asyncio.timeout(30):
            assert not (await staying).refused


async def test_an_error_of_the_store_reaches_the_waiting_request() -> None:
    """The error reaches only that request."""

    class Failing(MemoryCounters):
        fails = False

        async def take(self, charges: Any) -> Decision:
            if self.fails:
                raise RuntimeError("away")
            return await super().take(charges)

    store = Failing()
    queue = WaitQueue(store)
    charge = [Charge("a", Limit(1, "at_once"))]
    decision = await queue.take(charge)
    waiting = asyncio.create_task(queue.take(charge, wait=3600))
    await asyncio.sleep(0.01)
    store.fails = True
    queue.settle(decision, [0.0])
    with pytest.raises(RuntimeError, match="away"):
        await waiting


async def test_closing_cancels_waiting_requests() -> None:
    """Closing cancels the waiting requests."""
    queue = WaitQueue(MemoryCounters())
    charge = [Charge("a", Limit(1, "at_once"))]
    await queue.take(charge)
    waiting = asyncio.create_task(queue.take(charge, wait=3600))
    await asyncio.sleep(0.01)
    await queue.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting


def test_an_empty_record_has_all_the_room() -> None:
    """For every limit."""
    for limit in LIMITS:
        assert limit.remaining(limit.current(EMPTY, START)) == limit.capacity
        assert limit.reset(limit.current(EMPTY, START), START) == 0
