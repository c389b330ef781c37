"""What gateways on several machines tell each other of deployments, through the Redis of `store:`.

One hash holds the last news of each deployment, with times on the server's own clock. Each process writes what changes
with it at once, and reads what others have written each second. No request waits for it: where Redis is away,
each process knows what it has seen itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os

from gateway.balancing.circuit_breaker import Health, HealthEvent
from gateway.limits.redis_script import RedisScript
from gateway.limits.redis_url import RedisUrl
from gateway.limits.stall_tolerant_timer import stall_tolerant_timeout
from gateway.logs import get_logger, redacted

__all__ = ("SharedHealth",)

# How often, in seconds, it is read; and how long a call may take, a new connection included.
_EVERY, _PATIENCE = 1.0, 3.0
# How much is told in one call.
_MOST = 1000

# Keys: the hash. Arguments: who tells, and for each piece of news the deployment, for how many milliseconds it rests,
# and what else there is. Returned are the time and all fields; what was over a minute ago is taken out.
_SCRIPT = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
for place = 2, #ARGV, 3 do
    local head = string.format('%.0f %.0f ', now, now + tonumber(ARGV[place + 1]))
    redis.call('HSET', KEYS[1], ARGV[place], head .. ARGV[1] .. ' ' .. ARGV[place + 2])
end
if #ARGV > 1 then
    redis.call('EXPIRE', KEYS[1], 7200)
end
local told = redis.call('HGETALL', KEYS[1])
for place = 2, #told, 2 do
    local over = tonumber(string.match(told[place], '^%d+ (%d+) ') or '0')
    if over < now - 60000 then
        redis.call('HDEL', KEYS[1], told[place - 1])
    end
end
return {string.format('%.0f', now), told}
"""


class SharedHealth:
    """One process's side of it."""

    def __init__(self, place: RedisUrl, health: Health) -> None:
        self._place = place
        self._health = health
        self._script = RedisScript(place, _SCRIPT)
        self._key = f"{place.keys}health".encode()
        self._me = os.urandom(8).hex()
        self._unsaid: dict[str, tuple[float, HealthEvent]] = {}
        self._heard: dict[bytes, bytes] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._away = False

    @property
    def fetched(self) -> tuple[()]:
        """The names under which it keeps something: none."""
        return ()

    def start(self) -> None:
        """Begin to tell and to hear."""
        self._health.told.append(self._note)
        self._task = asyncio.create_task(self._work(), name="news of deployments")

    async def stop(self) -> None:
        """Tell and hear nothing more."""
        if self._note in self._health.told:
            self._health.told.remove(self._note)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        await self._script.disconnect()

    def _note(self, news: HealthEvent) -> None:
        self._unsaid[news.key] = asyncio.get_running_loop().time(), news
        self._changed.set()

    async def _work(self) -> None:
        while True:
            try:
                async with stall_tolerant_timeout(_PATIENCE):
                    await self._once()
            except Exception as exc:  # whatever a library finds to raise: nobody waits for it
                if not self._away:
                    self._away = True
                    reason = redacted({"reason": f"{type(exc).__name__}: {exc}"}, [self._place.password or ""])
                    get_logger().warning("news of deployments cannot be shared", store=str(self._place), **reason)
                await self._script.disconnect()
                self._script.use_next_node()
                await asyncio.sleep(_EVERY)
                continue
            if self._away:
                self._away = False
                get_logger().info("news of deployments are shared again", store=str(self._place))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EVERY):
                    await self._changed.wait()

    async def _once(self) -> None:
        """Tell what is new here, and take what is new there."""
        self._changed.clear()
        now = asyncio.get_running_loop().time()
        said = list(self._unsaid.items())[:_MOST]
        arguments: list[str | int] = [self._me]
        for key, (since, news) in said:
            left = max(0.0, news.seconds - (now - since))
            arguments += [key, round(left * 1000), f"{int(news.failing)} {news.reason}"]
        reply = await self._script.run(1, self._key, *arguments)
        for key, known in said:
            if self._unsaid.get(key) is known:
                del self._unsaid[key]
        server_now, fields = float(reply[0]), reply[1]
        heard = dict(zip(fields[::2], fields[1::2], strict=True))
        for name, value in heard.items():
            if self._heard.get(name) != value:
                self._hear(server_now, name, value)
        self._heard = heard

    def _hear(self, now: float, name: bytes, value: bytes) -> None:
        """Take one field; what is none of ours, or has come from here, is nothing."""
        parts = value.decode("utf-8", "replace").split(" ", 4)
        if len(parts) != 5 or parts[2] == self._me or not (parts[0].isdecimal() and parts[1].isdecimal()):
            return
        told, until = float(parts[0]), float(parts[1])
        key = name.decode("utf-8", "replace")
        if until <= told:  # it is back
            self._health.hear(HealthEvent(key))
        elif until > now:
            # (Not longer than it was told for, whatever the server's clock has done since.)
            self._health.hear(HealthEvent(key, min(until - now, until - told) / 1000, parts[3] == "1", parts[4]))
