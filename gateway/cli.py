"""The command line: `gateway serve`, `reload`, `check`, `doctor`, `keys`, `import`, `stages`, `schema`, `demo`.

Flags without a command are `serve`'s: that is how the Go proxy, which many come from, is started.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import datetime
import getpass
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import msgspec

from gateway.errors import ConfigError, Mistake, StartError
from gateway.version import __version__

__all__ = ("main",)

# In a checkout this is a link to config/gateway.yaml.
DEFAULT = (Path(__file__).parent / "gateway.yaml").resolve()
# Where the Go proxy's image has its configuration, so where its users' compose files mount theirs.
GO_PROXY_FILE = Path("/app/config.yaml")

NOTHING_CONFIGURED = """\
gateway: nothing is configured. Do one of these:

  AZURE_OPENAI_ENDPOINT=https://NAME.openai.azure.com gateway serve
                                      the shipped configuration, in front of that resource; also
                                      AZURE_OPENAI_MODEL_MAPPER=gpt-4=my-gpt4,gpt-4o=my-gpt-4o
                                      AZURE_OPENAI_API_VER=2024-10-21
  gateway serve --config gateway.yaml your own configuration (or GATEWAY_CONFIG=gateway.yaml)
  gateway check gateway.yaml          whether that file is right
  gateway doctor gateway.yaml         whether the deployments that it names answer
  gateway reload gateway.yaml         let the gateway that runs with it take a change over
  gateway demo                        no Azure at all: in front of a fake one, to try it
