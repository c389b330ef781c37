"""A client's body: streamed to Azure as it comes, or kept once somebody has asked for it.

Its beginning may be looked at before the rest is there, and places in what was looked at be written anew:
a form's `model` is found and changed so, while a file behind it streams through.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from gateway.body.spooled_file import ByteAccount as Kept
from gateway.body.spooled_file import SpooledFile
from gateway.errors import ApiError, BodyConsumed
from gateway.fair_scheduler import FairScheduler
from gateway.limits.memory_budget import UNCOUNTED
from gateway.settings import Limits

__all__ = (
    "Body",
    "BodySource",
    "Watcher",
)

_MOST_LOOKED_AT = Limits().form
# A body of up to this many bytes is counted before it comes. A longer one is counted as it comes: else a few clients
# could announce so much, and send nothing, that there is no room for anybody.
_ANNOUNCED = 1024 * 1024
# What a watcher is given in one turn of the loop, in bytes: more than one read, so that only kept bodies are cut.
_SHOWN = 512 * 1024


class BodySource(Protocol):
    """Where a body comes from: the server's connection to the client."""

    length: int | None

    async def read(self) -> bytes | None:
        """Return the next bytes, never b"", or None at the end: an empty read of a socket says nothing about it.

        Raises ApiError if the client is too slow, or sends too much.
        """

    async def rest(self, limit: int | None) -> bytes:
        """Return all that is still to come; raises as `read` does, and ApiError 413 above `limit` bytes."""


Watcher = Callable[[bytes | None], bool]
"""Takes a body in pieces, and None at its end; returns whether it has seen enough."""


class Account(Kept, Protocol):
    """Who answers for a body: its exchange."""

    async def before_reading(self) -> None:
        """Ask whether it may be read, before its first byte is. Raises ApiError."""


class _Replay:
    """What was looked at, with its changes, and then the rest: a body's source again."""

    def __init__(self, spool: SpooledFile, source: BodySource, watch: Watcher) -> None:
        self.length = source.length
        self.ended = False
        self._spool = spool
        self._source = source
        self._watch = watch
        self._place = 0
        self._edit = (0, 0, b"")
        self._edited = False

    async def look(self, most: int, advice: str) -> None:
        """Keep what comes until the watcher has seen enough, at most `most` bytes; see `Body.look`."""
        while not self.ended:
            piece = await self._source.read()
            if piece is None:
                self.ended = True
                self._watch(None)
                return
            await self._spool.write(piece)
            if await _show(piece, self._watch):
                return
            if self._spool.size > most:
                raise ApiError(
                    413,
                    f"what is looked for in this form did not come within its first {most} bytes; {advice}",
                    code="body_too_large",
                )

    async def again(self, watch: Watcher) -> bool:
        """Give what was looked at to another watcher; whether it has seen enough."""
        first = self._watch
        self._watch = lambda data: (first(data), watch(data))[1]
        place, enough = 0, False
        while place < self._spool.size:
            piece = await self._spool.read(place, self._spool.size)
            place += len(piece)
            enough = await _show(piece, watch)
        if self.ended:
            watch(None)
        return enough or self.ended

    def edit(self, start: int, end: int, new: bytes) -> None:
        """Send `new` in place of the bytes from `start` to `end`, which were looked at, and nothing else otherwise."""
        self._edit = (start, end, new)
        if self._source.length is not None:
            self.length = self._source.length + len(new) - (end - start)

    async def read(self) -> bytes | None:
        """Return the next bytes, or None at the end. Raises OSError if what was kept is gone."""
        while self._place < self._spool.size:
            start, end, new = self._edit
            if self._place == start < max(end, start + len(new)) and not self._edited:
                self._place, self._edited = end, True
                if new:
                    return new
                continue
            piece = await self._spool.read(self._place, start if self._place < start else self._spool.size)
            self._place += len(piece)
            return piece
        self._spool.close()
        if self.ended:
            return None
        more = await self._source.read()
        if more is None:
            self.ended = True
        else:
            await _show(more, self._watch)
        return more

    async def rest(self, limit: int | None) -> bytes:
        """Return all that is still to come, at most `limit` bytes."""
        parts: list[bytes] = []
        size = 0
        while (piece := await self.read()) is not None:
            parts.append(piece)
            size += len(piece)
            if limit is not None and size > limit:
                raise too_much(limit)
        return b"".join(parts)


