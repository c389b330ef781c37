"""Teams: find the team of a request; each has a compiled pipeline of stages."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gateway.auth.credentials import ListedKey, presented_key
from gateway.auth.oidc import Claims, Issuers, TokenVerification, verification_unavailable
from gateway.azure.resources import Pool, Resource, Target
from gateway.errors import ApiError, StartError
from gateway.fields import is_secret, settings_of
from gateway.logs import get_logger, redacted
from gateway.protocol.headers import Headers
from gateway.services import Services, Shared
from gateway.stage import BeforeBody, Next, Stage, compile_pipeline

__all__ = ("Background", "Match", "Team", "Teams")


# Timeout of a stage's `stop`, in seconds.
_STOP_TIMEOUT = 10.0


@dataclass(frozen=True)
class Match:
    """How a team's requests are recognized: one match is enough."""

    path_prefix: tuple[str, ...] = ()
    host: tuple[str, ...] = ()
    keys: tuple[ListedKey, ...] = ()
    claims: Claims = field(default_factory=dict)


@dataclass
class Team:
    """One team: its stages in order, and the target of its requests unless a stage changes it."""

    name: str
    stages: Sequence[Stage]
    target: Target
    targets: Sequence[Target] = ()
    """Other targets of its stages, such as the deployments that models are mapped to."""
    match: Match = field(default_factory=Match)
    services: Mapping[str, Services] = field(default_factory=dict)
    pipeline: Next | None = None
    metered: bool = False
    """Whether one of its stages needs the usage of exchanges."""
    before_body: tuple[BeforeBody, ...] = ()
    """The `before_body` methods of its stages."""

    async def start(self, end: Next) -> None:
        """Start the stages and compile the pipeline. If one fails, stop those already started."""
        started: list[Stage] = []
        try:
            for stage in self.stages:
                started.append(stage)
                try:
                    await stage.start(self.services[stage.id])
                except (Exception, SystemExit, asyncio.CancelledError) as exc:
                    if _is_cancelled(exc):
                        raise
                    raise StartError(
                        f"the stage {stage.id!r} of team {self.name!r} cannot start: {_described(exc, stage)}"
                    ) from exc
        except BaseException:
            await self._stop(started)
            raise
        active = [(stage.id, stage) for stage in self.stages if not stage.idle]
        self.metered = any(stage.needs_usage for _, stage in active)
        self.before_body = tuple(
            stage.before_body for _, stage in active if type(stage).before_body is not Stage.before_body
        )
        self.pipeline = compile_pipeline(active, end)

    async def stop(self) -> None:
        """Stop the stages, in reverse order."""
        await self._stop(self.stages)

    async def _stop(self, stages: Sequence[Stage]) -> None:
        for stage in reversed(stages):
            try:
                await _within(_STOP_TIMEOUT, stage.stop())
            except (Exception, SystemExit, asyncio.CancelledError) as exc:
                if _is_cancelled(exc):
                    raise
                slow = isinstance(exc, TimeoutError)
                get_logger().error(
                    "stage_stop_failed",
                    team=self.name,
                    stage=stage.id,
                    reason=f"it took longer than {_STOP_TIMEOUT:g} s" if slow else _described(exc, stage),
                )


async def _within(seconds: float, work: Coroutine[Any, Any, None]) -> None:
    """Wait for some work with a timeout, without waiting for its cancellation, which it may ignore."""

    async def run() -> None:
        try:
            await work
        except SystemExit as exc:  # in a task it would end the loop
            raise RuntimeError(f"SystemExit: {exc}") from None

    task = asyncio.create_task(run())
    try:
        await asyncio.wait((task,), timeout=seconds)
    finally:
        if not task.done():
            task.cancel()
    if not task.done():
        raise TimeoutError
    await task


def _is_cancelled(exc: BaseException) -> bool:
    """Whether this task is cancelled, and not one that a stage waited for."""
    task = asyncio.current_task()
    return isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def _described(exc: BaseException, stage: Stage) -> str:
    """Return an exception's name and message, with the secret settings of the stage redacted."""
    secrets = [str(getattr(stage, name)) for name, (kind, _) in settings_of(type(stage)).items() if is_secret(kind)]
    shown = redacted(
        {"text": f"{type(exc).__name__}: {exc}"}, [value for value in secrets if value not in ("", "None")]
    )
    return str(shown["text"])


