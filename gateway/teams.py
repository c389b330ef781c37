"""Teams: whose request it is, and the compiled pipeline that handles it."""

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


# How long, in seconds, a stage may take to stop.
_STOPPING = 10.0


@dataclass(frozen=True)
class Match:
    """How a team's requests are told from others': any one of these is enough."""

    path_prefix: tuple[str, ...] = ()
    host: tuple[str, ...] = ()
    keys: tuple[ListedKey, ...] = ()
    claims: Claims = field(default_factory=dict)


@dataclass
class Team:
    """One team as configured: its stages in order, and where its requests go unless a stage says else."""

    name: str
    stages: Sequence[Stage]
    target: Target
    targets: Sequence[Target] = ()
    """Where else its stages may send requests, such as the deployments that models are mapped to."""
    match: Match = field(default_factory=Match)
    services: Mapping[str, Services] = field(default_factory=dict)
    pipeline: Next | None = None
    metered: bool = False
    """Whether one of its stages wants to know what exchanges use."""
    before_body: tuple[BeforeBody, ...] = ()
    """What its stages do before a body that has not arrived is read."""

    async def start(self, end: Next) -> None:
        """Start the stages and compile the pipeline; those already started are stopped if one fails."""
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
                await _within(_STOPPING, stage.stop())
            except (Exception, SystemExit, asyncio.CancelledError) as exc:
                if _is_cancelled(exc):
                    raise
                slow = isinstance(exc, TimeoutError)
                get_logger().error(
                    "a stage failed to stop",
                    team=self.name,
                    stage=stage.id,
                    reason=f"it took more than {_STOPPING:g} s" if slow else _described(exc, stage),
                )


async def _within(seconds: float, work: Coroutine[Any, Any, None]) -> None:
    """Wait for some work, so long at most: it is left alone then, as it may not let itself be cancelled."""

    async def done() -> None:
        try:
            await work
        except SystemExit as exc:  # of a task it would end the loop
            raise RuntimeError(f"SystemExit: {exc}") from None

    task = asyncio.create_task(done())
    try:
        await asyncio.wait((task,), timeout=seconds)
    finally:
        if not task.done():
            task.cancel()
    if not task.done():
        raise TimeoutError
    await task


def _is_cancelled(exc: BaseException) -> bool:
    """Whether it is this task that is cancelled, and not one that a stage waited for."""
    task = asyncio.current_task()
    return isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def _described(exc: BaseException, stage: Stage) -> str:
    """Return an exception's name and words, without what of the stage's settings is secret."""
    hidden = [str(getattr(stage, name)) for name, (kind, _) in settings_of(type(stage)).items() if is_secret(kind)]
    shown = redacted({"text": f"{type(exc).__name__}: {exc}"}, [value for value in hidden if value not in ("", "None")])
    return str(shown["text"])


class Background(Protocol):
    """What a configuration has done beside requests, such as fetching tokens, from its start to its stop."""

    @property
    def fetched(self) -> Collection[str]:
        """The names under which it keeps what the next configuration need not fetch again."""

    def start(self) -> None:
        """Begin, without waiting for anything."""

    async def stop(self) -> None:
        """End."""


class Teams:
    """All teams, found by path prefix, host name, key digest or a token's claims, else the default team."""

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
        """Those of all pools."""
        self.resources = tuple(resources)
        """Those that the configuration names."""
        self._background: Sequence[Background] = (*background, *((issuers,) if issuers is not None else ()))
        self._prefixes = {prefix: team for team in others for prefix in team.match.path_prefix}
        self._hosts = {host: team for team in others for host in team.match.host}
        self._keys = {key.digest: (key, team) for team in others for key in team.match.keys}
        self._members = [(team.match.claims, team) for team in others if team.match.claims]

    @property
    def spaces(self) -> set[tuple[str, str]]:
        """The places of its stages' state: (team, stage id)."""
        return {(team.name, stage.id) for team in self.all for stage in team.stages}

    @property
    def fetched(self) -> set[str]:
        """The names under which tokens and keys are kept for the configuration that follows."""
        return {name for each in self._background for name in each.fetched}

    async def start(self, end: Next) -> None:
        """Start every team; those already started are stopped if one fails."""
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
        """Stop every team; what they share may go on, in those that follow them."""
        await asyncio.gather(*(each.stop() for each in self._background))
        await asyncio.gather(*(team.stop() for team in self.all))

    def find(self, prefix: str, headers: Headers, judgement: TokenVerification | None = None) -> Team | None:
        """Return the team of a request, or None where no team has its path prefix.

        `judgement` is what there is to say of its token. Raises ApiError 401 where the key belongs to a team that the
        path or the host name does not lead to, and 503 where its token would say whose it is, and cannot be judged.
        """
        team = self._prefixes.get(prefix) if prefix else (self._hosts.get(_host(headers)) if self._hosts else None)
        if prefix and team is None:
            return None
        owner = self._owner(headers) if self._keys else None
        if owner is None:
            return team or (self._of_member(judgement) if judgement is not None and self._members else self.default)
        if team is not None and team is not owner:
            # As any wrong key: whose it is, is nobody's business.
            raise ApiError.invalid_key()
        return owner

    def _owner(self, headers: Headers) -> Team | None:
        key = presented_key(headers)
        if key is None:
            return None
        listed, team = self._keys.get(key.digest, (None, None))
        # The dict has found it by hash; the comparison that decides takes the same time for every digest.
        return team if listed is not None and listed.is_of(key) else None

    def _of_member(self, judgement: TokenVerification) -> Team:
        if judgement.retry_after is not None:
            raise verification_unavailable(judgement)
        who = judgement.identity
        return next((team for claims, team in self._members if who is not None and who.has(claims)), self.default)


def _host(headers: Headers) -> str:
    """Return the name in the Host header, in lower case and without its port."""
    name, colon, port = (headers.get("host") or "").rpartition(":")
    return (name if port.isdigit() else name + colon + port).lower()
