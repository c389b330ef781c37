"""`gateway doctor`: ask each resource and deployment whether it answers."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from gateway.cli.arguments import CONFIG_HELP, Commands, config_path
from gateway.errors import StartError

__all__ = ("add_parser",)


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    doctor = commands.add_parser(
        "doctor",
        help="ask each resource and deployment whether it answers",
        description="Ask each resource for its models, and each deployment for a chat and a stream, or an embedding, "
        "of one token at most, and print what is wrong: a key, a region, a deployment's name, an api-version. Status 1 "
        "where anything is. Resources without a credential of their own are shown $AZURE_OPENAI_API_KEY.",
    )
    doctor.add_argument("path", metavar="PATH", type=Path, nargs="?", help=CONFIG_HELP + "; or the folder it is in")
    doctor.add_argument("-n", "--dry-run", action="store_true", help="print what would be asked, and ask nothing")
    doctor.add_argument("--json", action="store_true", help="print one JSON object for each probe")
    doctor.add_argument("--timeout", metavar="S", type=_seconds, default=30.0, help="seconds for a probe (%(default)g)")
    doctor.set_defaults(run=_doctor)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
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
        raise StartError("$AZURE_OPENAI_API_KEY is set, and cannot be a key")
    credential = None if key is None else Credential(key, bearer=is_jwt(key))
    what = plan(loaded)
    print(f"gateway: {what}", file=sys.stderr, flush=True)
    if options.dry_run:
        for each in what.deployments:
            print(f"{each.resource.name}/{each.deployment}")
        return 0
    return asyncio.run(_examine(loaded, what, credential, options))


async def _examine(loaded: Any, what: Any, credential: Any, options: argparse.Namespace) -> int:
    from gateway.admin.doctor import examine  # noqa: PLC0415
    from gateway.upstream import Upstream  # noqa: PLC0415

    upstream = Upstream(loaded.settings.timeouts)
    await upstream.start()
    count = wrong = 0
    try:
        async for finding in examine(what, upstream, credential, options.timeout):
            count, wrong = count + 1, wrong + (not finding.ok)
            if options.json:
                print(msgspec.json.encode(finding).decode(), flush=True)
                continue
            place = finding.resource + (f"/{finding.deployment}" if finding.deployment else "")
            took = f"{finding.ms:.0f} ms" if finding.ms is not None else ""
            verdict = "ok" if finding.ok else "WRONG"
            line = f"{place:<32} {finding.probe:<10} {verdict:<6} {took:>8}  {finding.verdict}".rstrip()
            print(line if line.isprintable() else ascii(line), flush=True)
    finally:
        await loaded.teams.shared.close()
        await upstream.close()
    if wrong:
        print(f"gateway: {wrong} of {count} probes found something wrong", file=sys.stderr)
    return 1 if wrong else 0
