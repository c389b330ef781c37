"""`gateway import`: convert another proxy's configuration."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from gateway.cli.arguments import Commands
from gateway.cli.output import print_notes
from gateway.errors import StartError

__all__ = ("add_parser",)


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    imports = commands.add_parser(
        "import",
        help="convert another proxy's configuration",
        description="Convert another proxy's configuration and print the result. Standard error has the differences "
        "and the settings that could not be converted. Stored keys are not printed: variables replace them.",
    )
    imports.add_argument(
        "source", metavar="azure-openai-proxy", choices=("azure-openai-proxy",), help="the other proxy"
    )
    imports.add_argument("path", metavar="FILE", type=Path, help="path of its configuration, such as config.yaml")
    imports.add_argument(
        "--env-file",
        metavar="NEW_FILE",
        type=Path,
        help="new file for the variables with the keys, readable only by you, in the format of `docker run --env-file`",
    )
    imports.set_defaults(run=_import)


def _import(options: argparse.Namespace) -> int:
    from gateway.config import import_go_proxy  # noqa: PLC0415
    from gateway.config.write import write  # noqa: PLC0415

    imported = import_go_proxy(options.path)
    head = [f"Converted from {options.path.name} by `gateway import azure-openai-proxy`. Check it: gateway check"]
    if options.env_file is not None:
        _write_keys(options.env_file, imported.keys)
    print_notes(imported.notes)
    if imported.keys:
        names = ", ".join(imported.keys)
        head.append(f"This file has no keys. They are the values of the variables {names}.")
        advice = f"they are in {options.env_file}" if options.env_file else "--env-file NEW_FILE writes them to a file"
        print(f"gateway: the keys are the values of the variables {names}; {advice}", file=sys.stderr)
    print("".join(f"# {line}\n" for line in head) + "\n" + write(imported.root, imported.comments), end="")
    return 0


def _write_keys(path: Path, keys: Mapping[str, str]) -> None:
    """Write `NAME=KEY` lines to a new file. Raises StartError if it exists or cannot be created."""
    try:
        # With its final mode from the start: a file that others may read even for a moment is a leak.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.writelines(f"{name}={key}\n" for name, key in keys.items())
    except OSError as exc:
        raise StartError(f"cannot write {path}: {exc.strerror}") from None
