"""Counters in Redis: a real `redis-server`, killed, paused and restarted under load."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import trustme

from gateway.limits.counters import CountersUnavailable
from gateway.limits.memory_counters import MemoryCounters
from gateway.limits.redis_counters import RedisCounters
from gateway.limits.redis_script import SCRIPT
from gateway.limits.redis_url import RedisUrl
from gateway.limits.token_bucket import Charge, Decision, Limit, Period, calendar_period
from gateway.testing import FakeAzure
from tests.conftest import Gateway, RawUpstream, StartGateway
from tests.redis_server import RedisServer, free_port, tls_in_front

pytestmark = pytest.mark.redis

# Tests set the clock of the script: they cannot set the clock of the server.
_CLOCK = """    local time = redis.call('TIME')
    return tonumber(time[1]) + tonumber(time[2]) / 1000000
"""
TURNED = SCRIPT.replace(_CLOCK, "    return (struct.unpack('<d', redis.call('GET', 'clock')))\n")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[RedisServer]:
    """A Redis server of the test's own."""
    server = RedisServer(tmp_path / "redis")
    await server.start()
    yield server
    server.kill()


@pytest.fixture
async def open_counters() -> AsyncIterator[Callable[..., RedisCounters]]:
    """Return a function that makes counters in a server; they are closed after the test."""
    made: list[RedisCounters] = []

    def make(server: RedisServer | str, timeout: float = 5.0, **more: Any) -> RedisCounters:
        url = server if isinstance(server, str) else server.url
        own = {name: more.pop(name) for name in ("script", "gateway_timeout") if name in more}
        counters = RedisCounters(RedisUrl.parse(url, timeout=timeout, **more), **own)
        made.append(counters)
        return counters

    yield make
    await asyncio.gather(*[counters.close() for counters in made])


OpenCounters = Callable[..., RedisCounters]


class Clock:
    """A clock that tests turn, for counters in memory and in Redis."""

    def __init__(self, server: RedisServer, now: float) -> None:
        from redis import Redis

        self._redis = Redis(port=server.port)
        self.set(now)

    def set(self, now: float) -> None:
        self.now = now
        self._redis.set("clock", struct.pack("<d", now))

    def __call__(self) -> float:
        return self.now

    def close(self) -> None:
        self._redis.close()


@pytest.fixture
def clock(server: RedisServer) -> Iterator[Clock]:
    clock = Clock(server, 1_700_000_000.25)
    yield clock
    clock.close()


def told(decision: Decision) -> tuple[Any, ...]:
    """Return the content of a decision, to a millionth; concurrent use has only its level in common."""
    records = [
        [round(each, 6) for each in (record[:1] if charge.limit.period == "at_once" else record)]
        for charge, record in zip(decision.charges, decision.records, strict=True)
    ]
    return (records, decision.now, tuple(decision.over), decision.refused)


async def settled(counters: RedisCounters) -> None:
    """Wait until all settlements are complete."""
    async with asyncio.timeout(30):
        while counters._settlements or not counters._idle:
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("seed", range(8))
async def test_the_script_counts_as_the_limits_do(
    server: RedisServer, open_counters: OpenCounters, clock: Clock, seed: int
) -> None:
    """The same takes, settlements and times have the same decisions and the same records."""
    rng = random.Random(seed)
    memory, counters = MemoryCounters(clock), open_counters(server, script=TURNED)
    limits = {
        "bucket": Limit(600, "minute", 30),
        "wide": Limit(100_000, "minute"),
        "odd": Limit(7, "minute", 3),
        "day": Limit(500, "day"),
        "month": Limit(2_000, "month"),
        "at-once": Limit(6, "at_once"),
    }
    held: list[tuple[Decision, Decision]] = []
    for _ in range(250):
        if rng.random() < 0.5:
            clock.set(clock.now + rng.choice([0, 0.001, rng.random(), 7.5, 60 * rng.random(), 40_000 * rng.random()]))
        if held and rng.random() < 0.45:
            theirs, ours = held.pop(rng.randrange(len(held)))
            actual: list[float | None] = [
                rng.choice([None, charge.cost, 0, float(rng.randrange(0, int(2 * charge.cost) + 1))])
                for charge in theirs.charges
            ]
            memory.settle(theirs, actual)
            counters.settle(ours, actual)
            await settled(counters)
            continue
        names = rng.sample(sorted(limits), rng.randrange(1, 4))
        charges = [
            Charge(
                f"{name}-{rng.randrange(2)}",
                limits[name],
                float(rng.randrange(0, 40_000) if name == "wide" else rng.randrange(0, 8)),
                shadow=rng.random() < 0.2,
            )
            for name in names
        ]
        counters._refusals._refusals.clear()  # they do not notice the new time
        theirs, ours = await memory.take(charges), await counters.take(charges)
        assert told(ours) == told(theirs)
        held.append((theirs, ours))


