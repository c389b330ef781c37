"""The sources of a configuration: every file that was read, and every pattern that was searched for.

They are recorded while the configuration is read, even if that fails, so that a corrected or added file is noticed.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gateway.transport.file_descriptors import caused_by_exhaustion

__all__ = ("Sources",)


@dataclass
class Sources:
    """Files by path with the SHA-256 of their content ("" if unreadable), and patterns with the files that match."""

    files: dict[str, str] = field(default_factory=dict)
    patterns: dict[str, list[str]] = field(default_factory=dict)

    def read(self, path: Path) -> bytes:
        """Return a file's content. Raises OSError, or ValueError for an invalid path."""
        name = os.path.abspath(path)
        self.files[name] = ""
        data = path.read_bytes()
        self.files[name] = hashlib.sha256(data).hexdigest()
        return data

    def find(self, pattern: Path) -> list[Path]:
        """Return the files that match a pattern, sorted.

        Raises OSError if no descriptor is left, which must not look like no file.
        """
        self.patterns[os.path.abspath(pattern)] = ["unread"]
        try:
            # (A configuration cannot name a file whose name is not UTF-8.)
            found = sorted(name for name in _expanded(str(pattern)) if _is_text(name))
        except (ValueError, re.error):
            found = []
        self.patterns[os.path.abspath(pattern)] = [os.path.abspath(each) for each in found]
        return list(map(Path, found))

    def unread(self) -> Sources:
        """Return the same files and patterns as unread, so that the watcher tries them again."""
        return Sources(dict.fromkeys(self.files, "unread"), {each: ["unread"] for each in self.patterns})

    @property
    def digest(self) -> str:
        """A digest of the content of all files and of the matches of all patterns."""
        return hashlib.sha256(repr((sorted(self.files.items()), sorted(self.patterns.items()))).encode()).hexdigest()

    def stats(self) -> list[object]:
        """Return data that changes when a file does; cheap enough to poll.

        Symbolic links are followed to the end: Kubernetes swaps a link to the folder of all files, and editors replace
        a file by another.
        """
        stats: list[object] = []
        for name in self.files:
            status = _status(name)
            stats.append(status and (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
        again = Sources()
        for pattern in self.patterns:
            again.find(Path(pattern))
        stats.append(again.patterns)
        return stats

    def now(self) -> Sources:
        """Read the same files and patterns again. Raises OSError if no descriptor is left."""
        again = Sources()
        for pattern in self.patterns:
            again.find(Path(pattern))
        for name in self.files:
            status = _status(name)
            if status is not None and not stat.S_ISREG(status.st_mode):
                again.files[name] = self.files[name]  # a pipe can be read once
                continue
            again.files[name] = ""
            try:
                again.read(Path(name))
            except OSError as exc:
                if caused_by_exhaustion(exc):
                    raise
            except ValueError:
                pass
        return again


def _expanded(pattern: str) -> Iterator[str]:
    """Yield the paths that match a pattern, as `glob.iglob` does; but that treats an unreadable folder as empty."""
    folder, last = os.path.split(pattern)
    if not glob.has_magic(pattern):
        if os.path.lexists(pattern):
            yield pattern
        return
    folders = _expanded(folder) if folder != pattern and glob.has_magic(folder) else [folder]
    for each in folders:
        for name in _names(each, last) if glob.has_magic(last) else [last]:
            path = os.path.join(each, name)
            if os.path.lexists(path):
                yield path


def _names(folder: str, pattern: str) -> list[str]:
    try:
        names = os.listdir(folder or os.curdir)
    except OSError as exc:
        if caused_by_exhaustion(exc):
            raise
        return []
    hidden = pattern.startswith(".")
    return fnmatch.filter((name for name in names if hidden or not name.startswith(".")), pattern)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _status(name: str) -> os.stat_result | None:
    try:
        return os.stat(name)
    except (OSError, ValueError):
        return None
