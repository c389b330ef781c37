"""Headroom: the share of a deployment's quota that is left, as Azure reports it."""

from __future__ import annotations

import pytest

from gateway.protocol.headers import Headers
from tests.balancing.test_circuit_breaker import made


@pytest.mark.parametrize(
    ("fields", "room"),
    [
        ({"x-ratelimit-remaining-requests": "119", "x-ratelimit-limit-requests": "120"}, 119 / 120),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-limit-tokens": "1000"}, 0.0),
        ({"x-ratelimit-remaining-tokens": "-5", "x-ratelimit-limit-tokens": "1000"}, 0.0),
        ({"azure-openai-deployment-utilization": "93.5%"}, 0.065),
        ({"azure-openai-deployment-utilization": "110%"}, 0.0),
        ({"x-ratelimit-remaining-tokens": "many", "x-ratelimit-limit-tokens": "nan"}, None),
        ({"x-ratelimit-remaining-tokens": "inf"}, None),
        ({"x-ratelimit-limit-tokens": "100"}, None),
        ({}, None),
    ],
)
def test_headroom(fields: dict[str, str], room: float | None) -> None:
    """The smallest share of any quota. Headers that report none mean neither headroom nor a full quota."""
    east, clock, _ = made()
    east.observe(clock.now, Headers(fields).fields)
    if room is None:
        assert east.headroom_until <= clock.now
    else:
        assert east.headroom == pytest.approx(room, abs=1e-3)
        assert east.headroom_until > clock.now
        assert (east.avoid_until > clock.now) == (room == 0.0)
        assert east.is_available(clock.now)


def test_headroom_without_a_limit() -> None:
    """Is a share of the largest remainder so far. It is read ten times a second at most, and valid for some seconds."""
    east, clock, _ = made()
    east.succeeded(clock.now, 0, Headers({"x-ratelimit-remaining-tokens": "800"}).fields)
    assert east.headroom == 1.0
    east.succeeded(clock.now, 0, Headers({"x-ratelimit-remaining-tokens": "1"}).fields)
    assert east.headroom == 1.0
    clock.now += 0.2
    east.succeeded(clock.now, 0, Headers({"x-ratelimit-remaining-tokens": "200"}).fields)
    assert east.headroom == 0.25
    assert east.headroom_until == pytest.approx(clock.now + 5)
