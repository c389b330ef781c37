"""Memory and disk budgets of requests: exact counts, a share for each caller, and everything is returned."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from collections.abc import AsyncIterator, Iterator
from functools import partial

import pytest

from gateway import CountersUnavailable, Decision, Next, Request, Response, Stage
from gateway.auth.credentials import key_digest
from gateway.body.request_body import Body
from gateway.exchange import Exchange
from gateway.limits.memory_budget import BUDGETS, UNCOUNTED
from gateway.testing import FakeAzure, send
from gateway.transport.websocket_relay import WebSocketRelay
from tests.conftest import CHAT, Gateway, RawUpstream, StartGateway, hard_close, raw_upstream, until

MIB = 1024 * 1024
MEMORY = {"memory": 4 * MIB}  # of which a caller may hold 1 MiB
SIZE = 400_000
KEYS = f"""
resources: {{azure: {{endpoint: "${{ENDPOINT}}", api_key: azure-key}}}}
match:
  keys:
    - {{digest: "{key_digest("K-ann")}", label: ann}}
    - {{digest: "{key_digest("K-bob")}", label: bob}}
"""
OWN_KEYS = KEYS + "pipeline: [auth_keys, model_map: {unmapped: own_name_without_dots}, api_version: 2024-10-21]\n"
ONE_AT_ONCE = OWN_KEYS.replace("api_version:", "rate_limit: {in_flight: 1}, api_version:")
PASSED_ON = """
resources: {azure: {endpoint: "${ENDPOINT}"}}
trusted_proxies: [127.0.0.1]
pipeline: [auth_passthrough, model_map: {unmapped: own_name_without_dots}, api_version: 2024-10-21]
"""
FORM = b'--XB\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
MODEL = b'\r\n--XB\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n--XB--\r\n'


@pytest.fixture(autouse=True)
def _all_is_given_back() -> Iterator[None]:
    """After each test nothing is held, in memory or on disk."""
    BUDGETS.memory.most_held = BUDGETS.disk.most_held = 0
    yield
    for budget in (BUDGETS.memory, BUDGETS.disk):
        assert budget.held == 0
        assert not budget._callers
    BUDGETS.use(memory=1024 * MIB, form=256 * MIB)


def body_of(size: int, **fields: object) -> bytes:
    """Return a chat completion of exactly `size` bytes."""
    given = json.dumps({**CHAT, **fields}).encode()
    return given[:-1] + b" " * (size - len(given)) + b"}"


def holds(size: int) -> bool:
    """Whether exactly `size` bytes of memory are held."""
    return BUDGETS.memory.held == size


class Client:
    """One request; the test sends its body step by step."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def start(
        cls,
        gateway: Gateway,
        key: str,
        length: int | None,
        *,
        path: str = "/v1/chat/completions",
        kind: str = "application/json",
        more: str = "",
    ) -> Client:
        """Send the head of a request; the body is chunked if `length` is None."""
        client = cls(*await asyncio.open_connection("127.0.0.1", gateway.port))
        framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        client.send(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: {kind}\r\n{more}"
            f"{framing}\r\n\r\n".encode()
        )
        return client

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def send_chunk(self, data: bytes) -> None:
        self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def status(self) -> int:
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10)
        self.head = head.decode().lower()
        return int(head[9:12])

    def leave(self) -> None:
        if not self.writer.is_closing():
            hard_close(self.writer)


@contextlib.asynccontextmanager
async def clients() -> AsyncIterator[list[Client]]:
    """Yield a list; the clients in it disconnect at the end."""
    made: list[Client] = []
    try:
        yield made
    finally:
        for client in made:
            client.leave()


async def started(made: list[Client], *args: object, **more: object) -> Client:
    made.append(await Client.start(*args, **more))  # type: ignore[arg-type] # passed on unchanged
    return made[-1]


# -- a share for each caller ---------------------------------------------------------------------------


