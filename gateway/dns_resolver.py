"""DNS resolver: host names and their addresses, looked up in threads that belong to it.

`getaddrinfo` blocks and cannot be cancelled, and the usual thread pools for it are small: four threads in uvloop, the
event loop's own pool in asyncio. Two names whose look-up hangs would keep every other name waiting there. Here:

- All requests for a name at the same time share one look-up. If it hangs, a second one begins after `_STUCK` seconds;
  a name never has more than `_MAX_THREADS_PER_NAME` threads, and all names together never more than `_MAX_THREADS`.
- A caller waits for a limited time. The threads are daemons: one that hangs does not keep the process from ending.
- Addresses are fresh for `_FRESH` seconds. After that a caller waits for a new look-up; but if it fails, or takes
  longer than `_STALE_AFTER` seconds, the last addresses are used, up to `_STALE` seconds old (serving stale data, with
  the timers of RFC 8767). "The name does not exist" is a result, not a failure: its addresses are dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import aiohappyeyeballs
from aiohttp.abc import AbstractResolver, ResolveResult

__all__ = ("AddressInfo", "LookupFailed", "LookupTimeout", "Resolver", "connected_socket")

AddressInfo: TypeAlias = tuple[int, int, int, str, Any]
"""As `socket.getaddrinfo` returns it: family, type, protocol, canonical name, socket address."""

# In seconds: addresses are fresh (getaddrinfo does not return the TTL); stale ones are used if no look-up succeeds.
_FRESH, _STALE = 60.0, 24 * 3600.0
# In seconds: wait for a look-up before stale addresses are used; pause after a failed look-up.
_STALE_AFTER, _RETRY_AFTER = 1.8, 30.0
# A look-up that takes longer, in seconds, may never return: the C library has its own timeout of some 30 s.
_STUCK = 35.0
_MAX_THREADS_PER_NAME = 2
_MAX_THREADS = 32
# Maximum number of names to remember.
_MAX_NAMES = 1024
# Default timeout of a look-up, in seconds.
_DEFAULT_TIMEOUT = 10.0
# Connection attempt delay: try the next address after so long, in seconds (RFC 8305, 8).
_ATTEMPT_DELAY = 0.25

# Results of the DNS, not failures of it: the name does not exist, or has no address.
_NO_SUCH_NAME = frozenset(
    number
    for name in ("EAI_NONAME", "EAI_NODATA", "EAI_ADDRFAMILY")
    if (number := getattr(socket, name, None)) is not None
)


class LookupFailed(OSError):
    """A host name has no address, or its look-up failed."""

    def __init__(self, host: str, reason: str) -> None:
        super().__init__(f"the host name {host!r} {reason}")
        self.host = host
        self.reason = reason

    def of(self, owner: str) -> str:
        """Return the error message, with the owner of the host name."""
        return f"the host name {self.host!r} of {owner} {self.reason}"


class LookupTimeout(LookupFailed):
    """The look-up of a host name took too long."""


class _Name:
    """A host name: its addresses, and its look-ups."""

    __slots__ = ("addresses", "failure", "fresh_until", "look_up", "newest", "running", "stale_until", "started")

    def __init__(self) -> None:
        self.addresses: list[AddressInfo] = []
        self.fresh_until = self.stale_until = 0.0
        self.failure: LookupFailed | None = None
        # The look-up in progress: a future that all its callers share, and its start.
        self.look_up: asyncio.Future[None] | None = None
        self.started = 0.0
        self.running: list[int] = []  # the numbers of the look-ups that hold a thread
        self.newest = 0  # the number of the look-up that returned the addresses


class Resolver(AbstractResolver):
    """Looks up host names, for one event loop. It is aiohttp's resolver as well."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._names: OrderedDict[str, _Name] = OrderedDict()  # the last one used is at the end
        self._threads = 0
        self._last_number = 0
        self._queue: deque[tuple[str, _Name]] = deque()  # look-ups that wait for a thread

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> Resolver:
        """Return the resolver of a loop: there is one for each, so that its limits are those of the process."""
        found = _resolvers.get(loop)
        if found is None:
            found = _resolvers[loop] = cls()
        return found

    @property
    def threads(self) -> int:
        """Number of look-ups in threads."""
        return self._threads

    async def look_up(self, host: str, within: float = _DEFAULT_TIMEOUT) -> list[AddressInfo]:
        """Return the addresses of a host, with port 0, within `within` seconds. Raises LookupFailed."""
        with contextlib.suppress(ValueError):
            return [_numeric(host)]
        name = self._name(host)
        now = self._clock()
        if name.addresses and now < name.fresh_until:
            return name.addresses
        look_up = self._begin(host, name, now)
        timeout = within
        if name.addresses and now < name.stale_until:
            timeout = min(within, max(0.0, name.started + _STALE_AFTER - now))
        await asyncio.wait((look_up,), timeout=timeout)
        if name.addresses and self._clock() < name.stale_until:
            return name.addresses
        if look_up.done() and name.failure is not None:
            raise name.failure
        raise LookupTimeout(host, f"could not be looked up within {within:g} s")

    async def look_up_rotated(self, host: str, within: float = _DEFAULT_TIMEOUT) -> list[AddressInfo]:
        """Return the result of `look_up`, rotated with each call, so that connections use all addresses."""
        found = await self.look_up(host, within)
        name = self._names.get(host.lower())
        if name is not None and name.addresses is found:
            name.addresses = [*found[1:], found[0]]
        return found

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the addresses of a host in aiohttp's form. Raises LookupFailed, which is an OSError."""
        found = [each for each in await self.look_up_rotated(host) if family in (socket.AF_UNSPEC, each[0])]
        if not found:
            raise LookupFailed(host, "has no address of the wanted family")
        return [_for_aiohttp(each, host, port) for each in found]

    async def close(self) -> None:
        """Do nothing: the resolver belongs to its loop, not to the connector that calls this."""

    # -- inside ----------------------------------------------------------------------------------------

    def _name(self, host: str) -> _Name:
        host = host.lower()
        name = self._names.get(host)
        if name is None:
            while len(self._names) >= _MAX_NAMES:
                idle = next((key for key, each in self._names.items() if each.look_up is None), None)
                if idle is None:
                    break
                del self._names[idle]
            name = self._names[host] = _Name()
        else:
            self._names.move_to_end(host)
        return name

    def _begin(self, host: str, name: _Name, now: float) -> asyncio.Future[None]:
        """Return the look-up of a name in progress; begin one if there is none, or if it hangs."""
        if name.look_up is not None and now < name.started + _STUCK:
            return name.look_up
        if name.look_up is None:
            name.look_up = asyncio.get_running_loop().create_future()
        if len(name.running) < _MAX_THREADS_PER_NAME and (host, name) not in self._queue:
            name.started = now
            self._queue.append((host, name))
            self._start_threads()
        return name.look_up

    def _start_threads(self) -> None:
        while self._queue and self._threads < _MAX_THREADS:
            host, name = self._queue.popleft()
            self._last_number += 1
            self._threads += 1
            name.running.append(self._last_number)
            loop = asyncio.get_running_loop()
            thread = threading.Thread(
                target=self._run, args=(loop, host, name, self._last_number), name=f"look-up of {host}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as exc:  # the system has no more threads
                loop.call_soon(self._done, host, name, self._last_number, exc)

    def _run(self, loop: asyncio.AbstractEventLoop, host: str, name: _Name, number: int) -> None:
        """Look up a name. This runs in a thread."""
        found: list[AddressInfo] | Exception
        try:
            found = list(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG))
        except Exception as exc:  # any exception goes to the callers
            found = exc
        with contextlib.suppress(RuntimeError):  # the loop is closed: no caller waits any more
            loop.call_soon_threadsafe(self._done, host, name, number, found)

    def _done(self, host: str, name: _Name, number: int, found: list[AddressInfo] | Exception) -> None:
        """Take the result of a look-up, on the loop again."""
        self._threads -= 1
        name.running.remove(number)
        if number > name.newest:  # else a later one was faster
            now = self._clock()
            name.newest = number
            if isinstance(found, list) and found:
                name.addresses, name.failure = found, None
                name.fresh_until, name.stale_until = now + _FRESH, now + _STALE
            else:
                name.fresh_until = now + _RETRY_AFTER
                name.failure = _failure(host, found)
                if not isinstance(found, Exception) or getattr(found, "errno", None) in _NO_SUCH_NAME:
                    name.addresses = []
            look_up, name.look_up = name.look_up, None
            if look_up is not None and not look_up.done():
                look_up.set_result(None)
        self._start_threads()


