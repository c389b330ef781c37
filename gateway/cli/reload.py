"""`gateway reload`: let the running gateway take over its changed configuration."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gateway.cli.arguments import CONFIG_HELP, Commands, config_path
from gateway.cli.output import print_lines

__all__ = ("add_parser",)


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    reload = commands.add_parser(
        "reload",
        help="let the running gateway take over its changed configuration",
        description="Let the gateway that runs here with this configuration read it anew, and print what has changed, "
        "or every mistake (status 1), for which it keeps the one at hand. The same as SIGHUP, with an answer.",
    )
    reload.add_argument("path", metavar="FILE", type=Path, nargs="?", help=CONFIG_HELP)
    reload.add_argument("-c", "--config", metavar="FILE", type=Path, help="the same")
    reload.add_argument(
        "--user",
        metavar="NAME",
        help="for root: the user that the gateway runs as, where that is neither root, nor `gateway`, nor the owner of "
        "FILE; any local user can pose as a gateway",
    )
    reload.set_defaults(run=_reload)


def _reload(options: argparse.Namespace) -> int:
    from gateway.process import control_socket as control  # noqa: PLC0415

    try:
        report = control.ask(config_path(options.config or options.path), options.user)
    except control.GatewayNotRunning as exc:
        print(f"gateway: {exc}", file=sys.stderr)
        return 1
    if report.mistakes:
        print_lines(report.mistakes, sys.stderr)
        print("gateway: not reloaded; the configuration at hand stays", file=sys.stderr)
        return 1
    print_lines(["nothing changed"] if report.same else report.changes or ["reloaded; no setting is another"])
    print_lines([f"gateway: {note}" for note in report.notes], sys.stderr)
    return 0
