"""Host names that hang, fail and change: timeouts, stale addresses, and limits on threads."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

import gateway.dns_resolver as module
from gateway.azure.resources import Resource
from gateway.dns_resolver import LookupFailed, LookupTimeout, Resolver
from gateway.errors import UpstreamError, UpstreamTimeout
from gateway.limits.redis_script import RedisScript
from gateway.limits.redis_url import RedisUrl
from gateway.protocol.proxy_url import Proxy
from gateway.services import Shared
from gateway.transport.connection_pool import ConnectionPool


class Names:
    """The results of `socket.getaddrinfo`; a name that hangs does so until the test ends."""

    def __init__(self) -> None:
        self.found: dict[str, list[str] | Exception] = {}
        self.asked: list[str] = []
        self.threads: list[str] = []
        self.hanging: set[str] = set()
        self.over = threading.Event()

    def getaddrinfo(self, host: str, port: Any, *_: Any, **__: Any) -> list[Any]:
        self.asked.append(host)
        self.threads.append(threading.current_thread().name)
        if host in self.hanging:
            self.over.wait(60)
        found = self.found.get(host, socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
        if isinstance(found, Exception):
            raise found
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port or 0)) for each in found]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    """Replace the names of this machine."""
    names = Names()
    monkeypatch.setattr(socket, "getaddrinfo", names.getaddrinfo)
    yield names
    names.over.set()


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def addresses(found: list[Any]) -> list[str]:
    return [each[4][0] for each in found]


async def until_idle(resolver: Resolver) -> None:
    """Wait until no look-up is in progress."""
    async with asyncio.timeout(10):
        while resolver.threads:
            await asyncio.sleep(0.001)


async def test_all_callers_share_one_look_up_of_a_name(names: Names) -> None:
    """One thread for a hundred callers at once, and none for later callers while the addresses are fresh."""
    names.found["east.test"] = ["192.0.2.1", "192.0.2.2"]
    resolver = Resolver()
    found = await asyncio.gather(*(resolver.look_up("east.test") for _ in range(100)))
    assert names.asked == ["east.test"]
    assert {tuple(addresses(each)) for each in found} == {("192.0.2.1", "192.0.2.2")}
    await resolver.look_up("EAST.test")
    assert names.asked == ["east.test"]


async def test_all_addresses_of_a_name_are_connected_to_in_turn(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each connection begins with the next address, also through a proxy."""
    names.found["east.test"] = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    tried: list[str] = []

    async def start_connection(addr_infos: list[Any], **_: Any) -> Any:
        tried.append(addr_infos[0][4][0])
        raise OSError("nobody is there")

    monkeypatch.setattr("aiohappyeyeballs.start_connection", start_connection)
    connector = ConnectionPool()
    await connector.start()
    resource = Resource("east", "http://east.test:1")
    through = Resource("east", "http://elsewhere.test", proxy=Proxy("east.test", 3128))
    for each in (resource, through):
        first = []
        for _ in range(3):
            tried.clear()
            with pytest.raises(UpstreamError):
                await connector.connect(connector.destination(each), 5)
            first.append(tried[0])
        assert sorted(first) == ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    await connector.close()


@pytest.mark.parametrize("literal", ["192.0.2.7", "2001:db8::7"])
async def test_an_address_is_not_looked_up(literal: str) -> None:
    """It takes no thread."""
    resolver = Resolver()
    (found,) = await resolver.look_up(literal)
    assert found[4][0] == literal
    assert resolver.threads == 0


async def test_a_name_that_hangs_keeps_no_other_waiting(names: Names) -> None:
    """Each has its own thread, up to a limit, and the error names the host."""
    resolver = Resolver()
    names.hanging = {f"hangs-{number}.test" for number in range(20)}
    names.found["well.test"] = ["192.0.2.1"]
    waiting = [asyncio.create_task(resolver.look_up(name, 0.05)) for name in names.hanging for _ in range(5)]
    async with asyncio.timeout(10):
        assert addresses(await resolver.look_up("well.test")) == ["192.0.2.1"]
        results = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(each) for each in results} == {LookupTimeout}
    assert str(results[0]).endswith("could not be looked up within 0.05 s")
    assert resolver.threads == 20, "one for each name, whoever and how many ask"


