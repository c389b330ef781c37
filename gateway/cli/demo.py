"""`gateway demo`: run the gateway with a fake Azure."""

from __future__ import annotations

import argparse

from gateway.cli.arguments import DEFAULT, Commands, listen_address

__all__ = ("add_parser",)


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    demo = commands.add_parser(
        "demo",
        help="try the gateway with a fake Azure",
        description="Run the gateway with a fake Azure on this machine; no request leaves the machine.",
    )
    demo.add_argument(
        "--listen", metavar="HOST:PORT", default="127.0.0.1:8080", help="address to listen on (default: %(default)s)"
    )
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from gateway import logs  # noqa: PLC0415
    from gateway.process.event_loop import run  # noqa: PLC0415
    from gateway.testing.demo import demonstrate  # noqa: PLC0415

    listen = listen_address(options.listen)
    logs.configure()
    run(lambda: demonstrate(listen, DEFAULT))
    return 0
