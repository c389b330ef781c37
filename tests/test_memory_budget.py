"""The budget of memory that requests hold: its bound, each caller's share, and that it is given back."""

from __future__ import annotations

import pytest

from gateway.errors import ApiError
from gateway.memory_budget import Hold, MemoryBudget


def test_a_caller_has_a_share_and_leaves_the_rest_to_others() -> None:
    """Above it there is a 503 that says when to come back, and what was held before still is."""
    budget = MemoryBudget(1000)
    hold = Hold(budget, "ann")
    hold.grow(250)
    with pytest.raises(ApiError) as refused:
        hold.grow(1)
    assert (refused.value.status, refused.value.code) == (503, "overloaded")
    assert refused.value.headers["retry-after"]
    assert hold.size == budget.held == budget.held_by("ann") == 250
    Hold(budget, "bob").grow(250)


def test_all_callers_together_have_the_limit() -> None:
    """However many they are."""
    budget = MemoryBudget(1000)
    for name in "abcd":
        Hold(budget, name).grow(250)
    with pytest.raises(ApiError):
        Hold(budget, "e").grow(1)
    assert budget.held == 1000


def test_what_is_released_is_there_again() -> None:
    """In parts or whole; a caller that holds nothing is forgotten."""
    budget = MemoryBudget(1000)
    one, other = Hold(budget, "ann"), Hold(budget, "ann")
    one.grow(200)
    other.grow(50)
    one.shrink(100)
    assert budget.held_by("ann") == 150
    one.release()
    one.release()
    other.release()
    assert budget.held == 0
    assert not budget._callers
