"""One supervisor and several workers on one address, as seen by clients and operators."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.cli import main
from gateway.errors import StartError
from gateway.process import two_phase_reload, worker_health, worker_restarts
from gateway.process.control_socket import ReloadReport
from gateway.process.supervisor import Supervisor
from gateway.process.systemd import Notifier
from gateway.process.worker_process import worker_command
from gateway.settings import Listen
from gateway.testing import FakeAzure
from gateway.transport.listener import Listener
from tests.cli.test_cli import CLEAN, OWN, STARTS, run
from tests.cluster import cluster, pool_yaml
from tests.conftest import CHAT, KEY, write_files
from tests.redis_server import free_port

WHO = """
import os
from dataclasses import dataclass
from gateway import Stage

@dataclass
class Who(Stage):
    "Say which process answered, and how it is configured."
    name: str = "first"

    async def __call__(self, request, call_next):
        response = await call_next(request)
        response.headers.set("x-pid", str(os.getpid()))
        response.headers.set("x-name", self.name)
        return response
"""
YAML = """
plugins_path: mine
timeouts: {grace: 20}
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline: [who, auth_passthrough, {model_map: {unmapped: own_name_without_dots}}, api_version: 2024-10-21]
"""


class Fleet:
    """A supervisor in a separate process; `events` are from its log and its workers'."""

    def __init__(self, process: asyncio.subprocess.Process, config: Path) -> None:
        self.process = process
        self.config = config
        self.events: list[dict[str, Any]] = []
        self.text = b""
        self._changed = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            self.text += line
            if line.startswith(b"{"):
                self.events.append(json.loads(line))
            self._changed.set()

    async def until(self, event: str, count: int = 1) -> dict[str, Any]:
        """Wait for the `count`-th event of a name."""
        async with asyncio.timeout(30):
            while len(found := self.named(event)) < count:
                self._changed.clear()
                assert not self._reader.done(), self.text.decode()
                await self._changed.wait()
        return found[count - 1]

    def named(self, event: str) -> list[dict[str, Any]]:
        return [each for each in self.events if each["event"] == event]

    async def gone(self) -> int:
        """Wait until the supervisor and every worker are gone, and return the supervisor's status."""
        async with asyncio.timeout(30):
            await self._reader  # ends when the last one that can write to the log has
            return await self.process.wait()

    @property
    def url(self) -> str:
        return f"http://{self.named('workers_ready')[0]['address']}/v1/chat/completions"

    @property
    def pids(self) -> set[int]:
        """The current workers, from the last event."""
        return set(self.named("workers_ready")[-1]["pids"])


@contextlib.asynccontextmanager
async def fleet(
    azure: FakeAzure, folder: Path, *arguments: str, yaml: str = YAML, count: int = 2, wait: bool = True
) -> AsyncIterator[Fleet]:
    """Run `gateway serve --workers`, and yield it when its workers are ready."""
    config = write_files(folder, {"gateway.yaml": yaml, "mine/who.py": WHO})
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "serve", "--config", str(config), "--workers", str(count),
        *(arguments or ("--listen", "127.0.0.1:0")),
        env={**CLEAN, "ENDPOINT": azure.endpoint}, stderr=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    running = Fleet(process, config)
    try:
        if wait:
            await running.until("workers_ready")
        yield running
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await running.gone()


async def ask(url: str, **more: Any) -> str:
    """Send a request on a new connection, and return the pid of the worker that responded."""
    async with (
        aiohttp.ClientSession(**more) as session,
        session.post(url, json=CHAT, headers={"api-key": KEY}) as answer,
    ):
        assert answer.status == 200, await answer.text()
        return answer.headers["x-pid"]


async def answering(url: str, pids: set[int]) -> None:
    """Send requests until every worker of a set has responded, and no other one."""
    async with asyncio.timeout(30):
        seen: set[int] = set()
        while seen != pids:
            answers = await asyncio.gather(*(ask(url) for _ in range(8)))
            seen = (seen | set(map(int, answers))) & pids


