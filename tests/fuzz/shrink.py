"""Shrinks a failing mutant while it fails in the same way."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import replace

from tests.fuzz.mutants import Mutant, without

__all__ = ("shrink",)


async def shrink(mutant: Mutant, fails: Callable[[Mutant], Awaitable[bool]], tries: int = 300) -> Mutant:
    """Return a smaller mutant that `fails`, after at most `tries`: with fewer cuts, then lines, then bytes."""
    left = tries

    async def still(candidate: Mutant) -> bool:
        nonlocal left
        if left <= 0:
            return False
        left -= 1
        return await fails(candidate)

    for simpler in (
        replace(mutant, cuts=()),
        replace(mutant, cuts=tuple(range(1, len(mutant.data)))),
        *(replace(mutant, cuts=(cut,)) for cut in mutant.cuts[:20]),
        replace(mutant, late=b""),
        replace(mutant, ending="keep"),
    ):
        if simpler != mutant and await still(simpler):
            mutant = simpler
    offset = 0
    lines = [found.end() for found in re.finditer(rb"\r\n|\Z", mutant.data)]
    for end in reversed(lines):  # from the end, so that earlier offsets stay valid
        offset = max((each for each in lines if each < end), default=0)
        smaller = without(mutant, offset, end)
        if smaller.data and await still(smaller):
            mutant = smaller
    size = len(mutant.data) // 2
    while size and left > 0:
        offset = 0
        while offset < len(mutant.data):
            smaller = without(mutant, offset, min(len(mutant.data), offset + size))
            if smaller.data and await still(smaller):
                mutant = smaller
            else:
                offset += size
        size //= 2
    return mutant