async def test_days_and_months_begin_and_end_as_in_python(server: RedisServer, clock: Clock) -> None:
    """In UTC, with leap years, to the moments before and after each border."""
    from redis.asyncio import Redis

    rng = random.Random(11)
    moments = [rng.uniform(0, 8e9) for _ in range(4_000)]
    for year in range(1970, 2210):
        for month in (1, 3, 12):
            for moment in calendar_period("month", (year - 1970) * 31_556_952 + month * 2_629_746):
                moments += [moment, moment - 1e-3, moment + 1e-3]
    head, found, _ = TURNED.partition("-- Keep a record for as long")
    assert found
    script = (
        head + "local all = {} for place = 1, #ARGV do now = read('<d', ARGV[place]) for period = 1, 2 do "
        "all[#all + 1] = write('<dd', calendar(period)) end end return table.concat(all)"
    )
    periods: tuple[Period, Period] = ("day", "month")
    async with Redis(port=server.port) as redis:
        for start in range(0, len(moments), 1_000):
            some = moments[start : start + 1_000]
            arguments: list[Any] = [script, 0, *[struct.pack("<d", each) for each in some]]
            told = await redis.eval(*arguments)
            expected = [calendar_period(period, moment) for moment in some for period in periods]
            assert list(struct.iter_unpack("<dd", told)) == expected


async def level(counters: RedisCounters, name: str, limit: Limit) -> float:
    """Return the level of a name."""
    decision = await counters.take([Charge(name, limit, 0.0, shadow=True)])
    return decision.records[0][0]


async def test_all_charges_are_taken_or_none(server: RedisServer, open_counters: OpenCounters) -> None:
    """A charge without room prevents the others; a shadow charge does not, and does not count itself."""
    counters = open_counters(server)
    wide, narrow, slots = Limit(1_000, "day"), Limit(1, "day"), Limit(5, "at_once")
    charges = [Charge("wide", wide, 10), Charge("narrow", narrow), Charge("slots", slots)]
    assert not (await counters.take(charges)).refused
    decision = await counters.take(charges)
    assert decision.refused
    assert list(decision.over) == [1]
    assert [
        await level(counters, name, limit) for name, limit in (("wide", wide), ("narrow", narrow), ("slots", slots))
    ] == [10, 1, 1]
    shadow = [Charge("wide", wide, 10), Charge("narrow", narrow, shadow=True), Charge("slots", slots)]
    decision = await counters.take(shadow)
    assert not decision.refused
    assert [decision.was_taken(place) for place in range(3)] == [True, False, True]
    assert [
        await level(counters, name, limit) for name, limit in (("wide", wide), ("narrow", narrow), ("slots", slots))
    ] == [20, 1, 2]


async def test_two_gateways_keep_one_limit_exactly(server: RedisServer, open_counters: OpenCounters) -> None:
    """Of 2,000 concurrent takes through two gateways exactly as many succeed as each limit allows."""
    gateways = [open_counters(server), open_counters(server)]
    charges = [
        Charge("requests", Limit(700, "day")),
        Charge("at once", Limit(650, "at_once")),
        Charge("all", Limit(10**9, "month"), 3.0),
    ]
    decisions = await asyncio.gather(*[gateways[place % 2].take(charges) for place in range(2_000)])
    taken = [decision for decision in decisions if not decision.refused]
    assert len(taken) == 650
    assert [await level(gateways[0], charge.name, charge.limit) for charge in charges] == [650, 650, 1_950]
    for place, decision in enumerate(taken):
        gateways[place % 2].settle(decision, [None, 0.0, 1.0])  # each gateway settles its own takes
    for gateway in gateways:
        await settled(gateway)
    assert await level(gateways[0], "requests", charges[0].limit) == 650
    assert await level(gateways[0], "all", charges[2].limit) == 650


async def test_a_settlement_makes_room_at_once(server: RedisServer, open_counters: OpenCounters) -> None:
    """A settlement is sent before later takes, and is visible to another gateway."""
    one, other = open_counters(server), open_counters(server)
    slot = [Charge("slot", Limit(1, "at_once"))]
    decision = await one.take(slot)
    for _ in range(20):
        assert (await other.take(slot)).refused
        one.settle(decision, [0.0])
        decision = await one.take(slot)
        assert not decision.refused
    one.settle(decision, [0.0])
    await settled(one)
    other._refusals.forget("slot")
    assert not (await other.take(slot)).refused


async def test_a_decision_is_settled_once(server: RedisServer, open_counters: OpenCounters) -> None:
    """A second settlement of a decision does nothing."""
    counters = open_counters(server)
    limit = Limit(100, "day")
    first, second = await counters.take([Charge("a", limit, 10)]), await counters.take([Charge("a", limit, 10)])
    counters.settle(first, [4.0])
    counters.settle(first, [0.0])
    await settled(counters)
    assert await level(counters, "a", limit) == 14
    counters.settle(second, [25.0])
    await settled(counters)
    assert await level(counters, "a", limit) == 29


async def test_a_drained_reservation_is_not_given_back(
    server: RedisServer, open_counters: OpenCounters, clock: Clock
) -> None:
    """Neither a reservation that has drained, nor one under a name that was deleted meanwhile."""
    counters = open_counters(server, script=TURNED)
    limit = Limit(600, "minute")
    early = await counters.take([Charge("a", limit, 300)])
    clock.set(clock.now + 20)  # 200 of them have drained
    late = await counters.take([Charge("a", limit, 300)])
    counters.settle(early, [0.0])
    await settled(counters)
    assert await level(counters, "a", limit) == 300
    counters.settle(late, [0.0])
    await settled(counters)
    assert await level(counters, "a", limit) == 0
    early = await counters.take([Charge("a", limit, 300)])
    server.command("FLUSHALL")
    clock.set(clock.now + 60)
    await counters.take([Charge("a", limit, 300)])
    counters.settle(early, [0.0])
    await settled(counters)
    assert await level(counters, "a", limit) == 300