"""


class NothingConfiguredError(Exception):
    """No file is named and no endpoint is set."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
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
        _print_lines(list(map(str, exc.mistakes)), sys.stderr)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gateway",
        description="Lets programs that speak only the OpenAI API use Azure OpenAI, "
        "through a chain of stages listed in a YAML file.",
    )
    parser.add_argument("-v", "--version", action="version", version=f"gateway {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    where = "gateway.yaml; without it $GATEWAY_CONFIG, else the shipped one with $AZURE_OPENAI_ENDPOINT"

    serve = commands.add_parser(
        "serve",
        help="run the gateway",
        description="Run the gateway until SIGTERM. A socket that systemd passes in (socket activation) is listened "
        "on in place of `listen:`; where systemd wants to know, it is told when the gateway is ready.",
    )
    # With the Go proxy's names of them: its users' compose files give these flags to the image.
    serve.add_argument("-c", "--config", "--configFile", metavar="FILE", type=Path, help=where)
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

    reload = commands.add_parser(
        "reload",
        help="let the running gateway take over its changed configuration",
        description="Let the gateway that runs here with this configuration read it anew, and print what has changed, "
        "or every mistake (status 1), for which it keeps the one at hand. The same as SIGHUP, with an answer.",
    )
    reload.add_argument("path", metavar="FILE", type=Path, nargs="?", help=where)
    reload.add_argument("-c", "--config", metavar="FILE", type=Path, help="the same")
    reload.add_argument(
        "--user",
        metavar="NAME",
        help="for root: the user that the gateway runs as, where that is neither root, nor `gateway`, nor the owner of "
        "FILE; any local user can pose as a gateway",
    )
    reload.set_defaults(run=_reload)

    check = commands.add_parser(
        "check",
        help="check a configuration",
        description="Check a configuration: print every mistake with its place (status 1), or each team's pipeline.",
    )
    check.add_argument("path", metavar="PATH", type=Path, nargs="?", help=where + "; or the folder it is in")
    check.set_defaults(run=_check)

    doctor = commands.add_parser(
        "doctor",
        help="ask each resource and deployment whether it answers",
        description="Ask each resource for its models, and each deployment for a chat and a stream, or an embedding, "
        "of one token at most, and print what is wrong: a key, a region, a deployment's name, an api-version. Status 1 "
        "where anything is. Resources without a credential of their own are shown $AZURE_OPENAI_API_KEY.",
    )
    doctor.add_argument("path", metavar="PATH", type=Path, nargs="?", help=where + "; or the folder it is in")
    doctor.add_argument("-n", "--dry-run", action="store_true", help="print what would be asked, and ask nothing")
    doctor.add_argument("--json", action="store_true", help="print one JSON object for each probe")
    doctor.add_argument("--timeout", metavar="S", type=_seconds, default=30.0, help="seconds for a probe (%(default)g)")
    doctor.set_defaults(run=_doctor)

    keys = commands.add_parser(
        "keys", help="make a team's key", description="Make keys for teams; the configuration has only their digests."
    ).add_subparsers(dest="keys_command", metavar="new|digest", required=True)
    new = keys.add_parser(
        "new",
        help="make a key",
        description="Make a key and print it, this once, with the line that makes it a team's. Nothing is stored.",
    )
    new.add_argument("--team", metavar="NAME", required=True, help="whose key it will be: the name of the team's file")
    new.add_argument("--label", metavar="TEXT", help="who will have it, for logs and limits")
    expires = "in so many days (90), or on its last day (2027-01-31); never if it is left out"
    new.add_argument("--expires", metavar="DAYS|DATE", help=expires)
    new.set_defaults(run=_new_key)
    digest = keys.add_parser(
        "digest",
        help="print the digest of a key",
        description="Read a key from standard input, and print its digest as `match: keys:` has it.",
    )
    digest.set_defaults(run=_digest)

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

    stages = commands.add_parser(
        "stages", help="list the stages, or the settings of one", description="List the stages, or one's settings."
    )
    stages.add_argument("name", metavar="NAME", nargs="?", help="a stage's name")
    stages.add_argument("-c", "--config", metavar="FILE", type=Path, help="whose `plugins_path` to look into as well")
    stages.set_defaults(run=_stages)

    schema = commands.add_parser(
        "schema", help="print the configuration's JSON Schema", description="Print the JSON Schema, for editors."
    )
    schema.add_argument("--team", action="store_true", help="of a team's file instead of gateway.yaml")
    schema.add_argument("-c", "--config", metavar="FILE", type=Path, help="whose `plugins_path` to look into as well")
    schema.set_defaults(run=_schema)

    demo = commands.add_parser(
        "demo",
        help="run in front of a fake Azure, to try it",
        description="Run the gateway in front of a fake Azure on this machine; nothing leaves it.",
    )
    demo.add_argument("--listen", metavar="HOST:PORT", default="127.0.0.1:8080", help="default: %(default)s")
    demo.set_defaults(run=_demo)
    return parser


def _config_path(given: Path | None) -> Path:
    """Return the configuration's file: the one given, $GATEWAY_CONFIG, the shipped one, or a Go proxy's."""
    if given is None and (named := os.environ.get("GATEWAY_CONFIG")):
        given = Path(named)
    if given is not None:
        return given / "gateway.yaml" if given.is_dir() else given
    if os.environ.get("AZURE_OPENAI_ENDPOINT"):
        return DEFAULT
    if GO_PROXY_FILE.is_file():
        return GO_PROXY_FILE
    raise NothingConfiguredError


def _workers(text: str) -> int:
    if text == "auto":
        return len(os.sched_getaffinity(0))
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 1 on nor auto")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds


def _serve(options: argparse.Namespace) -> int:
    if options.handover is not None:
        return _work(options)
    from gateway import logs, systemd  # noqa: PLC0415 -- `gateway --version` need not wait for the server's imports
    from gateway.config import load  # noqa: PLC0415
    from gateway.descriptors import raise_limit  # noqa: PLC0415
    from gateway.listener import Listener  # noqa: PLC0415
    from gateway.loop import run  # noqa: PLC0415
    from gateway.reload import Reloads  # noqa: PLC0415
    from gateway.renewal import Renewal  # noqa: PLC0415
    from gateway.server import Server, serve  # noqa: PLC0415
    from gateway.workers import Supervisor, worker_command  # noqa: PLC0415

    # It asks for a reload, once there is something to reload; until then, and in workers, it is nothing to end for.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    notify = systemd.Notifier(os.environ)
    passed = systemd.listen_fds(os.environ)
    path = _config_path(options.config)
    listener = Listener.inherited(passed) if passed else None
    given = None if options.listen is None else _listen(options.listen)
    listen = given if listener is None else listener.address

    def read(shared: Any = None, sources: Any = None) -> Any:
        return _with_listen(load(path, shared=shared, cors=options.cors == "true", sources=sources), listen)

    raise_limit()  # before there are workers, which inherit it
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
        renewal = Renewal(server, loaded, read)
        reloads = Reloads(renewal.reload, notify, path, renewal.state)
        del loaded  # a reload lets go of it
        run(lambda: serve(server, notify.ready, stopping=notify.stopping, listener=listener, beside=reloads.run))
        return 0
    command = worker_command(options.config, cors=options.cors == "true", listen=listen)
    listener = listener or Listener.open(settings.listen)
    asyncio.run(Supervisor(listener, command, options.workers, notify, config=path, admin=settings.admin).run())
    return 0


def _work(options: argparse.Namespace) -> int:
    """Serve as one of several workers; what is wrong is the supervisor's to say, once for all of them."""
    from gateway import logs  # noqa: PLC0415
    from gateway.config import load  # noqa: PLC0415
    from gateway.connection_count import ConnectionCount  # noqa: PLC0415
    from gateway.counters.shared import SharedCounters  # noqa: PLC0415
    from gateway.handover import Handover, Line  # noqa: PLC0415
    from gateway.listener import Listener  # noqa: PLC0415
    from gateway.loop import run  # noqa: PLC0415
    from gateway.renewal import Renewal  # noqa: PLC0415
    from gateway.server import Server, serve  # noqa: PLC0415
    from gateway.services import Shared  # noqa: PLC0415

    handover = Handover.parse(options.handover)
    line = Line(handover.line)
    path = _config_path(options.config)

    listen = None if options.listen is None else _listen(options.listen)

    def read(shared: Any = None, sources: Any = None) -> Any:
        return _with_listen(load(path, shared=shared, cors=options.cors == "true", sources=sources), listen)

    try:
        loaded = read(Shared(SharedCounters(handover.table)))
        logs.configure(loaded.log.level, loaded.log.format)
        listener = Listener.inherited(handover.sockets)
        # (The supervisor's are the admin listener, and what one worker is to know of what others do.)
        count = ConnectionCount(handover.counts, handover.place)
        server = Server(loaded.teams, dataclasses.replace(loaded.settings, admin=None), count=count)
        line.share(server.shared.health)
        renewal = Renewal(server, loaded, read)
        del loaded  # a reload lets go of it
        ready, beside = (lambda: line.ready(renewal.state)), (lambda: line.follow(renewal))
        run(lambda: serve(server, ready, listener=listener, obey=line.obey, beside=beside))
    except (ConfigError, StartError) as exc:
        line.failed(str(exc))
        return 1
    return 0


def _reload(options: argparse.Namespace) -> int:
    from gateway import control  # noqa: PLC0415

    try:
        report = control.ask(_config_path(options.config or options.path), options.user)
    except control.NobodyThere as exc:
        print(f"gateway: {exc}", file=sys.stderr)
        return 1
    if report.mistakes:
        _print_lines(report.mistakes, sys.stderr)
        print("gateway: not reloaded; the configuration at hand stays", file=sys.stderr)
        return 1
    _print_lines(["nothing changed"] if report.same else report.changes or ["reloaded; no setting is another"])
    _print_lines([f"gateway: {note}" for note in report.notes], sys.stderr)
    return 0


def _print_lines(lines: Sequence[str], to: TextIO | None = None) -> None:
    """Print text of another process, or out of files: it must not control the terminal."""
    for line in lines:
        print(line if line.isprintable() else ascii(line), file=to)


def _with_listen(loaded: Any, listen: Any) -> Any:
    """Return a configuration with another `listen:`, which counts instead of the file's."""
    if listen is None:
        return loaded
    return dataclasses.replace(loaded, settings=dataclasses.replace(loaded.settings, listen=listen))


def _listen(text: str) -> Any:
    from gateway.settings import Listen  # noqa: PLC0415

    try:
        return Listen.parse(text)
    except ValueError as exc:
        raise StartError(f"--listen: {exc}") from None


def _check(options: argparse.Namespace) -> int:
    from gateway.config import load  # noqa: PLC0415
    from gateway.config.show import show  # noqa: PLC0415

    path = _config_path(options.path)
    loaded = load(path)
    _print_notes(loaded.differences or ())
    print(show(loaded), end="")
    return 0


def _print_notes(notes: Sequence[Mistake]) -> None:
    for note in sorted(notes):
        print(note, file=sys.stderr)


def _doctor(options: argparse.Namespace) -> int:
    from gateway import logs  # noqa: PLC0415
    from gateway.config import load  # noqa: PLC0415
    from gateway.doctor import plan  # noqa: PLC0415
    from gateway.keys import Credential, is_jwt, is_key  # noqa: PLC0415

    loaded = load(_config_path(options.path))
    logs.configure("error", "text")
    key = os.environ.get("AZURE_OPENAI_API_KEY") or None
    if key is not None and not is_key(key):
        raise StartError("$AZURE_OPENAI_API_KEY is set, and cannot be a key")
    credential = None if key is None else Credential(key, bearer=is_jwt(key))
    what = plan(loaded)
    print(f"gateway: {what}", file=sys.stderr, flush=True)
    if options.dry_run:
        for each in what.deployments:
            print(f"{each.resource.name}/{each.deployment}")
        return 0
    return asyncio.run(_examine(loaded, what, credential, options))


async def _examine(loaded: Any, what: Any, credential: Any, options: argparse.Namespace) -> int:
    from gateway.doctor import examine  # noqa: PLC0415
    from gateway.upstream import Upstream  # noqa: PLC0415

    upstream = Upstream(loaded.settings.timeouts)
    await upstream.start()
    count = wrong = 0
    try:
        async for finding in examine(what, upstream, credential, options.timeout):
            count, wrong = count + 1, wrong + (not finding.ok)
            if options.json:
                print(msgspec.json.encode(finding).decode(), flush=True)
                continue
            place = finding.resource + (f"/{finding.deployment}" if finding.deployment else "")
            took = f"{finding.ms:.0f} ms" if finding.ms is not None else ""
            verdict = "ok" if finding.ok else "WRONG"
            line = f"{place:<32} {finding.probe:<10} {verdict:<6} {took:>8}  {finding.verdict}".rstrip()
            print(line if line.isprintable() else ascii(line), flush=True)
    finally:
        await loaded.teams.shared.close()
        await upstream.close()
    if wrong:
        print(f"gateway: {wrong} of {count} probes found something wrong", file=sys.stderr)
    return 1 if wrong else 0


def _new_key(options: argparse.Namespace) -> int:
    from gateway.config.nodes import NAME  # noqa: PLC0415
    from gateway.keys import key_digest, new_key  # noqa: PLC0415

    if not NAME.fullmatch(options.team):
        raise StartError(f"--team: {options.team!r} cannot be a team's name: letters, digits, _ . -")
    if options.label == "":
        raise StartError("--label is empty; leave it out for a key that is known by its digest")
    today = datetime.datetime.now(datetime.UTC).date()
    key = new_key()
    facts = {"digest": key_digest(key), "label": options.label, "created": str(today)}
    facts["expires"] = _last_day(options.expires, today) if options.expires is not None else None
    line = ", ".join(f"{name}: {json.dumps(text, ensure_ascii=False)}" for name, text in facts.items() if text)
    where = "gateway.yaml" if options.team == "default" else f"the team's file, {options.team}.yaml"
    print(f"{key}\n\nThis is the key; it is shown only now. It works once this stands in {where}")
    print(f"(where there are keys already, add its last line to them):\n\nmatch:\n  keys:\n    - {{{line}}}")
    return 0


def _last_day(text: str, today: datetime.date) -> str:
    """Return what `expires:` is to say. Raises StartError where that is past, or no day."""
    from gateway.config.load import end_of  # noqa: PLC0415

    try:
        day = str(today + datetime.timedelta(days=int(text))) if text.isdecimal() else text
        if end_of(day) <= datetime.datetime.now(datetime.UTC).timestamp():
            raise StartError(f"--expires: {day} is past")
    except (ValueError, OverflowError):
        raise StartError(f"--expires: {text!r} is neither a number of days nor a day, such as 2027-01-31") from None
    return day


def _digest(_: argparse.Namespace) -> int:
    from gateway.keys import is_key, key_digest  # noqa: PLC0415

    key = (getpass.getpass("key: ") if sys.stdin.isatty() else sys.stdin.readline()).strip()
    if not is_key(key):
        raise StartError("standard input has no key: one line of letters, digits and . _ ~ + / - =")
    print(key_digest(key))
    return 0


def _import(options: argparse.Namespace) -> int:
    from gateway.config import import_go_proxy  # noqa: PLC0415
    from gateway.config.write import write  # noqa: PLC0415

    made = import_go_proxy(options.path)
    head = [f"Made of {options.path.name} by `gateway import azure-openai-proxy`. Check it: gateway check"]
    if options.env_file is not None:
        _write_keys(options.env_file, made.keys)
    _print_notes(made.notes)
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


def _stages(options: argparse.Namespace) -> int:
    from gateway.config.show import show_stage, show_stages  # noqa: PLC0415
    from gateway.registry import UnknownStage  # noqa: PLC0415

    registry = _registry(options.config)
    if options.name is None:
        print(show_stages(registry), end="")
        return 0
    try:
        print(show_stage(options.name, registry.find(options.name)), end="")
    except UnknownStage as exc:
        print(f"gateway: {exc}", file=sys.stderr)
        return 1
    return 0


def _schema(options: argparse.Namespace) -> int:
    from gateway.config.schema import schema  # noqa: PLC0415

    print(json.dumps(schema(_registry(options.config), team=options.team), indent=2))
    return 0


def _registry(config: Path | None) -> Any:
    from gateway.config.load import plugin_folders  # noqa: PLC0415
    from gateway.registry import Registry  # noqa: PLC0415

    return Registry(plugin_folders(_config_path(config)) if config is not None else ())


def _demo(options: argparse.Namespace) -> int:
    from gateway import logs  # noqa: PLC0415
    from gateway.loop import run  # noqa: PLC0415
    from gateway.testing.demo import demonstrate  # noqa: PLC0415

    listen = _listen(options.listen)
    logs.configure()
    run(lambda: demonstrate(listen, DEFAULT))
    return 0
