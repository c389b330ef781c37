"""A gateway between programs that speak the OpenAI API and Azure OpenAI; this module is for plugin authors.

A stage is a dataclass that subclasses `Stage`; its fields are its settings in YAML. `gateway.testing` has
what tests of a stage need.
"""

from msgspec import Meta

from gateway.attempts import AttemptLimits, Balancer, RetryBudget
from gateway.counters import Charge, CountersUnavailable, Rule, Verdict
from gateway.errors import ApiError, UpstreamError
from gateway.exchange import Outcome
from gateway.headers import Headers
from gateway.keys import Credential
from gateway.messages import Request, Response
from gateway.prices import Price
from gateway.services import Services
from gateway.stage import Next, Stage
from gateway.stream import Event, EventFilter, Filter
from gateway.stream_error import StreamError
from gateway.targets import Target
from gateway.usage import Usage
from gateway.version import __version__ as __version__

__all__ = (
    "ApiError",
    "AttemptLimits",
    "Balancer",
    "Charge",
    "CountersUnavailable",
    "Credential",
    "Event",
    "EventFilter",
    "Filter",
    "Headers",
    "Meta",
    "Next",
    "Outcome",
    "Price",
    "Request",
    "Response",
    "RetryBudget",
    "Rule",
    "Services",
    "Stage",
    "StreamError",
    "Target",
    "UpstreamError",
    "Usage",
    "Verdict",
)
