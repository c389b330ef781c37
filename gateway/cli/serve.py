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
        description="Run the gateway until SIGTERM. A socket that systemd passes in (socket activation) is listened "
        "on in place of `listen:`; where systemd wants to know, it is told when the gateway is ready.",
    )
    # With the Go proxy's names of them: its users' compose files give these flags to the image.
    serve.add_argument("-c", "--config", "--configFile", metavar="FILE", type=Path, help=CONFIG_HELP)
    serve.add_argument(
        "-l",
        "--listen",
        metavar="HOST:PORT|unix:PATH",
        help="where to listen, instead of `listen:`; :PORT is every interface",
    )
    serve.add_argument(
        "-s",
        "--cors",
        nargs="?",
        choices=("true", "false"),
        const="true",
        help="let any page use it from a browser, where the configuration lists no stage `cors`",
    )
    serve.add_argument(
        "--workers",
        metavar="N|auto",
        type=_workers,
        default=1,
        help="processes that share the address; auto: one for each CPU that may be used. With 2 or more, SIGUSR2 is a "
        "rolling restart and one that crashes is replaced (default: 1, this process alone)",
    )
    serve.add_argument("--handover", help=argparse.SUPPRESS)  # how a supervisor starts its workers
    serve.set_defaults(run=_serve)


def _workers(text: str) -> int:
    if text == "auto":
        return len(os.sched_getaffinity(0))
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 1 on nor auto")
    return int(text)


def _serve(options: argparse.Namespace) -> int:
    if options.handover is not None:
        return _work(options)
    from gateway import logs  # noqa: PLC0415 -- `gateway --version` need not wait for the server's imports
    from gateway.config import load  # noqa: PLC0415
    from gateway.process import systemd  # noqa: PLC0415
    from gateway.process.event_loop import run  # noqa: PLC0415
    from gateway.process.generations import GenerationSwitch  # noqa: PLC0415
    from gateway.process.reload import ReloadLoop, log_exceptions  # noqa: PLC0415
    from gateway.process.server_process import serve  # noqa: PLC0415
    from gateway.process.supervisor import Supervisor, worker_command  # noqa: PLC0415
    from gateway.server import Server  # noqa: PLC0415
    from gateway.transport.file_descriptors import raise_descriptor_limit  # noqa: PLC0415
    from gateway.transport.listener import Listener  # noqa: PLC0415

    # It asks for a reload, once there is something to reload; until then, and in workers, it is nothing to end for.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    notify = systemd.Notifier(os.environ)
    passed = systemd.listen_fds(os.environ)
    path = config_path(options.config)
    listener = Listener.inherited(passed) if passed else None
    given = None if options.listen is None else listen_address(options.listen)
    listen = given if listener is None else listener.address

    def read(shared: Any = None, sources: Any = None) -> Any:
        return with_listen(load(path, shared=shared, cors=options.cors == "true", sources=sources), listen)

    raise_descriptor_limit()  # before there are workers, which inherit it
    loaded = read()
    settings = loaded.settings
    logs.configure(loaded.log.level, loaded.log.format)
    if loaded.differences is not None:
        logs.get_logger().warning(
            "this is a configuration of azure-openai-proxy",
            file=str(loaded.path),
            advice="make one of the gateway's own of it: gateway import azure-openai-proxy FILE > gateway.yaml",
            differences=[str(each) for each in loaded.differences],
        )
    if options.workers == 1:
        server = Server(loaded.teams, settings)
        renewal = GenerationSwitch(server, loaded, read)
        reloads = ReloadLoop(renewal.reload, notify, path, renewal.state)
        del loaded  # a reload lets go of it
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


def _work(options: argparse.Namespace) -> int:
    """Serve as one of several workers; what is wrong is the supervisor's to say, once for all of them."""
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

    handover = WorkerInheritance.parse(options.handover)
    line = SupervisorChannel(handover.line)
    path = config_path(options.config)

    listen = None if options.listen is None else listen_address(options.listen)

    def read(shared: Any = None, sources: Any = None) -> Any:
        return with_listen(load(path, shared=shared, cors=options.cors == "true", sources=sources), listen)

    try:
        loaded = read(Shared(SharedCounters(handover.table)))
        logs.configure(loaded.log.level, loaded.log.format)
        listener = Listener.inherited(handover.sockets)
        # (The supervisor's are the admin listener, and what one worker is to know of what others do.)
        count = ConnectionCount(handover.counts, handover.place)
        server = Server(loaded.teams, dataclasses.replace(loaded.settings, admin=None), count=count)
        line.share(server.shared.health)
        renewal = GenerationSwitch(server, loaded, read)
        del loaded  # a reload lets go of it
        ready, background = (lambda: line.ready(renewal.state)), (lambda: log_exceptions(line.follow(renewal)))
        run(lambda: serve(server, ready, listener=listener, connect_signals=line.obey, background=background))
    except (ConfigError, StartError) as exc:
        line.failed(str(exc))
        return 1
    return 0


def with_listen(loaded: Any, listen: Any) -> Any:
    """Return a configuration with another `listen:`, which counts instead of the file's."""
    if listen is None:
        return loaded
    return dataclasses.replace(loaded, settings=dataclasses.replace(loaded.settings, listen=listen))
