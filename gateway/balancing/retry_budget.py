"""The limits of retries: `RetryLimits` for one request, and `RetryBudget`, which all requests of a team share.

The budget keeps retries from multiplying the load on Azure when many requests fail. It is a token bucket: each request
adds a fraction of a token, and each retry of a request that may have been processed takes one token.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ("RetryBudget", "RetryLimits")


@dataclass(frozen=True)
class RetryLimits:
    """Limits for the attempts of one request. Times are in seconds.

    `deadline`: maximum time until a response must have started, over all attempts.
    `silence`: maximum time until a stream must have started, while another deployment is available.
    `attempts`: maximum number of attempts.
    `wait`: maximum time in total to wait for a deployment, while none is available.
    `hold`: maximum time to hold back the beginning of a stream.
    `keep`: largest body to keep for retries, in bytes. A request with a larger one is sent once.
    `retries`: tokens that each request adds to the retry budget.
    `reserve`: capacity of the retry budget, in tokens.
    """

    deadline: float
    silence: float = 60.0
    attempts: int = 5
    wait: float = 5.0
    hold: float = 10.0
    keep: int = 16 * 1024 * 1024
    retries: float = 0.2
    reserve: float = 100.0


class RetryBudget:
    """A token bucket for retries, which `Retrier.send` refills; requests that share it may have different limits."""

    def __init__(self, left: float) -> None:
        self.left = left

    def take(self) -> bool:
        """Take a token; return False if there is none."""
        if self.left < 1:
            return False
        self.left -= 1
        return True