async def test_one_caller_s_bodies_leave_room_for_another_s(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Two bodies fit into ann's share; the third gets a 503 before a byte of it is read. Bob's is served."""
    gateway = await start_gateway(azure.endpoint, OWN_KEYS, limits=MEMORY)
    async with clients() as made:
        for _ in range(2):
            (await started(made, gateway, "K-ann", SIZE)).send(b"{")
        await until(lambda: BUDGETS.memory.held == 2 * SIZE)
        third = await started(made, gateway, "K-ann", SIZE)
        third.send(b"{")
        assert await third.status() == 503
        assert "retry-after: 1" in third.head
        assert b'"code":"overloaded"' in await third.reader.read(1000)
        assert BUDGETS.memory.held_by("caller default/ann") == BUDGETS.memory.held == 2 * SIZE
        bob = await started(made, gateway, "K-bob", SIZE)
        bob.send(body_of(SIZE))
        assert await bob.status() == 200
        for client in made[:2]:
            client.send(body_of(SIZE)[1:])
            assert await client.status() == 200
    await gateway.idle()
    assert BUDGETS.memory.most_held == 3 * SIZE


async def test_what_no_share_could_hold_is_too_large(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """A retry would not help, so it is a 413 that says how much a caller may hold."""
    gateway = await start_gateway(azure.endpoint, OWN_KEYS, limits=MEMORY)
    async with clients() as made:
        client = await started(made, gateway, "K-ann", MIB + 1)
        client.send(b"{")
        assert await client.status() == 413
        assert f"{MIB} bytes" in (await client.reader.read(1000)).decode()


async def test_all_shares_together_are_bounded(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """For any number of callers; above the bound each gets a 503."""
    gateway = await start_gateway(azure.endpoint, PASSED_ON, limits=MEMORY)
    async with clients() as made:
        for number in range(5):
            more = f"X-Forwarded-For: 192.0.2.{number}\r\n"
            (await started(made, gateway, "K", MIB - 10_000, more=more)).send(b"{")
            if number < 4:
                await until(partial(holds, (number + 1) * (MIB - 10_000)))
        assert await made[-1].status() == 503
        assert BUDGETS.memory.held == 4 * (MIB - 10_000)


@pytest.mark.parametrize(
    "addresses", [["192.0.2.1"] * 3, ["2001:db8::1", "2001:db8::2:0:0:1", "2001:db8:0:0:ffff::"]], ids=["v4", "v6"]
)
async def test_keys_that_are_made_up_have_no_shares_of_their_own(
    start_gateway: StartGateway, azure: FakeAzure, addresses: list[str]
) -> None:
    """Keys that are passed on are not checked, so the share belongs to the client's address (IPv6: its /64)."""
    gateway = await start_gateway(azure.endpoint, PASSED_ON, limits=MEMORY)
    async with clients() as made:
        for number, address in enumerate(addresses):
            more = f"X-Forwarded-For: {address}\r\n"
            (await started(made, gateway, f"K-{number}", SIZE, more=more)).send(b"{")
            if number < 2:
                await until(partial(holds, (number + 1) * SIZE))
        assert await made[-1].status() == 503


async def test_who_is_not_let_in_holds_nothing(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """An unknown key is refused before its body is read."""
    gateway = await start_gateway(azure.endpoint, OWN_KEYS, limits=MEMORY)
    async with clients() as made:
        client = await started(made, gateway, "K-nobody", SIZE)
        client.send(b"{")
        assert await client.status() == 401
    assert BUDGETS.memory.most_held == 0


async def test_small_bodies_are_not_counted(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Whether they arrive with their head or after it, with or without a length."""
    gateway = await start_gateway(azure.endpoint, OWN_KEYS, limits=MEMORY)
    body = body_of(UNCOUNTED)
    async with clients() as made:
        for length in (UNCOUNTED, None):
            client = await started(made, gateway, "K-ann", length)
            await asyncio.sleep(0.02)
            for part in (body[:1000], body[1000:]):
                client.send(part) if length else client.send_chunk(part)
            client.send(b"" if length else b"0\r\n\r\n")
            assert await client.status() == 200
    assert BUDGETS.memory.most_held == 0


async def test_a_body_of_unknown_length_is_counted_as_it_comes(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Bytes are counted before they are kept. Above the share the body is refused, and the rest is not read."""
    gateway = await start_gateway(azure.endpoint, OWN_KEYS, limits=MEMORY)
    async with clients() as made:
        client = await started(made, gateway, "K-ann", None)
        client.send_chunk(b"{" + b" " * 99_999)
        await until(lambda: BUDGETS.memory.held == 100_000)
        client.send_chunk(b" " * 50_000)
        await until(lambda: BUDGETS.memory.held == 150_000)
        client.send_chunk(b" " * MIB)
        assert await client.status() == 413
        whole = await started(made, gateway, "K-bob", None)
        whole.send_chunk(body_of(SIZE))
        whole.send(b"0\r\n\r\n")
        assert await whole.status() == 200
    assert BUDGETS.memory.most_held <= MIB


async def test_one_caller_s_forms_leave_the_disk_to_another_s(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """A caller may use a quarter of the disk budget, which is two of the largest forms."""
    gateway = await start_gateway(azure.endpoint, OWN_KEYS, limits={"form": 4 * MIB})
    kind = "multipart/form-data; boundary=XB"
    async with clients() as made:
        statuses = []
        for _ in range(9):
            client = await started(made, gateway, "K-ann", 90 * MIB, path="/v1/audio/transcriptions", kind=kind)
            client.send(FORM + b"A" * (4 * MIB - 1000))
        waiting = [asyncio.create_task(client.status()) for client in made]
        await until(lambda: sum(each.done() for each in waiting) >= 6)
        statuses = [each.result() for each in waiting if each.done()]
        assert set(statuses) == {503}
        assert BUDGETS.disk.held_by("caller default/ann") == BUDGETS.disk.held <= 8 * MIB
        good = FORM + b"A" * 3 * MIB + MODEL
        bob = await started(made, gateway, "K-bob", len(good), path="/v1/audio/transcriptions", kind=kind)
        bob.send(good)
        assert await bob.status() in (200, 404)  # Azure was asked
        assert azure.requests
        for each in waiting:
            each.cancel()


# -- slots are taken before a body is read -------------------------------------------------------------


async def test_a_caller_s_bodies_are_no_more_than_its_slots(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """If one request at a time is allowed, the body of a second one is not read, even by a stage above the limit."""
    gateway = await start_gateway(azure.endpoint, ONE_AT_ONCE)
    async with clients() as made:
        first = await started(made, gateway, "K-ann", SIZE)
        first.send(b"{")
        await until(lambda: BUDGETS.memory.held == SIZE)
        for _ in range(3):
            refused = await started(made, gateway, "K-ann", SIZE)
            refused.send(b"{")
            assert await refused.status() == 429
        assert BUDGETS.memory.most_held == SIZE
        other = await started(made, gateway, "K-bob", SIZE)
        other.send(body_of(SIZE))
        assert await other.status() == 200
        first.send(body_of(SIZE)[1:])
        assert await first.status() == 200
        await gateway.idle()
        after = await started(made, gateway, "K-ann", SIZE)
        after.send(body_of(SIZE))
        assert await after.status() == 200


async def test_a_slot_is_free_when_its_client_hangs_up(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """In the middle of its body. One slot is freed, not two."""
    gateway = await start_gateway(azure.endpoint, ONE_AT_ONCE)
    async with clients() as made:
        for _ in range(3):
            client = await started(made, gateway, "K-ann", SIZE)
            client.send(b"{")
            await until(lambda: BUDGETS.memory.held == SIZE)
            client.leave()
            await until(lambda: BUDGETS.memory.held == 0)
        first, second = [await started(made, gateway, "K-ann", SIZE) for _ in range(2)]
        first.send(b"{")
        await until(lambda: BUDGETS.memory.held == SIZE)
        second.send(b"{")
        assert await second.status() == 429


async def test_a_form_s_slot_is_taken_before_it_is_looked_at(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Its bytes go to disk; a second form takes no disk space."""
    gateway = await start_gateway(azure.endpoint, ONE_AT_ONCE)
    kind = "multipart/form-data; boundary=XB"
    async with clients() as made:
        for status in (None, 429):
            client = await started(made, gateway, "K-ann", 9 * MIB, path="/v1/audio/transcriptions", kind=kind)
            client.send(FORM + b"A" * 2 * MIB)
            if status is None:
                await until(lambda: BUDGETS.disk.held > MIB)
            else:
                assert await client.status() == status


@pytest.mark.parametrize(
    "limit", ["in_flight: 1, per: model", "in_flight: 1, shadow: true", "in_flight: 2", "requests_per_minute: 9"]
)
async def test_only_slots_that_a_body_cannot_change_keep_it_from_being_read(
    start_gateway: StartGateway, azure: FakeAzure, limit: str
) -> None:
    """The body is read for slots per model, for shadow limits, and for a limit that has room."""
    gateway = await start_gateway(azure.endpoint, ONE_AT_ONCE.replace("in_flight: 1", limit))
    async with clients() as made:
        for number in (1, 2):
            (await started(made, gateway, "K-ann", SIZE)).send(b"{")
            await until(partial(holds, number * SIZE))
        for client in made:
            client.send(body_of(SIZE)[1:])
            assert await client.status() == 200
            await until(lambda: BUDGETS.memory.held < 2 * SIZE)  # the first one is over


async def test_what_was_taken_early_is_not_taken_again(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """One slot and one request are taken; the stage checks its other limits when the request reaches it."""
    yaml = ONE_AT_ONCE.replace("in_flight: 1", "in_flight: 1, requests_per_minute: 5")
    gateway = await start_gateway(azure.endpoint, yaml)
    async with clients() as made:
        for left in (4, 3):
            client = await started(made, gateway, "K-ann", SIZE)
            client.send(body_of(SIZE))
            assert await client.status() == 200
            assert f"x-ratelimit-remaining-requests: {left}" in client.head
            await gateway.idle()


async def test_a_body_that_is_read_above_the_key_takes_nobody_s_slot(
    start_gateway: StartGateway, azure: FakeAzure
) -> None:
    """The caller is not known yet, so the slot is taken when the request reaches the limit."""
    yaml = "plugins_path: [mine]\n" + ONE_AT_ONCE.replace("[auth_keys,", "[reads_first, auth_keys,")
    gateway = await start_gateway(azure.endpoint, yaml, {"mine/reads_first.py": READS_FIRST})
    async with clients() as made:
        for number, key in enumerate(("K-ann", "K-bob"), 1):
            (await started(made, gateway, key, SIZE)).send(b"{")
            await until(partial(holds, number * SIZE))
        for client in made:
            client.send(body_of(SIZE)[1:])
            assert await client.status() == 200


READS_FIRST = """
from gateway import CountersUnavailable, Next, Request, Response, Stage


class ReadsFirst(Stage):
    async def __call__(self, request: Request, call_next: Next) -> Response:
        await request.body()
        return await call_next(request)
"""


@pytest.mark.parametrize("on_error", ["open", "closed"])
async def test_a_store_that_is_away_is_asked_before_the_body(
    start_gateway: StartGateway, azure: FakeAzure, monkeypatch: pytest.MonkeyPatch, on_error: str
) -> None:
    """With `on_error: closed` the body is not read; with `open` the request passes uncounted."""
    gateway = await start_gateway(
        azure.endpoint, ONE_AT_ONCE.replace("in_flight: 1", f"in_flight: 1, on_error: {on_error}")
    )

    async def take(*_: object, **__: object) -> Decision:
        raise CountersUnavailable("away")

    monkeypatch.setattr(gateway.server.shared.counters, "take", take)
    async with clients() as made:
        client = await started(made, gateway, "K-ann", SIZE)
        if on_error == "closed":
            client.send(b"{")
            assert await client.status() == 503
            assert BUDGETS.memory.most_held == 0
        else:
            client.send(body_of(SIZE))
            assert await client.status() == 200


# -- every end of an exchange --------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["refused", "too many", "broken JSON", "leaves", "broken off"])
async def test_a_body_is_given_back_however_its_request_ends(
    start_gateway: StartGateway, azure: FakeAzure, end: str
) -> None:
    """The request is refused for its model, its JSON or by a limit; its client leaves; or its body times out."""
    yaml = OWN_KEYS.replace("own_name_without_dots", "refuse").replace("api_version:", "rate_limit: {%s}, api_version:")
    limit = "requests_per_minute: 1, burst: 1" if end == "too many" else "in_flight: 5"
    yaml = yaml.replace("{unmapped: refuse}", "{models: {gpt-4o: gpt-4o}, unmapped: refuse}") % limit
    gateway = await start_gateway(azure.endpoint, yaml, timeouts={"client": 0.3})
    async with clients() as made:
        if end == "too many":
            async with gateway.post(key="K-ann") as answer:
                assert answer.status == 200
        client = await started(made, gateway, "K-ann", SIZE)
        client.send(b"{")
        await until(lambda: BUDGETS.memory.held == SIZE)
        if end == "leaves":
            client.leave()
        elif end == "broken off":
            assert await client.status() == 408
        else:
            model = "unknown" if end == "refused" else "gpt-4o"
            body = b"x" * SIZE if end == "broken JSON" else body_of(SIZE, model=model)
            client.send(body[1:])
            assert await client.status() == {"refused": 404, "too many": 429, "broken JSON": 400}[end]
        await until(lambda: BUDGETS.memory.held == 0)


@pytest.mark.parametrize("end", ["complete", "broken", "silent", "left"])
async def test_a_body_is_given_back_when_its_answer_ends(start_gateway: StartGateway, end: str) -> None:
    """It is held while Azure responds: until the response is complete, breaks off, or the client leaves."""
    go_on = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upstream.request(reader)
        if end == "silent":
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"a\r\ndata: 1\n\n\n\r\n")
        await writer.drain()
        await go_on.wait()
        if end == "complete":
            writer.write(b"0\r\n\r\n")
            await writer.drain()

    upstream = RawUpstream(script)
    async with upstream, clients() as made:
        gateway = await start_gateway(upstream.endpoint, OWN_KEYS)
        client = await started(made, gateway, "K-ann", SIZE)
        client.send(body_of(SIZE, stream=True))
        assert await client.status() == (502 if end == "silent" else 200)
        if end != "silent":
            assert BUDGETS.memory.held == SIZE
        if end == "left":
            client.leave()
        else:
            go_on.set()
        await until(lambda: BUDGETS.memory.held == 0)
        await gateway.idle()


@contextlib.contextmanager
def without_collector() -> Iterator[list[object]]:
    """Run without the garbage collector; afterwards the list has the gateway's objects that are in cycles."""
    found: list[object] = []
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        found += [each for each in gc.garbage if isinstance(each, Body | Exchange | Request | WebSocketRelay)]
        gc.garbage.clear()
    finally:
        gc.set_debug(0)
        gc.enable()


@pytest.mark.both_loops
@pytest.mark.parametrize("end", ["complete", "broken", "left", "left, unanswered", "left, uploading", "reset", "late"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_body_does_not_wait_for_the_collector(start_gateway: StartGateway, end: str, *, streamed: bool) -> None:
    """Bytes that are no longer counted are freed: no end of an exchange leaves its body in a reference cycle."""
    go_on = asyncio.Event()
    asked = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if end == "left, uploading":
            await reader.readuntil(b"\r\n\r\n")
            asked.set()
            await reader.read()
            return
        if streamed:
            tail = b""
            while not tail.endswith(b"\r\n0\r\n\r\n"):
                tail = tail[-10:] + await reader.read(65536)
        else:
            await upstream.request(reader)
        asked.set()
        if end == "left, unanswered":
            await reader.read()
            return
        if end == "reset":
            hard_close(writer)
            return
        if end == "late":
            await go_on.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"a\r\ndata: 1\n\n\n\r\n")
        await writer.drain()
        if end == "complete":
            writer.write(b"0\r\n\r\n")
        elif end == "left":
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(b"a\r\ndata: 1\n\n\n\r\n")
                    await writer.drain()
                    await asyncio.sleep(0.01)
        await writer.drain()

    async def exchange(gateway: Gateway) -> None:
        asked.clear()
        deployment = "/openai/deployments/gpt-4o" if streamed else "/v1"  # no stage reads the body on this path
        length = None if streamed or end == "left, uploading" else SIZE
        async with clients() as made:
            client = await started(made, gateway, "K-ann", length, path=f"{deployment}/chat/completions")
            data = body_of(SIZE, stream=True)
            if length is not None:
                client.send(data)
            elif end == "left, uploading":
                client.send_chunk(data)
            else:
                client.send_chunk(data)
                client.send(b"0\r\n\r\n")
            if streamed or end != "left, uploading":
                await asyncio.wait_for(asked.wait(), 10)
            else:
                await until(lambda: holds(SIZE))
            if end in ("complete", "broken", "left"):
                assert await client.status() == 200
            elif end == "reset":
                assert await client.status() == 502
            elif end == "late":
                assert await client.status() == 504
            if end in ("complete", "broken"):
                with contextlib.suppress(asyncio.IncompleteReadError):
                    await client.reader.readuntil(b"0\r\n\r\n")
        await gateway.idle()
        await until(lambda: not gateway.server._http.connections)  # type: ignore[union-attr] # the server has started

    upstream = RawUpstream(script)
    async with upstream:
        gateway = await start_gateway(upstream.endpoint, OWN_KEYS, timeouts={"first_byte": 0.5})
        await exchange(gateway)
        with without_collector() as found:
            await exchange(gateway)
        go_on.set()
    assert found == []


async def test_what_a_stage_holds_is_given_back_though_it_fails() -> None:
    """A stage counts what it keeps with `request.reserve_memory`; `release_memory` gives some back before the end."""

    class Keeps(Stage):
        async def __call__(self, request: Request, call_next: Next) -> Response:
            request.reserve_memory(3000)
            request.release_memory(1000)
            held.append(BUDGETS.memory.held)
            raise ZeroDivisionError

    held: list[int] = []
    assert (await send([Keeps()])).status == 500
    assert held == [2000]


async def test_nothing_is_reserved_after_the_end_of_the_exchange() -> None:
    """A reservation would never be released; to release memory that is already released does nothing."""
    exchange = Exchange()
    exchange.reserve_memory(10)
    exchange.reserve_disk(5)
    exchange.finish()
    exchange.release_memory(10)
    exchange.release_disk(5)
    for hold in (exchange.reserve_memory, exchange.reserve_disk):
        with pytest.raises(RuntimeError):
            hold(1)


# -- responses that stages read ------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "status"), [(MIB - 1000, 200), (3 * MIB, 413)])
async def test_an_answer_that_a_stage_reads_is_counted(start_gateway: StartGateway, size: int, status: int) -> None:
    """While it arrives. If there is no room, it is not kept, and the connection to Azure is closed."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer += b"%x\r\n%b\r\n0\r\n\r\n" % (size, b"a" * size)
    async with raw_upstream(answer) as upstream:
        files = {"mine/reads_all.py": READS_ALL}
        yaml = "plugins_path: [mine]\n" + OWN_KEYS.replace("[auth_keys,", "[auth_keys, reads_all,")
        gateway = await start_gateway(upstream.endpoint, yaml, files, limits=MEMORY)
        async with gateway.post(key="K-ann") as answered:
            assert answered.status == status
            await answered.read()
        await gateway.idle()
        assert BUDGETS.memory.most_held == size if status == 200 else BUDGETS.memory.most_held <= MIB


READS_ALL = """
from gateway import CountersUnavailable, Next, Request, Response, Stage


class ReadsAll(Stage):
    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        await response.read(64 * 1024 * 1024)
        return response
"""


async def test_an_event_that_does_not_end_is_held(start_gateway: StartGateway) -> None:
    """The bytes that the splitter keeps count; above the caller's share the stream ends with an error event."""
    released = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upstream.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: " + b"x" * 500_000)
        await released.wait()
        writer.write(b"\n\ndata: " + b"y" * 2_000_000)
        await reader.read()

    yaml = OWN_KEYS.replace("]\n", ", prompt_filter_chunk: merge, sse_newline]\n").replace(
        "pipeline: [auth_keys,", "pipeline:\n  [auth_keys,"
    )
    upstream = RawUpstream(script)
    async with upstream:
        gateway = await start_gateway(upstream.endpoint, yaml, limits=MEMORY)
        async with gateway.post(json={**CHAT, "stream": True}, key="K-ann") as answer:
            await until(lambda: BUDGETS.memory.held_by("caller default/ann") > 490_000)
            released.set()
            text = await answer.content.read(500_008)
            while not text.endswith(b"\n\n") or b"error" not in text[-300:]:
                text = text[-1000:] + await answer.content.readany()
        assert b'"code":"overloaded"' in text
        await gateway.idle()
    assert BUDGETS.memory.most_held <= MIB


async def test_what_is_only_announced_takes_no_room(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """Large bodies count while they arrive: a caller that announces its whole share and sends little holds little."""
    gateway = await start_gateway(azure.endpoint, OWN_KEYS, limits={"memory": 16 * MIB})
    clients = [await Client.start(gateway, "K-ann", 4 * MIB - 1000) for _ in range(5)]
    for client in clients:
        client.writer.write(b"{" + b" " * 99_999)
    await until(lambda: BUDGETS.memory.held == 5 * 100_000)
    assert BUDGETS.memory.most_held <= 4 * MIB + 4 * 100_000
    whole = await Client.start(gateway, "K-ann", 3 * MIB)
    whole.writer.write(body_of(3 * MIB))
    assert (await whole.reader.readline()).startswith(b"HTTP/1.1 200 ")
    assert BUDGETS.memory.most_held >= 3 * MIB
    for client in (*clients, whole):
        client.writer.close()
    await gateway.idle()
