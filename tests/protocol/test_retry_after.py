"""Retry-After: how long Azure asks the gateway to wait."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest

from gateway.protocol.headers import Headers
from gateway.protocol.retry_after import cooldown, retry_after


@pytest.mark.parametrize(
    ("headers", "message", "seconds"),
    [
        ({"retry-after": "7"}, "", 7.0),
        ({"Retry-After": "0"}, "", 0.0),
        ({"retry-after": "7", "retry-after-ms": "1500"}, "", 1.5),
        ({"retry-after": "7"}, "Please retry after 9 seconds.", 7.0),
        ({}, "Please retry after 86400 seconds.", 86_400.0),
        ({}, "Rate limit is exceeded. Try again in 2 seconds.", 2.0),
        ({}, "Please try again in 450ms.", 0.45),
        ({}, "Please try again in 1m30s.", 90.0),
        ({"retry-after": "soon"}, "", None),
        ({"retry-after": "-3"}, "", None),
        ({"retry-after-ms": "1e9"}, "", None),
        ({}, "The system is currently experiencing high demand.", None),
    ],
)
def test_seconds(headers: dict[str, str], message: str, seconds: float | None) -> None:
    """From the most precise header, or else from the message; None if neither has it."""
    assert retry_after(Headers(headers), message) == seconds


def test_a_date() -> None:
    """RFC 9110 allows a date; a past date means now."""
    later = retry_after(Headers({"retry-after": formatdate(time.time() + 30, usegmt=True)}))
    assert later is not None
    assert 28 <= later <= 30
    assert retry_after(Headers({"retry-after": formatdate(time.time() - 30, usegmt=True)})) == 0.0


def test_a_429_without_a_time_has_the_default_cooldown() -> None:
    """Other statuses have none; a given time counts, even if it is zero."""
    assert cooldown(429, Headers()) == 1.0
    assert cooldown(503, Headers()) is None
    assert cooldown(429, Headers({"retry-after": "0"})) == 0.0
    assert cooldown(429, Headers(), "try again in 2 seconds") == 2.0
