"""The contract of a store of counters: what it is asked, and what it raises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gateway.errors import GatewayError
from gateway.limits.token_bucket import Charge, Decision

__all__ = ("Counters", "CountersUnavailable")


class CountersUnavailable(GatewayError):
    """Where the counters are kept cannot be asked now: nothing is known, and nothing was taken as far as is known."""


class Counters(Protocol):
    """A place where uses are counted."""

    async def take(self, charges: Sequence[Charge]) -> Decision:
        """Take all charges, or, where one that is not in the shadow has no room, none.

        Raises CountersUnavailable.
        """

    def settle(self, verdict: Decision, actual: Sequence[float | None]) -> None:
        """Let what was really used take the place of what was taken, charge by charge; None leaves one as it is.

        Once for each verdict: a second call does nothing. It is done at once or soon.
        """

    async def close(self) -> None:
        """Settle what is still to be settled, and let go of everything."""
