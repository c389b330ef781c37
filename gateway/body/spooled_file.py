"""A spool: keeps bytes in memory while they are few, then in a temporary file that no other process can open."""

from __future__ import annotations

import asyncio
import errno
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Protocol

__all__ = ("DISK_THREADS", "ByteAccount", "SpooledFile")

# Buffer limits, in bytes: in memory, and per read or write.
_MAX_IN_MEMORY = 1024 * 1024
_MAX_PIECE = 256 * 1024
# Separate threads: the default ones resolve host names, which must not wait for disks.
DISK_THREADS = ThreadPoolExecutor(4, "spool")


class ByteAccount(Protocol):
    """Counts the kept bytes against a budget: the exchange. `reserve_memory` and `reserve_disk` raise ApiError."""

    def reserve_memory(self, size: int) -> None:
        """Add bytes in memory, before they are kept."""

    def release_memory(self, size: int) -> None:
        """Subtract bytes in memory."""

    def reserve_disk(self, size: int) -> None:
        """Add bytes on disk, before they are written."""

    def release_disk(self, size: int) -> None:
        """Subtract bytes on disk."""


class SpooledFile:
    """Keeps the bytes that are written to it, for reads at any offset. `close` deletes the file."""

    def __init__(self, in_memory: int = _MAX_IN_MEMORY, account: ByteAccount | None = None) -> None:
        self.size = 0
        self._account = account
        self._in_memory = in_memory
        self._data = bytearray()
        self._file: IO[bytes] | None = None
        self._on_disk = 0
        self._closed = False
        self.lock = threading.Lock()
        """Held by the thread that uses the file."""

    async def write(self, data: bytes) -> None:
        """Append bytes. Raises OSError if the disk fails, and ApiError if a budget is exhausted."""
        if self._account is not None:
            self._account.reserve_memory(len(data))
        self.size += len(data)
        self._data += data
        if (size := len(self._data)) > (_MAX_PIECE if self._file is not None else self._in_memory):
            if self._account is not None:
                self._account.reserve_disk(size)
            self._on_disk += size
            await asyncio.get_running_loop().run_in_executor(DISK_THREADS, self._to_file)
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
        """Return bytes from `start`, up to `end` or the size of one read; b"" only at the end.

        Raises OSError if the spool is closed.
        """
        end = min(end, start + _MAX_PIECE, self.size)
        if self._file is None:
            if self._closed:
                raise _closed()
            return bytes(self._data[start:end])
        return await asyncio.get_running_loop().run_in_executor(DISK_THREADS, self._from_file, start, end)

    def _from_file(self, start: int, end: int) -> bytes:
        with self.lock:
            if self._closed:
                raise _closed()
            if self._data or self._file is None:
                self._write_out()
            assert self._file is not None  # noqa: S101 -- just created
            self._file.seek(start)
            data = self._file.read(end - start)
            if not data and start < end:
                raise OSError(errno.EIO, "a temporary file is shorter than the data written to it")
            return data

    def file(self) -> IO[bytes]:
        """Return a file with all bytes, positioned at its beginning; for a thread that holds the lock.

        Raises OSError if the spool is closed.
        """
        if self._closed:
            raise _closed()
        self._write_out()
        assert self._file is not None  # noqa: S101 -- just created
        self._file.seek(0)
        return self._file

    def close(self) -> None:
        """Release the bytes; the file is deleted when no thread uses it."""
        if self._account is not None and not self._closed:
            self._account.release_memory(self.size - self._on_disk)
            self._account.release_disk(self._on_disk)
        self._closed = True
        if self._file is None and not self.lock.locked():
            self._data = bytearray()
        else:
            DISK_THREADS.submit(self._close_file)

    def _close_file(self) -> None:
        with self.lock:
            self._data = bytearray()
            if self._file is not None:
                self._file.close()
                self._file = None


def _closed() -> OSError:
    return OSError(errno.EBADF, "the exchange that kept these bytes has ended")
