"""Health of deployments that several gateways share, through the Redis of `store:`.

One Redis hash has the latest event of each deployment, with times on the server's clock. Each process writes its own
changes at once and reads the others' every second. No request waits for Redis: while it is unavailable, each process
uses its own observations.
"""

from __future__ import annotations

import asyncio
import contextlib
import os

from gateway.balancing.circuit_breaker import HealthEvent
from gateway.balancing.health import Health
from gateway.limits.redis_script import RedisScript
from gateway.limits.redis_url import RedisUrl
from gateway.limits.stall_tolerant_timer import stall_tolerant_timeout
from gateway.logs import get_logger, redacted

__all__ = ("SharedHealth",)

_READ_INTERVAL = 1.0  # in seconds
_TIMEOUT = 3.0  # of a call, a new connection included, in seconds
_MAX_EVENTS = 1000  # in one call

# KEYS: the hash. ARGV: the id of the writing process, then three arguments for each event: the deployment's key, for
# how many milliseconds it is unavailable, and the rest of the event. Returns the time and all fields. Deletes events
# that ended more than a minute ago.
_SCRIPT = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
for index = 2, #ARGV, 3 do
    local head = string.format('%.0f %.0f ', now, now + tonumber(ARGV[index + 1]))
    redis.call('HSET', KEYS[1], ARGV[index], head .. ARGV[1] .. ' ' .. ARGV[index + 2])
end
if #ARGV > 1 then
    redis.call('EXPIRE', KEYS[1], 7200)
end
local events = redis.call('HGETALL', KEYS[1])
for index = 2, #events, 2 do
    local until_ms = tonumber(string.match(events[index], '^%d+ (%d+) ') or '0')
    if until_ms < now - 60000 then
        redis.call('HDEL', KEYS[1], events[index - 1])
    end
end
return {string.format('%.0f', now), events}
"""


class SharedHealth:
    """The publisher and subscriber of one process."""

    def __init__(self, url: RedisUrl, health: Health) -> None:
        self._url = url
        self._health = health
        self._script = RedisScript(url, _SCRIPT)
        self._key = f"{url.keys}health".encode()
        self._process_id = os.urandom(8).hex()
        self._pending: dict[str, tuple[float, HealthEvent]] = {}  # events to write, and their times
        self._seen: dict[bytes, bytes] = {}  # the hash, as it was read last
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._unavailable = False

    @property
    def fetched(self) -> tuple[()]:
        """The names under which it keeps something: none."""
        return ()

    def start(self) -> None:
        """Start to publish and to subscribe."""
        self._health.listeners.append(self._publish)
        self._task = asyncio.create_task(self._run(), name="shared health")

    async def stop(self) -> None:
        """Stop to publish and to subscribe."""
        if self._publish in self._health.listeners:
            self._health.listeners.remove(self._publish)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        await self._script.disconnect()

    def _publish(self, event: HealthEvent) -> None:
        self._pending[event.key] = asyncio.get_running_loop().time(), event
        self._changed.set()

    async def _run(self) -> None:
        while True:
            try:
                async with stall_tolerant_timeout(_TIMEOUT):
                    await self._synchronize()
            except Exception as exc:  # any exception of the Redis client
                if not self._unavailable:
                    self._unavailable = True
                    reason = redacted({"reason": f"{type(exc).__name__}: {exc}"}, [self._url.password or ""])
                    get_logger().warning("health_sharing_failed", store=str(self._url), **reason)
                await self._script.disconnect()
                self._script.use_next_node()
                await asyncio.sleep(_READ_INTERVAL)
                continue
            if self._unavailable:
                self._unavailable = False
                get_logger().info("health_sharing_restored", store=str(self._url))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_READ_INTERVAL):
                    await self._changed.wait()

    async def _synchronize(self) -> None:
        """Write pending events, and apply the ones that are new in Redis."""
        self._changed.clear()
        now = asyncio.get_running_loop().time()
        written = list(self._pending.items())[:_MAX_EVENTS]
        arguments: list[str | int] = [self._process_id]
        for key, (since, event) in written:
            left = max(0.0, event.seconds - (now - since))
            arguments += [key, round(left * 1000), f"{int(event.failing)} {event.reason}"]
        reply = await self._script.run(1, self._key, *arguments)
        for key, pending in written:
            if self._pending.get(key) is pending:
                del self._pending[key]
        server_now, fields = float(reply[0]), reply[1]
        seen = dict(zip(fields[::2], fields[1::2], strict=True))
        for name, value in seen.items():
            if self._seen.get(name) != value:
                self._apply(server_now, name, value)
        self._seen = seen

    def _apply(self, now: float, name: bytes, value: bytes) -> None:
        """Apply one field of the hash; ignore fields of this process, and of other programs."""
        parts = value.decode("utf-8", "replace").split(" ", 4)
        if len(parts) != 5 or parts[2] == self._process_id or not (parts[0].isdecimal() and parts[1].isdecimal()):
            return
        written_at, until = float(parts[0]), float(parts[1])
        key = name.decode("utf-8", "replace")
        if until <= written_at:  # it is available again
            self._health.apply(HealthEvent(key))
        elif until > now:
            # (Not longer than when it was written, even if the server's clock was set back.)
            seconds = min(until - now, until - written_at) / 1000
            self._health.apply(HealthEvent(key, seconds, parts[3] == "1", parts[4]))
