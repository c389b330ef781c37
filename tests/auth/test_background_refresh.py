"""Background refresh: one fetch at a time, and all callers wait for it."""

from __future__ import annotations

import asyncio

import pytest

from gateway.auth.background_refresh import BackgroundRefresh


class Slow:
    """A fetch that waits for an event; counts the fetches that started, ended and were cancelled."""

    def __init__(self) -> None:
        self.begun = self.ended = self.cancelled = 0
        self.go_on = asyncio.Event()

    async def __call__(self) -> None:
        self.begun += 1
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.ended += 1


async def test_all_wait_for_one_fetch_and_the_next_is_another() -> None:
    """A caller during a fetch starts no other; a cancelled caller does not cancel it for the others."""
    slow = Slow()
    refresh = BackgroundRefresh(slow, "keys")
    in_progress = [refresh.in_progress]
    waiting = [asyncio.create_task(refresh.refresh()) for _ in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    in_progress.append(refresh.in_progress)
    waiting[0].cancel()
    await asyncio.wait(waiting[:1])
    slow.go_on.set()
    await asyncio.gather(*waiting[1:])
    assert (slow.begun, slow.ended, slow.cancelled) == (1, 1, 0)
    assert [*in_progress, refresh.in_progress] == [False, True, False]
    await refresh.refresh()
    assert slow.ended == 2


async def test_stop_ends_the_schedule() -> None:
    """And so does the current fetch; stopping without a start is allowed."""
    slow = Slow()
    refresh = BackgroundRefresh(slow, "keys")
    await refresh.stop()

    async def keep_fresh() -> None:
        while True:
            await refresh.refresh()

    refresh.start(keep_fresh())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert slow.begun == 1
    async with asyncio.timeout(30):
        await refresh.stop()
    assert (slow.begun, slow.ended, slow.cancelled) == (1, 0, 1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await slow.go_on.wait()
    assert slow.begun == 1
