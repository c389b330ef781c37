"""Printing lines that may hold text of files or of other processes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from gateway.errors import Mistake

__all__ = (
    "print_lines",
    "print_notes",
)


def print_lines(lines: Sequence[str], to: TextIO | None = None) -> None:
    """Print text of another process, or out of files: it must not control the terminal."""
    for line in lines:
        print(line if line.isprintable() else ascii(line), file=to)


def print_notes(notes: Sequence[Mistake]) -> None:
    """Print notes to standard error, by their place in the file."""
    for note in sorted(notes):
        print(note, file=sys.stderr)
