"""A gateway from the OpenAI API to Azure OpenAI. This module is the public API for authors of stages (plugins).

A stage is a dataclass that subclasses `Stage`; its fields are its settings in YAML. `gateway.testing` has the test kit.
"""

from msgspec import Meta

from gateway.auth.credentials import Credential
from gateway.azure.error_body import ErrorBody
from gateway.azure.resources import Target
from gateway.azure.stream_errors import StreamError
from gateway.balancing.retries import Retrier
from gateway.balancing.retry_budget import RetryBudget, RetryLimits
from gateway.errors import ApiError, UpstreamError
from gateway.exchange import Outcome
from gateway.limits.counters import CountersUnavailable
from gateway.limits.token_bucket import Charge, Decision, Limit
from gateway.protocol.filters import EventFilter, Filter
from gateway.protocol.headers import Headers
from gateway.protocol.sse import Event
from gateway.request import Request
from gateway.response import Response
from gateway.services import Services
from gateway.stage import Next, Stage
from gateway.usage.prices import Price
from gateway.usage.usage_fields import Usage
from gateway.version import __version__ as __version__

__all__ = (
    "ApiError",
    "Charge",
    "CountersUnavailable",
    "Credential",
    "Decision",
    "ErrorBody",
    "Event",
    "EventFilter",
    "Filter",
    "Headers",
    "Limit",
    "Meta",
    "Next",
    "Outcome",
    "Price",
    "Request",
    "Response",
    "Retrier",
    "RetryBudget",
    "RetryLimits",
    "Services",
    "Stage",
    "StreamError",
    "Target",
    "UpstreamError",
    "Usage",
)
