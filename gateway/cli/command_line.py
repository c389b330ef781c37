"""The parser of the whole command line, and the function that runs the given command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gateway.cli import check, demo, doctor, import_config, keys, reload, schema, serve, stages
from gateway.cli.arguments import NothingConfiguredError
from gateway.cli.output import print_lines
from gateway.errors import ConfigError, StartError
from gateway.version import __version__

__all__ = (
    "NOTHING_CONFIGURED",
    "command_line",
    "main",
)


NOTHING_CONFIGURED = """\
gateway: nothing is configured. Run one of these commands:

  AZURE_OPENAI_ENDPOINT=https://NAME.openai.azure.com gateway serve
                                      run the shipped configuration with this resource; optional:
                                      AZURE_OPENAI_MODEL_MAPPER=gpt-4=my-gpt4,gpt-4o=my-gpt-4o
                                      AZURE_OPENAI_API_VER=2024-10-21
  gateway serve --config gateway.yaml run your own configuration (or set GATEWAY_CONFIG=gateway.yaml)
  gateway check gateway.yaml          check that file for mistakes
  gateway doctor gateway.yaml         test its resources and deployments
  gateway reload gateway.yaml         reload it in the running gateway
  gateway demo                        try the gateway with a fake Azure
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = command_line()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0].startswith("-") and given[0] not in ("-h", "--help", "-v", "--version"):
        given.insert(0, "serve")
    options = parser.parse_args(given)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        return int(options.run(options))
    except ConfigError as exc:
        print_lines(list(map(str, exc.mistakes)), sys.stderr)
        count = len(exc.mistakes)
        print(f"gateway: {count} mistake{'s' if count > 1 else ''} in the configuration", file=sys.stderr)
        return 1
    except StartError as exc:
        print(f"gateway: {exc}", file=sys.stderr)
        return 1
    except NothingConfiguredError:
        print(NOTHING_CONFIGURED, file=sys.stderr, end="")
        return 1
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        return 130


def command_line() -> argparse.ArgumentParser:
    """Return the parser of all commands; each command sets `run` to its function."""
    parser = argparse.ArgumentParser(
        prog="gateway",
        description="A gateway that lets programs for the OpenAI API use Azure OpenAI. Requests pass through a "
        "pipeline of stages, which a YAML file lists.",
    )
    parser.add_argument("-v", "--version", action="version", version=f"gateway {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in (serve, reload, check, doctor, keys, import_config, stages, schema, demo):
        command.add_parser(commands)
    return parser