async def test_a_clock_that_is_set_back(server: RedisServer, open_counters: OpenCounters, clock: Clock) -> None:
    """The refill intervals restart, also for a caller that is refused all the time."""
    counters = open_counters(server, script=TURNED)
    charges = [Charge("a", Limit(60, "minute"), 60)]
    assert not (await counters.take(charges)).refused
    clock.set(clock.now - 86_400)
    for seconds in range(0, 61, 5):
        decision = await counters.take(charges)
        assert decision.refused is (seconds < 60)
        clock.set(clock.now + 5)
        counters._refusals.forget("a")


async def test_whole_numbers_stay_whole(server: RedisServer, open_counters: OpenCounters) -> None:
    """Budgets in millionths of a currency unit are large numbers; none of their digits is lost."""
    counters = open_counters(server)
    limit = Limit(2**52, "month")
    for cost in (2**51 + 1, 123_456_789_012_345, 1, 7):
        await counters.take([Charge("budget", limit, cost)])
    assert await level(counters, "budget", limit) == 2**51 + 1 + 123_456_789_012_345 + 8


async def test_every_key_expires(server: RedisServer, open_counters: OpenCounters) -> None:
    """Every key expires: of a limit per minute when it is empty, of a month at its end."""
    counters = open_counters(server)
    limits = {
        "minute": Limit(60_000, "minute", 10),
        "long": Limit(1, "minute", 10**9),
        "day": Limit(9, "day"),
        "month": Limit(9, "month"),
        "slots": Limit(9, "at_once"),
    }
    decision = await counters.take([Charge(name, limit, 5) for name, limit in limits.items()])
    assert not decision.refused
    keys = server.command("KEYS", "*").split()
    assert len(keys) == len(limits) + 2
    assert all(key.startswith("{gateway}:") for key in keys)
    for key in keys:
        assert 0 < int(server.command("PTTL", key)) <= 32 * 86_400_000 or "long" in key
    counters.settle(decision, [None, None, None, None, 0.0])
    await settled(counters)
    assert server.command("EXISTS", "{gateway}:held:slots") == "0"
    async with asyncio.timeout(30):
        while server.command("EXISTS", "{gateway}:used:minute") != "0":
            await asyncio.sleep(0.05)
    await counters.close()
    assert "last" not in server.command("HKEYS", "{gateway}:gateways")
    assert server.command("EXISTS", "{gateway}:gateways") == "0"


# -- Redis is away ---------------------------------------------------------------------------------------


async def refused_or_taken(counters: RedisCounters, charges: list[Charge]) -> Decision | None:
    """Take. Returns None if the counters are unavailable. Any other error, or a hang, fails the test."""
    async with asyncio.timeout(30):
        try:
            return await counters.take(charges)
        except CountersUnavailable:
            return None


async def back(counters: RedisCounters, charges: list[Charge]) -> Decision:
    """Wait until the counters are available."""
    async with asyncio.timeout(30):
        while True:
            decision = await refused_or_taken(counters, charges)
            if decision is not None:
                return decision
            await asyncio.sleep(0.02)


SLOTS = [Charge("slots", Limit(3, "at_once"))]
DAY = [Charge("day", Limit(10**9, "day"))]


async def test_without_a_server_nothing_waits(open_counters: OpenCounters, tmp_path: Path) -> None:
    """The first take detects the outage, the others fail at once; its start and its end are logged once."""
    server = RedisServer(tmp_path / "redis")
    counters = open_counters(server)
    with structlog.testing.capture_logs() as logs:
        assert await refused_or_taken(counters, DAY) is None
        for _ in range(1_000):
            with pytest.raises(CountersUnavailable):
                counters.take(DAY).send(None)  # it never waits
        await server.start()
        try:
            await back(counters, DAY)
        finally:
            server.kill()
    assert [(log["log_level"], log["event"]) for log in logs] == [
        ("warning", "limit_store_unavailable"),
        ("info", "limit_store_available"),
    ]


async def test_a_killed_server_that_is_started_again(server: RedisServer, open_counters: OpenCounters) -> None:
    """After a restart without data, limits start from zero, and earlier reservations give nothing back."""
    counters = open_counters(server)
    held = [await counters.take(SLOTS) for _ in range(3)]
    day = [await counters.take(DAY) for _ in range(3)]
    assert (await counters.take(SLOTS)).refused
    server.kill()
    counters._refusals.forget("slots")
    assert await refused_or_taken(counters, SLOTS) is None
    await server.start()
    assert not (await back(counters, SLOTS)).refused
    for decision in held:
        counters.settle(decision, [0.0])
    for decision in day:
        counters.settle(decision, [0.0])
    await settled(counters)
    assert await level(counters, "slots", SLOTS[0].limit) == 1
    assert await level(counters, "day", DAY[0].limit) == 0


