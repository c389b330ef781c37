"""Bytes kept for later: in memory while they are few, then in a temporary file that nobody else can open."""

from __future__ import annotations

import asyncio
import errno
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Protocol

__all__ = ("DISK", "ByteAccount", "SpooledFile")

# What is kept in memory, and read back at once, in bytes.
_IN_MEMORY = 1024 * 1024
PIECE = 256 * 1024
# Threads of their own: the default ones look host names up, which must not wait for disks.
DISK = ThreadPoolExecutor(4, "spool")


class ByteAccount(Protocol):
    """Who answers for the bytes that are kept: the exchange. `reserve_memory` and `reserve_disk` raise ApiError."""

    def reserve_memory(self, size: int) -> None:
        """Count bytes in memory, before they are kept."""

    def release_memory(self, size: int) -> None:
        """Count bytes in memory less."""

    def reserve_disk(self, size: int) -> None:
        """Count bytes on disk, before they are written."""

    def release_disk(self, size: int) -> None:
        """Count bytes on disk less."""


class SpooledFile:
    """Keeps what is written to it, and gives any of it back. `close` lets go of the file."""

    def __init__(self, in_memory: int = _IN_MEMORY, account: ByteAccount | None = None) -> None:
        self.size = 0
        self._account = account
        self._in_memory = in_memory
        self._data = bytearray()
        self._file: IO[bytes] | None = None
        self._on_disk = 0
        self._closed = False
        self.lock = threading.Lock()
        """Held by the thread that works with the file."""

    async def write(self, data: bytes) -> None:
        """Keep more. Raises OSError if the disk does not take it, and ApiError where there is no room for it."""
        if self._account is not None:
            self._account.reserve_memory(len(data))
        self.size += len(data)
        self._data += data
        if (size := len(self._data)) > (PIECE if self._file is not None else self._in_memory):
            if self._account is not None:
                self._account.reserve_disk(size)
            self._on_disk += size
            await asyncio.get_running_loop().run_in_executor(DISK, self._to_file)
            if self._account is not None:
                self._account.release_memory(size)

    def _to_file(self) -> None:
        with self.lock:
            if not self._closed:
                self._write_out()

    def _write_out(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="gateway-", buffering=0)  # noqa: SIM115 -- closed by close()
        self._file.seek(0, 2)
        view = memoryview(self._data)
        while view:
            view = view[self._file.write(view) :]
        self._data = bytearray()

    async def read(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` to `end`, or as many of them as are read at once; never none, if there are any.

        Raises OSError if it was closed.
        """
        end = min(end, start + PIECE, self.size)
        if self._file is None:
            if self._closed:
                raise _closed()
            return bytes(self._data[start:end])
        return await asyncio.get_running_loop().run_in_executor(DISK, self._from_file, start, end)

    def _from_file(self, start: int, end: int) -> bytes:
        with self.lock:
            if self._closed:
                raise _closed()
            if self._data or self._file is None:
                self._write_out()
            assert self._file is not None  # noqa: S101 -- just made
            self._file.seek(start)
            found = self._file.read(end - start)
            if not found and start < end:
                raise OSError(errno.EIO, "a temporary file is shorter than what was written to it")
            return found

    def file(self) -> IO[bytes]:
        """Return a file with all that was written, at its beginning; for a thread that holds the lock.

        Raises OSError where it was closed.
        """
        if self._closed:
            raise _closed()
        self._write_out()
        assert self._file is not None  # noqa: S101 -- just made
        self._file.seek(0)
        return self._file

    def close(self) -> None:
        """Let go of what is kept; the file goes when no thread works with it any more."""
        if self._account is not None and not self._closed:
            self._account.release_memory(self.size - self._on_disk)
            self._account.release_disk(self._on_disk)
        self._closed = True
        if self._file is None and not self.lock.locked():
            self._data = bytearray()
        else:
            DISK.submit(self._close_file)

    def _close_file(self) -> None:
        with self.lock:
            self._data = bytearray()
            if self._file is not None:
                self._file.close()
                self._file = None


def _closed() -> OSError:
    return OSError(errno.EBADF, "the exchange that kept these bytes is over")