@pytest.mark.slow
async def test_workers_share_one_port_and_a_killed_one_is_replaced(azure: FakeAzure, tmp_path: Path) -> None:
    """Both respond; the log has the dead worker, its exit and the restart delay; then both respond again."""
    async with fleet(azure, tmp_path) as running:
        first = running.pids
        assert len(first) == 2
        assert running.process.pid not in first
        await answering(running.url, first)
        victim = min(first)
        os.kill(victim, signal.SIGKILL)
        died = await running.until("worker_died")
        assert (died["level"], died["pid"], died["exit"]) == ("error", victim, "signal SIGKILL")
        assert died["restart_in"] == 0.5
        heir = (await running.until("worker_ready", 3))["pid"]
        await answering(running.url, {max(first), heir})
        running.process.send_signal(signal.SIGTERM)
        assert await running.gone() == 0


@pytest.mark.slow
async def test_rolling_restarts_under_load_fail_no_request(tmp_path: Path) -> None:
    """Three restarts, with kept and new connections, and a stream that outlives the first; all workers are replaced."""
    async with FakeAzure(words=["x"] * 300, delay=0.1) as azure, fleet(azure, tmp_path) as running:
        done, whole, failed, enough = 0, 0, [], asyncio.Event()
        body = {**CHAT, "user": "load"}

        async def load(kept: bool) -> None:
            nonlocal done, whole
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=not kept)) as session:
                while not enough.is_set():
                    try:
                        async with session.post(running.url, json=body, headers={"api-key": KEY}) as answer:
                            assert answer.status == 200
                            await answer.read()
                            whole += 1
                    except aiohttp.ServerDisconnectedError:
                        # A kept connection may be closed when its client says nothing for a second, as this one
                        # does on a busy machine. The request is none then: Azure has not seen it.
                        assert kept
                    except (aiohttp.ClientError, AssertionError) as exc:
                        failed.append(repr(exc))
                    done += 1
                    await asyncio.sleep(0.001)

        clients = [asyncio.create_task(load(kept)) for kept in (True, True, True, True, True, True, False, False)]
        async with aiohttp.ClientSession() as session:
            answer = await session.post(running.url, json={**CHAT, "stream": True}, headers={"api-key": KEY})
            streaming = int(answer.headers["x-pid"])
            seen = running.pids
            assert streaming in seen
            for turn in (2, 3, 4):
                before = done
                os.killpg(
                    running.process.pid, signal.SIGUSR2
                )  # the workers get it, too, and leave it to the supervisor
                await running.until("workers_ready", turn)
                assert not running.pids & seen
                seen |= running.pids
                assert done > before
                if turn == 2:
                    assert azure.streaming == 1
                    azure.delay = 0
                    text = await answer.text()
                    assert text.endswith("data: [DONE]\n\n")
                    assert text.count('"x"') >= 300
        await answering(running.url, running.pids)
        enough.set()
        await asyncio.gather(*clients)
        assert failed == []
        assert len([seen for seen in azure.requests if b'"load"' in seen.body]) == whole
        await running.until("stopped", 6)  # the old ones, and nobody died
        assert not running.named("worker_died")
        running.process.send_signal(signal.SIGTERM)
        assert await running.gone() == 0


