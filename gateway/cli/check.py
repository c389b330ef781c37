"""`gateway check`: check a configuration."""

from __future__ import annotations

import argparse
from pathlib import Path

from gateway.cli.arguments import CONFIG_OR_FOLDER_HELP, Commands, config_path
from gateway.cli.output import print_notes

__all__ = ("add_parser",)


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    check = commands.add_parser(
        "check",
        help="check a configuration",
        description="Check a configuration: print every mistake with its file, line and column (status 1), or, if "
        "there is none, each team's pipeline.",
    )
    check.add_argument("path", metavar="PATH", type=Path, nargs="?", help=CONFIG_OR_FOLDER_HELP)
    check.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> int:
    from gateway.config import load  # noqa: PLC0415
    from gateway.config.show import show  # noqa: PLC0415

    path = config_path(options.path)
    loaded = load(path)
    print_notes(loaded.differences or ())
    print(show(loaded), end="")
    return 0