async def test_a_server_restarted_between_two_takes_is_not_noticed(
    server: RedisServer, open_counters: OpenCounters
) -> None:
    """A connection that broke while it was idle is replaced, and the take is repeated."""
    counters = open_counters(server)
    await counters.take(DAY)
    server.kill()
    await server.start()
    assert not (await counters.take(DAY)).refused


async def test_a_paused_server(server: RedisServer, open_counters: OpenCounters) -> None:
    """Takes fail, and what Redis takes for them later is given back; settlements wait."""
    counters = open_counters(server, timeout=0.3)
    held = await counters.take(SLOTS)
    await counters.take(DAY)
    server.pause()
    results = await asyncio.gather(*[refused_or_taken(counters, [*SLOTS, *DAY]) for _ in range(50)])
    assert results == [None] * 50
    counters.settle(held, [0.0])
    server.resume()
    await back(counters, DAY)
    await settled(counters)
    assert await level(counters, "slots", SLOTS[0].limit) == 0
    assert await level(counters, "day", DAY[0].limit) == 2


async def test_a_server_that_accepts_no_connection(server: RedisServer, open_counters: OpenCounters) -> None:
    """A connection can take longer than a request waits: meanwhile no other request waits, and then it is used."""
    counters = open_counters(server, timeout=0.3)
    server.pause()
    assert await refused_or_taken(counters, [Charge("never", DAY[0].limit)]) is None
    with pytest.raises(CountersUnavailable):
        counters.take(DAY).send(None)  # it never waits
    connecting = counters._script._client
    server.resume()
    await back(counters, DAY)
    assert counters._script._client is connecting
    assert server.command("EXISTS", "{gateway}:used:never") == "0"


async def test_a_server_that_pauses_its_clients(server: RedisServer, open_counters: OpenCounters) -> None:
    """As `CLIENT PAUSE` in a failover: unavailable for that time, and correct afterwards."""
    counters = open_counters(server, timeout=0.3)
    await counters.take(DAY)
    server.command("CLIENT", "PAUSE", "1000", "ALL")
    assert await refused_or_taken(counters, DAY) is None
    await back(counters, DAY)
    await settled(counters)
    assert await level(counters, "day", DAY[0].limit) == 2


@pytest.mark.parametrize("seed", range(3))
async def test_killed_paused_and_restarted_under_load(
    server: RedisServer, open_counters: OpenCounters, seed: int
) -> None:
    """Whatever happens to the server, each take ends; when it is available again, the slots are exact."""
    rng = random.Random(seed)
    gateways = [open_counters(server, timeout=0.3), open_counters(server, timeout=0.3)]
    slots = [Charge("slots", Limit(40, "at_once")), *DAY]
    stop = False
    outcomes: set[str] = set()

    async def caller(place: int) -> None:
        counters = gateways[place % 2]
        while not stop:
            decision = await refused_or_taken(counters, slots)
            outcomes.add("away" if decision is None else "refused" if decision.refused else "taken")
            await asyncio.sleep(rng.random() * 0.02)
            if decision is not None:
                counters.settle(decision, [0.0, 1.0])

    callers = [asyncio.create_task(caller(place)) for place in range(60)]
    for _ in range(4):
        await asyncio.sleep(rng.random() * 0.3)
        if rng.random() < 0.5:
            server.pause()
            await asyncio.sleep(rng.random())
            server.resume()
        else:
            server.kill()
            await asyncio.sleep(rng.random() * 0.3)
            await server.start()
    for counters in gateways:
        await back(counters, DAY)
    stop = True
    await asyncio.gather(*callers)
    for counters in gateways:
        await settled(counters)
    assert {"away", "taken"} <= outcomes
    others = [open_counters(server), open_counters(server)]  # with a long timeout: they check the result
    assert await level(others[0], "slots", slots[0].limit) == 0
    for counters, room in zip(others, (25, 15), strict=True):
        decisions = await asyncio.gather(*[counters.take(slots[:1]) for _ in range(25)])
        assert len([decision for decision in decisions if not decision.refused]) == room


class Wire(RawUpstream):
    """A proxy between gateway and Redis that can lose replies, and close the connection after that or not."""

    def __init__(self, port: int) -> None:
        super().__init__(self._pass_on)
        self._redis_port = port
        self.lose = 0
        self.breaks = True
        self.lost = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to = await asyncio.open_connection("127.0.0.1", self._redis_port)

        async def forth() -> None:
            while data := await reader.read(65536):
                to.write(data)
            to.close()

        forward = asyncio.create_task(forth())
        try:
            while data := await there.read(65536):
                if self.lose and b"$" in data:
                    self.lose -= 1
                    self.lost += 1
                    if self.breaks:
                        return
                    continue
                writer.write(data)
        finally:
            forward.cancel()
            await asyncio.gather(forward, return_exceptions=True)
            to.close()


async def test_a_reply_that_is_lost_with_its_connection_is_repeated(
    server: RedisServer, open_counters: OpenCounters
) -> None:
    """The call is repeated with its number: it is not made twice, and has the same decision."""
    async with Wire(server.port) as wire:
        counters = open_counters(wire.url)
        await counters.take(DAY)
        for count in range(2, 6):
            wire.lose = 1
            decision = await counters.take(DAY)
            assert decision.records[0][0] == count
        assert wire.lost == 4
        assert await level(counters, "day", DAY[0].limit) == 5
        await counters.close()


