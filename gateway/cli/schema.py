"""`gateway schema`: print the JSON Schema of the configuration."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gateway.cli.arguments import Commands, registry_of

__all__ = ("add_parser",)


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    schema = commands.add_parser(
        "schema",
        help="print the configuration's JSON Schema",
        description="Print the JSON Schema of the configuration, for editors.",
    )
    schema.add_argument("--team", action="store_true", help="the schema of a team's file instead of gateway.yaml")
    schema.add_argument(
        "-c", "--config", metavar="FILE", type=Path, help="a gateway.yaml, to include the stages in its `plugins_path`"
    )
    schema.set_defaults(run=_schema)


def _schema(options: argparse.Namespace) -> int:
    from gateway.config.schema import schema  # noqa: PLC0415

    print(json.dumps(schema(registry_of(options.config), team=options.team), indent=2))
    return 0