class Background(Protocol):
    """A background job of a configuration, such as refreshing tokens, from its start to its stop."""

    @property
    def fetched(self) -> Collection[str]:
        """The names of its fetched data, which the next configuration can reuse."""

    def start(self) -> None:
        """Start without blocking."""

    async def stop(self) -> None:
        """Stop."""


class Teams:
    """All teams. A request's team is found by path prefix, host, key digest or token claims; else the default team."""

    def __init__(
        self,
        default: Team,
        others: Sequence[Team] = (),
        shared: Shared | None = None,
        issuers: Issuers | None = None,
        background: Sequence[Background] = (),
        pools: Iterable[Pool] = (),
        resources: Iterable[Resource] = (),
    ) -> None:
        self.all = (default, *others)
        self.default = default
        self.shared = shared or Shared()
        self.issuers = issuers
        self.deployments = [deployment for pool in pools for deployment in pool.deployments]
        """The deployments of all pools."""
        self.resources = tuple(resources)
        """The resources of the configuration."""
        self._background: Sequence[Background] = (*background, *((issuers,) if issuers is not None else ()))
        self._by_prefix = {prefix: team for team in others for prefix in team.match.path_prefix}
        self._by_host = {host: team for team in others for host in team.match.host}
        self._by_key = {key.digest: (key, team) for team in others for key in team.match.keys}
        self._by_claims = [(team.match.claims, team) for team in others if team.match.claims]

    @property
    def stage_keys(self) -> set[tuple[str, str]]:
        """The keys of the state of all stages: (team, stage id)."""
        return {(team.name, stage.id) for team in self.all for stage in team.stages}

    @property
    def fetched(self) -> set[str]:
        """The names of the tokens and keys that the next configuration can reuse."""
        return {name for each in self._background for name in each.fetched}

    async def start(self, end: Next) -> None:
        """Start every team. If one fails, stop those already started."""
        started: list[Team] = []
        try:
            for team in self.all:
                await team.start(end)
                started.append(team)
        except BaseException:
            for team in reversed(started):
                await team.stop()
            raise
        for each in self._background:
            each.start()

    async def stop(self) -> None:
        """Stop every team. Shared services stay open: the teams of the next configuration use them."""
        await asyncio.gather(*(each.stop() for each in self._background))
        await asyncio.gather(*(team.stop() for team in self.all))

    def find(self, prefix: str, headers: Headers, verification: TokenVerification | None = None) -> Team | None:
        """Return the team of a request, or None if no team has its path prefix.

        `verification` is that of its token, if it has one. Raises ApiError 401 if the key belongs to another team than
        the one of the path or the host, and 503 if the team depends on a token that cannot be verified at the moment.
        """
        team = self._by_prefix.get(prefix) if prefix else (self._by_host.get(_host(headers)) if self._by_host else None)
        if prefix and team is None:
            return None
        owner = self._team_by_key(headers) if self._by_key else None
        if owner is None:
            return team or (
                self._team_by_claims(verification) if verification is not None and self._by_claims else self.default
            )
        if team is not None and team is not owner:
            # The same error as for any wrong key: it must not reveal that another team has this key.
            raise ApiError.invalid_key()
        return owner

    def _team_by_key(self, headers: Headers) -> Team | None:
        key = presented_key(headers)
        if key is None:
            return None
        listed, team = self._by_key.get(key.digest, (None, None))
        # The lookup is by hash; the comparison that decides takes constant time.
        return team if listed is not None and listed.is_of(key) else None

    def _team_by_claims(self, verification: TokenVerification) -> Team:
        if verification.retry_after is not None:
            raise verification_unavailable(verification)
        identity = verification.identity
        if identity is None:
            return self.default
        return next((team for claims, team in self._by_claims if identity.has(claims)), self.default)


def _host(headers: Headers) -> str:
    """Return the host name in the Host header, in lower case and without its port."""
    name, colon, port = (headers.get("host") or "").rpartition(":")
    return (name if port.isdigit() else name + colon + port).lower()
