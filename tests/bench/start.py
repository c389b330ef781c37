"""The time from the gateway's start to its first response."""

from __future__ import annotations

import time

from tests.bench import limits
from tests.bench.measure import say
from tests.bench.place import Place
from tests.bench.rows import Row

TIMES = 5


def start(place: Place) -> list[Row]:
    """Start it several times; the first response is a 200 from `/healthz`."""
    figures = []
    for _ in range(TIMES):
        begun = time.monotonic()
        place.ours()
        figures.append(time.monotonic() - begun)
        place.clear()
    say(f"start: {', '.join(f'{figure:.2f}' for figure in figures)} s")
    return [Row("from its start to the first answer", "s", limits.START, figures)]
