"""Reload: a running gateway takes over a changed configuration completely, or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway import logs
from gateway.cli import main
from gateway.config import Loaded, load
from gateway.config.sources import Sources
from gateway.process import control_socket as control
from gateway.process import file_watch as watch
from gateway.process import generations
from gateway.process.control_socket import GatewayNotRunning, ReloadReport
from gateway.process.generations import GenerationSwitch
from gateway.process.reload import Prepared, ReloadLoop, WatchedState
from gateway.process.systemd import Notifier
from gateway.process.worker import SupervisorChannel
from gateway.services import Shared
from gateway.testing import FakeAzure
from tests.cli.test_cli import CLEAN, run
from tests.conftest import CHAT, KEY, Gateway, StartGateway, until, write_files
from tests.process.test_systemd import Manager

pytestmark = pytest.mark.both_loops

MARK = """
import asyncio, os
from dataclasses import dataclass
from typing import Literal
from gateway import Stage

@dataclass
class Mark(Stage):
    "Say which set answered, and when it began and ended."
    name: str = "first"
    starts: Literal["well", "never", "not", "once"] = "well"

    async def start(self, services):
        self.store = services.store
        self.logger = services.logger
        self.logger.info("mark started", name=self.name)
        if self.starts == "never":
            await asyncio.sleep(3600)
        if self.starts == "not":
            raise OSError("no redis")
        if self.starts == "once":
            open(os.environ["ONCE"], "x").close()

    async def stop(self):
        self.logger.info("mark stopped", name=self.name)

    async def __call__(self, request, call_next):
        self.store["seen"] = self.store.get("seen", 0) + 1
        response = await call_next(request)
        response.headers.set("x-name", self.name)
        response.headers.set("x-seen", str(self.store["seen"]))
        response.headers.set("x-client", request.client_address)
        response.headers.set("x-pid", str(os.getpid()))
        return response
"""
YAML = """
plugins_path: mine
resources: {azure: {endpoint: "${ENDPOINT}", api_key: "${file:key}"}}
pipeline:
  - access_log
  - mark: first
  - auth_passthrough
  - rate_limit: {requests_per_minute: 1000000}
  - model_map: {unmapped: own_name_without_dots}
  - api_version: 2024-10-21
"""
FILES = {"mine/mark.py": MARK, "key": "sesame"}


class Running:
    """A gateway in this process, and the switch to its next configuration."""

    def __init__(self, gateway: Gateway, path: Path, env: dict[str, str]) -> None:
        self.gateway = gateway
        self.path = path
        self.env = env
        self.generations = GenerationSwitch(gateway.server, self.load(), self.load)

    def load(self, shared: Shared | None = None, sources: Sources | None = None) -> Loaded:
        return load(self.path, self.env, shared, sources=sources)

    async def reload(self, *changes: tuple[str, str], yaml: str = YAML) -> ReloadReport:
        """Reload with other text in gateway.yaml."""
        for old, new in changes:
            assert old in yaml
            yaml = yaml.replace(old, new)
        self.path.write_text(yaml)
        return (await self.generations.reload()).report

    async def name(self, **more: Any) -> str:
        """Send a request, and return the name of the generation that responded."""
        async with self.gateway.post(**more) as answer:
            assert answer.status == 200, await answer.text()
            await answer.read()
            return str(answer.headers["x-name"])

    def marks(self, event: str) -> list[str]:
        return [each["name"] for each in self.gateway.events if each["event"] == f"mark {event}"]


Start = Callable[..., Awaitable[Running]]


@pytest.fixture
def start(start_gateway: StartGateway, tmp_path: Path, azure: FakeAzure) -> Start:
    async def started(yaml: str = YAML, **files: str) -> Running:
        env = {"ENDPOINT": azure.endpoint}
        gateway = await start_gateway(azure.endpoint, yaml, {**FILES, **files})
        return Running(gateway, tmp_path / "gateway.yaml", env)

    return started


async def test_new_requests_are_the_new_configuration_s(start: Start) -> None:
    """On kept connections, too; the changes are reported; the old generation's stages stop."""
    running = await start()
    assert await running.name() == "first"
    report = await running.reload(("mark: first", "mark: second"))
    assert report == ReloadReport(changes=["team default: mark.name: first -> second"])
    assert await running.name() == "second"
    await until(lambda: running.marks("stopped") == ["first"])
    assert running.marks("started") == ["first", "second"]


async def test_a_running_stream_ends_in_the_set_that_it_began_in(start: Start, azure: FakeAzure) -> None:
    """Its stages stop after the stream's end, not before; other streams do not matter."""
    azure.words, azure.delay = ["x"] * 300, 0.1
    running = await start()
    async with running.gateway.post(json={**CHAT, "stream": True}) as first:
        assert (await running.reload(("mark: first", "mark: second"))).changes
        async with running.gateway.post(json={**CHAT, "stream": True}) as second:
            await running.reload(("mark: first", "mark: third"))
            await asyncio.sleep(0.1)
            assert running.marks("stopped") == []
            azure.delay = 0
            assert (await first.text()).endswith("data: [DONE]\n\n")
            assert (await second.text()).endswith("data: [DONE]\n\n")
            names = [first.headers["x-name"], second.headers["x-name"], await running.name()]
    assert names == ["first", "second", "third"]
    await until(lambda: sorted(running.marks("stopped")) == ["first", "second"])


