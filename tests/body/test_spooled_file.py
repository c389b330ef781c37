"""The spool: bytes are in memory while they are few, then on disk."""

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.body.spooled_file import SpooledFile
from gateway.errors import ApiError
from tests.conftest import until


def open_files() -> set[str]:
    links = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            links.add(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    return {link for link in links if "gateway-" in Path(link).name or "/#" in link}


@given(st.lists(st.binary(max_size=40), max_size=20), st.integers(0, 100), st.integers(0, 100))
async def test_what_was_written_is_read_back(pieces: list[bytes], start: int, size: int) -> None:
    """Any part can be read, in any order, in memory and on disk."""
    spool = SpooledFile(in_memory=16)
    for piece in pieces:
        await spool.write(piece)
        whole = b"".join(pieces)[: spool.size]
        assert await spool.read(0, spool.size) == whole
    whole = b"".join(pieces)
    assert spool.size == len(whole)
    assert await spool.read(start, start + size) == whole[start : start + size]
    with spool.lock:
        assert spool.file().read() == whole
    spool.close()


async def test_little_stays_in_memory_and_much_leaves_no_file_behind() -> None:
    """The file has no name, and closing deletes it."""
    gc.collect()  # files of other tests, whose descriptor numbers may be reused
    before = open_files()
    spool = SpooledFile(in_memory=1000)
    await spool.write(b"x" * 900)
    assert open_files() == before
    await spool.write(b"x" * 900)
    assert len(open_files() - before) == 1
    assert await spool.read(800, 1000) == b"x" * 200
    spool.close()
    spool.close()
    await until(lambda: open_files() == before)


class Account:
    """Counts the bytes that a spool reports."""

    def __init__(self, disk: int = 1000) -> None:
        self.memory = self.disk = self.most_in_memory = 0
        self._room = disk

    def reserve_memory(self, size: int) -> None:
        self.memory += size
        self.most_in_memory = max(self.most_in_memory, self.memory)

    def release_memory(self, size: int) -> None:
        self.memory -= size

    def reserve_disk(self, size: int) -> None:
        if self.disk + size > self._room:
            raise ApiError(503, "full")
        self.disk += size

    def release_disk(self, size: int) -> None:
        self.disk -= size


@given(st.lists(st.integers(0, 40), max_size=20), st.integers(0, 200))
async def test_each_byte_is_counted_once_where_it_is(sizes: list[int], room: int) -> None:
    """In memory or on disk; none after `close`, even if the budget was exhausted."""
    account = Account(room)
    spool = SpooledFile(in_memory=16, account=account)
    with contextlib.suppress(ApiError):
        for size in sizes:
            await spool.write(b"x" * size)
            assert (account.memory, account.disk) == (len(spool._data), spool.size - len(spool._data))
    assert account.disk <= room
    spool.close()
    spool.close()
    assert (account.memory, account.disk) == (0, 0)


@pytest.mark.parametrize("in_memory", [10, 100])
async def test_what_was_closed_is_gone_and_not_empty(in_memory: int) -> None:
    """Reading raises an error: no bytes would mean the end of the body."""
    spool = SpooledFile(in_memory=in_memory)
    await spool.write(b"x" * 20)
    spool.close()
    await until(lambda: spool._file is None)
    with pytest.raises(OSError, match="has ended"):
        await spool.read(0, 20)
    with spool.lock, pytest.raises(OSError, match="has ended"):
        spool.file()


async def test_a_file_that_lost_bytes_is_not_taken_for_whole() -> None:
    """Missing bytes are an error, not an end."""
    spool = SpooledFile(in_memory=10)
    await spool.write(b"x" * 20)
    assert spool._file is not None
    spool._file.truncate(5)
    assert await spool.read(0, 20) == b"x" * 5
    with pytest.raises(OSError, match="shorter"):
        await spool.read(5, 20)
    spool.close()
