"""The command line: one file per command, each with its arguments (`add_parser`) and the function that runs it.

Flags without a command belong to `serve`, because the Go proxy, which many users come from, is started that way.
Commands import the server inside their functions, so that `gateway --version` need not wait for it. No logic lives here
that a program would want to call.
"""

from gateway.cli.command_line import main

__all__ = ("main",)
