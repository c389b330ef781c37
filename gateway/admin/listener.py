"""The admin listener: read-only JSON for operators, on a separate address."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec
from aiohttp import web

from gateway.errors import ApiError, StartError
from gateway.settings import Listen
from gateway.transport.listener import Listener

__all__ = ("Admin", "group_by_resource", "merge_reports")

# Keep-alive timeout, in seconds.
_KEEP_ALIVE = 15.0


class Admin:
    """Serves `GET /admin/resources`: the result of `report`, a row for each deployment of a pool.

    `report` raises ApiError if nothing is known.
    """

    def __init__(self, report: Callable[[], Awaitable[list[dict[str, Any]]]]) -> None:
        self.address: Listen | None = None
        """The address, once it listens."""
        self._report = report
        self._listener: Listener | None = None
        self._servers: list[asyncio.Server] = []
        self._http: web.Server | None = None

    async def start(self, listen: Listen) -> None:
        """Listen. Raises StartError if the address is not available."""
        try:
            self._listener = Listener.open(listen)
        except StartError as exc:
            raise StartError(f"admin: {exc}") from None
        self.address = self._listener.address
        self._http = web.Server(self._handle, keepalive_timeout=_KEEP_ALIVE, access_log=None)
        loop = asyncio.get_running_loop()
        for sock in self._listener.sockets:
            self._servers.append(await loop.create_server(cast(Any, self._http), sock=sock))

    async def stop(self) -> None:
        """Close the listener and its connections."""
        for server in self._servers:
            server.close()
        if self._http is not None:
            await self._http.shutdown(timeout=1)
        if self._listener is not None:
            self._listener.close()
            self._listener.remove()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            if request.path != "/admin/resources":
                raise ApiError(404, "the admin listener has only GET /admin/resources", code="unknown_url")
            if request.method not in ("GET", "HEAD"):
                raise ApiError(
                    405, "the admin listener is read-only; use GET", code="method_not_allowed", headers={"allow": "GET"}
                )
            body = msgspec.json.format(msgspec.json.encode(group_by_resource(await self._report())), indent=2)
            status, headers = 200, {}
        except ApiError as exc:
            status, body, headers = exc.status, exc.body(), exc.headers
        return web.Response(status=status, body=body, content_type="application/json", headers=headers)


def group_by_resource(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Group rows of deployments by resource."""
    resources: dict[str, dict[str, Any]] = {}
    for row in rows:
        name, region = row["resource"], row["region"]
        found = resources.setdefault(name, {"name": name, "region": region, "deployments": []})
        found["deployments"].append({key: value for key, value in row.items() if key not in ("resource", "region")})
    return {"resources": list(resources.values())}


def merge_reports(reports: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Merge the reports of several processes to one row per deployment.

    Counts are summed; for the rest, the worst report counts.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in (row for report in reports for row in report):
        key = row["resource"], row["deployment"]
        known = rows.get(key)
        if known is None:
            rows[key] = {**row, "counts": dict(row["counts"])}
            continue
        requests = known["requests"] + row["requests"]
        failed = known["error_share"] * known["requests"] + row["error_share"] * row["requests"]
        if (_STATES.index(row["state"]), row["cool_down"]) > (_STATES.index(known["state"]), known["cool_down"]):
            known.update({name: row[name] for name in ("state", "reason", "cool_down")})
        known["error_share"] = round(failed / requests, 4) if requests else 0.0
        known["requests"] = requests
        known["in_flight"] += row["in_flight"]
        known["failures_in_a_row"] = max(known["failures_in_a_row"], row["failures_in_a_row"])
        headrooms = [each for each in (known["headroom"], row["headroom"]) if each is not None]
        known["headroom"] = min(headrooms, default=None)
        for reason, count in row["counts"].items():
            known["counts"][reason] = known["counts"].get(reason, 0) + count
    return list(rows.values())


_STATES = ("available", "half_open", "cooling_down", "open")
