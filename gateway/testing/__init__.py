"""What tests of stages and gateways need: a pipeline without sockets, and a fake Azure with one.

* `send` and `post` put one request through stages and return what came of it; `running` keeps the stages
  started between requests.
* `every_split` feeds a filter the same bytes cut at every place.
* `talk` sends messages through the stages of a WebSocket.
* `FakeAzure` is a real server on loopback that answers as Azure does, and records what it saw.
* `serving` runs a gateway with a configuration of yours, such as in front of it.
"""

from gateway.azure.resources import Resource
from gateway.testing.azure import FakeAzure, Seen
from gateway.testing.serving import serving
from gateway.testing.stages import Running, Sent, Talked, every_split, post, running, send, talk

__all__ = (
    "FakeAzure",
    "Resource",
    "Running",
    "Seen",
    "Sent",
    "Talked",
    "every_split",
    "post",
    "running",
    "send",
    "serving",
    "talk",
)