@pytest.mark.parametrize("breaks", [True, False])
async def test_a_take_whose_reply_is_lost_is_undone(
    server: RedisServer, open_counters: OpenCounters, breaks: bool
) -> None:
    """Its take is given back as soon as Redis responds, and settlements are made once."""
    async with Wire(server.port) as wire:
        counters = open_counters(wire.url, timeout=0.3)
        watching = open_counters(server)
        held = await counters.take(SLOTS)
        spent = await counters.take([Charge("budget", DAY[0].limit, 100)])
        wire.lose, wire.breaks = 2, breaks
        counters.settle(spent, [40.0])
        counters.settle(held, [0.0])
        assert await refused_or_taken(counters, SLOTS) is None
        assert await level(watching, "slots", SLOTS[0].limit) == 1  # the call was made
        wire.lose = 0
        await back(counters, DAY)
        await settled(counters)
        assert await level(watching, "slots", SLOTS[0].limit) == 0
        assert await level(watching, "budget", DAY[0].limit) == 40
        await counters.close()


async def test_a_cancelled_take_takes_nothing(server: RedisServer, open_counters: OpenCounters) -> None:
    """Whenever a take is cancelled - before it is sent, in flight, after its reply - its slot is free again."""
    counters = open_counters(server)
    await counters.take(DAY)
    rng = random.Random(3)
    for _ in range(200):
        task = asyncio.create_task(counters.take(SLOTS))
        for _ in range(rng.randrange(0, 12)):
            await asyncio.sleep(0)
        if rng.random() < 0.3:
            await asyncio.sleep(rng.random() * 0.001)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            counters.settle(await task, [0.0])
    await settled(counters)
    assert await level(counters, "slots", SLOTS[0].limit) == 0


async def test_a_late_call_is_rejected(server: RedisServer, open_counters: OpenCounters) -> None:
    """The script rejects a call from an abandoned connection that arrives after a later call."""
    from redis.asyncio import Redis
    from redis.exceptions import ResponseError

    counters = open_counters(server)
    for _ in range(3):
        await counters.take(DAY)
    async with Redis(port=server.port) as redis:
        keys = [counters._gateways_key, counters._last_call_key]
        arguments: list[Any] = [SCRIPT, 2, *keys, counters._id, struct.pack("<ddB", 1, 20, 0)]
        with pytest.raises(ResponseError, match="abandoned"):
            await redis.eval(*arguments)


async def crash(counters: RedisCounters) -> None:
    """End counters as a crash of their process does: without a farewell."""
    worker = counters._worker
    assert worker is not None
    worker.cancel()
    await asyncio.wait((worker,))
    counters._worker = None
    counters._settlements.clear()
    await counters._script.disconnect()


async def test_a_crashed_gateway_frees_its_slots(server: RedisServer, open_counters: OpenCounters) -> None:
    """Its concurrent use counts until its timeout; the use of the others stays."""
    crashed = open_counters(server)
    here = open_counters(server, gateway_timeout=0.5)
    for counters in (crashed, crashed, here):
        assert not (await counters.take(SLOTS)).refused
    assert (await here.take(SLOTS)).refused
    await crash(crashed)
    async with asyncio.timeout(30):
        while (await here.take(SLOTS)).refused:
            await asyncio.sleep(0.05)
    here._refusals.forget("slots")
    assert not (await here.take(SLOTS)).refused
    assert (await here.take(SLOTS)).refused


async def test_a_gateway_that_was_only_silent_is_counted_again(
    server: RedisServer, open_counters: OpenCounters
) -> None:
    """A disconnected gateway still has its exchanges: at its next call they count again, and so do their ends."""
    silent = open_counters(server)
    here = open_counters(server, gateway_timeout=0.3)
    decision = await silent.take(SLOTS)
    worker = silent._worker
    assert worker is not None
    await asyncio.sleep(0.4)
    assert await level(here, "slots", SLOTS[0].limit) == 0
    await silent.take(DAY)
    assert await level(here, "slots", SLOTS[0].limit) == 1
    silent.settle(decision, [0.0])
    await settled(silent)
    assert await level(here, "slots", SLOTS[0].limit) == 0


async def test_an_idle_gateway_sends_heartbeats(server: RedisServer, open_counters: OpenCounters) -> None:
    """Its concurrent use counts for as long as it runs."""
    quiet, here = open_counters(server, gateway_timeout=1.5), open_counters(server, gateway_timeout=1.5)
    await quiet.take(SLOTS)
    for _ in range(10):
        await asyncio.sleep(0.3)
        assert await level(here, "slots", SLOTS[0].limit) == 1


async def test_closing_completes_pending_settlements(server: RedisServer, open_counters: OpenCounters) -> None:
    """All settlements are made, in several calls; and the gateway's concurrent use is free."""
    counters, watching = open_counters(server), open_counters(server)
    decisions = await asyncio.gather(
        *[
            counters.take([Charge("day", DAY[0].limit, 10), Charge("slot", Limit(10**6, "at_once"))])
            for _ in range(1_000)
        ]
    )
    for decision in decisions:
        counters.settle(decision, [3.0, None])
    await counters.close()
    assert await level(watching, "day", DAY[0].limit) == 3_000
    assert await level(watching, "slot", Limit(10**6, "at_once")) == 0
    assert await refused_or_taken(counters, DAY) is None
    await counters.close()


