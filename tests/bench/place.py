"""Shared by the rows about the gateway alone: the judged interpreter, the upstream, and the load."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.bench import peers
from tests.bench.interpreters import Interpreter
from tests.bench.measure import Meter
from tests.bench.peers import Peer, Setup
from tests.bench.upstream import Azure
from tests.bench.workplace import Workplace


@dataclass(frozen=True)
class Place:
    """Starts gateways, each for one row."""

    workplace: Workplace
    azure: Azure
    meter: Meter
    interpreter: Interpreter
    rounds: int
    seconds: float
    _running: list[Peer] = field(default_factory=list)

    def ours(self, setup: Setup | None = None) -> Peer:
        """Start a gateway; it ends with its row."""
        peer = peers.ours(self.workplace, self.azure, self.interpreter, setup)
        self._running.append(peer)
        return peer

    def clear(self) -> None:
        """Stop the gateways of a row."""
        while self._running:
            self._running.pop().process.stop()