class Body:
    """A client's body: a stream until somebody asks for its bytes. Copies of a request share it."""

    __slots__ = ("_data", "_kept", "_most", "_source", "_spool", "_streamed", "account")

    def __init__(self, source: BodySource | bytes, *, kept: bool = True, most: int = _MOST_LOOKED_AT) -> None:
        """Take a body from where it comes, or its bytes: `kept`, or here by chance and to be had once.

        `most` is how many bytes may be looked at before they are sent.
        """
        self._most = most
        self._data = source if isinstance(source, bytes) else None
        self._source = None if isinstance(source, bytes) else source
        self._kept = kept
        self._streamed = False
        self._spool: SpooledFile | None = None
        self.account: Account | None = None
        """Who answers for what is kept of it, if it has not arrived."""

    def is_arriving(self) -> bool:
        """Whether it is still to be read."""
        return self._source is not None

    @property
    def length(self) -> int | None:
        """The number of bytes, where it is known before they are read."""
        if self._data is not None:
            return len(self._data)
        return self._source.length if self._source is not None else None

    def at_hand(self) -> bytes | None:
        """Return the bytes, if they are here: again and again if they are kept, else once."""
        data = self._data
        if not self._kept and data is not None:
            self._data, self._streamed = None, True
        return data

    def keep(self) -> bytes | None:
        """Return the bytes, if they are here, and keep them; `read` without the wait."""
        if self._data is not None:
            self._kept = True
        return self._data

    async def read(self, limit: int | None = None) -> bytes:
        """Read it whole and keep it.

        Raises ApiError 413 above `limit` bytes, BodyConsumed where it was streamed away already.
        """
        if self._data is None:
            if self._streamed or self._source is None:
                raise BodyConsumed(BodyConsumed.__doc__)
            if self.account is not None:
                await self.account.before_reading()
                if (length := self._source.length) is not None and length > UNCOUNTED:
                    if limit is not None and length > limit:
                        raise too_much(limit)
                    self.account.reserve_memory(length)
                    if length > _ANNOUNCED:
                        self.account.release_memory(length)  # there is room for it: it is counted as it comes
            self._streamed = True
            if isinstance(self._source, _Replay):
                self._source.edit(0, 0, b"")
            self._data = await self._rest(self._source, limit)
            self._source = None
        if limit is not None and len(self._data) > limit:
            raise too_much(limit)
        self._kept = True
        return self._data

    async def _rest(self, source: BodySource, limit: int | None) -> bytes:
        """Read all that is still to come; each piece of a large body, or of one of unknown length, is counted first."""
        account = self.account
        if account is None or (source.length is not None and source.length <= _ANNOUNCED):
            return await source.rest(limit)
        whole = io.BytesIO()  # unlike a list of pieces, it needs no copy at the end: 0.1 s and as much memory for 96 MB
        size = held = 0
        while (piece := await source.read()) is not None:
            size += len(piece)
            if limit is not None and size > limit:
                raise too_much(limit)
            if size > UNCOUNTED:
                account.reserve_memory(size - held)
                held = size
            whole.write(piece)
        return whole.getvalue()

    async def look(self, watch: Watcher, advice: str) -> None:
        """Give the body to `watch`, in pieces and None at the end, until it returns True; all of it stays to be sent.

        What is looked at is kept in memory, or on disk where it is long, and may be looked at again. `watch` is given
        the rest as well, when that is sent. Raises ApiError: 413 with the advice where the bytes that may be looked at
        were not enough, 503 where they cannot be kept now, and what `watch` raises; BodyConsumed where it is gone.
        """
        if self._data is not None:
            self._kept = True
            await _show(self._data, watch)
            watch(None)
            return
        if self._streamed or self._source is None:
            raise BodyConsumed(BodyConsumed.__doc__)
        if self.account is not None:
            await self.account.before_reading()
        if isinstance(self._source, _Replay):
            replay = self._source
            if await replay.again(watch):
                return
        else:
            self._spool = SpooledFile(account=self.account)
            self._source = replay = _Replay(self._spool, self._source, watch)
        try:
            await replay.look(self._most, advice)
        except OSError as exc:
            raise ApiError(
                503, f"the gateway cannot keep this form on disk: {exc.strerror}", code="out_of_space"
            ) from None

    def edited(self, start: int, end: int, new: bytes) -> bytes | Body:
        """Return the body with `new` in place of the bytes from `start` to `end`, which must have been looked at.

        Where it is kept, it stays as it is, so that it can be sent again with something else there.
        """
        if self._data is not None:
            return self._data[:start] + new + self._data[end:]
        if isinstance(self._source, _Replay):
            self._source.edit(start, end, new)
        return self

    def as_it_came(self) -> bytes | Body:
        """Return the bytes if they are at hand, else the body itself, with nothing in it written anew."""
        if isinstance(self._source, _Replay):
            self._source.edit(0, 0, b"")
        at_hand = self.at_hand()
        return self if at_hand is None else at_hand

    def looked_at(self) -> SpooledFile | bytes:
        """Return all that was looked at."""
        if self._data is not None:
            return self._data
        assert self._spool is not None, "nothing was looked at"  # noqa: S101 -- a bug of ours
        return self._spool

    def close(self) -> None:
        """Let go of what is kept on disk."""
        if self._spool is not None:
            self._spool.close()
            self._spool = None

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield it as it comes, once; BodyConsumed the second time, unless it was read before."""
        if (data := self.at_hand()) is not None:
            if data:
                yield data
            return
        if self._streamed or self._source is None:
            raise BodyConsumed(BodyConsumed.__doc__)
        if self.account is not None:
            await self.account.before_reading()
        self._streamed = True
        while (chunk := await self._source.read()) is not None:
            yield chunk


async def _show(data: bytes, watch: Watcher) -> bool:
    """Give bytes to a watcher, a bounded piece in each turn of the loop; whether it has seen enough."""
    if len(data) <= _SHOWN:
        return watch(data)
    enough = False
    for place in range(0, len(data), _SHOWN):
        if place:
            await FairScheduler.of(asyncio.get_running_loop()).turn()
        enough = watch(data[place : place + _SHOWN])
    return enough


def too_much(limit: int) -> ApiError:
    """Return the error for a body above what a stage may keep."""
    return ApiError(413, f"the body is larger than the {limit} bytes that may be kept", code="body_too_large")