async def test_closing_without_a_server_ends(server: RedisServer, open_counters: OpenCounters) -> None:
    """It logs once how many charges could not be settled."""
    counters = open_counters(server)
    decisions = [await counters.take(DAY) for _ in range(7)]
    server.kill()
    for decision in decisions:
        counters.settle(decision, [0.0])
    with structlog.testing.capture_logs() as logs:
        async with asyncio.timeout(30):
            await counters.close()
    assert logs[-1] == {
        "event": "limit_store_settlements_lost",
        "store": str(counters.url),
        "charges": 7,
        "log_level": "warning",
    }


# -- Redis refuses ---------------------------------------------------------------------------------------


async def test_a_server_without_the_script(server: RedisServer, open_counters: OpenCounters) -> None:
    """The script is sent again."""
    counters = open_counters(server)
    for _ in range(3):
        assert not (await counters.take(DAY)).refused
        server.command("SCRIPT", "FLUSH")


async def test_a_server_that_is_full_takes_nothing(server: RedisServer, open_counters: OpenCounters) -> None:
    """No take counts in part; it continues when there is room again."""
    counters = open_counters(server)
    both = [*DAY, *SLOTS]
    await counters.take(both)
    server.command("CONFIG", "SET", "maxmemory", "1")
    assert await refused_or_taken(counters, both) is None
    server.command("CONFIG", "SET", "maxmemory", "0")
    decision = await back(counters, both)
    assert decision.records[0][0] == 2


async def test_a_server_that_has_become_a_replica(server: RedisServer, open_counters: OpenCounters) -> None:
    """As after a failover: a replica accepts no writes until it is the primary."""
    counters = open_counters(server)
    await counters.take(DAY)
    server.command("REPLICAOF", "127.0.0.1", "1")
    with structlog.testing.capture_logs() as logs:
        assert await refused_or_taken(counters, DAY) is None
    assert "ReadOnlyError" in logs[0]["reason"]
    server.command("REPLICAOF", "NO", "ONE")
    await back(counters, DAY)


async def test_a_server_that_is_loading(tmp_path: Path, open_counters: OpenCounters) -> None:
    """The counters are unavailable until Redis has loaded its data; then the earlier use counts."""
    server = RedisServer(tmp_path / "redis")
    await server.start()
    counters = open_counters(server)
    await counters.take(DAY)
    for place in range(60):
        server.command("SET", f"other{place}", "x" * 2_000)
    server.command("CONFIG", "SET", "rdbcompression", "no")
    server.command("SAVE")
    server.kill()
    await server.start("--key-load-delay", "20000", "--loading-process-events-interval-bytes", "1024")
    try:
        with structlog.testing.capture_logs() as logs:
            assert await refused_or_taken(counters, DAY) is None
        assert "loading" in logs[0]["reason"]
        decision = await back(counters, DAY)
        assert decision.records[0][0] == 2
    finally:
        server.kill()


@pytest.mark.parametrize("words", [("RPUSH", "x"), ("SET", "x")])
async def test_another_value_under_a_key(
    server: RedisServer, open_counters: OpenCounters, words: tuple[str, str]
) -> None:
    """Takes of that key fail, the others continue, and no take counts in part."""
    counters = open_counters(server)
    command, value = words
    server.command(command, "{gateway}:used:bad", value)
    server.command(command, "{gateway}:held:bad", value)
    for limit in (Limit(5, "day"), Limit(5, "minute"), Limit(5, "at_once")):
        bad = Charge("bad", limit)
        results = await asyncio.gather(
            refused_or_taken(counters, [*DAY, bad]), refused_or_taken(counters, DAY), refused_or_taken(counters, [bad])
        )
        assert [result is None for result in results] == [True, False, True]
    assert await level(counters, "day", DAY[0].limit) == 3


@pytest.mark.parametrize("name", ["gateways", "last"])
async def test_another_value_under_the_keys_of_the_gateways(
    server: RedisServer, open_counters: OpenCounters, name: str
) -> None:
    """The counters are unavailable until that key is deleted, and then correct."""
    counters = open_counters(server)
    await counters.take(DAY)
    key = (counters._gateways_key if name == "gateways" else counters._last_call_key).decode()
    server.command("DEL", key)
    server.command("SADD", key, "x")
    assert await refused_or_taken(counters, DAY) is None
    server.command("DEL", key)
    decision = await back(counters, DAY)
    assert decision.records[0][0] == 2


# The permissions of the gateway's user in docs/operating.md.
ALLOWED = ["+eval", "+evalsha", "+time", "+get", "+set", "+del", "+hget", "+hset", "+hdel", "+hgetall", "+expire"]