_resolvers: WeakKeyDictionary[asyncio.AbstractEventLoop, Resolver] = WeakKeyDictionary()


async def connected_socket(host: str, port: int, within: float = _DEFAULT_TIMEOUT) -> socket.socket:
    """Return a TCP socket that is connected to a host; `within` is the timeout of the look-up, in seconds.

    Raises LookupFailed, and OSError if the connection fails.
    """
    found = await Resolver.of(asyncio.get_running_loop()).look_up_rotated(host, within)
    addresses = [(*each[:4], (each[4][0], port, *each[4][2:])) for each in found]
    try:
        sock = await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=_ATTEMPT_DELAY, interleave=1)
    except RuntimeError as exc:  # uvloop raises that, too
        raise OSError(str(exc)) from None
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _numeric(host: str) -> AddressInfo:
    """Return the address that a text is. Raises ValueError if it is a name."""
    address = ipaddress.ip_address(host)
    if address.version == 4:
        return (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, 0))
    # (The C library converts the scope of an IPv6 address to a number; it looks up no name.)
    flags = socket.AI_NUMERICHOST
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=flags)[0]


def _failure(host: str, found: list[AddressInfo] | Exception) -> LookupFailed:
    if not isinstance(found, Exception) or getattr(found, "errno", None) in _NO_SUCH_NAME:
        return LookupFailed(host, "was not found")
    return LookupFailed(host, f"could not be looked up: {getattr(found, 'strerror', None) or found}")


def _for_aiohttp(info: AddressInfo, host: str, port: int) -> ResolveResult:
    numeric = info[4][0]
    if info[0] == socket.AF_INET6 and len(info[4]) > 3 and info[4][3] and "%" not in numeric:
        numeric = f"{numeric}%{info[4][3]}"
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    return ResolveResult(hostname=host, host=numeric, port=port, family=info[0], proto=info[2], flags=flags)