async def test_threads_are_bounded_for_each_name_and_in_all(names: Names) -> None:
    """A second thread for a name whose first one hangs, never a third; and a limit for all names together."""
    clock = Clock()
    resolver = Resolver(clock)
    names.hanging = {"one.test"}
    for _ in range(10):
        with pytest.raises(LookupTimeout):
            await resolver.look_up("one.test", 0.001)
        clock.now += 60
    assert resolver.threads == 2
    names.hanging |= {f"{number}.test" for number in range(100)}
    for number in range(100):
        with pytest.raises(LookupTimeout):
            await resolver.look_up(f"{number}.test", 0.001)
    assert resolver.threads == 32
    names.over.set()
    await until_idle(resolver)
    assert set(names.asked) == {"one.test", *(f"{number}.test" for number in range(100))}, "the others had their turn"


async def test_a_name_recovers_while_its_first_look_up_hangs_for_ever(names: Names) -> None:
    """The result of the second counts, and the late result of the first is ignored."""
    clock = Clock()
    resolver = Resolver(clock)
    names.hanging = {"east.test"}
    names.found["east.test"] = ["192.0.2.1"]
    with pytest.raises(LookupTimeout):
        await resolver.look_up("east.test", 0.001)
    clock.now += 40
    names.hanging.clear()
    names.found["east.test"] = ["192.0.2.2"]
    assert addresses(await resolver.look_up("east.test")) == ["192.0.2.2"]
    names.found["east.test"] = ["192.0.2.1"]
    names.over.set()
    await until_idle(resolver)
    assert addresses(await resolver.look_up("east.test")) == ["192.0.2.2"]


async def test_stale_addresses_are_used_while_a_look_up_hangs(names: Names) -> None:
    """RFC 8767: the first caller waits for a while, later callers do not; after a day it is an error."""
    clock = Clock()
    resolver = Resolver(clock)
    names.found["east.test"] = ["192.0.2.1"]
    await resolver.look_up("east.test")
    names.hanging = {"east.test"}
    clock.now += 61
    first = asyncio.create_task(resolver.look_up("east.test"))
    await asyncio.sleep(0.01)
    assert not first.done(), "the look-up may be about to answer"
    clock.now += 2
    async with asyncio.timeout(1):
        assert addresses(await resolver.look_up("east.test")) == ["192.0.2.1"]
    assert addresses(await first) == ["192.0.2.1"]
    assert names.asked == ["east.test"] * 2
    clock.now += 24 * 3600
    with pytest.raises(LookupTimeout):
        await resolver.look_up("east.test", 0.01)


async def test_stale_addresses_are_used_if_a_look_up_fails_but_not_if_the_name_is_gone(names: Names) -> None:
    """A failed look-up is retried after half a minute; "no such name" is a result, not a failure."""
    clock = Clock()
    resolver = Resolver(clock)
    names.found["east.test"] = ["192.0.2.1"]
    await resolver.look_up("east.test")
    names.found["east.test"] = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    clock.now += 61
    for _ in range(5):
        assert addresses(await resolver.look_up("east.test")) == ["192.0.2.1"]
    assert len(names.asked) == 2
    clock.now += 31
    names.found["east.test"] = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    with pytest.raises(LookupFailed, match=r"the host name 'east\.test' was not found"):
        await resolver.look_up("east.test")
    names.found["east.test"] = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    with pytest.raises(LookupFailed, match=r"'east\.test' could not be looked up: Temporary failure"):
        await resolver.look_up("east.test")