async def test_a_wrong_password_is_not_logged(tmp_path: Path, open_counters: OpenCounters) -> None:
    """The counters are unavailable, the log says why, and the correct password works."""
    server = RedisServer(tmp_path / "redis")
    await server.start()
    try:
        server.command("ACL", "SETUSER", "gw", "on", ">sesame", "~{gateway}:*", *ALLOWED)
        server.command("ACL", "SETUSER", "default", "off")
        wrong = open_counters(f"redis://gw:opensesame@127.0.0.1:{server.port}")
        with structlog.testing.capture_logs() as logs:
            assert await refused_or_taken(wrong, DAY) is None
        assert "AuthenticationError" in logs[0]["reason"]
        assert "sesame" not in str(logs)
        assert "sesame" not in repr(wrong.url)
        wrong._unavailable_since = None
        with structlog.testing.capture_logs() as logs:
            wrong._mark_unavailable("a library that says opensesame")
        assert logs[0]["reason"] == "a library that says ***"
        right = open_counters(f"redis://gw:sesame@127.0.0.1:{server.port}")
        decision = await right.take([*SLOTS, *DAY, Charge("minute", Limit(60, "minute"))])
        right.settle(decision, [0.0, 0.0, 0.0])
        await settled(right)
        assert await level(right, "minute", Limit(60, "minute")) == 0
    finally:
        server.kill()


# -- other ways to it ------------------------------------------------------------------------------------


async def test_a_unix_socket(tmp_path: Path, open_counters: OpenCounters) -> None:
    """`unix:///PATH` works, too."""
    path = tmp_path / "r.sock"
    server = RedisServer(tmp_path / "redis", "--unixsocket", str(path))
    await server.start()
    try:
        counters = open_counters(f"unix://{path}")
        assert not (await counters.take(DAY)).refused
    finally:
        server.kill()


async def test_tls_with_a_private_ca(server: RedisServer, tmp_path: Path, open_counters: OpenCounters) -> None:
    """The certificate must be from that CA and for that host; otherwise the counters are unavailable."""
    ca, other = trustme.CA(), trustme.CA()
    paths = {name: tmp_path / f"{name}.pem" for name in ("ca", "other")}
    ca.cert_pem.write_to_path(paths["ca"])
    other.cert_pem.write_to_path(paths["other"])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("localhost").configure_cert(context)
    async with tls_in_front(server, context) as front:
        right = open_counters(f"rediss://localhost:{front.port}", ca=paths["ca"])
        assert not (await right.take(DAY)).refused
        for host, known in (("localhost", "other"), ("127.0.0.1", "ca")):
            counters = open_counters(f"rediss://{host}:{front.port}", ca=paths[known])
            with structlog.testing.capture_logs() as logs:
                assert await refused_or_taken(counters, DAY) is None
            assert "certificate" in logs[0]["reason"].lower()


async def test_a_cluster(tmp_path: Path, open_counters: OpenCounters) -> None:
    """Any node redirects to the one with the keys, also after they move, and all gateways share one limit."""
    servers = [RedisServer(tmp_path / f"node{place}", "--cluster-enabled", "yes") for place in range(3)]
    for server in servers:
        await server.start("--cluster-port", str(free_port()))
    try:
        for place, server in enumerate(servers):
            first, last = place * 5461 + (place > 0), min((place + 1) * 5461, 16383)
            server.command("CLUSTER", "ADDSLOTSRANGE", str(first), str(last))
            server.command("CLUSTER", "SET-CONFIG-EPOCH", str(place + 1))
        for server in servers[1:]:
            bus = server.command("CLUSTER", "NODES").split()[1].partition("@")[2].partition(",")[0]
            servers[0].command("CLUSTER", "MEET", "127.0.0.1", str(server.port), bus)
        async with asyncio.timeout(30):
            while not all("cluster_state:ok" in server.command("CLUSTER", "INFO") for server in servers):
                await asyncio.sleep(0.05)
        gateways = [open_counters(server, cluster=True) for server in servers]
        charges = [Charge("requests", Limit(50, "day")), Charge("slots", Limit(1_000, "at_once"))]
        decisions = await asyncio.gather(*[gateways[place % 3].take(charges) for place in range(200)])
        assert len([decision for decision in decisions if not decision.refused]) == 50
        owner = next(server for server in servers if "MovedError" not in server.command("GET", "{gateway}:x"))
        other = next(server for server in servers if server is not owner)
        with structlog.testing.capture_logs() as logs:
            assert await refused_or_taken(open_counters(other), DAY) is None
        assert "MovedError" in logs[0]["reason"]

        # While the slot migrates, takes are correct or fail.
        slot = owner.command("CLUSTER", "KEYSLOT", "{gateway}:x")
        here, there = (server.command("CLUSTER", "MYID") for server in (owner, other))
        other.command("CLUSTER", "SETSLOT", slot, "IMPORTING", here)
        owner.command("CLUSTER", "SETSLOT", slot, "MIGRATING", there)
        for _ in range(20):
            for counters in gateways:
                await refused_or_taken(counters, [Charge(f"new{random.random()}", DAY[0].limit)])
        owner.command("FLUSHALL")
        for server in (other, owner):
            server.command("CLUSTER", "SETSLOT", slot, "NODE", there)
        # The node with the keys ends, even if the configuration names it: another node redirects to the new one.
        owner.kill()
        for counters in gateways:
            await back(counters, DAY)
        assert await level(gateways[0], "day", DAY[0].limit) == 3
    finally:
        for server in servers:
            server.kill()


