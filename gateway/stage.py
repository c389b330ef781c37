"""The contract of a stage, and how a list of stages becomes one callable.

A pipeline is an onion: the first stage of the list sees the request first and the response last. A stage passes the
request on with `await call_next(request)`, responds itself by returning a `Response`, and refuses by raising an
`ApiError`. Each link turns an exception into a `Response`, so that the stages above it always get one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeAlias

from gateway.azure.key_redaction import secrets_of
from gateway.azure.resources import Target
from gateway.errors import ApiError, UpstreamTimeout
from gateway.logs import exception_fields, get_logger, redacted
from gateway.request import Request
from gateway.response import Response
from gateway.services import Services
from gateway.transport.file_descriptors import caused_by_exhaustion, descriptors_exhausted

__all__ = ("BeforeBody", "Next", "Stage", "compile_pipeline")

Next: TypeAlias = Callable[[Request], Awaitable[Response]]
BeforeBody: TypeAlias = Callable[[Request], Awaitable[None]]

# A mistake in the settings of a stage: the path to the setting, and a description.
Finding: TypeAlias = tuple[Sequence[str | int], str]


class Stage:
    """One plugin in a pipeline. Subclass it as a dataclass: its fields are its settings.

    `needs`, `provides` and `must_precede` are names such as `caller`, `credential`, `deployment` and `api_version`;
    `gateway check` reports a wrong order. A plain tuple is enough: `provides = ("caller",)`.
    """

    id: str = ""
    """The name in the pipeline, such as `burst` for `rate_limit as burst`; set when the stage is loaded."""

    idle = False
    """Set it to True in `start` if the stage has nothing to do for this team: requests then skip it."""

    @property
    def needs_usage(self) -> bool:
        """Whether the stage needs `Outcome.usage`: the gateway then asks Azure to report the tokens of streams."""
        return False

    @property
    def needs(self) -> Iterable[str]:
        """Names that stages above this one must provide."""
        return ()

    @property
    def provides(self) -> Iterable[str]:
        """Names that this stage provides to the stages below it."""
        return ()

    @property
    def must_precede(self) -> Iterable[str]:
        """Names that no stage above this one may provide: this stage must be above their providers."""
        return ()

    @property
    def targets(self) -> Iterable[Target]:
        """Targets to which this stage may send requests, besides the team's resource; read after `check`."""
        return ()

    def check(self, services: Services) -> Iterable[Finding]:
        """Yield `(path to the setting, description)` for each mistake that the types cannot express."""
        return ()

    async def start(self, services: Services) -> None:
        """Prepare, once, before the first request."""

    async def stop(self) -> None:
        """Release what `start` acquired; called in reverse order, also if `start` failed half-way."""

    async def before_body(self, request: Request) -> None:
        """Reserve what this request needs, before any stage reads the first byte of a body that has not arrived.

        The gateway calls it at most once, on all stages in order, including those that the request has not reached yet;
        never if the body arrives with the head. Raise `ApiError` to refuse: the client gets the error, and the body is
        not read. Release the reservation in `request.defer`, and note it in `request.reservations`, so that `__call__`
        does not repeat it. The caller is known if the stage that reads the body is below the one that authenticates.
        """

    async def __call__(self, request: Request, call_next: Next) -> Response:
        """Handle one request. `await call_next(request)` is the rest of the pipeline."""
        return await call_next(request)


def compile_pipeline(stages: Sequence[tuple[str, Callable[[Request, Next], Awaitable[Response]]]], end: Next) -> Next:
    """Compile (id, stage) pairs and the end of the pipeline into one callable; done once per team."""
    call_next = _link("upstream", lambda request, _: end(request), end)
    for name, stage in reversed(stages):
        # Calling a bound method costs half of calling the object.
        call = stage.__call__ if isinstance(stage, Stage) else stage
        call_next = _link(name, call, call_next)
    return call_next


def _link(name: str, stage: Callable[[Request, Next], Awaitable[Response]], call_next: Next) -> Next:
    async def linked(request: Request) -> Response:
        try:
            response = await stage(request, call_next)
        except asyncio.CancelledError:
            if not request._exchange.deadline_hit():
                raise
            return _deadline_exceeded(name, request)
        except ApiError as exc:
            # Without a traceback the error refers to no frame, and so to no request: no cycle to collect.
            return Response.from_error(exc.with_traceback(None))
        except Exception as exc:  # a bug in one stage must not stop the others
            return _failed(name, exc, request)
        if response.__class__ is Response:
            return response
        result: object = response  # the stage of a plugin may have no types
        if not isinstance(result, Response):
            return _failed(name, TypeError(f"returned {type(result).__name__}, not a Response"), request)
        return result

    return linked


def _deadline_exceeded(name: str, request: Request) -> Response:
    waited_for = "Azure OpenAI" if name == "upstream" else f"the gateway's stage {name!r}"
    get_logger().warning("first_byte_deadline_exceeded", stage=name, request_id=request.id)
    message = f"no response in time: {waited_for} did not finish before the deadline; retry, or send a smaller request"
    return Response.from_error(
        UpstreamTimeout(message, fault="deadline")
        if name == "upstream"
        else ApiError(504, message, code="deadline_exceeded")
    )


def _failed(name: str, exc: Exception, request: Request) -> Response:
    secrets = secrets_of(request.headers, request.target)
    get_logger().error(
        "stage_failed",
        stage=name,
        request_id=request.id,
        **redacted(exception_fields(exc), secrets),
    )
    if caused_by_exhaustion(exc):
        return Response.from_error(descriptors_exhausted())
    error = ApiError(
        500, f"an internal error occurred in the gateway. Contact its operator and quote request id {request.id}"
    )
    response = Response.from_error(error)
    response.error = exc.with_traceback(None)
    return response
