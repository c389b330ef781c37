"""`gateway reload`: reload the configuration of the running gateway."""

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
        help="reload the configuration of the running gateway",
        description="Reload the configuration of the gateway that runs on this machine. Print the changes, or, with "
        "status 1, every mistake; the gateway then keeps its current configuration. Unlike SIGHUP, it waits and "
        "reports.",
    )
    reload.add_argument("path", metavar="FILE", type=Path, nargs="?", help=CONFIG_HELP)
    reload.add_argument("-c", "--config", metavar="FILE", type=Path, help="the same as the argument FILE")
    reload.add_argument(
        "--user",
        metavar="NAME",
        help="for root: the user that the gateway runs as, unless that is root, `gateway`, or the owner of FILE. It is "
        "checked because any local user can pose as a gateway",
    )
    reload.set_defaults(run=_reload)


def _reload(options: argparse.Namespace) -> int:
    from gateway.process import control_socket as control  # noqa: PLC0415

    try:
        report = control.request_reload(config_path(options.config or options.path), options.user)
    except control.GatewayNotRunning as exc:
        print(f"gateway: {exc}", file=sys.stderr)
        return 1
    if report.mistakes:
        print_lines(report.mistakes, sys.stderr)
        print("gateway: not reloaded; the current configuration stays", file=sys.stderr)
        return 1
    print_lines(["nothing changed"] if report.same else report.changes or ["reloaded; no setting has changed"])
    print_lines([f"gateway: {note}" for note in report.notes], sys.stderr)
    return 0
