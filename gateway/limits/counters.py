"""The contract of a store of counters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gateway.errors import GatewayError
from gateway.limits.token_bucket import Charge, Decision

__all__ = ("Counters", "CountersUnavailable")


class CountersUnavailable(GatewayError):
    """The store of counters is unavailable. Nothing was taken, as far as this process knows."""


class Counters(Protocol):
    """A store of counters."""

    async def take(self, charges: Sequence[Charge]) -> Decision:
        """Take all charges, or none if one (that is not a shadow charge) has no room.

        Raises CountersUnavailable.
        """

    def settle(self, decision: Decision, actual: Sequence[float | None]) -> None:
        """Replace the cost of each charge with its actual use, now or soon. None leaves a charge unchanged.

        Call it once per decision: further calls do nothing.
        """

    async def close(self) -> None:
        """Complete the pending settlements, and release all resources."""
