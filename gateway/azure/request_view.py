"""The part of `Request` that this wing uses, as a protocol, so that it does not import `Request`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from gateway.azure.operations import Operation
from gateway.azure.resources import Target
from gateway.body.request_body import Body, BodyAccount
from gateway.protocol.headers import Headers
from gateway.protocol.multipart import FormReader

__all__ = ("ExchangeView", "RequestView")


class ExchangeView(BodyAccount, Protocol):
    """The exchange of a request: it counts buffered bytes, and runs callbacks at its end."""

    def defer(self, callback: Callable[[Any], None]) -> None:
        """Run a callback once, when the exchange ends."""


class RequestView(Protocol):
    """A request as this wing reads and changes it; see `Request` for the meaning of each attribute."""

    method: str
    operation: str | None
    path: str
    query: str
    headers: Headers
    target: Target
    notes: dict[str, object]
    _operation: Operation | None
    _path_model: str | None
    _json: dict[str, Any] | None
    _json_replaced: bool
    _form: FormReader | None
    _body: Body

    @property
    def _exchange(self) -> ExchangeView: ...

    @property
    def holder(self) -> str:
        """The owner of the memory that it uses."""

    @property
    def last_target(self) -> Target | None:
        """The target of the last attempt at Azure."""

    async def body(self) -> bytes:
        """Return the body's bytes."""

    async def json(self) -> dict[str, Any]:
        """Return the body as a JSON object."""

    def set_json(self, body: dict[str, Any]) -> dict[str, Any]:
        """Replace the body."""

    async def fields(self, *names: str) -> dict[str, bytes]:
        """Return fields of the JSON body, as JSON."""

    async def model(self) -> str | None:
        """Return the model that it names."""
