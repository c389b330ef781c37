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
        description="Print a configuration made of another proxy's; on standard error, what is different now, and what "
        "could not be carried over. Stored keys are not printed: variables stand for them.",
    )
    imports.add_argument("source", metavar="azure-openai-proxy", choices=("azure-openai-proxy",), help="whose it is")
    imports.add_argument("path", metavar="FILE", type=Path, help="its configuration, such as config.yaml")
    imports.add_argument(
        "--env-file",
        metavar="NEW_FILE",
        type=Path,
        help="write the variables and their keys there, readable by you alone, as `docker run --env-file` takes them",
    )
    imports.set_defaults(run=_import)


def _import(options: argparse.Namespace) -> int:
    from gateway.config import import_go_proxy  # noqa: PLC0415
    from gateway.config.write import write  # noqa: PLC0415

    made = import_go_proxy(options.path)
    head = [f"Made of {options.path.name} by `gateway import azure-openai-proxy`. Check it: gateway check"]
    if options.env_file is not None:
        _write_keys(options.env_file, made.keys)
    print_notes(made.notes)
    if made.keys:
        names = ", ".join(made.keys)
        head.append(f"The keys are not in here: they are the values of {names}.")
        where = f"they are in {options.env_file}" if options.env_file else "--env-file NEW_FILE writes them to a file"
        print(f"gateway: the keys are the values of {names}; {where}", file=sys.stderr)
    print("".join(f"# {line}\n" for line in head) + "\n" + write(made.root, made.comments), end="")
    return 0


def _write_keys(path: Path, keys: Mapping[str, str]) -> None:
    """Write `NAME=KEY` lines to a new file. Raises StartError where there is one already, or none can be made."""
    try:
        # The mode from the beginning: a file that is opened up to others for a moment may be read then.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.writelines(f"{name}={key}\n" for name, key in keys.items())
    except OSError as exc:
        raise StartError(f"cannot write {path}: {exc.strerror}") from None
