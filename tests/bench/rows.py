"""A row about one figure of the gateway: the result and its limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import median

from tests.bench.limits import FAILED, Limit
from tests.bench.table import table


@dataclass(frozen=True)
class Row:
    """One figure, measured several times; the median counts."""

    title: str
    unit: str
    limit: Limit
    figures: Sequence[float] = ()
    problem: str = ""
    """The reason why there are no figures."""

    @property
    def verdict(self) -> str:
        """The verdict on the median."""
        return f"{FAILED}: {self.problem}" if self.problem else self.limit.verdict(median(self.figures))

    def cells(self) -> list[str]:
        """Return the cells of the row."""
        measured, spread = "-", "-"
        if self.figures:
            measured = f"{_short(median(self.figures))} {self.unit}"
            spread = "-" if len(self.figures) == 1 else f"{_short(min(self.figures))} to {_short(max(self.figures))}"
        goal = "-" if self.limit.goal is None else f"{self.limit.goal:g}"
        return [
            self.title,
            measured,
            spread,
            goal,
            "-" if self.limit.fail_above == inf else f"{self.limit.fail_above:g}",
            self.verdict,
        ]


def show(rows: Sequence[Row]) -> str:
    """Return the table of some rows."""
    head = ["what", "measured", "from-to", "goal", "fail above", "verdict"]
    return table(head, [row.cells() for row in rows])


def _short(figure: float) -> str:
    return f"{figure:.0f}" if abs(figure) >= 100 else f"{figure:.2f}"
