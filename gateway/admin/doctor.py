"""`gateway doctor`: probes each resource and deployment of a configuration, and reports what is wrong.

A resource gets a request for its models, which costs nothing; a deployment one for a chat and a stream of one token, or
for an embedding of one. The requests take the usual path to Azure, without the stages.
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
    diagnose_error,
    diagnose_region,
    diagnose_status,
    expects_other_limit_name,
    is_cut_off,
    lacks_operation,
    message_of,
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
_PROMPT = "Hi"
_MAX_ERROR_BODY = 256 * 1024  # in bytes


class Finding(msgspec.Struct, frozen=True):
    """The result of one probe; `ms` is its time, in milliseconds."""

    resource: str
    deployment: str | None
    probe: Probe
    ok: bool
    verdict: str
    ms: float | None = None


@dataclass(frozen=True)
class _PlannedProbe:
    """A deployment, and the team whose pipeline chooses the api-version."""

    resource: Resource
    deployment: str
    team: Team


@dataclass(frozen=True)
class Plan:
    """The resources and deployments to probe."""

    resources: Sequence[Resource]
    deployments: Sequence[_PlannedProbe]

    def __str__(self) -> str:
        count = len(self.deployments)
        return (
            f"probing {_counted(len(self.resources), 'resource')} for models, and {_counted(count, 'deployment')} for "
            "a chat and a stream, or an embedding; at most one output token per request "
            f"({2 * count} in all), and prompts of one word"
        )


def plan(loaded: Loaded) -> Plan:
    """Return what to probe: all resources, and every deployment that a model is mapped to, or that is in a pool."""
    found: dict[tuple[str, str], _PlannedProbe] = {}
    for pool in loaded.pools.values():
        for each in pool.deployments:
            team = next((team for team in loaded.teams.all if _maps(team, pool.name)), loaded.teams.default)
            found.setdefault((each.resource.name, each.name), _PlannedProbe(each.resource, each.name, team))
    for team in loaded.teams.all:
        for target in team.targets:
            if target.resource is not None and target.deployment is not None:
                found.setdefault(
                    (target.resource.name, target.deployment), _PlannedProbe(target.resource, target.deployment, team)
                )
    order = list(loaded.resources)
    deployments = sorted(found.values(), key=lambda each: order.index(each.resource.name))
    return Plan(list(loaded.resources.values()), deployments)


def _maps(team: Team, pool: str) -> bool:
    return any(target.pool is not None and target.pool.name == pool for target in team.targets)


async def examine(
    planned: Plan, upstream: Upstream, key: Credential | None = None, seconds: float = 30.0
) -> AsyncIterator[Finding]:
    """Probe, and yield each result; `seconds` is the timeout of a probe.

    Resources without a stored credential get `key`.
    """
    for resource in planned.resources:
        doctor = _Doctor(resource, upstream, key, seconds)
        finding = await doctor.models()
        yield finding
        for each in planned.deployments:
            if each.resource is resource and doctor.reached:
                for found in await doctor.deployment(each):
                    yield found


class _Doctor:
    """Probes one resource and its deployments."""

    def __init__(self, resource: Resource, upstream: Upstream, key: Credential | None, seconds: float) -> None:
        self.reached = False
        """Whether it responded and accepted the credential, so that its deployments can be probed."""
        self._region_known = False
        self._resource = resource
        self._upstream = upstream
        self._credential = None if resource.has_credential else key
        self._seconds = seconds

    async def models(self) -> Finding:
        """Request the models: checks the endpoint, the credential and the region."""
        resource = self._resource
        if not resource.has_credential and self._credential is None:
            return self._finding(
                None, "models", "no stored credential; set AZURE_OPENAI_API_KEY to a key for this probe"
            )
        if resource.tokens is not None:
            try:
                await resource.tokens.credential()
            except TokenUnavailable as exc:
                return self._finding(None, "models", f"no Entra token: {exc.reason}")
        started = time.monotonic()
        try:
            response = await self._upstream.models(resource, self._seconds, self._credential)
        except ApiError as exc:
            return self._finding(None, "models", diagnose_error(exc))
        took = _ms(started)
        # (A resource without this path may still have the deployments.)
        self.reached = response.status < 400 or response.status in (404, 429)
        if response.status >= 400 and response.status != 429:
            body = (await response.read(_MAX_ERROR_BODY)).decode("utf-8", "replace")
            return self._finding(None, "models", self._message(response.status, body), took)
        region = response.headers.get("x-ms-region")
        self._region_known = region is not None
        if (wrong := diagnose_region(resource, region)) is not None:
            return self._finding(None, "models", wrong, took)
        verdict = f"in {region}" if region else "" if resource.region is None else "the response names no region"
        return self._finding(None, "models", verdict, took, ok=True)

    async def deployment(self, planned: _PlannedProbe) -> list[Finding]:
        """Request a chat and a stream, or an embedding if the model does not chat."""
        chat = await self._probe(planned, "chat", "chat.completions", {"messages": [_MESSAGE]})
        if chat is None or chat.verdict.startswith(f"{TOO_OLD}:"):
            embedding = await self._probe(planned, "embeddings", "embeddings", {"input": _PROMPT})
            if embedding is not None and (chat is None or embedding.ok):
                return [embedding]
        if chat is None:
            words = "the deployment exists, but supports neither chats nor embeddings, so no other probe was sent"
            return [self._finding(planned.deployment, "chat", words, ok=True)]
        if not chat.ok:
            return [chat]
        stream = await self._probe(planned, "stream", "chat.completions", {"messages": [_MESSAGE], "stream": True})
        return [chat] if stream is None else [chat, stream]

    async def _probe(
        self, planned: _PlannedProbe, probe: Probe, operation: str, body: dict[str, Any]
    ) -> Finding | None:
        """Send one probe; None if the model does not support the operation."""
        try:
            version = await _version(planned, operation)
            limit = "max_completion_tokens" if version == "v1" or version >= "2024-09-01" else "max_tokens"
            for name in (limit, "max_tokens" if limit != "max_tokens" else "max_completion_tokens"):
                sent = body if operation == "embeddings" else {**body, name: 1}
                finding, again = await self._send(planned, probe, operation, sent, version)
                if not again or operation == "embeddings":
                    return finding
            return finding
        except ApiError as exc:
            return self._finding(planned.deployment, probe, diagnose_error(exc))

    async def _send(
        self, planned: _PlannedProbe, probe: Probe, operation: str, body: dict[str, Any], version: str
    ) -> tuple[Finding | None, bool]:
        """Send it once; return the finding, and whether the model expects the token limit under another name."""
        exchange = Exchange()
        target = Target(planned.resource, planned.deployment, version, self._credential)
        request = _request(operation, target, {"model": planned.deployment, **body}, exchange)
        request.first_byte_deadline = time.monotonic() + self._seconds
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._seconds):
                response = await self._upstream(request)
                first = _ms(started)
                region = None if self._region_known else response.headers.get("x-ms-region")
                if (wrong := diagnose_region(planned.resource, region)) is not None:
                    return self._finding(planned.deployment, probe, wrong, first), False
                if response.status >= 400:
                    return await self._of_status(planned, probe, response, version, first)
                if probe != "stream":
                    await response.read()
                    return self._finding(planned.deployment, probe, "", _ms(started), ok=True), False
                first, asynchronous = await _read_stream(response, started)
        except StreamBroken as exc:
            return self._finding(planned.deployment, probe, str(exc)), False
        except TimeoutError:
            return self._finding(planned.deployment, probe, diagnose_error(UpstreamTimeout(""))), False
        finally:
            exchange.finish()
        words = f"content filter {'asynchronous' if asynchronous else 'synchronous'}"
        return self._finding(planned.deployment, probe, words, first, ok=True), False

    async def _of_status(
        self, planned: _PlannedProbe, probe: Probe, response: Response, version: str, took: float
    ) -> tuple[Finding | None, bool]:
        status, body = response.status, (await response.read(_MAX_ERROR_BODY)).decode("utf-8", "replace")
        if status == 400 and is_cut_off(body):
            words = "a reasoning model; no token was left for output"
            return self._finding(planned.deployment, probe, words, took, ok=True), False
        if status in (400, 404) and lacks_operation(body) and "max_" not in body:
            return None, False
        if status == 429:
            wait = response.retry_after(message_of(body))
            words = "the deployment exists, but its quota is used up" + (f" for {wait:g} s" if wait is not None else "")
            return self._finding(planned.deployment, probe, words, took, ok=True), False
        return self._finding(planned.deployment, probe, self._message(status, body, version), took), (
            status == 400 and expects_other_limit_name(body)
        )

    def _message(self, status: int, body: str, version: str | None = None) -> str:
        credential = self._credential
        by_token = self._resource.tokens is not None or (credential is not None and credential.bearer)
        return diagnose_status(self._resource, status, body, version, by_token=by_token)

    def _finding(
        self, deployment: str | None, probe: Probe, verdict: str, ms: float | None = None, *, ok: bool = False
    ) -> Finding:
        return Finding(self._resource.name, deployment, probe, ok, verdict, ms)


_MESSAGE = {"role": "user", "content": _PROMPT}


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


async def _version(planned: _PlannedProbe, operation: str) -> str:
    """Return the api-version that a team's stages choose for an operation on a deployment."""
    chosen: list[str | None] = []

    async def end(request: Request) -> Response:
        chosen.append(request.target.api_version)
        return Response()

    stages = [stage for stage in planned.team.stages if "api_version" in tuple(stage.provides)]
    for stage in stages:
        await stage.start(planned.team.services[stage.id])
    try:
        pipeline = compile_pipeline([(stage.id, stage) for stage in stages], end)
        target = Target(planned.resource, planned.deployment)
        response = await pipeline(_request(operation, target, {"model": planned.deployment}, Exchange()))
        if isinstance(response.error, ApiError):
            raise response.error
    finally:
        for stage in stages:
            await stage.stop()
    version = chosen[0] if chosen else None
    return version or planned.resource.api_version or ""


async def _read_stream(response: Response, started: float) -> tuple[float, bool]:
    """Read a stream to its end; return the time to its first byte, and whether its filter is asynchronous."""
    first = 0.0
    splitter = EventSplitter()
    asynchronous = False
    async for piece in response.raw_chunks():
        first = first or _ms(started)
        for each in splitter.feed(piece):
            content = Event(each).json()
            choices = content.get("choices") if isinstance(content, dict) else None
            items = choices if isinstance(choices, list) else ()
            asynchronous |= any(isinstance(each, dict) and "content_filter_offsets" in each for each in items)
    return first or _ms(started), asynchronous


def _ms(started: float) -> float:
    return round((time.monotonic() - started) * 1000, 1)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
