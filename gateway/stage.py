"""The contract of a stage, and how a list of stages becomes one callable.

A pipeline is an onion: the first stage of the list sees the request first and the response last. A stage
passes on with `await call_next(request)`, answers by itself by returning a `Response`, and refuses by
raising an `ApiError`. Each link turns an exception into a `Response`, so that the stages above it always
get one.
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

# A mistake that a stage finds in its own settings: the path to the setting, and what is wrong with it.
Finding: TypeAlias = tuple[Sequence[str | int], str]


class Stage:
    """One plugin in a pipeline. Subclass it as a dataclass: its fields are its settings.

    `needs` and `provides` are names such as `caller`, `credential`, `deployment` and `api_version`;
    `gateway check` reports a wrong order. A plain tuple will do: `provides = ("caller",)`.
    """

    id: str = ""
    """The name in the pipeline, such as `burst` for `rate_limit as burst`; set when it is loaded."""

    idle = False
    """Set by `start` where the stage has nothing to do for this team: it is left out of the requests' way."""

    @property
    def needs_usage(self) -> bool:
        """Whether `Outcome.usage` is wanted: the tokens that an exchange used, for which Azure is asked then."""
        return False

    @property
    def needs(self) -> Iterable[str]:
        """What stages further up must have provided."""
        return ()

    @property
    def provides(self) -> Iterable[str]:
        """What this stage provides to those below it."""
        return ()

    @property
    def above(self) -> Iterable[str]:
        """What no stage further up may have provided: this stage stands above those that do."""
        return ()

    @property
    def targets(self) -> Iterable[Target]:
        """Where this stage may send requests, besides to the team's resource; asked after `check`."""
        return ()

    def check(self, services: Services) -> Iterable[Finding]:
        """Yield `(path to the setting, what is wrong)` for each mistake that the types do not show."""
        return ()

    async def start(self, services: Services) -> None:
        """Get ready, once, before the first request."""

    async def stop(self) -> None:
        """Let go of what `start` took; called in reverse order, also when `start` failed half-way."""

    async def before_body(self, request: Request) -> None:
        """Take what this request needs, before the first byte of a body that has not arrived is read by any stage.

        Called once at most, of all stages in order, also of those that the request has not come to yet, and not at all
        for a body that arrives with its head. Raise `ApiError` to refuse: its client is answered, and the body is never
        read. What is taken here is given back in `request.defer`, and noted in `request.taken`, so that `__call__` does
        not take it again. The caller is known if the stage that reads the body is below the one that authenticates.
        """

    async def __call__(self, request: Request, call_next: Next) -> Response:
        """Handle one request. `await call_next(request)` is the rest of the pipeline."""
        return await call_next(request)


def compile_pipeline(stages: Sequence[tuple[str, Callable[[Request, Next], Awaitable[Response]]]], end: Next) -> Next:
    """Compile (id, stage) pairs and the end of the pipeline into one callable; done once per team."""
    call_next = _link("upstream", lambda request, _: end(request), end)
    for name, stage in reversed(stages):
        # A bound method is called at half the cost of an object that has one.
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
            return _too_late(name, request)
        except ApiError as exc:
            # Without its traceback the error holds no frame, and so no request: less for the collector to do.
            return Response.from_error(exc.with_traceback(None))
        except Exception as exc:  # a stage's bug must not take the others down
            return _broken(name, exc, request)
        if response.__class__ is Response:
            return response
        answer: object = response  # a stranger's stage may have no types
        if not isinstance(answer, Response):
            return _broken(name, TypeError(f"returned {type(answer).__name__}, not a Response"), request)
        return answer

    return linked


def _too_late(name: str, request: Request) -> Response:
    where = "Azure OpenAI" if name == "upstream" else f"the gateway's stage {name!r}"
    get_logger().warning("deadline before the first byte", stage=name, request_id=request.id)
    message = f"no answer in time: {where} was still at work"
    return Response.from_error(
        UpstreamTimeout(message, fault="deadline")
        if name == "upstream"
        else ApiError(504, message, code="deadline_exceeded")
    )


def _broken(name: str, exc: Exception, request: Request) -> Response:
    hidden = secrets_of(request.headers, request.target)
    get_logger().error(
        "a stage failed",
        stage=name,
        request_id=request.id,
        **redacted(exception_fields(exc), hidden),
    )
    if caused_by_exhaustion(exc):
        return Response.from_error(descriptors_exhausted())
    answer = ApiError(
        500, f"the gateway failed on this request. Contact its operator and quote request id {request.id}"
    )
    response = Response.from_error(answer)
    response.error = exc.with_traceback(None)
    return response
