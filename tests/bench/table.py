"""Tables that are readable as text and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; its first column is aligned to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    rule = ["-" * width if not column else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    text = ""
    for first, *others in [head, rule, *rows]:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        text += f"| {' | '.join(cells)} |\n"
    return text
