"""`gateway stages`: list the stages, or the settings of one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gateway.cli.arguments import Commands, registry_of

__all__ = ("add_parser",)


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    stages = commands.add_parser(
        "stages",
        help="list the stages, or the settings of one",
        description="List the stages, or print the settings of one.",
    )
    stages.add_argument("name", metavar="NAME", nargs="?", help="name of a stage")
    stages.add_argument(
        "-c", "--config", metavar="FILE", type=Path, help="a gateway.yaml, to include the stages in its `plugins_path`"
    )
    stages.set_defaults(run=_stages)


def _stages(options: argparse.Namespace) -> int:
    from gateway.config.show import show_stage, show_stages  # noqa: PLC0415
    from gateway.registry import UnknownStage  # noqa: PLC0415

    registry = registry_of(options.config)
    if options.name is None:
        print(show_stages(registry), end="")
        return 0
    try:
        print(show_stage(options.name, registry.find(options.name)), end="")
    except UnknownStage as exc:
        print(f"gateway: {exc}", file=sys.stderr)
        return 1
    return 0
