"""The fair scheduler: steps in one turn, their order, and reads that are handled at once."""

from __future__ import annotations

import asyncio

from gateway.fair_scheduler import _ALLOWANCE, SMALL, STEP, FairScheduler


class Counting:
    """Work of a known number of steps, which records the turn of each."""

    def __init__(self, name: str, steps: int, seen: list[str]) -> None:
        self.name, self.steps, self.seen = name, steps, seen

    def step(self) -> bool:
        self.seen.append(self.name)
        self.steps -= 1
        return self.steps > 0


async def turns(seen: list[str], count: int) -> list[list[str]]:
    """Return the steps of each of the next turns of the loop."""
    out = []
    for _ in range(count):
        before = len(seen)
        await asyncio.sleep(0)
        out.append(seen[before:])
    return out


async def test_a_turn_has_a_bounded_number_of_steps() -> None:
    """For any amount of work and any number of connections; each gets its step in turn."""
    seen: list[str] = []
    scheduler = FairScheduler.of(asyncio.get_running_loop())
    for name in "abc":
        scheduler.add(Counting(name, 2, seen))
    ran = await turns(seen, 7)
    assert max(map(len, ran)) == 1
    assert "".join(seen) == "abcabc"


async def test_one_connection_alone_gets_two_steps() -> None:
    """Until another one has work, too."""
    seen: list[str] = []
    scheduler = FairScheduler.of(asyncio.get_running_loop())
    alone = Counting("a", 100, seen)
    scheduler.add(alone)
    assert max(map(len, await turns(seen, 4))) == 2
    scheduler.add(Counting("b", 3, seen))
    assert max(map(len, await turns(seen, 4))) == 1
    scheduler.remove(alone)


async def test_what_is_removed_runs_no_more() -> None:
    """Work that is added again runs after the others."""


async def test_removed_work_runs_no_more() -> None:
    """Work that is added again continues after the others."""
    seen: list[str] = []
    scheduler = FairScheduler.of(asyncio.get_running_loop())
    work = Counting("a", 100, seen)
    scheduler.add(work)
    await turns(seen, 2)
    count = len(seen)
    scheduler.remove(work)
    await turns(seen, 3)
    assert len(seen) == count
    scheduler.add(work)
    await turns(seen, 1)
    assert len(seen) > count
    scheduler.remove(work)


async def test_work_that_fails_does_not_stop_other_work() -> None:
    """The others continue; the loop reports the exception."""
    seen: list[str] = []
    told: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
    scheduler = FairScheduler.of(loop)

    class Broken:
        def step(self) -> bool:
            raise ValueError("a bug")

    scheduler.add(Broken())
    scheduler.add(Counting("a", 3, seen))
    await turns(seen, 5)
    assert seen == ["a"] * 3
    assert len(told) == 1


async def test_small_reads_are_always_handled_at_once_and_large_ones_up_to_an_allowance() -> None:
    """The allowance is for one turn, and for all connections together."""
    scheduler = FairScheduler.of(asyncio.get_running_loop())
    for _ in range(_ALLOWANCE // STEP):
        assert scheduler.may_handle(STEP)
    assert not scheduler.may_handle(STEP)
    assert scheduler.may_handle(SMALL)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert scheduler.may_handle(STEP)
    assert not scheduler.may_handle(STEP + 1)


async def test_each_loop_has_one_scheduler() -> None:
    """Connections to clients and to Azure share it."""
    loop = asyncio.get_running_loop()
    assert FairScheduler.of(loop) is FairScheduler.of(loop)