async def test_the_last_of_many_exchanges_lets_the_old_set_go(start: Start, azure: FakeAzure) -> None:
    """Including exchanges whose clients disconnect."""
    azure.words, azure.delay = ["x"] * 300, 0.1
    running = await start()
    answers = [await running.gateway.post(json={**CHAT, "stream": True}) for _ in range(3)]
    await running.reload(("mark: first", "mark: second"))
    for answer in answers:
        assert running.marks("stopped") == []
        answer.close()
    await until(lambda: running.marks("stopped") == ["first"])


async def test_a_gateway_that_stops_stops_every_set(start: Start, azure: FakeAzure) -> None:
    """Including those with running exchanges."""
    azure.words, azure.delay = ["x"] * 300, 0.1
    running = await start()
    answer = await running.gateway.post(json={**CHAT, "stream": True})
    await running.reload(("mark: first", "mark: second"))
    http = running.gateway.server.shared.session()
    now = asyncio.Event()
    now.set()
    await running.gateway.server.stop(now=now)
    answer.close()
    assert sorted(running.marks("stopped")) == ["first", "second"]
    assert http.closed


@pytest.mark.parametrize(
    ("old", "new", "mistake"),
    [
        ("mark: first", "mork: first", "gateway.yaml:6:5: there is no stage 'mork'; did you mean 'mark'?"),
        ("api_version: 2024-10-21", "api_version: [", "gateway.yaml:11:1: not valid YAML: "),
        ("mark: first", "mark: {starts: not}", "the stage 'mark' of team 'default' cannot start: OSError: no redis"),
        ("mark: first", "mark: {starts: never}", "the stages of the new configuration were not ready after 0.2 s"),
        ("${file:key}", "${file:keys}", "gateway.yaml:3:55: cannot read keys: No such file or directory"),
    ],
)
async def test_any_error_keeps_the_old_set(
    old: str, new: str, mistake: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It serves as before, and started stages of the new generation stop; a corrected file is taken."""
    running = await start()
    if "never" in new:
        monkeypatch.setattr(generations, "_PREPARE_TIMEOUT", 0.2)
    report = await running.reload((old, new))
    monkeypatch.undo()
    (event,) = report.mistakes
    assert mistake in event
    assert not report.changes
    assert await running.name() == "first"
    started = running.marks("started")
    assert len(running.marks("stopped")) == len(started) - 1
    assert (await running.reload(("mark: first", "mark: second"))).changes == [
        "team default: mark.name: first -> second"
    ]
    assert await running.name() == "second"


async def test_a_bug_keeps_the_old_set_and_shows_no_secret(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of an unexpected exception may contain a secret."""
    running = await start()

    def fails(old: Loaded, new: Loaded) -> list[str]:
        raise ValueError("sesame")

    monkeypatch.setattr(generations, "diff", fails)
    report = await running.reload(("mark: first", "mark: second"))
    assert report.mistakes == ["ValueError; see the log"]
    assert "sesame" not in str(running.gateway.events)
    assert await running.name() == "first"


async def test_the_same_content_starts_nothing(start: Start) -> None:
    """Nothing is swapped; a changed comment is new content without a changed setting."""
    running = await start()
    assert await running.reload() == ReloadReport(same=True)
    assert running.marks("started") == ["first"]
    assert await running.reload(yaml=YAML + "# more\n") == ReloadReport()
    await until(lambda: running.marks("stopped") == ["first"])


async def test_secrets_are_not_shown(start: Start, tmp_path: Path) -> None:
    """Neither the old one nor the new one, from any source."""
    running = await start()
    (tmp_path / "key").write_text("simsim")
    report = await running.reload()
    assert report.changes == ["resource azure: api_key: *** -> *** (changed)"]
    report = await running.reload(("${file:key}", "abracadabra"))
    assert report.changes == ["resource azure: api_key: *** -> *** (changed)"]
    assert "simsim" not in repr(running.generations.state)


async def test_limits_keep_their_counts(start: Start) -> None:
    """A stage's store is passed to its successor, by team and id."""
    running = await start(YAML.replace("1000000", "60"))
    for _ in range(3):
        assert await running.name() == "first"
    await running.reload(("mark: first", "mark: second"), ("1000000", "600"))
    async with running.gateway.post() as answer:
        assert answer.headers["x-name"] == "second"
        assert answer.headers["x-seen"] == "4"
        assert answer.headers["x-ratelimit-limit-requests"] == "600"
        assert answer.headers["x-ratelimit-remaining-requests"] == "596"


async def test_kept_connections_get_the_new_limits_and_timeouts(start: Start, azure: FakeAzure) -> None:
    """A proxy's connection may live for days; connections to Azure stay open."""
    running = await start()
    server = running.gateway.server
    assert await running.name() == "first"
    report = await running.reload(
        ("plugins_path", "limits: {body: 10}\ntimeouts: {idle: 7, connect: 3, keep_alive: 9}\nplugins_path")
    )
    assert report.changes == [
        "timeouts.connect: 10.0 -> 3.0", "timeouts.idle: 300.0 -> 7.0", "timeouts.keep_alive: 75.0 -> 9.0",
        "limits.body: 104857600 -> 10",
    ]  # fmt: skip
    async with running.gateway.post() as answer:
        assert answer.status == 413
    await running.reload(("plugins_path", "timeouts: {idle: 7}\nplugins_path"))
    assert await running.name() == "first"
    assert server.upstream._timeouts.idle == 7
    assert azure.connections == 1


async def test_trusted_proxies_are_those_of_the_new_set(start: Start) -> None:
    """Like every setting: the trusted proxy names the client."""
    running = await start()
    await running.reload(("plugins_path", "trusted_proxies: 127.0.0.1\nplugins_path"))
    async with running.gateway.post(headers={"X-Forwarded-For": "192.0.2.7"}) as answer:
        assert answer.headers["x-client"] == "192.0.2.7"


async def test_another_address_takes_a_restart(start: Start) -> None:
    """It is reported once; the gateway keeps its address."""
    running = await start()
    address = running.gateway.server.address
    report = await running.reload(("plugins_path", "listen: 127.0.0.1:1\nplugins_path"))
    assert report.changes == ["listen: 127.0.0.1:8080 -> 127.0.0.1:1"]
    assert report.notes == [f"listen: the gateway listens on {address} until it is restarted"]
    assert await running.name() == "first"
    assert not (await running.reload(("plugins_path", "listen: 127.0.0.1:1 # one\nplugins_path"))).notes


async def test_the_log_s_settings_are_taken_over(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the new stages start, because they keep their loggers; restored if these fail."""
    running = await start()
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(logs, "configure", lambda level, form: asked.append((level, form)))
    debug = ("plugins_path", "log: {level: debug}\nplugins_path")
    await running.reload(debug, ("mark: first", "mark: {starts: not}"))
    assert asked == [("debug", "auto"), ("info", "auto")]
    await running.reload(debug)
    assert asked[2:] == [("debug", "auto")]


async def test_what_is_prepared_can_be_dropped(start: Start) -> None:
    """As if another worker failed to prepare it: its stages stop, and the old generation serves."""
    running = await start()
    running.path.write_text(YAML.replace("mark: first", "mark: second"))
    assert (await running.generations.prepare()).report.changes
    assert await running.name() == "first"
    await running.generations.abort()
    assert running.marks("stopped") == ["second"]
    running.generations.commit()
    assert await running.name() == "first"


async def test_old_sets_are_not_kept_in_memory(start: Start) -> None:
    """Even if a stage refers to itself, which only the garbage collector finds."""
    code = MARK.replace("self.logger = services.logger", "self.logger = services.logger; self.me = self.start")
    running = await start(**{"mine/mark.py": code.replace("class Mark", "class Mork")})
    await running.name()
    sets = []
    gc.disable()
    try:
        for number in range(3):
            sets.append(weakref.ref(running.gateway.server.teams.default.stages[1]))
            await running.reload(("mark: first", f"mark: no-{number}"))
            await running.name()
        await until(lambda: len(running.marks("stopped")) == 3)
        await until(lambda: [each() for each in sets] == [None] * 3)
    finally:
        gc.enable()


@pytest.mark.slow
async def test_100_reloads_under_load_fail_no_request(start: Start, azure: FakeAzure) -> None:
    """Plain responses and streams, on kept connections and new ones, from each generation."""
    azure.words = ["x"] * 20
    running = await start()
    url = running.gateway.url + "/v1/chat/completions"
    failed, names, done, enough = [], set(), 0, asyncio.Event()

    async def ask(kept: bool, stream: bool) -> None:
        nonlocal done
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=not kept)) as session:
            while not enough.is_set():
                try:
                    async with session.post(url, json={**CHAT, "stream": stream}, headers={"api-key": KEY}) as answer:
                        text = await answer.text()
                        assert answer.status == 200
                        assert not stream or text.endswith("data: [DONE]\n\n")
                        names.add(answer.headers["x-name"])
                except (aiohttp.ClientError, AssertionError) as exc:
                    failed.append(repr(exc))
                done += 1

    clients = [asyncio.create_task(ask(kept, stream)) for kept in (True, False) for stream in (True, False)]
    for number in range(100):
        before = done
        report = await running.reload(("mark: first", f"mark: no-{number}"))
        assert report.changes, report
        await until(lambda before=before: done > before)  # type: ignore[misc]
    enough.set()
    await asyncio.gather(*clients)
    assert failed == []
    assert len(names) > 50
    await until(lambda: len(running.marks("stopped")) == 100)


# -- what asks for a reload ----------------------------------------------------------------------------


def reloads(tmp_path: Path, reload: Callable[[], Awaitable[Prepared]], sources: Sources | None = None) -> ReloadLoop:
    return ReloadLoop(reload, Notifier({}), tmp_path / "gateway.yaml", WatchedState(sources or Sources()))


@contextlib.asynccontextmanager
async def going(asking: ReloadLoop) -> AsyncIterator[None]:
    task = asyncio.create_task(asking.run())
    try:
        await asyncio.sleep(0.02)
        yield
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def test_one_reload_at_a_time(tmp_path: Path) -> None:
    """A request during a reload gets the next one: its files may be newer than those already read."""
    go, begun = asyncio.Event(), 0

    async def reload() -> Prepared:
        nonlocal begun
        begun += 1
        number = begun
        await go.wait()
        return Prepared(ReloadReport(changes=[str(number)]), WatchedState())

    asking = reloads(tmp_path, reload)
    async with going(asking):
        first = asking.ask()
        await until(lambda: begun == 1)
        later = [asking.ask(), asking.ask()]
        os.kill(os.getpid(), signal.SIGHUP)
        go.set()
        assert (await first).changes == ["1"]
        assert [(await each).changes for each in later] == [["2"], ["2"]]
        await asyncio.sleep(0.05)
        go.clear()
        last = asking.ask()
        await until(lambda: begun == 3)
    assert (await last).mistakes == ["the gateway is stopping"]


async def test_files_that_failed_are_tried_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not earlier: the log would fill."""
    monkeypatch.setattr(watch, "_INTERVAL", 0.01)
    (tmp_path / "file").write_text("0")
    tried: list[str] = []

    async def reload() -> Prepared:
        sources = Sources()
        tried.append(sources.read(tmp_path / "file").decode())
        return Prepared(ReloadReport(mistakes=["wrong"]), WatchedState(sources, watch=tried[-1] != "2"))

    sources = Sources()
    sources.read(tmp_path / "file")
    async with going(reloads(tmp_path, reload, sources)):
        for text in ("1", "2"):
            (tmp_path / "file").write_text(text)
            await until(lambda text=text: tried[-1:] == [text])  # type: ignore[misc]
            await asyncio.sleep(0.1)
        (tmp_path / "file").write_text("3")  # but `watch: false` was said
        await asyncio.sleep(0.1)
    assert tried == ["1", "2"]


async def test_only_root_and_the_gateway_s_user_may_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other command exists."""
    asked = 0

    async def reload() -> Prepared:
        nonlocal asked
        asked += 1
        return Prepared(ReloadReport(same=True), WatchedState())

    path = tmp_path / "gateway.yaml"
    async with going(reloads(tmp_path, reload)):
        assert (await asyncio.to_thread(control.request_reload, path)).same
        monkeypatch.setattr(control, "_user", lambda sock: 12345)
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        with pytest.raises(GatewayNotRunning):
            await asyncio.to_thread(control.request_reload, path)
        assert asked == 1
        monkeypatch.setattr(os, "geteuid", lambda: 99)
        with pytest.raises(GatewayNotRunning, match="as another user"):
            await asyncio.to_thread(control.request_reload, path)
        monkeypatch.undo()
        monkeypatch.setattr(control, "_COMMAND", b"stop!!\n")
        answered = asyncio.create_task(asyncio.to_thread(control.request_reload, path))
        await asyncio.sleep(0)
        monkeypatch.undo()
        with contextlib.suppress(GatewayNotRunning):
            await answered
    with pytest.raises(GatewayNotRunning, match=r"no gateway with the configuration .*gateway\.yaml runs here"):
        control.request_reload(path)


async def test_a_second_gateway_on_one_file_goes_on_without_a_socket(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It logs that, and reloads on SIGHUP."""
    logs.configure("info", "json", sys.stderr)

    async def reload(which: int) -> Prepared:
        return Prepared(ReloadReport(changes=[str(which)]), WatchedState())

    async with going(reloads(tmp_path, lambda: reload(1))), going(second := reloads(tmp_path, lambda: reload(2))):
        assert (await asyncio.to_thread(control.request_reload, tmp_path / "gateway.yaml")).changes == ["1"]
        assert (await second.ask()).changes == ["2"]
    (line,) = (line for line in capfd.readouterr().err.splitlines() if "reload_socket_unavailable" in line)
    assert json.loads(line)["level"] == "warning"


async def test_a_worker_that_stops_stops_what_it_had_prepared(start: Start) -> None:
    """Also a preparation that a new order replaces; only a committed one serves."""
    running = await start()
    ours, theirs = socket.socketpair()
    line, (heard, said) = SupervisorChannel(theirs.detach()), await asyncio.open_unix_connection(sock=ours)
    line.obey(asyncio.Event(), asyncio.Event())
    following = asyncio.create_task(line.handle_reloads(running.generations))
    for number, name in enumerate(("second", "third", "fourth"), 1):
        running.path.write_text(YAML.replace("first", name))
        said.write(f"prepare {number}\n".encode())
        answer = json.loads(await heard.readline())
        assert (answer["word"], answer["number"]) == ("prepared", number)
        if name == "third":
            said.write(b"commit 2\n")
            assert json.loads(await heard.readline()) == {"word": "committed", "number": 2}
    assert await running.name() == "third"
    await until(lambda: sorted(running.marks("stopped")) == ["first", "second"])
    following.cancel()
    await asyncio.wait((following,))
    assert sorted(running.marks("stopped")) == ["first", "fourth", "second"]
    asyncio.get_running_loop().remove_reader(line._socket)
    line._socket.close()
    said.close()


# -- a gateway in processes of its own -----------------------------------------------------------------


class Served:
    """`gateway serve` as a process; `events` are from its log and its workers'."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self.process = process
        self.path = folder / "gateway.yaml"
        self.events: list[dict[str, Any]] = []
        self.text = ""
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        while line := (await self.process.stderr.readline()).decode():
            self.text += line
            if line.startswith("{"):
                self.events.append(json.loads(line))

    def named(self, event: str) -> list[dict[str, Any]]:
        return [each for each in self.events if each["event"] == event]

    async def until(self, event: str, count: int = 1) -> dict[str, Any]:
        """Wait for the `count`-th event of a name."""
        async with asyncio.timeout(30):
            while len(found := self.named(event)) < count:
                assert not self._reader.done(), self.text
                await asyncio.sleep(0.01)
        return found[count - 1]

    async def reload(self, *changes: tuple[str, str], yaml: str = YAML) -> tuple[int, str, str]:
        """Change gateway.yaml, run `gateway reload`, and return its status and output."""
        for old, new in changes:
            assert old in yaml
            yaml = yaml.replace(old, new)
        self.path.write_text(yaml)
        done = await asyncio.to_thread(run, "reload", "--config", "gateway.yaml", cwd=self.path.parent)
        return done.returncode, done.stdout, done.stderr

    async def answers(self, count: int = 12) -> set[tuple[str, str]]:
        """Send requests on new connections, and return the pids and names in the responses."""

        async def ask() -> tuple[str, str]:
            async with (
                aiohttp.ClientSession() as session,
                session.post(self.url, json=CHAT, headers={"api-key": KEY}) as answer,
            ):
                assert answer.status == 200, await answer.text()
                return answer.headers["x-pid"], answer.headers["x-name"]

        return set(await asyncio.gather(*(ask() for _ in range(count))))

    async def names(self) -> set[str]:
        return {name for _, name in await self.answers()}

    @property
    def url(self) -> str:
        return f"http://{self.named('listening')[0]['address']}/v1/chat/completions"

    async def ended(self) -> int:
        async with asyncio.timeout(30):
            await self._reader
            return await self.process.wait()


UNWATCHED = YAML + "watch: false\n"
VERSION = (
    "gateway.yaml:10:18: stage 'api_version': version must be text like 2024-10-21, 2025-04-01-preview or v1, "
    "not 'x2024-10-21'"
)


@contextlib.asynccontextmanager
async def served(azure: FakeAzure, folder: Path, *flags: str, yaml: str = YAML, **env: str) -> AsyncIterator[Served]:
    """Run `gateway serve` on new files, and yield it when it serves."""
    if not (folder / "gateway.yaml").exists():
        write_files(folder, {**FILES, "gateway.yaml": yaml})
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "serve", "--config", str(folder / "gateway.yaml"), "--listen", "127.0.0.1:0",
        *flags, env={**CLEAN, "ENDPOINT": azure.endpoint, **env}, cwd=folder, stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    running = Served(process, folder)
    try:
        await running.until("workers_ready" if "--workers" in flags else "listening")
        yield running
        if process.returncode is None:
            process.terminate()
        assert await running.ended() == 0
        assert "Traceback" not in running.text
        assert "sesame" not in running.text
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


WORKERS = pytest.mark.parametrize("flags", [[], ["--workers", "2"]], ids=["alone", "workers"])


@pytest.mark.slow
@WORKERS
async def test_gateway_reload_reports_the_result(flags: list[str], azure: FakeAzure, tmp_path: Path) -> None:
    """Changes and status 0, or every mistake and status 1; afterwards, every process serves the new set."""
    async with served(azure, tmp_path, *flags, yaml=UNWATCHED) as running:
        assert await running.reload(yaml=UNWATCHED) == (0, "nothing changed\n", "")
        second = [("mark: first", "mark: second"), ("key}", "key}x")]
        assert await running.reload(*second, yaml=UNWATCHED) == (
            0, "resource azure: api_key: *** -> *** (changed)\nteam default: mark.name: first -> second\n", ""
        )  # fmt: skip
        assert await running.names() == {"second"}
        event = await running.until("reloaded")
        assert event["changes"][1] == "team default: mark.name: first -> second"
        broken = await running.reload(("mark: first", "mork: first"), ("sion: 2024", "sion: x2024"), yaml=UNWATCHED)
        assert broken[:2] == (1, "")
        assert broken[2].splitlines() == [
            "gateway.yaml:6:5: there is no stage 'mork'; did you mean 'mark'?",
            VERSION,
            "gateway: not reloaded; the current configuration stays",
        ]
        failed = await running.until("reload_failed")
        assert (failed["level"], failed["mistakes"]) == ("error", broken[2].splitlines()[:2])
        assert await running.names() == {"second"}
        assert running.text.count("there is no stage 'mork'") == 1
        status, _, error = await running.reload(("mark: first", "mark: {starts: not}"), yaml=UNWATCHED)
        assert status == 1
        assert "the stage 'mark' of team 'default' cannot start: OSError: no redis" in error
        assert await running.reload(("mark: first", "mark: third"), yaml="listen: :1\n" + UNWATCHED) == (
            0, "resource azure: api_key: *** -> *** (changed)\nteam default: mark.name: second -> third\n", ""
        )  # fmt: skip  # --listen counts, not the file
        assert await running.names() == {"third"}
        assert await running.reload(yaml=UNWATCHED + "log: {level: warning}\n") == (
            0, "log.level: info -> warning\nteam default: mark.name: third -> first\n", ""
        )  # fmt: skip
        await running.until("reloaded", 2)
    done = await asyncio.to_thread(run, "reload", "--config", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == f"gateway: no gateway with the configuration {tmp_path}/gateway.yaml runs here\n"


@pytest.mark.slow
@WORKERS
async def test_sighup_reloads(flags: list[str], azure: FakeAzure, tmp_path: Path) -> None:
    """Even if the workers get the signal, as from a terminal; systemd is notified of the begin and the end."""
    manager = Manager(str(tmp_path / "notify"))
    async with served(azure, tmp_path, *flags, yaml=UNWATCHED, NOTIFY_SOCKET=manager.name) as running:
        assert await manager.hear() == "READY=1"
        for number in (1, 2):
            running.path.write_text(UNWATCHED.replace("first", f"no-{number}"))
            os.killpg(running.process.pid, signal.SIGHUP)
            assert (await manager.hear()).startswith("RELOADING=1\n")
            assert await manager.hear() == "READY=1"
            await running.until("reloaded", number)
            assert await running.names() == {f"no-{number}"}
        os.killpg(running.process.pid, signal.SIGHUP)
        await running.until("reload_unchanged")
    manager.close()


@pytest.mark.slow
@WORKERS
async def test_a_changed_file_is_taken_over(flags: list[str], azure: FakeAzure, tmp_path: Path) -> None:
    """A ConfigMap's swap; an invalid one is reported once; after `watch: false`, changes are ignored."""
    versions = [
        YAML.replace("first", "second"),
        YAML.replace("- mark", "- mork"),
        UNWATCHED.replace("first", "third"),
        YAML.replace("first", "fourth"),
    ]
    for number, text in enumerate((YAML, *versions)):
        write_files(tmp_path / f"..{number}", {**FILES, "gateway.yaml": text})
    (tmp_path / "..data").symlink_to("..0")
    write_files(tmp_path, {"mine/mark.py": MARK})
    for name in ("gateway.yaml", "key"):
        (tmp_path / name).symlink_to(f"..data/{name}")

    def swap(number: int) -> None:
        (tmp_path / "..tmp").symlink_to(f"..{number}")
        (tmp_path / "..tmp").rename(tmp_path / "..data")

    async with served(azure, tmp_path, *flags) as running:
        swap(1)
        assert (await running.until("reloaded"))["changes"] == ["team default: mark.name: first -> second"]
        assert await running.names() == {"second"}
        swap(2)
        failed = await running.until("reload_failed")
        assert "6:5: there is no stage 'mork'" in failed["mistakes"][0]
        await asyncio.sleep(3.5)
        assert len(running.named("reload_failed")) == 1
        swap(3)
        await running.until("reloaded", 2)
        swap(4)
        await asyncio.sleep(3.5)
        assert await running.names() == {"third"}


@pytest.mark.slow
async def test_20_reloads_of_two_workers_under_load_fail_no_request(azure: FakeAzure, tmp_path: Path) -> None:
    """After each reload, every worker serves the new configuration."""
    azure.words = ["x"] * 20
    async with served(azure, tmp_path, "--workers", "2", yaml=UNWATCHED) as running:
        failed, enough = [], asyncio.Event()

        async def ask(stream: bool, kept: bool) -> None:
            connector = aiohttp.TCPConnector(force_close=not kept)
            async with aiohttp.ClientSession(connector=connector) as session:
                while not enough.is_set():
                    body = {**CHAT, "stream": stream}
                    try:
                        async with session.post(running.url, json=body, headers={"api-key": KEY}) as answer:
                            text = await answer.text()
                            assert answer.status == 200
                            assert not stream or text.endswith("data: [DONE]\n\n")
                    except (aiohttp.ClientError, AssertionError) as exc:
                        failed.append(repr(exc))
                    await asyncio.sleep(0.002)

        clients = [asyncio.create_task(ask(stream, kept)) for kept in (True, False) for stream in (True, False)]
        for number in range(20):
            running.path.write_text(UNWATCHED.replace("first", f"no-{number}"))
            report = await asyncio.to_thread(control.request_reload, running.path)
            assert len(report.changes) == 1, report
            assert await running.names() == {f"no-{number}"}
        enough.set()
        await asyncio.gather(*clients)
        assert failed == []
        assert not running.named("worker_died")


@pytest.mark.slow
async def test_what_one_worker_cannot_start_none_takes_over(azure: FakeAzure, tmp_path: Path) -> None:
    """The other worker stops what it has prepared."""
    async with served(azure, tmp_path, "--workers", "2", yaml=UNWATCHED, ONCE=str(tmp_path / "once")) as running:
        status, _, error = await running.reload(("mark: first", "mark: {name: second, starts: once}"), yaml=UNWATCHED)
        assert status == 1
        assert "cannot start: FileExistsError" in error
        assert {name for _, name in await running.answers()} == {"first"}
        await running.until("mark stopped", 2)
        assert {each["name"] for each in running.named("mark stopped")} == {"second"}


@pytest.mark.slow
async def test_a_worker_that_replaced_another_is_followed(azure: FakeAzure, tmp_path: Path) -> None:
    """It reads the current files; if these have changed, all workers are reloaded without a request."""
    async with served(azure, tmp_path, "--workers", "2", yaml=UNWATCHED) as running:
        running.path.write_text(UNWATCHED.replace("first", "second"))
        os.kill(running.named("workers_ready")[0]["pids"][0], signal.SIGKILL)
        await running.until("worker_ready", 3)
        await running.until("reloaded")
        answers: set[tuple[str, str]] = set()
        async with asyncio.timeout(30):
            while len(answers) < 2:  # which worker takes a connection is the system's to say
                answers |= await running.answers(4)
        assert {name for _, name in answers} == {"second"}
        assert len({pid for pid, _ in answers}) == 2


@pytest.mark.slow
async def test_a_rolling_restart_and_reloads_are_one_after_another(azure: FakeAzure, tmp_path: Path) -> None:
    """In either order; a stop waits for neither."""
    async with served(azure, tmp_path, "--workers", "2", yaml=UNWATCHED) as running:
        running.path.write_text(UNWATCHED.replace("first", "second"))
        os.kill(running.process.pid, signal.SIGUSR2)
        os.kill(running.process.pid, signal.SIGHUP)
        await running.until("workers_ready", 2)
        await running.until("reload_unchanged")  # the new workers have read it already
        assert await running.names() == {"second"}
        running.path.write_text(UNWATCHED.replace("first", "third"))
        os.kill(running.process.pid, signal.SIGHUP)
        await asyncio.sleep(0.05)
        os.kill(running.process.pid, signal.SIGUSR2)
        await running.until("reloaded")
        await running.until("workers_ready", 3)
        assert await running.names() == {"third"}


@pytest.mark.slow
@WORKERS
async def test_a_reload_that_hangs_does_not_keep_the_gateway_from_stopping(
    flags: list[str], azure: FakeAzure, tmp_path: Path
) -> None:
    """A waiting client gets a report."""
    async with served(azure, tmp_path, *flags, yaml=UNWATCHED) as running:
        asked = asyncio.create_task(running.reload(("mark: first", "mark: {starts: never}"), yaml=UNWATCHED))
        await running.until("mark started", 3 if flags else 2)
        running.process.terminate()
        assert await running.ended() == 0
        status, _, error = await asked
        assert status == 1
        assert "the gateway is stopping" in error or "ended before the reload was complete" in error


def test_what_another_process_says_does_not_steer_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any local user may take the name before the gateway."""
    monkeypatch.setattr(
        control, "request_reload", lambda path, user: ReloadReport(changes=["\x1b[2J"], notes=["listen: \r"])
    )
    assert main(["reload", "--config", str(tmp_path / "gateway.yaml")]) == 0
    printed = capsys.readouterr()
    assert printed.out == "'\\x1b[2J'\n"
    assert printed.err == "'gateway: listen: \\r'\n"


ODD = """
import asyncio, contextlib, sys
from dataclasses import dataclass
from typing import Annotated, Literal
from gateway import Meta, Stage

stopped = []

@dataclass
class Odd(Stage):
    "Do at its beginning or its end what no stage should."
    how: Literal[
        "well", "cancelled", "exits", "tells", "stops by cancelling", "hangs at its end", "exits at its end",
        "cannot be stopped"
    ] = "well"
    secret: Annotated[str, Meta(extra={"secret": True})] = "sesame-open"

    async def start(self, services):
        if self.how == "cancelled":
            task = asyncio.create_task(asyncio.sleep(10))
            task.cancel()
            await task
        if self.how == "exits":
            sys.exit(3)
        if self.how == "tells":
            raise OSError(f"cannot connect to redis://:{self.secret}@host")
        self.task = asyncio.create_task(asyncio.sleep(3600))

    async def stop(self):
        self.task.cancel()
        if self.how == "stops by cancelling":
            await self.task
        if self.how == "hangs at its end":
            await asyncio.sleep(3600)
        if self.how == "exits at its end":
            sys.exit(3)
        while self.how == "cannot be stopped":
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.3)
                return
        stopped.append(self.how)
"""
ODD_FILES = {**FILES, "mine/odd.py": ODD, "teams/b.yaml": "match: {path_prefix: /b}\n"}
ODD_YAML = YAML.replace("  - mark: first", "  - mark: first\n  - odd: well") + "teams: teams/*.yaml\n"


@pytest.mark.parametrize(
    ("how", "words"), [("cancelled", "CancelledError"), ("exits", "SystemExit: 3"), ("tells", "redis://:***@host")]
)
async def test_whatever_a_stage_does_when_it_starts_keeps_the_old_set(
    how: str, words: str, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """Even an exception that ends other programs; a later reload works. No message has its secret settings."""
    running = await start(ODD_YAML, **ODD_FILES)
    report = await running.reload(("odd: well", f"odd: {how}"), yaml=ODD_YAML)
    (mistake,) = report.mistakes
    assert words in mistake
    assert "sesame-open" not in str(report)
    assert await running.name() == "first"
    report = await running.reload(("mark: first", "mark: second"), yaml=ODD_YAML)
    assert not report.mistakes
    assert await running.name() == "second"


@pytest.mark.parametrize("how", ["stops by cancelling", "hangs at its end", "exits at its end", "cannot be stopped"])
async def test_whatever_a_stage_does_when_it_stops_the_others_are_stopped(
    how: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of its team and of other teams; and the gateway can be stopped."""
    monkeypatch.setattr("gateway.teams._STOP_TIMEOUT", 0.1)
    yaml = ODD_YAML.replace("odd: well", f"odd: {how}")
    running = await start(yaml, **ODD_FILES)
    await running.reload(("mark: first", "mark: second"), yaml=yaml)
    assert await running.name() == "second"
    events = running.gateway.events
    await until(lambda: len([each for each in events if each["event"] == "mark stopped"]) == 2)
    failed = [each for each in events if each["event"] == "stage_stop_failed"]
    assert {each["team"] for each in failed} == {"default", "b"}
    now = asyncio.Event()
    now.set()
    async with asyncio.timeout(30):
        await running.gateway.server.stop(now=now)
    assert len([each for each in events if each["event"] == "mark stopped"]) == 4


async def test_a_pipe_that_says_nothing_does_not_keep_the_gateway(start: Start, tmp_path: Path) -> None:
    """The configuration is read in a daemon thread."""
    running = await start()
    os.mkfifo(tmp_path / "pipe")
    running.path.write_text(YAML.replace("${file:key}", "${file:pipe}"))
    reloading = asyncio.create_task(running.generations.reload())
    await asyncio.sleep(0.1)
    assert not reloading.done()
    assert await running.name() == "first"
    reloading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reloading
    assert [each.daemon for each in threading.enumerate() if each.name == "reading the configuration"] == [True]
    (tmp_path / "pipe").write_text("x")  # lets the thread end


async def test_a_worker_sends_long_messages(tmp_path: Path) -> None:
    """A message larger than the socket's buffer, on a non-blocking descriptor, as event loops leave it."""
    ours, theirs = socket.socketpair()
    line = SupervisorChannel(theirs.detach())
    os.set_blocking(line._socket.fileno(), False)
    names = {f"/etc/gateway/teams/{number:05}.yaml": "0" * 64 for number in range(20_000)}
    said = asyncio.create_task(asyncio.to_thread(line.ready, WatchedState(Sources(names))))
    with ours:
        ours.setblocking(False)
        await asyncio.sleep(0.1)
        heard = b""
        while not heard.endswith(b"\n"):
            heard += await asyncio.get_running_loop().sock_recv(ours, 65536)
        await said
        line._socket.close()
    assert len(json.loads(heard)["state"]["sources"]["files"]) == 20_000


async def test_names_that_are_no_text_are_none_of_a_configuration_s(tmp_path: Path) -> None:
    """A stray file in a folder of stages must not prevent workers from reporting their sources."""
    (tmp_path / "fine.py").write_text("")
    Path(os.fsdecode(bytes(tmp_path) + b"/\xe4.py")).write_text("")
    sources = Sources()
    assert [each.name for each in sources.find(tmp_path / "*.py")] == ["fine.py"]
    json.dumps(sources.patterns).encode()


async def test_simultaneous_clients_are_limited(tmp_path: Path) -> None:
    """Each client costs a descriptor."""

    async def reload() -> Prepared:
        await asyncio.sleep(3600)
        raise AssertionError

    async with going(reloads(tmp_path, reload)):
        clients = []
        for _ in range(40):
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            clients.append(sock)
            while True:
                try:
                    sock.connect(control._name(tmp_path / "gateway.yaml"))
                except BlockingIOError:
                    await asyncio.sleep(0.01)
                else:
                    break
        await asyncio.sleep(0.2)
        closed = 0
        for sock in clients:
            with contextlib.suppress(BlockingIOError):
                closed += sock.recv(1) == b""
            sock.close()
    assert closed == 40 - 16


async def test_a_reload_that_fails_by_a_bug_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client gets a report, and the next reload runs: a passing error must not end the loop."""
    monkeypatch.setattr("gateway.process.reload._PAUSE", 0.01)
    tried = 0

    async def reload() -> Prepared:
        nonlocal tried
        tried += 1
        if tried == 1:
            raise RuntimeError("can't start new thread")
        return Prepared(ReloadReport(changes=["x"]), WatchedState())

    async with going(running := reloads(tmp_path, reload)):
        assert (await running.ask()).mistakes == ["RuntimeError; see the log"]
        assert (await running.ask()).changes == ["x"]


async def test_the_watch_outlives_a_reload_that_read_nothing(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It failed before it read a file: all files are still watched, and count as changed."""
    running = await start()
    before = running.generations.state.sources

    def fails(*args: object) -> Loaded:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(running.generations, "_load", fails)
    prepared = await running.generations.prepare()
    assert prepared.report.mistakes == ["RuntimeError; see the log"]
    assert prepared.state.sources.files.keys() == before.files.keys()
    monkeypatch.setattr(watch, "_INTERVAL", 0.01)
    async with asyncio.timeout(20):
        await watch.wait_for_change(prepared.state.sources)


async def test_a_watch_without_threads_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lack of threads is a passing error."""
    (tmp_path / "f").write_text("1")
    sources = Sources()
    sources.read(tmp_path / "f")
    monkeypatch.setattr(watch, "_INTERVAL", 0.01)
    to_thread, left = asyncio.to_thread, 3

    async def without(work: Callable[..., Any], *args: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise RuntimeError("can't start new thread")
        if left == -1:
            (tmp_path / "f").write_text("2")
        return await to_thread(work, *args)

    monkeypatch.setattr(asyncio, "to_thread", without)
    async with asyncio.timeout(20):
        await watch.wait_for_change(sources)
    assert left < -1
