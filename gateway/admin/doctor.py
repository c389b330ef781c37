"""`gateway doctor`: whether each resource and each deployment of a configuration answers, and if not, why.

Resources are asked for their models, which costs nothing; deployments for a chat and a stream of one token, or for an
embedding of one. They are asked by the way that requests take, but for the stages.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from gateway.admin.diagnosis import (
    TOO_OLD,
    cuts_off,
    lacks_operation,
    message_of,
    of_error,
    of_region,
    of_status,
    wants_other_limit,
)
from gateway.auth.credentials import Credential
from gateway.auth.entra_tokens import TokenUnavailable
from gateway.azure.operations import BY_NAME
from gateway.azure.resources import Resource, Target
from gateway.body.request_body import Body
from gateway.config import Loaded
from gateway.errors import ApiError, StreamBroken, UpstreamTimeout
from gateway.exchange import Exchange
from gateway.protocol.headers import Headers
from gateway.protocol.sse import Event, EventSplitter
from gateway.request import Request
from gateway.response import Response
from gateway.stage import compile_pipeline
from gateway.teams import Team
from gateway.upstream import Upstream

__all__ = ("Finding", "Plan", "examine", "plan")

Probe = Literal["models", "chat", "stream", "embeddings"]
_WORD = "Hi"
_MOST = 256 * 1024  # of an error's body, in bytes


class Finding(msgspec.Struct, frozen=True):
    """What one probe found. Times are milliseconds."""

    resource: str
    deployment: str | None
    probe: Probe
    ok: bool
    verdict: str
    ms: float | None = None


@dataclass(frozen=True)
class _Asked:
    """A deployment, and the team by whose pipeline it is asked."""

    resource: Resource
    deployment: str
    team: Team


@dataclass(frozen=True)
class Plan:
    """What is going to be asked."""

    resources: Sequence[Resource]
    deployments: Sequence[_Asked]

    def __str__(self) -> str:
        count = len(self.deployments)
        return (
            f"asking {_several(len(self.resources), 'resource')} for models, and {_several(count, 'deployment')} for a "
            f"chat and a stream, or an embedding: at most one token each, so {2 * count} at most, and prompts of a word"
        )


def plan(loaded: Loaded) -> Plan:
    """Return what there is to ask: all resources, and every deployment that models are mapped to, or that is pooled."""
    found: dict[tuple[str, str], _Asked] = {}
    for pool in loaded.pools.values():
        for each in pool.deployments:
            team = next((team for team in loaded.teams.all if _maps(team, pool.name)), loaded.teams.default)
            found.setdefault((each.resource.name, each.name), _Asked(each.resource, each.name, team))
    for team in loaded.teams.all:
        for target in team.targets:
            if target.resource is not None and target.deployment is not None:
                found.setdefault(
                    (target.resource.name, target.deployment), _Asked(target.resource, target.deployment, team)
                )
    order = list(loaded.resources)
    deployments = sorted(found.values(), key=lambda each: order.index(each.resource.name))
    return Plan(list(loaded.resources.values()), deployments)


def _maps(team: Team, pool: str) -> bool:
    return any(target.pool is not None and target.pool.name == pool for target in team.targets)


async def examine(
    what: Plan, upstream: Upstream, key: Credential | None = None, seconds: float = 30.0
) -> AsyncIterator[Finding]:
    """Ask, and yield what each probe found; one takes so many seconds at most.

    `key` is shown to resources that have no credential of their own.
    """
    for resource in what.resources:
        doctor = _Doctor(resource, upstream, key, seconds)
        finding = await doctor.models()
        yield finding
        for each in what.deployments:
            if each.resource is resource and doctor.reached:
                for found in await doctor.deployment(each):
                    yield found


class _Doctor:
    """Asks one resource."""

    def __init__(self, resource: Resource, upstream: Upstream, key: Credential | None, seconds: float) -> None:
        self.reached = False
        """Whether it answered at all, and took the credential, so that its deployments can be asked."""
        self._region_told = False
        self._resource = resource
        self._upstream = upstream
        self._credential = None if resource.has_credential else key
        self._seconds = seconds

    async def models(self) -> Finding:
        """Ask for the models: whether it is there, takes the credential, and is where it is said to be."""
        resource = self._resource
        if not resource.has_credential and self._credential is None:
            return self._finding(
                None, "models", "it has no credential of its own; set AZURE_OPENAI_API_KEY to the one to try it with"
            )
        if resource.tokens is not None:
            try:
                await resource.tokens.credential()
            except TokenUnavailable as exc:
                return self._finding(None, "models", f"no Entra token: {exc.reason}")
        begun = time.monotonic()
        try:
            response = await self._upstream.models(resource, self._seconds, self._credential)
        except ApiError as exc:
            return self._finding(None, "models", of_error(exc))
        took = _ms(begun)
        # (One that has no such path may still have the deployments.)
        self.reached = response.status < 400 or response.status in (404, 429)
        if response.status >= 400 and response.status != 429:
            body = (await response.read(_MOST)).decode("utf-8", "replace")
            return self._finding(None, "models", self._words(response.status, body), took)
        region = response.headers.get("x-ms-region")
        self._region_told = region is not None
        if (wrong := of_region(resource, region)) is not None:
            return self._finding(None, "models", wrong, took)
        told = f"in {region}" if region else "" if resource.region is None else "Azure does not say its region"
        return self._finding(None, "models", told, took, ok=True)

    async def deployment(self, asked: _Asked) -> list[Finding]:
        """Ask for a chat and a stream, or, where it is none for chats, for an embedding."""
        chat = await self._ask(asked, "chat", "chat.completions", {"messages": [_MESSAGE]})
        if chat is None or chat.verdict.startswith(f"{TOO_OLD}:"):
            embedding = await self._ask(asked, "embeddings", "embeddings", {"input": _WORD})
            if embedding is not None and (chat is None or embedding.ok):
                return [embedding]
        if chat is None:
            words = "it is there; it takes neither chats nor embeddings, so nothing else was asked"
            return [self._finding(asked.deployment, "chat", words, ok=True)]
        if not chat.ok:
            return [chat]
        stream = await self._ask(asked, "stream", "chat.completions", {"messages": [_MESSAGE], "stream": True})
        return [chat] if stream is None else [chat, stream]

    async def _ask(self, asked: _Asked, probe: Probe, operation: str, body: dict[str, Any]) -> Finding | None:
        """Send one probe; None where the model has no such operation."""
        try:
            version = await _version(asked, operation)
            most = "max_completion_tokens" if version == "v1" or version >= "2024-09-01" else "max_tokens"
            for name in (most, "max_tokens" if most != "max_tokens" else "max_completion_tokens"):
                sent = body if operation == "embeddings" else {**body, name: 1}
                finding, again = await self._send(asked, probe, operation, sent, version)
                if not again or operation == "embeddings":
                    return finding
            return finding
        except ApiError as exc:
            return self._finding(asked.deployment, probe, of_error(exc))

    async def _send(
        self, asked: _Asked, probe: Probe, operation: str, body: dict[str, Any], version: str
    ) -> tuple[Finding | None, bool]:
        """Send it once; returns the finding, and whether the model wants its limit of tokens by another name."""
        exchange = Exchange()
        target = Target(asked.resource, asked.deployment, version, self._credential)
        request = _request(operation, target, {"model": asked.deployment, **body}, exchange)
        request.first_byte_deadline = time.monotonic() + self._seconds
        begun = time.monotonic()
        try:
            async with asyncio.timeout(self._seconds):
                response = await self._upstream(request)
                first = _ms(begun)
                region = None if self._region_told else response.headers.get("x-ms-region")
                if (wrong := of_region(asked.resource, region)) is not None:
                    return self._finding(asked.deployment, probe, wrong, first), False
                if response.status >= 400:
                    return await self._of_status(asked, probe, response, version, first)
                if probe != "stream":
                    await response.read()
                    return self._finding(asked.deployment, probe, "", _ms(begun), ok=True), False
                first, asynchronous = await _read_stream(response, begun)
        except StreamBroken as exc:
            return self._finding(asked.deployment, probe, str(exc)), False
        except TimeoutError:
            return self._finding(asked.deployment, probe, of_error(UpstreamTimeout(""))), False
        finally:
            exchange.finish()
        words = f"content filter {'asynchronous' if asynchronous else 'synchronous'}"
        return self._finding(asked.deployment, probe, words, first, ok=True), False

    async def _of_status(
        self, asked: _Asked, probe: Probe, response: Response, version: str, took: float
    ) -> tuple[Finding | None, bool]:
        status, body = response.status, (await response.read(_MOST)).decode("utf-8", "replace")
        if status == 400 and cuts_off(body):
            words = "it thinks, and had no token left to answer with"
            return self._finding(asked.deployment, probe, words, took, ok=True), False
        if status in (400, 404) and lacks_operation(body) and "max_" not in body:
            return None, False
        if status == 429:
            wait = response.retry_after(message_of(body))
            words = "it is there, and its quota is used up" + (f" for {wait:g} s" if wait is not None else "")
            return self._finding(asked.deployment, probe, words, took, ok=True), False
        return self._finding(asked.deployment, probe, self._words(status, body, version), took), (
            status == 400 and wants_other_limit(body)
        )

    def _words(self, status: int, body: str, version: str | None = None) -> str:
        shown = self._credential
        by_token = self._resource.tokens is not None or (shown is not None and shown.bearer)
        return of_status(self._resource, status, body, version, by_token=by_token)

    def _finding(
        self, deployment: str | None, probe: Probe, verdict: str, ms: float | None = None, *, ok: bool = False
    ) -> Finding:
        return Finding(self._resource.name, deployment, probe, ok, verdict, ms)


_MESSAGE = {"role": "user", "content": _WORD}


def _request(operation: str, target: Target, body: Mapping[str, Any], exchange: Exchange) -> Request:
    row = BY_NAME[operation]
    return Request(
        id=f"doctor-{os.urandom(8).hex()}",
        operation=row,
        method="POST",
        path=row.path,
        headers=Headers({"content-type": "application/json"}),
        body=Body(msgspec.json.encode(body)),
        team="",
        target=target,
        exchange=exchange,
    )


async def _version(asked: _Asked, operation: str) -> str:
    """Return the api-version that a team's stages choose for an operation of a deployment."""
    chosen: list[str | None] = []

    async def end(request: Request) -> Response:
        chosen.append(request.target.api_version)
        return Response()

    stages = [stage for stage in asked.team.stages if "api_version" in tuple(stage.provides)]
    for stage in stages:
        await stage.start(asked.team.services[stage.id])
    try:
        pipeline = compile_pipeline([(stage.id, stage) for stage in stages], end)
        target = Target(asked.resource, asked.deployment)
        answer = await pipeline(_request(operation, target, {"model": asked.deployment}, Exchange()))
        if isinstance(answer.error, ApiError):
            raise answer.error
    finally:
        for stage in stages:
            await stage.stop()
    version = chosen[0] if chosen else None
    return version or asked.resource.api_version or ""


async def _read_stream(response: Response, begun: float) -> tuple[float, bool]:
    """Read a stream to its end; returns when its first byte came, and whether its filter is asynchronous."""
    first = 0.0
    splitter = EventSplitter()
    asynchronous = False
    async for piece in response.raw_chunks():
        first = first or _ms(begun)
        for each in splitter.feed(piece):
            content = Event(each).json()
            choices = content.get("choices") if isinstance(content, dict) else None
            listed = choices if isinstance(choices, list) else ()
            asynchronous |= any(isinstance(each, dict) and "content_filter_offsets" in each for each in listed)
    return first or _ms(begun), asynchronous


def _ms(begun: float) -> float:
    return round((time.monotonic() - begun) * 1000, 1)


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
