"""The test kit for stages and gateways: a pipeline without sockets, and a fake Azure server.

* `send` and `post` send one request through stages and return the result; `running` keeps the stages started
  between requests.
* `every_split` feeds a filter the same bytes, split at every position.
* `talk` sends messages through the stages of a WebSocket.
* `FakeAzure` is a real server on loopback that responds like Azure and records its requests.
* `serving` runs a gateway with your configuration, for example in front of `FakeAzure`.
"""

from gateway.azure.resources import Resource
from gateway.testing.azure import FakeAzure, Seen
from gateway.testing.serving import serving
from gateway.testing.stages import Conversation, Running, Sent, every_split, post, running, send, talk

__all__ = (
    "Conversation",
    "FakeAzure",
    "Resource",
    "Running",
    "Seen",
    "Sent",
    "every_split",
    "post",
    "running",
    "send",
    "serving",
    "talk",
)
