"""The memory budget: its limit, the share of each caller, and the release of bytes."""

from __future__ import annotations

import pytest

from gateway.errors import ApiError
from gateway.limits.memory_budget import Budgets, Hold, MemoryBudget


def test_a_caller_has_a_share_and_leaves_the_rest_to_others() -> None:
    """Above the share a caller gets 503 with Retry-After, and the bytes that it already holds stay held."""
    budget = MemoryBudget(1000)
    hold, another = Hold(budget, "ann"), Hold(budget, "ann")
    hold.grow(200)
    another.grow(50)
    with pytest.raises(ApiError) as refused:
        another.grow(1)
    assert (refused.value.status, refused.value.code) == (503, "overloaded")
    assert refused.value.headers["retry-after"]
    assert (hold.size, another.size) == (200, 50)
    assert budget.held == budget.held_by("ann") == 250
    Hold(budget, "bob").grow(250)


def test_a_request_above_the_share_of_a_caller_is_a_413() -> None:
    """A single request above the share gets 413 even if the budget is empty: a retry would not help."""
    budget = MemoryBudget(1000)
    hold = Hold(budget, "ann")
    hold.grow(250)
    with pytest.raises(ApiError) as refused:
        hold.grow(1)
    assert (refused.value.status, refused.value.code) == (413, "body_too_large")
    assert "retry-after" not in refused.value.headers
    assert hold.size == budget.held == 250


def test_the_peak_is_recorded() -> None:
    """The peak helps an operator to size the budget."""
    budget = MemoryBudget(1000)
    hold = Hold(budget, "ann")
    for size in (100, 150):
        hold.grow(size)
    hold.release()
    hold.grow(30)
    assert (budget.held, budget.most_held) == (30, 250)


def test_a_new_limit_applies_to_later_takes() -> None:
    """After a reload lowers the limit, takes fail until enough bytes are released."""
    budgets = Budgets(memory=1000, form=100)
    one, other = Hold(budgets.memory, "ann"), Hold(budgets.memory, "bob")
    one.grow(250)
    budgets.use(memory=400, form=10)
    assert budgets.disk.limit == 80
    other.grow(100)
    with pytest.raises(ApiError):
        Hold(budgets.memory, "eve").grow(60)
    one.release()
    Hold(budgets.memory, "eve").grow(60)


def test_all_callers_together_have_the_limit() -> None:
    """All callers together cannot exceed the limit."""
    budget = MemoryBudget(1000)
    for name in "abcd":
        Hold(budget, name).grow(250)
    with pytest.raises(ApiError):
        Hold(budget, "e").grow(1)
    assert budget.held == 1000


def test_released_bytes_are_available_again() -> None:
    """A hold releases a part or everything; a caller without bytes is dropped."""
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