async def test_a_refused_caller_costs_no_round_trip(server: RedisServer, open_counters: OpenCounters) -> None:
    """The gateway refuses it itself until some use is given back here, or for a second."""
    counters, other = open_counters(server), open_counters(server)
    held = [await counters.take(SLOTS) for _ in range(3)]
    assert (await counters.take(SLOTS)).refused
    asked = counters._number
    for _ in range(500):
        decision = await counters.take(SLOTS)
        assert decision.refused
        assert decision.retry_after(0) == 1
    assert counters._number <= asked + 1  # it may have sent a heartbeat
    counters.settle(held[0], [0.0])
    assert not (await counters.take(SLOTS)).refused
    assert (await counters.take(SLOTS)).refused
    assert (await other.take(SLOTS)).refused
    counters.settle(held[1], [0.0])
    async with asyncio.timeout(30):
        while (await other.take(SLOTS)).refused:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("passes", range(4))
async def test_a_stalled_loop_is_no_outage_of_redis(
    server: RedisServer, open_counters: OpenCounters, passes: int
) -> None:
    """A reply that has arrived counts, even if a stall delayed its reading beyond the timeout."""
    counters = open_counters(server, timeout=0.3)
    await counters.take(DAY)
    take = asyncio.create_task(counters.take(DAY))
    for _ in range(passes):
        await asyncio.sleep(0)
    time.sleep(0.6)  # noqa: ASYNC251 -- what is tested
    with structlog.testing.capture_logs() as logs:
        assert not (await take).refused
        await counters.take(DAY)
    assert not logs


async def test_an_empty_take_checks_whether_redis_is_available(
    server: RedisServer, open_counters: OpenCounters
) -> None:
    """A stage can connect before its first request, and the log has a problem at the start."""
    counters = open_counters(server)
    assert not (await counters.take([])).refused
    server.kill()
    assert await refused_or_taken(counters, []) is None


async def test_an_invalid_charge_fails_its_caller_only(server: RedisServer, open_counters: OpenCounters) -> None:
    """An invalid charge raises for its caller only, and Redis stays available for the others."""
    counters = open_counters(server)
    with pytest.raises(struct.error):
        await counters.take([Charge("a", DAY[0].limit, "many")])  # type: ignore[arg-type] # that is the point
    assert not (await counters.take(DAY)).refused


# -- with everything around it ---------------------------------------------------------------------------

GATEWAY = """
store: {redis: "${REDIS}", timeout: 2}
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline:
  - auth_passthrough
  - rate_limit: {requests_per_day: 25, tokens_per_day: 100000, in_flight: 100, on_error: closed}
  - model_map: {unmapped: own_name_without_dots}
  - api_version: 2024-10-21
"""


async def test_two_gateways_with_one_limit(server: RedisServer, start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Clients of both share one limit; without Redis `on_error` decides."""
    env = {"REDIS": server.url}
    gateways = [await start_gateway(azure.endpoint, GATEWAY, env=env) for _ in range(2)]

    async def status(gateway: Gateway) -> int:
        async with gateway.post() as answer:
            await answer.read()
            return int(answer.status)

    statuses = await asyncio.gather(*[status(gateways[place % 2]) for place in range(60)])
    assert sorted(statuses) == [200] * 25 + [429] * 35
    async with asyncio.timeout(30):
        while server.command("KEYS", "{gateway}:held:*"):
            await asyncio.sleep(0.02)
    server.kill()
    assert await status(gateways[0]) in (429, 503)  # a recent refusal may be repeated
    async with asyncio.timeout(30):
        while await status(gateways[0]) != 503:
            await asyncio.sleep(0.05)
    opened = await start_gateway(azure.endpoint, GATEWAY.replace("closed", "open"), env=env)
    assert await status(opened) == 200


async def test_no_settlement_is_dropped(
    server: RedisServer, open_counters: OpenCounters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too many pending settlements takes fail; every slot and every token is given back."""
    monkeypatch.setattr("gateway.limits.redis_counters._MAX_PENDING", 20)
    monkeypatch.setattr("gateway.limits.redis_counters._MAX_SETTLEMENTS", 3)
    counters = open_counters(server)
    charges = [Charge("slots", Limit(1000, "at_once")), Charge("tokens", Limit(10**6, "day"), 100.0)]
    decisions = [await counters.take(charges) for _ in range(50)]
    for decision in decisions:
        counters.settle(decision, [0.0, 1.0])
    with pytest.raises(CountersUnavailable, match="too slow"):
        await counters.take(charges)
    await settled(counters)
    decision = await counters.take([Charge(each.name, each.limit, 0.0) for each in charges])
    assert [record[0] for record in decision.records] == [0.0, 50.0]


async def test_slots_are_released_however_late(
    server: RedisServer, open_counters: OpenCounters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after an outage that is so long that tokens no longer matter."""
    monkeypatch.setattr("gateway.limits.redis_counters._MAX_PENDING_AGE", 0.2)
    monkeypatch.setattr("gateway.limits.redis_counters._RETRY", 0.1)
    counters = open_counters(server, timeout=0.3)
    charges = [Charge("tokens", Limit(10**6, "day"), 100.0), Charge("slots", Limit(1, "at_once"))]
    decision = await counters.take(charges)
    server.pause()
    with pytest.raises(CountersUnavailable):
        await counters.take([Charge("other", Limit(5, "day"))])
    counters.settle(decision, [1.0, 0.0])
    await asyncio.sleep(1)
    server.resume()
    await back(counters, DAY)
    await settled(counters)
    assert not (await counters.take(charges[1:])).refused
