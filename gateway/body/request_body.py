"""A request body: streamed to Azure while it arrives, or kept once a reader has asked for all of it.

Its beginning can be scanned before the rest arrives, and a range of the scanned bytes can be replaced. So the gateway
finds and changes the `model` of a form, and streams the file after it.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from gateway.body.spooled_file import ByteAccount, SpooledFile
from gateway.errors import ApiError, BodyConsumed
from gateway.fair_scheduler import FairScheduler
from gateway.limits.memory_budget import UNCOUNTED
from gateway.settings import Limits

__all__ = (
    "Body",
    "BodyScanner",
    "BodySource",
    "body_too_large",
)

_DEFAULT_SCAN_LIMIT = Limits().form
# A body of up to this many bytes is counted against the memory budget before it arrives. A larger one is counted while
# it arrives: otherwise a few clients could announce large bodies, send nothing, and use up the budget.
_MAX_COUNTED_AHEAD = 1024 * 1024
# Maximum number of bytes to scan in one turn of the loop: more than one read, so that only kept bodies are split.
_MAX_SCANNED_PER_TURN = 512 * 1024


class BodySource(Protocol):
    """The source of a body: the connection of the client."""

    length: int | None

    async def read(self) -> bytes | None:
        """Return the next bytes, never b"", or None at the end.

        Raises ApiError if the client is too slow, or sends too much.
        """

    async def rest(self, limit: int | None) -> bytes:
        """Return the rest of the body. Raises as `read` does, and ApiError 413 above `limit` bytes."""


BodyScanner = Callable[[bytes | None], bool]
"""Takes a body in pieces, and None at its end; returns whether it has seen enough."""


class BodyAccount(ByteAccount, Protocol):
    """Counts the bytes of a body against a budget, and permits reading it: its exchange."""

    async def before_reading(self) -> None:
        """Ask for permission before the first byte is read. Raises ApiError."""


class _Replay:
    """A source that repeats the scanned bytes, with one range replaced, and continues with the rest."""

    def __init__(self, spool: SpooledFile, source: BodySource, scanner: BodyScanner) -> None:
        self.length = source.length
        self.ended = False
        self._spool = spool
        self._source = source
        self._scanner = scanner
        self._offset = 0
        self._replacement = (0, 0, b"")
        self._replaced = False

    async def scan(self, limit: int, advice: str) -> None:
        """Keep incoming bytes until the scanner has seen enough, at most `limit` bytes; see `Body.scan`."""
        while not self.ended:
            piece = await self._source.read()
            if piece is None:
                self.ended = True
                self._scanner(None)
                return
            await self._spool.write(piece)
            if await _scan_piece(piece, self._scanner):
                return
            if self._spool.size > limit:
                raise ApiError(
                    413,
                    f"the first {limit} bytes of this form do not contain a field that the gateway needs; {advice}",
                    code="body_too_large",
                )

    async def scan_again(self, scanner: BodyScanner) -> bool:
        """Add a scanner, and give it the bytes scanned so far; returns whether it has seen enough."""
        first = self._scanner
        self._scanner = lambda data: (first(data), scanner(data))[1]
        offset, enough = 0, False
        while offset < self._spool.size:
            piece = await self._spool.read(offset, self._spool.size)
            offset += len(piece)
            enough = await _scan_piece(piece, scanner)
        if self.ended:
            scanner(None)
        return enough or self.ended

    def replace(self, start: int, end: int, new: bytes) -> None:
        """Send `new` instead of the scanned bytes from `start` to `end`. Discards an earlier replacement."""
        self._replacement = (start, end, new)
        if self._source.length is not None:
            self.length = self._source.length + len(new) - (end - start)

    async def read(self) -> bytes | None:
        """Return the next bytes, or None at the end. Raises OSError if the spool is closed."""
        while self._offset < self._spool.size:
            start, end, new = self._replacement
            if self._offset == start < max(end, start + len(new)) and not self._replaced:
                self._offset, self._replaced = end, True
                if new:
                    return new
                continue
            piece = await self._spool.read(self._offset, start if self._offset < start else self._spool.size)
            self._offset += len(piece)
            return piece
        self._spool.close()
        if self.ended:
            return None
        more = await self._source.read()
        if more is None:
            self.ended = True
        else:
            await _scan_piece(more, self._scanner)
        return more

    async def rest(self, limit: int | None) -> bytes:
        """Return the rest of the body, at most `limit` bytes."""
        parts: list[bytes] = []
        size = 0
        while (piece := await self.read()) is not None:
            parts.append(piece)
            size += len(piece)
            if limit is not None and size > limit:
                raise body_too_large(limit)
        return b"".join(parts)


class Body:
    """A request body: a stream until a reader asks for all its bytes. Copies of a request share it."""

    __slots__ = ("_data", "_kept", "_scan_limit", "_source", "_spool", "_streamed", "account")

    def __init__(self, source: BodySource | bytes, *, kept: bool = True, scan_limit: int = _DEFAULT_SCAN_LIMIT) -> None:
        """Take the source of a body, or its bytes.

        Without `kept`, bytes are a stream that has arrived already: readable once. `scan_limit` is the maximum number
        of bytes to scan before they are sent.
        """
        self._scan_limit = scan_limit
        self._data = source if isinstance(source, bytes) else None
        self._source = None if isinstance(source, bytes) else source
        self._kept = kept
        self._streamed = False
        self._spool: SpooledFile | None = None
        self.account: BodyAccount | None = None
        """Counts the kept bytes, if the body has not arrived yet."""

    def is_arriving(self) -> bool:
        """Whether a reader has to wait for the client."""
        return self._source is not None

    @property
    def length(self) -> int | None:
        """The number of bytes, if it is known before they are read."""
        if self._data is not None:
            return len(self._data)
        return self._source.length if self._source is not None else None

    def take_buffered(self) -> bytes | None:
        """Return the bytes if they have arrived: every time if they are kept, otherwise once."""
        data = self._data
        if not self._kept and data is not None:
            self._data, self._streamed = None, True
        return data

    def keep(self) -> bytes | None:
        """Return the bytes if they have arrived, and keep them; `read` without the wait."""
        if self._data is not None:
            self._kept = True
        return self._data

    async def read(self, limit: int | None = None) -> bytes:
        """Read the whole body and keep it.

        Raises ApiError 413 above `limit` bytes, and BodyConsumed if the body was streamed already.
        """
        if self._data is None:
            if self._streamed or self._source is None:
                raise BodyConsumed(BodyConsumed.__doc__)
            if self.account is not None:
                await self.account.before_reading()
                if (length := self._source.length) is not None and length > UNCOUNTED:
                    if limit is not None and length > limit:
                        raise body_too_large(limit)
                    self.account.reserve_memory(length)
                    if length > _MAX_COUNTED_AHEAD:
                        self.account.release_memory(length)  # the budget suffices: it is counted while it arrives
            self._streamed = True
            if isinstance(self._source, _Replay):
                self._source.replace(0, 0, b"")
            self._data = await self._rest(self._source, limit)
            self._source = None
        if limit is not None and len(self._data) > limit:
            raise body_too_large(limit)
        self._kept = True
        return self._data

    async def _rest(self, source: BodySource, limit: int | None) -> bytes:
        """Read the rest; count each piece of a large body, or of one of unknown length, before it is kept."""
        account = self.account
        if account is None or (source.length is not None and source.length <= _MAX_COUNTED_AHEAD):
            return await source.rest(limit)
        whole = io.BytesIO()  # a list of pieces needs a copy at the end: for 96 MB, 0.1 s and as much memory
        size = held = 0
        while (piece := await source.read()) is not None:
            size += len(piece)
            if limit is not None and size > limit:
                raise body_too_large(limit)
            if size > UNCOUNTED:
                account.reserve_memory(size - held)
                held = size
            whole.write(piece)
        return whole.getvalue()

    async def scan(self, scanner: BodyScanner, advice: str) -> None:
        """Give the body to `scanner`, in pieces and None at the end, until it returns True. It can still be sent whole.

        The scanned bytes are kept in memory, or on disk if there are many, and can be scanned again. `scanner` also
        gets the rest when it is sent. Raises ApiError: 413 with `advice` above `scan_limit`, 503 if the disk fails, and
        the errors of `scanner`. Raises BodyConsumed if the body was streamed already.
        """
        if self._data is not None:
            self._kept = True
            await _scan_piece(self._data, scanner)
            scanner(None)
            return
        if self._streamed or self._source is None:
            raise BodyConsumed(BodyConsumed.__doc__)
        if self.account is not None:
            await self.account.before_reading()
        if isinstance(self._source, _Replay):
            replay = self._source
            if await replay.scan_again(scanner):
                return
        else:
            self._spool = SpooledFile(account=self.account)
            self._source = replay = _Replay(self._spool, self._source, scanner)
        try:
            await replay.scan(self._scan_limit, advice)
        except OSError as exc:
            raise ApiError(
                503, f"the gateway cannot write this form to disk ({exc.strerror}); retry later", code="out_of_space"
            ) from None

    def with_replacement(self, start: int, end: int, new: bytes) -> bytes | Body:
        """Return the body with `new` instead of the bytes from `start` to `end`, which must have been scanned.

        A kept body does not change, so that it can be sent again with another replacement.
        """
        if self._data is not None:
            return self._data[:start] + new + self._data[end:]
        if isinstance(self._source, _Replay):
            self._source.replace(start, end, new)
        return self

    def unmodified(self) -> bytes | Body:
        """Return the bytes if they have arrived, otherwise the body itself, without a replacement."""
        if isinstance(self._source, _Replay):
            self._source.replace(0, 0, b"")
        buffered = self.take_buffered()
        return self if buffered is None else buffered

    def scanned(self) -> SpooledFile | bytes:
        """Return the scanned bytes."""
        if self._data is not None:
            return self._data
        assert self._spool is not None, "nothing was scanned"  # noqa: S101 -- a bug of ours
        return self._spool

    def close(self) -> None:
        """Release the spool."""
        if self._spool is not None:
            self._spool.close()
            self._spool = None

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the body while it arrives, once. Raises BodyConsumed the second time, unless it was read before."""
        if (data := self.take_buffered()) is not None:
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


async def _scan_piece(data: bytes, scanner: BodyScanner) -> bool:
    """Give bytes to a scanner, a bounded number in each turn of the loop; returns whether it has seen enough."""
    if len(data) <= _MAX_SCANNED_PER_TURN:
        return scanner(data)
    enough = False
    for offset in range(0, len(data), _MAX_SCANNED_PER_TURN):
        if offset:
            await FairScheduler.of(asyncio.get_running_loop()).turn()
        enough = scanner(data[offset : offset + _MAX_SCANNED_PER_TURN])
    return enough


def body_too_large(limit: int) -> ApiError:
    """Return the 413 for a body above the limit that a stage sets."""
    return ApiError(413, f"the body is larger than {limit} bytes; send a smaller one", code="body_too_large")