async def test_any_exception_of_a_look_up_reaches_the_caller(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that cannot be encoded, or a system without threads: an error, and the next look-up works."""
    resolver = Resolver()
    names.found["odd.test"] = UnicodeError("label too long")
    with pytest.raises(LookupFailed, match="label too long"):
        await resolver.look_up("odd.test")

    def no_more(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_more)
        with pytest.raises(LookupFailed, match="can't start new thread"):
            await resolver.look_up("east.test")
    assert resolver.threads == 0
    names.found["east.test"] = ["192.0.2.1"]
    assert addresses(await resolver.look_up("east.test")) == ["192.0.2.1"]


async def test_a_cancelled_caller_does_not_cancel_the_look_up_of_others(names: Names) -> None:
    """They share it."""
    resolver = Resolver()
    names.hanging = {"east.test"}
    names.found["east.test"] = ["192.0.2.1"]
    leaves, stays = (asyncio.create_task(resolver.look_up("east.test")) for _ in range(2))
    await asyncio.sleep(0.01)
    leaves.cancel()
    await asyncio.gather(leaves, return_exceptions=True)
    names.over.set()
    assert addresses(await stays) == ["192.0.2.1"]


async def test_the_number_of_remembered_names_is_bounded(names: Names) -> None:
    """The least recently used names are forgotten."""
    resolver = Resolver()
    for number in range(1100):
        names.found[f"{number}.test"] = ["192.0.2.1"]
        await resolver.look_up(f"{number}.test")
    assert len(resolver._names) == 1024


LOOPS = """
import asyncio, socket, sys, threading
from gateway.transport.connection_pool import ConnectionPool
from gateway.errors import UpstreamTimeout
from gateway.dns_resolver import Resolver
from gateway.azure.resources import Resource
real = socket.getaddrinfo
def fake(host, port, *args, **more):
    if str(host).startswith("hangs"):
        threading.Event().wait()
    return real("127.0.0.1", port, *args, **more)
socket.getaddrinfo = fake
async def main():
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    connector = ConnectionPool()
    await connector.start()
    def there(host):
        return connector.destination(Resource(host, f"http://{host}:{port}"))
    stuck = [asyncio.create_task(connector.connect(there(f"hangs-{number}.test"), 0.5)) for number in range(8)]
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        wire = await connector.connect(there("well.test"), 5)
    print("connected", wire.is_connected(), flush=True)
    errors = await asyncio.gather(*stuck, return_exceptions=True)
    print(errors[0].message)
    print(isinstance(errors[0], UpstreamTimeout), errors[0].fault, errors[0].unsent, flush=True)
    await connector.close()
    server.close()
if sys.argv[1] == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_names_that_hang_for_ever_block_neither_others_nor_the_exit(loop: str) -> None:
    """A healthy resource is reached, the error names the host, and the process ends."""
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", LOOPS, loop], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout.splitlines(), done.returncode) == (
        [
            "connected True",
            "the host name 'hangs-0.test' of the Azure resource 'hangs-0.test' could not be looked up within 0.5 s",
            "True dns_timeout True",
        ],
        0,
    ), done.stderr


async def test_all_look_ups_run_in_these_threads(names: Names) -> None:
    """Resources, proxies, issuers, tokens and Redis: none of them uses a shared thread pool."""
    connector = ConnectionPool()
    await connector.start()
    shared = Shared()
    with pytest.raises(UpstreamError) as caught:
        await connector.connect(connector.destination(Resource("east", "https://resource.test")), 5)
    assert caught.value.message == "the host name 'resource.test' of the Azure resource 'east' was not found"
    assert (caught.value.fault, caught.value.unsent) == ("dns", True)
    through = Resource("east", "https://resource.test", proxy=Proxy("proxy.test", 3128))
    with pytest.raises(UpstreamError) as caught:
        await connector.connect(connector.destination(through), 5)
    assert caught.value.message == "the host name 'proxy.test' of the proxy of the Azure resource 'east' was not found"
    with pytest.raises(aiohttp.ClientConnectorDNSError):
        await shared.session().get("https://issuer.test/")
    pytest.importorskip("redis")
    for place in (RedisUrl("redis.test"), RedisUrl("rediss.test", tls=True)):
        with pytest.raises(Exception, match="was not found"):
            await RedisScript(place).run(1)
    assert names.threads == [f"look-up of {name}" for name in names.asked]
    assert set(names.asked) == {"resource.test", "proxy.test", "issuer.test", "redis.test", "rediss.test"}
    await connector.close()
    await shared.close()


async def test_a_proxy_whose_name_hangs_is_named(names: Names) -> None:
    """Its look-up is a part of the connect timeout."""
    names.hanging = {"proxy.test"}
    connector = ConnectionPool()
    await connector.start()
    through = Resource("east", "https://resource.test", proxy=Proxy("proxy.test", 3128))
    with pytest.raises(UpstreamTimeout) as caught:
        await connector.connect(connector.destination(through), 0.05)
    assert caught.value.message == (
        "the host name 'proxy.test' of the proxy of the Azure resource 'east' could not be looked up within 0.05 s"
    )
    await connector.close()


def test_no_other_module_looks_up_names() -> None:
    """Only this module and the listener call `getaddrinfo`; none calls it through the loop."""
    from pathlib import Path

    places = {
        path.name
        for path in Path(module.__file__).parent.rglob("*.py")
        if "getaddrinfo(" in path.read_text(encoding="utf-8")
    }
    assert places == {"dns_resolver.py", "listener.py"}