@pytest.mark.slow
async def test_a_broken_configuration_keeps_the_old_workers(azure: FakeAzure, tmp_path: Path) -> None:
    """The log has the reason, once; the next restart takes a corrected one, and new code of a stage."""
    unwatched = YAML + "watch: false\n"
    async with fleet(azure, tmp_path, yaml=unwatched) as running:
        old = running.pids
        running.config.write_text(unwatched.replace("pipeline: [who", "pipeline: [whom"))
        running.process.send_signal(signal.SIGUSR2)
        failed = await running.until("rolling_restart_failed")
        assert failed["level"] == "error"
        assert "gateway.yaml:5:12: there is no stage 'whom'" in failed["reason"]
        assert running.text.count(b"there is no stage 'whom'") == 1
        assert set(failed["pids"]) == old
        await answering(running.url, old)

        write_files(tmp_path, {"mine/who.py": WHO.replace("    name: str", "    title: str = 'x'\n    name: str")})
        running.config.write_text(unwatched.replace("[who,", "[{who: {title: t, name: second}},"))
        running.process.send_signal(signal.SIGUSR2)
        await running.until("workers_ready", 3)
        assert not running.pids & old
        await answering(running.url, running.pids)
        async with aiohttp.ClientSession() as session, session.post(running.url, json=CHAT) as answer:
            assert answer.headers["x-name"] == "second"
        running.process.send_signal(signal.SIGTERM)
        assert await running.gone() == 0


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [False, True])
async def test_sigterm_drains_every_worker(whole_group: bool, tmp_path: Path) -> None:
    """Streams complete, new connections are refused, the status is 0; even if the workers get the signal, too."""
    async with FakeAzure(words=["x"] * 300, delay=0.1) as azure, fleet(azure, tmp_path) as running:
        url = running.url
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
            body = {**CHAT, "stream": True}
            answers = [await session.post(url, json=body, headers={"api-key": KEY}) for _ in range(6)]
            if whole_group:
                os.killpg(running.process.pid, signal.SIGTERM)
            else:
                running.process.send_signal(signal.SIGTERM)
            await running.until("draining")
            async with asyncio.timeout(30):
                while True:
                    try:
                        await ask(url)
                    except aiohttp.ClientConnectionError:
                        break
            assert azure.streaming == 6
            azure.delay = 0
            for answer in answers:
                assert (await answer.text()).endswith("data: [DONE]\n\n")
        assert await running.gone() == 0
        assert not running.named("worker_died")
        assert not running.named("exchanges_cancelled")


@pytest.mark.slow
async def test_a_second_signal_ends_every_worker_at_once(tmp_path: Path) -> None:
    """Without the grace period."""
    async with FakeAzure(words=["x"] * 2000, delay=0.05) as azure:
        yaml = YAML.replace("grace: 20", "grace: 3600")
        async with fleet(azure, tmp_path, yaml=yaml) as running, aiohttp.ClientSession() as session:
            answer = await session.post(running.url, json={**CHAT, "stream": True}, headers={"api-key": KEY})
            running.process.send_signal(signal.SIGTERM)
            await running.until("draining")
            await asyncio.sleep(0.3)
            assert running.process.returncode is None
            running.process.send_signal(signal.SIGTERM)
            assert await running.gone() == 0
            answer.close()


@pytest.mark.slow
async def test_workers_do_not_outlive_their_supervisor(tmp_path: Path) -> None:
    """If it is killed, they drain and exit."""
    async with (
        FakeAzure(words=["x"] * 20, delay=0.1) as azure,
        fleet(azure, tmp_path) as running,
        aiohttp.ClientSession() as session,
    ):
        answer = await session.post(running.url, json={**CHAT, "stream": True}, headers={"api-key": KEY})
        running.process.kill()
        assert (await answer.text()).endswith("data: [DONE]\n\n")
        assert await running.gone() == -signal.SIGKILL
        assert len(running.named("stopped")) == 2


@pytest.mark.slow
async def test_the_unix_socket_is_the_supervisors(azure: FakeAzure, tmp_path: Path) -> None:
    """Its file outlives workers and restarts, and is removed at the end."""
    path = tmp_path / "s"
    async with fleet(azure, tmp_path, "--listen", f"unix:{path}") as running:
        os.kill(min(running.pids), signal.SIGKILL)
        await running.until("worker_ready", 3)
        running.process.send_signal(signal.SIGUSR2)
        await running.until("workers_ready", 2)
        await running.until("stopped", 2)  # the old ones
        assert path.is_socket()
        pid = await ask("http://x/v1/chat/completions", connector=aiohttp.UnixConnector(str(path)))
        assert int(pid) in running.pids
        running.process.send_signal(signal.SIGTERM)
        assert await running.gone() == 0
    assert not path.exists()


