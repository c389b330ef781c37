"""Printing lines with text from files or other processes."""

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
    """Print text from files or another process, escaped so that it cannot control the terminal."""
    for line in lines:
        print(line if line.isprintable() else ascii(line), file=to)


def print_notes(notes: Sequence[Mistake]) -> None:
    """Print notes to standard error, in the order of the file."""
    for note in sorted(notes):
        print(note, file=sys.stderr)
