"""The cost of tokens by the operator's price list."""

from __future__ import annotations

import pytest

from gateway.usage.prices import Price, Prices
from gateway.usage.usage_fields import Usage


@pytest.mark.parametrize(
    ("usage", "cost"),
    [
        (Usage(), 0),
        (Usage(1_000_000, 0), 2_500_000),
        (Usage(1000, 100), 3500),
        (Usage(1000, 100, cached_tokens=400), 3000),
        (Usage(1000, 100, reasoning_tokens=90), 3500),
        (Usage(1000, 100, audio_input_tokens=100, audio_output_tokens=50), 2250 + 4000 + 500 + 4000),
        (Usage(10, 0, cached_tokens=50), 13),
        (Usage(10, 5, audio_input_tokens=20), 850),
        (Usage(1, 0), 3),
    ],
)
def test_a_usage_costs(usage: Usage, cost: int) -> None:
    """In millionths, rounded up; cached and audio tokens are part of the total, and never more."""
    price = Price(input=2.5, output=10, cached_input=1.25, audio_input=40, audio_output=80)
    assert price.cost(usage) == cost


def test_missing_prices_have_defaults() -> None:
    """Cached and audio tokens cost as other tokens; a request costs nothing."""
    price = Price(input=2, output=4)
    assert price.cost(Usage(100, 100, 50, 50, 20, 20)) == 600
    assert Price(input=0, request=0.04).cost(Usage(5, 5)) == 40_000


def test_names_win_over_globs() -> None:
    """Then globs in their order; a name without a price has none."""
    listed = {"gpt-4o*": Price(1), "gpt-*": Price(2), "gpt-4o-mini": Price(3)}
    prices = Prices(listed)
    for model, price in (("gpt-4o-mini", 3), ("gpt-4o-2024", 1), ("gpt-5", 2)):
        assert prices.of(model) == Price(price)
    assert prices.of("o3") is None
    assert not Prices()
    for number in range(10_000):
        prices.of(f"made-up-{number}")
    assert len(prices._cache) <= 4096
