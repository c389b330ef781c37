"""What a configuration is made of: every file that was read, and every pattern that names some.

It is noted while the configuration is read, also when that fails: a mended file, or one that was missing, must be
seen afterwards.
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
    """Files by path with the SHA-256 of what was read, "" where nothing could be; patterns with what they found."""

    files: dict[str, str] = field(default_factory=dict)
    patterns: dict[str, list[str]] = field(default_factory=dict)

    def read(self, path: Path) -> bytes:
        """Return a file's content. Raises OSError, and ValueError where the path can be no file's."""
        name = os.path.abspath(path)
        self.files[name] = ""
        data = path.read_bytes()
        self.files[name] = hashlib.sha256(data).hexdigest()
        return data

    def find(self, pattern: Path) -> list[Path]:
        """Return the files that a pattern has, sorted.

        Raises OSError if no descriptor is left: that is not the same as no file.
        """
        self.patterns[os.path.abspath(pattern)] = ["unread"]
        try:
            # (A name that is no UTF-8 is none that a configuration could give.)
            found = sorted(name for name in _expanded(str(pattern)) if _is_text(name))
        except (ValueError, re.error):
            found = []
        self.patterns[os.path.abspath(pattern)] = [os.path.abspath(each) for each in found]
        return list(map(Path, found))

    def unread(self) -> Sources:
        """Return these files and patterns as if none could be read, so that they are tried again."""
        return Sources(dict.fromkeys(self.files, "unread"), {each: ["unread"] for each in self.patterns})

    @property
    def digest(self) -> str:
        """What tells one content from another: that of all files, and which there are."""
        return hashlib.sha256(repr((sorted(self.files.items()), sorted(self.patterns.items()))).encode()).hexdigest()

    def stats(self) -> list[object]:
        """Return what changes when a file does: cheap, for looking often.

        Links are followed to the end: Kubernetes swaps a link that leads to the folder of all files, and editors put
        another file in a file's place.
        """
        found: list[object] = []
        for name in self.files:
            status = _status(name)
            found.append(status and (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
        again = Sources()
        for pattern in self.patterns:
            again.find(Path(pattern))
        found.append(again.patterns)
        return found

    def now(self) -> Sources:
        """Return the same files and patterns as they are now. Raises OSError if no descriptor is left."""
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
    """Yield the names that a pattern has, as `glob.iglob` does, which takes a folder that cannot be read for empty."""
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
