"""Bytes kept for later: in memory while they are few, then in a temporary file that nobody else can open."""

from __future__ import annotations

import asyncio
import tempfile
from typing import IO

__all__ = ("Spool",)

# What is kept in memory, and read back at once, in bytes.
_IN_MEMORY = 1024 * 1024
PIECE = 256 * 1024


class Spool:
    """Keeps what is written to it, and gives any of it back. `close` lets go of the file."""

    def __init__(self, in_memory: int = _IN_MEMORY) -> None:
        self.size = 0
        self._in_memory = in_memory
        self._data = bytearray()
        self._file: IO[bytes] | None = None

    async def write(self, data: bytes) -> None:
        """Keep more. Raises OSError where the disk does not take it."""
        self.size += len(data)
        self._data += data
        if len(self._data) > (PIECE if self._file is not None else self._in_memory):
            await asyncio.to_thread(self._to_file)

    def _to_file(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="gateway-", buffering=0)  # noqa: SIM115 -- closed by close()
        self._file.seek(0, 2)
        view = memoryview(self._data)
        while view:
            view = view[self._file.write(view) :]
        self._data = bytearray()

    async def read(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` to `end`, or as many of them as are read at once."""
        end = min(end, start + PIECE)
        if self._file is None:
            return bytes(self._data[start:end])
        return await asyncio.to_thread(self._from_file, start, end)

    def _from_file(self, start: int, end: int) -> bytes:
        if self._data:
            self._to_file()
        assert self._file is not None  # noqa: S101 -- only called with one
        self._file.seek(start)
        return self._file.read(end - start)

    def file(self) -> IO[bytes]:
        """Return a file with all that was written, at its beginning; for work in another thread."""
        self._to_file()
        assert self._file is not None  # noqa: S101 -- just made
        self._file.seek(0)
        return self._file

    def close(self) -> None:
        """Let go of what is kept."""
        self._data = bytearray()
        if self._file is not None:
            self._file.close()
            self._file = None
