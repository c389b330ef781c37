"""What a configuration is made of: every file that was read, and every pattern that names some.

It is noted while the configuration is read, also when that fails: a mended file, or one that was missing, must be
seen afterwards.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

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
        """Return the files that a pattern has, sorted."""
        try:
            # (A name that is no UTF-8 is none that a configuration could give.)
            found = sorted(name for name in glob.glob(str(pattern)) if _is_text(name))
        except (OSError, ValueError, re.error):
            found = []
        self.patterns[os.path.abspath(pattern)] = [os.path.abspath(each) for each in found]
        return list(map(Path, found))

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
        """Return the same files and patterns as they are now."""
        again = Sources()
        for pattern in self.patterns:
            again.find(Path(pattern))
        for name in self.files:
            status = _status(name)
            if status is not None and not stat.S_ISREG(status.st_mode):
                again.files[name] = self.files[name]  # a pipe can be read once
                continue
            with contextlib.suppress(OSError, ValueError):
                again.files[name] = ""
                again.read(Path(name))
        return again


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
