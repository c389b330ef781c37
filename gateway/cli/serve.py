"""`gateway serve`: run the gateway, or one of its workers."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

from gateway.cli.arguments import CONFIG_HELP, Commands, config_path, listen_address
from gateway.errors import ConfigError, StartError

__all__ = (
    "add_parser",
    "with_listen",
)


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    serve = commands.add_parser(
        "serve",
        help="run the gateway",
        description="Run the gateway until SIGTERM. With systemd, it takes a socket from socket activation in place of "
        "`listen:`, and notifies systemd when it is ready.",
    )
    # Some flags have the Go proxy's names, too: its users' compose files pass them to the image.
    serve.add_argument("-c", "--config", "--configFile", metavar="FILE", type=Path, help=CONFIG_HELP)
    serve.add_argument(
        "-l",
        "--listen",
        metavar="HOST:PORT|unix:PATH",
        help="address to listen on; overrides `listen:`. :PORT is every interface",
    )
    serve.add_argument(
        "-s",
        "--cors",
        nargs="?",
        choices=("true", "false"),
        const="true",
        help="allow browsers to call the gateway from any web page, if the configuration has no stage `cors`",
    )
    serve.add_argument(
        "--workers",
        metavar="N|auto",
        type=_workers,
        default=1,
        help="number of processes that share the address; auto: one for each usable CPU. With 2 or more, SIGUSR2 "
        "starts a rolling restart, and a worker that crashes is replaced (default: 1, this process alone)",
    )
    serve.add_argument("--handover", help=argparse.SUPPRESS)  # a supervisor starts its workers with it
    serve.set_defaults(run=_serve)


def _workers(text: str) -> int:
    if text == "auto":
        return len(os.sched_getaffinity(0))
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 1, or auto")
    return int(text)


def _serve(options: argparse.Namespace) -> int:
    if options.handover is not None:
        return _serve_as_worker(options)
    from gateway import logs  # noqa: PLC0415 -- `gateway --version` need not wait for the server's imports
    from gateway.config import load  # noqa: PLC0415
    from gateway.process import systemd  # noqa: PLC0415
    from gateway.process.event_loop import run  # noqa: PLC0415
    from gateway.process.generations import GenerationSwitch  # noqa: PLC0415
    from gateway.process.reload import ReloadLoop, log_exceptions  # noqa: PLC0415
    from gateway.process.server_process import serve  # noqa: PLC0415
    from gateway.process.supervisor import Supervisor  # noqa: PLC0415
    from gateway.process.worker_process import worker_command  # noqa: PLC0415
    from gateway.server import Server  # noqa: PLC0415
    from gateway.transport.file_descriptors import raise_descriptor_limit  # noqa: PLC0415
    from gateway.transport.listener import Listener  # noqa: PLC0415

    # SIGHUP reloads once there is something to reload. Until then, and in workers, it must not end the process.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    notify = systemd.Notifier(os.environ)
    activated = systemd.listen_fds(os.environ)
    path = config_path(options.config)
    listener = Listener.inherited(activated) if activated else None
    given = None if options.listen is None else listen_address(options.listen)
    listen = given if listener is None else listener.address

    def read(shared: Any = None, sources: Any = None) -> Any:
        return with_listen(load(path, shared=shared, cors=options.cors == "true", sources=sources), listen)

    raise_descriptor_limit()  # before workers start, which inherit it
    loaded = read()
    settings = loaded.settings
    logs.configure(loaded.log.level, loaded.log.format)
    if loaded.differences is not None:
        logs.get_logger().warning(
            "go_proxy_configuration",
            file=str(loaded.path),
            advice="convert this file of azure-openai-proxy: gateway import azure-openai-proxy FILE > gateway.yaml",
            differences=[str(each) for each in loaded.differences],
        )
    if options.workers == 1:
        server = Server(loaded.teams, settings)
        generations = GenerationSwitch(server, loaded, read)
        reloads = ReloadLoop(generations.reload, notify, path, generations.state)
        del loaded  # so that a reload frees it
        run(
            lambda: serve(
                server,
                notify.ready,
                stopping=notify.stopping,
                listener=listener,
                background=lambda: log_exceptions(reloads.run()),
            )
        )
        return 0
    command = worker_command(options.config, cors=options.cors == "true", listen=listen)
    listener = listener or Listener.open(settings.listen)
    asyncio.run(Supervisor(listener, command, options.workers, notify, config=path, admin=settings.admin).run())
    return 0


def _serve_as_worker(options: argparse.Namespace) -> int:
    """Serve as one of several workers; the supervisor reports mistakes, once for all of them."""
    from gateway import logs  # noqa: PLC0415
    from gateway.config import load  # noqa: PLC0415
    from gateway.limits.shared_counters import SharedCounters  # noqa: PLC0415
    from gateway.process.event_loop import run  # noqa: PLC0415
    from gateway.process.generations import GenerationSwitch  # noqa: PLC0415
    from gateway.process.reload import log_exceptions  # noqa: PLC0415
    from gateway.process.server_process import serve  # noqa: PLC0415
    from gateway.process.worker import SupervisorChannel, WorkerInheritance  # noqa: PLC0415
    from gateway.server import Server  # noqa: PLC0415
    from gateway.services import Shared  # noqa: PLC0415
    from gateway.transport.connection_limit import ConnectionCount  # noqa: PLC0415
    from gateway.transport.listener import Listener  # noqa: PLC0415

    inheritance = WorkerInheritance.parse(options.handover)
    channel = SupervisorChannel(inheritance.channel)
    path = config_path(options.config)

    listen = None if options.listen is None else listen_address(options.listen)

    def read(shared: Any = None, sources: Any = None) -> Any:
        return with_listen(load(path, shared=shared, cors=options.cors == "true", sources=sources), listen)

    try:
        loaded = read(Shared(SharedCounters(inheritance.table)))
        logs.configure(loaded.log.level, loaded.log.format)
        listener = Listener.inherited(inheritance.sockets)
        # (The supervisor has the admin listener.)
        count = ConnectionCount(inheritance.counts, inheritance.index)
        server = Server(loaded.teams, dataclasses.replace(loaded.settings, admin=None), count=count)
        channel.share(server.shared.health)
        generations = GenerationSwitch(server, loaded, read)
        del loaded  # so that a reload frees it
        run(
            lambda: serve(
                server,
                lambda: channel.ready(generations.state),
                listener=listener,
                connect_signals=channel.obey,
                background=lambda: log_exceptions(channel.handle_reloads(generations)),
            )
        )
    except (ConfigError, StartError) as exc:
        channel.failed(str(exc))
        return 1
    return 0


def with_listen(loaded: Any, listen: Any) -> Any:
    """Return a configuration with another `listen:`, which overrides the file's."""
    if listen is None:
        return loaded
    return dataclasses.replace(loaded, settings=dataclasses.replace(loaded.settings, listen=listen))
