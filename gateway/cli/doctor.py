"""`gateway doctor`: test each resource and deployment with a small request."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from gateway.cli.arguments import CONFIG_OR_FOLDER_HELP, Commands, config_path
from gateway.errors import StartError

__all__ = ("add_parser",)


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    doctor = commands.add_parser(
        "doctor",
        help="test each resource and deployment with a small request",
        description="Request the models of each resource, and a chat and a stream, or an embedding, of at most one "
        "token from each deployment. Print each problem, such as a wrong key, region, deployment or api-version; with "
        "any, the status is 1. Resources without a stored credential get $AZURE_OPENAI_API_KEY.",
    )
    doctor.add_argument("path", metavar="PATH", type=Path, nargs="?", help=CONFIG_OR_FOLDER_HELP)
    doctor.add_argument(
        "-n", "--dry-run", action="store_true", help="print the deployments that would be tested, without any request"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object per probe")
    doctor.add_argument(
        "--timeout",
        metavar="S",
        type=_seconds,
        default=30.0,
        help="timeout of a probe, in seconds (default: %(default)g)",
    )
    doctor.set_defaults(run=_doctor)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds above 0 and below 86400")
    return seconds


def _doctor(options: argparse.Namespace) -> int:
    from gateway import logs  # noqa: PLC0415
    from gateway.admin.doctor import plan  # noqa: PLC0415
    from gateway.auth.credentials import Credential, is_jwt, is_key  # noqa: PLC0415
    from gateway.config import load  # noqa: PLC0415

    loaded = load(config_path(options.path))
    logs.configure("error", "text")
    key = os.environ.get("AZURE_OPENAI_API_KEY") or None
    if key is not None and not is_key(key):
        raise StartError("$AZURE_OPENAI_API_KEY is set, but its value cannot be a key")
    credential = None if key is None else Credential(key, bearer=is_jwt(key))
    planned = plan(loaded)
    print(f"gateway: {planned}", file=sys.stderr, flush=True)
    if options.dry_run:
        for each in planned.deployments:
            print(f"{each.resource.name}/{each.deployment}")
        return 0
    return asyncio.run(_examine(loaded, planned, credential, options))


async def _examine(loaded: Any, planned: Any, credential: Any, options: argparse.Namespace) -> int:
    from gateway.admin.doctor import examine  # noqa: PLC0415
    from gateway.upstream import Upstream  # noqa: PLC0415

    upstream = Upstream(loaded.settings.timeouts)
    await upstream.start()
    count = wrong = 0
    try:
        async for finding in examine(planned, upstream, credential, options.timeout):
            count, wrong = count + 1, wrong + (not finding.ok)
            if options.json:
                print(msgspec.json.encode(finding).decode(), flush=True)
                continue
            name = finding.resource + (f"/{finding.deployment}" if finding.deployment else "")
            took = f"{finding.ms:.0f} ms" if finding.ms is not None else ""
            verdict = "ok" if finding.ok else "WRONG"
            line = f"{name:<32} {finding.probe:<10} {verdict:<6} {took:>8}  {finding.verdict}".rstrip()
            print(line if line.isprintable() else ascii(line), flush=True)
    finally:
        await loaded.teams.shared.close()
        await upstream.close()
    if wrong:
        print(f"gateway: {wrong} of {count} probes found a problem", file=sys.stderr)
    return 1 if wrong else 0
