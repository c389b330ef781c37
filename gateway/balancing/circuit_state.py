"""The states of a circuit breaker and their transitions.

Time alone changes no state: the next request does.

| State                    | Event                                             | Next state                       |
| ------------------------ | ------------------------------------------------- | -------------------------------- |
| any but OPEN, HALF_OPEN  | N failures in a row, or a large share of failures | OPEN                             |
| any but OPEN, HALF_OPEN  | an error that every request would get             | OPEN                             |
| any but OPEN, HALF_OPEN  | another process opened the circuit                | OPEN                             |
| any but OPEN, HALF_OPEN  | 429 or Retry-After, here or in another process    | COOLING_DOWN                     |
| COOLING_DOWN             | the first request after the cooldown              | SLOW_START                       |
| COOLING_DOWN, SLOW_START | a request 10 s after the cooldown, or later       | CLOSED                           |
| OPEN                     | a request after `blocked_until`                   | HALF_OPEN: it is the trial       |
| OPEN                     | another process closed the circuit                | SLOW_START (1)                   |
| HALF_OPEN                | the trial gets a response                         | SLOW_START (1)                   |
| HALF_OPEN                | the trial gets a 429                              | COOLING_DOWN                     |
| HALF_OPEN                | the trial fails                                   | OPEN, for twice as long          |
| HALF_OPEN                | the trial ends without a result                   | OPEN; a trial may follow at once |
| HALF_OPEN                | a request, if the trial has no result within 5 s  | HALF_OPEN: it is the trial       |
| OPEN, HALF_OPEN          | 429 of a request that is no trial                 | unchanged (2)                    |

(1) COOLING_DOWN, if a cooldown that Azure asked for has not ended.
(2) No request is sent before the cooldown has ended.
"""

from __future__ import annotations

import enum

__all__ = ("CLOSED", "CircuitState")


class CircuitState(enum.Enum):
    """The state of a circuit breaker; this module's docstring has the transitions."""

    CLOSED = "closed"
    """Requests are sent."""
    COOLING_DOWN = "cooling_down"
    """No requests are sent, because of a 429."""
    SLOW_START = "slow_start"
    """Few requests are sent, and more as Azure accepts them."""
    OPEN = "open"
    """No requests are sent, because they failed."""
    HALF_OPEN = "half_open"
    """One request, the trial, is under way after failures."""


CLOSED = CircuitState.CLOSED
"""For the path of every request: an attribute of an enum costs more than a global name."""