@pytest.mark.slow
async def test_restarts_asked_for_meanwhile_are_one_more_and_a_stop_wins(azure: FakeAzure, tmp_path: Path) -> None:
    """Several signals during a restart count as one; SIGTERM does not wait for it."""
    async with fleet(azure, tmp_path) as running:
        running.process.send_signal(signal.SIGUSR2)
        await running.until("rolling_restart")
        for _ in range(3):
            running.process.send_signal(signal.SIGUSR2)
            await asyncio.sleep(0.01)
        await running.until("workers_ready", 3)
        await asyncio.sleep(0.5)
        assert len(running.named("rolling_restart")) == 2
        running.process.send_signal(signal.SIGUSR2)
        await running.until("rolling_restart", 3)
        running.process.send_signal(signal.SIGTERM)
        assert await running.gone() == 0
        assert len(running.named("workers_ready")) == 3


@pytest.mark.slow
async def test_what_keeps_every_worker_from_starting_is_said_once(azure: FakeAzure, tmp_path: Path) -> None:
    """Status 1 and one line, as without workers: a stage that fails, an address that is taken."""
    write_files(tmp_path, {"gateway.yaml": OWN, "p/starts.py": STARTS.format(what="raise OSError('no redis')")})
    done = await asyncio.to_thread(run, "serve", "--config", "gateway.yaml", "--workers", "3", "--listen",
                                   "127.0.0.1:0", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("gateway: the stage 'starts' of team 'default' cannot start: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == "starting\n", "one worker has tried"
    address = f"127.0.0.1:{azure.port}"
    done = await asyncio.to_thread(
        run, "serve", "--workers", "2", "--listen", address, AZURE_OPENAI_ENDPOINT=azure.endpoint
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"gateway: cannot listen on {address}: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("how", "signals"), [("await asyncio.sleep(3600)", 1), ("time.sleep(3600)", 2)])
async def test_workers_that_hang_while_they_start_can_be_stopped(
    how: str, signals: int, azure: FakeAzure, tmp_path: Path
) -> None:
    """SIGTERM ends a gateway that is starting; a worker that does not react is killed after a second signal."""
    write_files(tmp_path, {"mine/starts.py": STARTS.format(what=f"get_logger().info('hanging'); {how}")})
    path = tmp_path / "mine" / "starts.py"
    path.write_text("import time\nfrom gateway.logs import get_logger\n" + path.read_text())
    async with fleet(azure, tmp_path, yaml=YAML.replace("[who,", "[starts,"), wait=False) as running:
        await running.until("hanging")
        for turn in range(signals):
            running.process.send_signal(signal.SIGTERM)
            await running.until("stopping")
            if turn + 1 < signals:
                await asyncio.sleep(0.3)
                assert running.process.returncode is None
        assert await running.gone() == 0


@pytest.mark.parametrize("given", ["0", "-1", "x", "1.5", ""])
def test_a_wrong_number_of_workers_is_a_clear_error(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2, and the valid values."""
    with pytest.raises(SystemExit) as caught:
        main(["serve", f"--workers={given}"])
    assert caught.value.code == 2
    assert f"--workers: {given!r} must be a number of at least 1, or auto" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("cpus", [1, 2])
async def test_auto_is_one_worker_for_each_cpu_that_may_be_used(cpus: int, azure: FakeAzure, tmp_path: Path) -> None:
    """Not one for each CPU of the machine; with one CPU there is no supervisor."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < cpus:
        pytest.skip("this machine has too few CPUs")
    config = write_files(tmp_path, {"gateway.yaml": YAML, "mine/who.py": WHO})
    code = "import os, sys; os.sched_setaffinity(0, map(int, sys.argv[1].split(','))); sys.argv[1:2] = []\n"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code + "from gateway.cli import main; sys.exit(main())",
        ",".join(map(str, allowed[:cpus])), "serve", "--config", str(config), "--workers", "auto", "--listen",
        "127.0.0.1:0", env={**CLEAN, "ENDPOINT": azure.endpoint}, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    running = Fleet(process, config)
    try:
        if cpus == 1:
            assert (await running.until("listening"))["pid"] == process.pid
        else:
            assert len((await running.until("workers_ready"))["pids"]) == cpus
        process.send_signal(signal.SIGTERM)
        assert await running.gone() == 0
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def test_workers_import_from_where_the_supervisor_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory may have another gateway.py: it counts only if `python -m gateway` looked there, too."""
    monkeypatch.setattr(sys, "path", [os.getcwd(), *sys.path])
    assert worker_command(None, cors=True)[-2:] == ["serve", "--cors"]
    assert worker_command(None) == [sys.executable, "-m", "gateway", "serve"]
    monkeypatch.setattr(sys, "path", ["/opt/gateway/bin", *sys.path])
    assert worker_command(Path("g.yaml"))[1:] == ["-P", "-m", "gateway", "serve", "--config", "g.yaml"]


# A worker that says that it serves, and ends; one that never says anything.
CRASHES = """
import socket, sys
socket.socket(fileno=int(sys.argv[2].split(",")[-1])).sendall(b'{"word": "ready"}\\n')
sys.exit(3)
"""
SILENT = "import time; time.sleep(3600)"


def supervisor(code: str, count: int = 1, **more: Any) -> Supervisor:
    """A supervisor in this process, with stubs as workers."""
    command = [sys.executable, "-S", "-c", code]
    listener = Listener.open(Listen("127.0.0.1", 0))
    return Supervisor(listener, command, count, Notifier({}), config=Path("none.yaml"), **more)


@pytest.mark.parametrize(
    ("reset_after", "delays"), [(60.0, [0.01, 0.02, 0.04, 0.05, 0.05]), (0.0, [0.01, 0.01, 0.01, 0.01, 0.01])]
)
async def test_the_delay_grows_while_workers_die_young(
    reset_after: float, delays: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The delay doubles up to a maximum; after a long uptime it starts again at the initial delay."""
    monkeypatch.setattr(worker_restarts, "_FIRST_DELAY", 0.01)
    monkeypatch.setattr(worker_restarts, "_MAX_DELAY", 0.05)
    monkeypatch.setattr(worker_restarts, "_RESET_AFTER", reset_after)
    events: list[dict[str, Any]] = []
    running = supervisor(CRASHES)

    class Log:
        def info(self, event: str, **facts: Any) -> None:
            pass

        def error(self, event: str, **facts: Any) -> None:
            events.append({"event": event, **facts})
            if len(events) == len(delays):
                running._stop()

    monkeypatch.setattr(worker_restarts, "get_logger", Log)
    async with asyncio.timeout(30):
        await running.run()
    assert {event["event"] for event in events} == {"worker_died"}
    assert {event["exit"] for event in events} == {"status 3"}
    assert [event["restart_in"] for event in events] == delays


async def test_workers_that_never_become_ready_are_killed() -> None:
    """The supervisor has a timeout."""
    running = supervisor(SILENT, 2, timeout=0.3)
    async with asyncio.timeout(30):
        with pytest.raises(StartError, match=r"not ready after 0\.3 s"):
            await running.run()


async def test_a_system_without_processes_is_a_clear_error() -> None:
    """Like any reason why the first worker cannot start."""
    running = Supervisor(Listener.open(Listen("127.0.0.1", 0)), ["no-such-program"], 2, Notifier({}),
                         config=Path("none.yaml"))  # fmt: skip
    async with asyncio.timeout(30):
        with pytest.raises(StartError, match="cannot start a worker: No such file"):
            await running.run()


async def test_a_system_without_threads_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread waits for each worker; without a thread there is no worker, and the supervisor reports it."""

    async def without(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", without)
    running = supervisor(SILENT, 2)
    async with asyncio.timeout(30):
        with pytest.raises(StartError, match="cannot start a worker: can't start new thread"):
            await running.run()


async def test_a_worker_that_exits_silently_is_reported_with_its_status() -> None:
    """Its traceback, which it has printed, is not repeated."""
    running = supervisor("raise SystemExit(7)", 2)
    async with asyncio.timeout(30):
        with pytest.raises(StartError, match="exited before it was ready: status 7"):
            await running.run()


# A worker that prepares reloads: `other` is code for the second one of them. What it hears is in a file.
PREPARES = """
import json, os, socket, sys, time
line = socket.socket(fileno=int(sys.argv[2].split(",")[-1]))
first = not os.path.exists("FOLDER/first")
heard = open("FOLDER/" + ("first" if first else "second"), "a", buffering=1)
def say(**words):
    line.sendall(json.dumps(words).encode() + b"\\n")
def state(content):
    return {"sources": {"files": {"f": content}, "patterns": {}}, "watch": False}
def prepared(content):
    say(word="prepared", number=int(number), prepared={"report": {"changes": [content]}, "state": state(content)})
say(word="ready", state=state("0"))
for order in line.makefile("r"):
    heard.write(order)
    word, _, number = order.strip().partition(" ")
    if word in ("drain", "end"):
        break
    if word == "commit":
        say(word="committed", number=int(number))
    if word == "prepare":
        if first:
            prepared("new")
        else:
            OTHER
"""


@pytest.mark.parametrize(
    ("other", "said", "heard"),
    [
        ("prepared('new')", ReloadReport(changes=["new"]), "prepare 1, commit 1"),
        ("pass", ReloadReport(mistakes=["a worker did not prepare the reload within 2 s"]), "prepare 1, abort 1"),
        ("sys.exit(3)", ReloadReport(mistakes=["a worker exited while it prepared the reload"]), "prepare 1, abort 1"),
        ("prepared('old' if number == '1' else 'new')", ReloadReport(changes=["new"]),
         "prepare 1, abort 1, prepare 2, commit 2"),
        ("prepared('old')",
         ReloadReport(mistakes=["the files changed while they were read; the gateway reads them again"]),
         "prepare 1, abort 1, prepare 2, abort 2"),
    ],
    ids=["well", "late", "dies", "changed-once", "changed-again"],
)  # fmt: skip
async def test_all_workers_take_the_same_files_over_or_none(
    other: str, said: ReloadReport, heard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is late, exits meanwhile, or has read different files, prevents the commit."""
    monkeypatch.setattr(worker_restarts, "_FIRST_DELAY", 30.0)
    code = PREPARES.replace("FOLDER", str(tmp_path)).replace("OTHER", other)
    running = supervisor(code, 2, timeout=2)
    task = asyncio.create_task(running.run())
    async with asyncio.timeout(30):
        while len(running._serving()) < 2 or running._reloading is None:
            await asyncio.sleep(0.01)
        report = await running._reloads.ask()
        running._stop()
        running._stop()
        await task
    assert report == said
    assert (tmp_path / "first").read_text().split("\n") == [*heard.split(", "), "drain", ""]
    assert running._reloads.state is not None
    if "reads them again" in str(report):
        assert running._reloads.state.sources.files == {"f": "unread"}


# A worker that serves, and tells how its deployments are as often as it is said.
REPORTS = """
import json, os, socket, sys
line = socket.socket(fileno=int(sys.argv[2].split(",")[-1]))
left = TIMES
row = {"resource": "east", "region": None, "deployment": "gpt-4o", "state": "available", "reason": "", "cool_down": 0,
       "in_flight": 1, "error_share": 0.0, "requests": 0, "failures_in_a_row": 0, "headroom": None,
       "counts": {"answered": 1}}
if READY:
    line.sendall(b'{"word": "ready"}\\n')
for order in line.makefile("r"):
    word, _, number = order.strip().partition(" ")
    if word in ("drain", "end"):
        break
    if word == "report" and left == "dies":
        os._exit(3)
    if word == "report" and left:
        left -= 1
        line.sendall(json.dumps({"word": "reported", "number": int(number), "report": [row]}).encode() + b"\\n")
"""


@pytest.mark.parametrize(
    ("ready", "times", "expected"),
    [
        (True, "9", [(200, 2), (200, 2)]),
        (True, "1", [(200, 2), (200, 2)]),
        (True, "0", [(503, "the workers do not reply; try again")] * 2),
        (True, "'dies'", [(503, "the workers do not reply; try again"), (503, "not all workers are ready; try again")]),
        (False, "9", [(503, "not all workers are ready; try again")] * 2),
    ],
    ids=["well", "known from before", "silent", "dead", "starting"],
)
async def test_the_operator_gets_the_last_known_state_or_a_503(
    ready: bool, times: str, expected: list[tuple[int, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While workers start, do not reply, or have died: the last known state, or a 503 with Retry-After."""
    monkeypatch.setattr(worker_health, "_REPORT_TIMEOUT", 0.3)
    monkeypatch.setattr(worker_restarts, "_FIRST_DELAY", 30.0)
    code = REPORTS.replace("TIMES", times).replace("READY", str(ready))
    running = supervisor(code, 2, admin=Listen(unix=str(tmp_path / "admin")))
    task = asyncio.create_task(running.run())
    async with asyncio.timeout(30):
        while running._admin.address is None or (ready and len(running._serving()) < 2):
            await asyncio.sleep(0.01)
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(tmp_path / "admin"))) as session:
            for status, shown in expected:
                async with session.get("http://x/admin/resources") as answer:
                    assert answer.status == status
                    body = await answer.json()
                    if status == 200:
                        assert body["resources"][0]["deployments"][0]["in_flight"] == shown
                    else:
                        assert body["error"]["message"] == shown
                        assert int(answer.headers["retry-after"]) > 0
        running._stop()
        running._stop()
        with contextlib.suppress(StartError):
            await task


async def test_a_worker_that_does_not_commit_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have committed, so there is no way back; the late worker commits when it can."""
    monkeypatch.setattr(two_phase_reload, "STOP_TIMEOUT", 0.2)
    warned: list[str] = []

    class Log:
        def info(self, event: str, **facts: Any) -> None:
            pass

        def warning(self, event: str, **facts: Any) -> None:
            warned.append(event)

    monkeypatch.setattr(two_phase_reload, "get_logger", Log)
    code = PREPARES.replace("FOLDER", str(tmp_path)).replace("OTHER", "prepared('new'); time.sleep(1)")
    running = supervisor(code, 2)
    task = asyncio.create_task(running.run())
    async with asyncio.timeout(30):
        while len(running._serving()) < 2 or running._reloading is None:
            await asyncio.sleep(0.01)
        assert (await running._reloads.ask()).changes == ["new"]
        assert warned == ["worker_reload_late"]
        running._stop()
        await task
    assert "commit 1" in (tmp_path / "second").read_text()


LIMITED = """
plugins_path: mine
timeouts: {grace: 20}
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline:
  - who
  - auth_passthrough
  - rate_limit: {requests_per_day: 20, limits: [{in_flight: 3, per: team}]}
  - {model_map: {unmapped: own_name_without_dots}}
  - api_version: 2024-10-21
"""


@pytest.mark.slow
async def test_workers_share_one_limit(azure: FakeAzure, tmp_path: Path) -> None:
    """Exactly, on all workers; across a reload that changes it, a rolling restart, and the death of a worker."""

    async def statuses(count: int) -> list[int]:
        async def one() -> int:
            async with (
                aiohttp.ClientSession() as session,
                session.post(running.url, json=CHAT, headers={"api-key": KEY}) as answer,
            ):
                return answer.status

        return [await one() for _ in range(count)]

    async with fleet(azure, tmp_path, yaml=LIMITED) as running:
        await asyncio.gather(statuses(6), statuses(6))
        assert sorted(await statuses(10)) == [200] * 8 + [429] * 2
        write_files(tmp_path, {"gateway.yaml": LIMITED.replace("requests_per_day: 20", "requests_per_day: 25")})
        running.process.send_signal(signal.SIGHUP)
        await running.until("reloaded")
        assert sorted(await statuses(6)) == [200] * 5 + [429]
        running.process.send_signal(signal.SIGUSR2)
        await running.until("workers_ready", 2)
        assert await statuses(3) == [429] * 3
        os.kill(min(running.pids), signal.SIGKILL)
        await running.until("worker_ready", 5)
        assert await statuses(3) == [429] * 3
        running.process.send_signal(signal.SIGTERM)
        assert await running.gone() == 0


@pytest.mark.slow
async def test_what_a_killed_worker_had_running_is_free_again(tmp_path: Path) -> None:
    """Three may run at once on all workers together; those of a replaced worker no longer count."""
    async with FakeAzure(words=["x"] * 100, delay=0.1) as azure, fleet(azure, tmp_path, yaml=LIMITED) as running:
        async with contextlib.AsyncExitStack() as stack:
            answers = []
            for _ in range(4):
                session = await stack.enter_async_context(aiohttp.ClientSession())
                body = {**CHAT, "stream": True}
                asked = session.post(running.url, json=body, headers={"api-key": KEY})
                answers.append(await stack.enter_async_context(asked))
            assert [each.status for each in answers] == [200, 200, 200, 429]
            assert "concurrent requests for this team is reached" in await answers[3].text()
            pids = [int(each.headers["x-pid"]) for each in answers[:3]]
            os.kill(pids[0], signal.SIGKILL)
            await running.until("worker_ready", 3)
            free = pids.count(pids[0])
            for status in [200] * free + [429]:
                session = await stack.enter_async_context(aiohttp.ClientSession())
                asked = session.post(running.url, json={**CHAT, "stream": True}, headers={"api-key": KEY})
                assert (await stack.enter_async_context(asked)).status == status
        running.process.send_signal(signal.SIGTERM)
        running.process.send_signal(signal.SIGTERM)
        await running.gone()


async def test_workers_share_what_they_know_of_deployments(tmp_path: Path) -> None:
    """What one worker learns, all know, including a replacement; the operator sees the sum."""
    async with cluster("east", "west") as regions:
        east = regions["east"]
        east.fault, east.rest = "limited", 600
        port = free_port()
        yaml = pool_yaml(regions, top=f"admin: 127.0.0.1:{port}\nplugins_path: mine").replace(
            "  - access_log\n", "  - who\n"
        )
        async with fleet(regions["west"].azure, tmp_path, yaml=yaml, count=3) as running:
            pids = running.pids
            while not east.saw:
                await ask(running.url)
            await asyncio.sleep(0.2)
            await answering(running.url, pids)
            seen = len(east.saw)
            assert seen == 1
            os.kill(next(iter(pids)), signal.SIGKILL)
            await running.until("worker_ready", 4)
            for _ in range(3):
                await asyncio.gather(*(ask(running.url) for _ in range(16)))
            assert len(east.saw) == seen
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"http://127.0.0.1:{port}/admin/resources") as answer,
            ):
                shown = await answer.json()
            rows = {each["name"]: each["deployments"][0] for each in shown["resources"]}
            assert rows["east"]["state"] == "cooling_down"
            assert 500 < rows["east"]["cool_down"] <= 600
            assert rows["west"]["state"] == "available"
            assert rows["west"]["counts"]["answered"] >= 48
