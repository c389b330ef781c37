"""The command line as a process: arguments, output and exit status."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.testing import FakeAzure
from tests.conftest import CHAT, KEY, write_files

pytestmark = pytest.mark.slow

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("AZURE_", "GATEWAY_", "OPENAI_"))}


def run(*arguments: str, cwd: Any = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway", *arguments]
    return subprocess.run(
        command, cwd=cwd, env={**CLEAN, **env}, capture_output=True, text=True, check=False, timeout=60
    )


@contextlib.asynccontextmanager
async def serving(*arguments: str, **env: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, dict[str, Any]]]:
    """Run `gateway serve`, and yield the process and its `listening` event."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "serve", *arguments, env={**CLEAN, **env}, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        async with asyncio.timeout(30):
            line = await process.stderr.readline()
        assert line.startswith(b"{"), line + await process.stderr.read()
        yield process, json.loads(line)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def test_nothing_configured_tells_what_to_do() -> None:
    """Without a file and an endpoint, the message has the commands that help."""
    for command in ("serve", "check"):
        done = run(command)
        assert done.returncode == 1
        for words in ("AZURE_OPENAI_ENDPOINT=https://", "--config gateway.yaml", "gateway demo"):
            assert words in done.stderr


def test_help_and_version() -> None:
    """Plain `gateway` prints help; each command has its own."""
    assert "gateway 0.1.0" in run("--version").stdout
    assert "COMMAND" in run().stdout
    assert run("--version").stdout == run("-v").stdout
    for command in ("serve", "reload", "check", "keys", "import", "stages", "schema", "demo"):
        assert "usage: gateway " + command in run(command, "--help").stdout


def test_check_prints_every_mistake_with_its_place(tmp_path: Path) -> None:
    """Status 1 and all mistakes, or status 0 and the pipelines; a folder works, too."""
    good = "resources: {a: https://x.openai.azure.com}\npipeline: [auth_passthrough, model_map, api_version]\n"
    write_files(
        tmp_path, {"gateway.yaml": good, "bad/gateway.yaml": good.replace("model_map", "model_mop") + "logg: 1\n"}
    )
    done = run("check", cwd=tmp_path, GATEWAY_CONFIG=".")
    assert (done.returncode, done.stderr) == (0, "")
    assert "team default" in done.stdout
    done = run("check", "bad", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "bad/gateway.yaml:2:30: there is no stage 'model_mop'; did you mean 'model_map'?",
        "bad/gateway.yaml:3:1: this file has no setting 'logg'; did you mean 'log'?",
        "gateway: 2 mistakes in the configuration",
    ]
    assert run("check", "no-such-file.yaml", cwd=tmp_path).returncode == 1


def test_stages_and_schema(tmp_path: Path) -> None:
    """Every stage with its first line; one with its settings; the schema as JSON."""
    assert "rate_limit" in run("stages").stdout
    assert "requests_per_minute: whole number" in run("stages", "rate_limit").stdout
    assert run("stages", "rate_limits").returncode == 1
    assert "It takes no settings" in run("stages", "sse_newline").stdout
    assert "pipeline" in json.loads(run("schema").stdout)["properties"]
    assert "match" in json.loads(run("schema", "--team").stdout)["properties"]
    mine = "from gateway import Stage\nclass Mine(Stage):\n    'Mine.'\n"
    write_files(tmp_path, {"gateway.yaml": "plugins_path: p\n", "p/mine.py": mine})
    assert "mine" in run("stages", "--config", "gateway.yaml", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"AZURE_OPENAI_MODEL_MAPPER": "gpt-4=a,gpt-4o"}, "'gpt-4o' is not model=deployment"),
        ({"AZURE_OPENAI_API_VER": "2024/10/21"}, "version must be text like 2024-10-21"),
        ({"GATEWAY_LISTEN": "here"}, "'here' is not HOST:PORT"),
        ({"AZURE_OPENAI_ENDPOINT": "my-resource"}, "must be a URL"),
    ],
)
def test_malformed_environment_is_a_clear_error(env: dict[str, str], words: str) -> None:
    """It names the invalid part and its variable."""
    given = {"AZURE_OPENAI_ENDPOINT": "https://x.openai.azure.com", **env}
    done = run("serve", **given)
    assert done.returncode == 1
    assert words in done.stderr
    assert next(iter(env)) in done.stderr


async def test_environment_alone_replaces_the_go_proxy(azure: FakeAzure) -> None:
    """With the three variables of the Go proxy, swapping the image is enough."""
    azure.deployments = ("xc-gpt-35", "my-gpt4", "gpt-35-turbo-16k")
    env = {
        "AZURE_OPENAI_ENDPOINT": azure.endpoint,
        "AZURE_OPENAI_MODEL_MAPPER": "gpt-3.5-turbo=xc-gpt-35,gpt-4=my-gpt4",
        "AZURE_OPENAI_API_VER": "2024-02-01",
    }
    async with serving("--listen", "127.0.0.1:0", **env) as (_, listening), aiohttp.ClientSession() as session:
        url = f"http://{listening['address']}/v1"
        for model in ("gpt-3.5-turbo", "gpt-4", "gpt-3.5-turbo-16k"):
            async with session.post(
                f"{url}/chat/completions", json={**CHAT, "model": model}, headers={"Authorization": f"Bearer {KEY}"}
            ) as answer:
                assert answer.status == 200, await answer.text()
        async with session.get(f"{url}/models", headers={"Authorization": f"Bearer {KEY}"}) as answer:
            assert [model["id"] for model in (await answer.json())["data"]] == ["gpt-3.5-turbo", "gpt-4"]
    assert [seen.path.split("/")[3] for seen in azure.requests] == ["xc-gpt-35", "my-gpt4", "gpt-35-turbo-16k"]
    assert azure.requests[0].query == [("api-version", "2024-02-01")]


GO = """\
deployment_config:
  - {deployment_name: xxx, model_name: gpt-4o, endpoint: "ENDPOINT", api_key: sesame, api_version: 2024-02-01}
"""


async def until_it_listens(process: asyncio.subprocess.Process) -> list[dict[str, Any]]:
    """Return the log's events up to `listening`."""
    events: list[dict[str, Any]] = []
    assert process.stderr is not None
    async with asyncio.timeout(30):
        while not events or events[-1]["event"] != "listening":
            line = await process.stderr.readline()
            assert line, events
            events.append(json.loads(line))
    return events


@pytest.mark.parametrize(
    "flags",
    [
        "-c config.yaml -l :0 -s",
        "--configFile config.yaml --listen :0 --cors",
        "-c=config.yaml -l=:0 --cors=true",
        "-s=false --configFile=config.yaml -l 0.0.0.0:0",
        "serve -c config.yaml -l :0",
        "serve --config config.yaml --listen :0 --workers 2",
        "--config config.yaml --listen :0 --workers 2 -s",
    ],
)
async def test_the_go_proxy_s_flags_and_file_start_the_gateway(flags: str, azure: FakeAzure, tmp_path: Path) -> None:
    """Even without a command; one warning recommends the import; `-s` allows every page, in workers, too."""
    azure.api_key, azure.deployments = "sesame", ["xxx"]
    write_files(tmp_path, {"config.yaml": GO.replace("ENDPOINT", azure.endpoint)})
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", *flags.split(), env=CLEAN, cwd=tmp_path, stderr=asyncio.subprocess.PIPE
    )
    try:
        events = await until_it_listens(process)
        assert process.stderr is not None
        if "workers" in flags:
            while events[-1]["event"] != "workers_ready":
                events.append(json.loads(await process.stderr.readline()))
        port = int(events[-1]["address"].rpartition(":")[2])
        assert events[-1]["address"].startswith("0.0.0.0:")
        # (A machine with few descriptors has another warning.)
        (warning,) = (event for event in events if event["level"] == "warning" and "differences" in event)
        assert "gateway import azure-openai-proxy" in warning["advice"]
        assert "config.yaml:2:" in warning["differences"][0]
        assert "sesame" not in str(events)
        async with (
            aiohttp.ClientSession() as session,
            session.post(
                f"http://127.0.0.1:{port}/v1/chat/completions", json=CHAT, headers={"Origin": "https://any.test"}
            ) as answer,
        ):
            assert answer.status == 200
            cors = "-s " in flags + " " or "--cors" in flags
            assert answer.headers.get("access-control-allow-origin") == ("*" if cors else None)
    finally:
        process.terminate()
        await process.wait()


def test_where_the_go_proxy_s_image_has_its_file_is_looked_at_last(tmp_path: Path) -> None:
    """Its users' compose files mount it there without naming it; the environment has precedence, as before."""
    write_files(tmp_path, {"config.yaml": GO.replace("ENDPOINT", "https://go.openai.azure.com")})
    code = (
        "import sys, pathlib, gateway.cli as cli; from gateway.cli import arguments; "
        "assert arguments.GO_PROXY_FILE == pathlib.Path('/app/config.yaml'); "
        "arguments.GO_PROXY_FILE = pathlib.Path('config.yaml'); sys.exit(cli.main(['check']))"
    )
    for env, words in (
        ({}, "https://go.openai"),
        ({"AZURE_OPENAI_ENDPOINT": "https://env.openai.azure.com"}, "//env."),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env={**CLEAN, **env}, capture_output=True, text=True, check=True
        )
        assert words in done.stdout
        assert ("config.yaml:2:" in done.stderr) == (not env), "the differences are said"


def test_import_prints_a_configuration_and_keeps_the_keys_apart(tmp_path: Path) -> None:
    """In a new file for its owner only; YAML on standard output, the rest on standard error, no key on either."""
    write_files(tmp_path, {"config.yaml": GO.replace("ENDPOINT", "https://east.openai.azure.com")})
    done = run("import", "azure-openai-proxy", "config.yaml", cwd=tmp_path)
    assert done.returncode == 0
    assert "AZURE_OPENAI_KEY_EAST" in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "config.yaml"]
    done = run("import", "azure-openai-proxy", "config.yaml", "--env-file", "keys.env", cwd=tmp_path)
    assert "sesame" not in done.stdout + done.stderr
    assert "`auth: none`" in done.stderr
    keys = tmp_path / "keys.env"
    assert keys.read_text() == "AZURE_OPENAI_KEY_EAST=sesame\n"
    assert keys.stat().st_mode & 0o777 == 0o600
    write_files(tmp_path, {"gateway.yaml": done.stdout})
    assert "with a stored key" in run("check", cwd=tmp_path, GATEWAY_CONFIG=".", AZURE_OPENAI_KEY_EAST="sesame").stdout
    assert "AZURE_OPENAI_KEY_EAST is not set" in run("check", cwd=tmp_path, GATEWAY_CONFIG=".").stderr
    done = run("import", "azure-openai-proxy", "config.yaml", "--env-file", "keys.env", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, ""), "a file that is there is not written over"
    assert done.stderr == "gateway: cannot write keys.env: File exists\n"
    done = run("import", "azure-openai-proxy", "gateway.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no `deployment_config`" in done.stderr


async def test_sigterm_finishes_streams_and_exits_0(azure: FakeAzure) -> None:
    """The listener closes at once; the running stream completes; the status is 0."""
    azure.words, azure.delay = ["x"] * 20, 0.05
    async with (
        serving("--listen", "127.0.0.1:0", AZURE_OPENAI_ENDPOINT=azure.endpoint) as (process, listening),
        aiohttp.ClientSession() as session,
    ):
        url = f"http://{listening['address']}/v1/chat/completions"
        body = {**CHAT, "stream": True}
        async with session.post(url, json=body, headers={"api-key": KEY}) as answer:
            await answer.content.readany()
            process.send_signal(signal.SIGTERM)
            rest = await answer.content.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        async with asyncio.timeout(30):
            assert await process.wait() == 0


async def test_second_signal_ends_it_at_once(azure: FakeAzure) -> None:
    """A second signal skips the grace period."""
    azure.words, azure.delay = ["x"] * 2000, 0.05
    async with (
        serving("--listen", "127.0.0.1:0", AZURE_OPENAI_ENDPOINT=azure.endpoint) as (process, listening),
        aiohttp.ClientSession() as session,
    ):
        url = f"http://{listening['address']}/v1/chat/completions"
        answer = await session.post(url, json={**CHAT, "stream": True}, headers={"api-key": KEY})
        await answer.content.readany()
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        async with asyncio.timeout(30):
            while b'"draining"' not in await process.stderr.readline():
                assert process.returncode is None
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            assert await process.wait() == 0
        answer.close()


async def test_unix_socket(azure: FakeAzure, tmp_path: Path) -> None:
    """For nginx on the same machine; a socket that a killed run has left is replaced, and removed at the end."""
    path = tmp_path / "gateway.sock"
    for kill in (True, False):
        async with serving("--listen", f"unix:{path}", AZURE_OPENAI_ENDPOINT=azure.endpoint) as (process, listening):
            assert listening["address"] == f"unix:{path}"
            async with (
                aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session,
                session.post("http://x/v1/chat/completions", json=CHAT, headers={"api-key": KEY}) as answer,
            ):
                assert answer.status == 200
            if not kill:
                process.send_signal(signal.SIGTERM)
                assert await process.wait() == 0
        assert path.exists() == kill


async def test_an_address_in_use_is_a_clear_error(azure: FakeAzure, tmp_path: Path) -> None:
    """Status 1 and the address, not a traceback; a socket that another process serves is not replaced."""
    path = tmp_path / "gateway.sock"
    async with serving("--listen", f"unix:{path}", AZURE_OPENAI_ENDPOINT=azure.endpoint) as (process, _):
        for address in (f"127.0.0.1:{azure.port}", f"unix:{path}", "unix:/no/such/folder/x.sock", "here"):
            done = await asyncio.to_thread(run, "serve", "--listen", address, AZURE_OPENAI_ENDPOINT=azure.endpoint)
            assert done.returncode == 1
            assert address in done.stderr
            assert done.stderr.startswith("gateway: ")
            assert len(done.stderr.splitlines()) == 1
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session,
            session.get("http://x/healthz") as answer,
        ):
            assert answer.status == 200
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    assert not path.exists()


STARTS = """
import asyncio
from gateway import Services, Stage

class Starts(Stage):
    "Fail or hang while it starts."
    async def start(self, services: Services) -> None:
        print("starting", flush=True)
        {what}
"""
OWN = """
plugins_path: p
resources: {a: https://x.openai.azure.com}
pipeline: [starts, auth_passthrough, model_map, api_version]
"""


@pytest.mark.parametrize("what", ["raise KeyError('x')", "raise OSError('redis is not there')"])
def test_a_stage_that_cannot_start_is_named(what: str, tmp_path: Path) -> None:
    """With its team and its error, on one line."""
    write_files(tmp_path, {"gateway.yaml": OWN, "p/starts.py": STARTS.format(what=what)})
    done = run("serve", "--config", "gateway.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("gateway: the stage 'starts' of team 'default' cannot start: ")
    assert "Traceback" not in done.stderr


async def test_a_stage_that_hangs_while_it_starts_can_be_stopped(tmp_path: Path) -> None:
    """SIGTERM ends a gateway that is starting."""
    write_files(tmp_path, {"gateway.yaml": OWN, "p/starts.py": STARTS.format(what="await asyncio.sleep(3600)")})
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "serve", "--config", "gateway.yaml", "--listen", "127.0.0.1:0",
        cwd=tmp_path, env=CLEAN, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert await process.stdout.readline() == b"starting\n"
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(30):
        assert await process.wait() == 0


async def test_demo_says_that_azure_is_fake_and_its_curl_line_works(unused_tcp_port: int) -> None:
    """`make run` starts it without an endpoint; the curl line that it prints streams a response."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "demo", "--listen", f"127.0.0.1:{unused_tcp_port}", env=CLEAN,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        async with asyncio.timeout(30):
            assert b"listening" in await process.stderr.readline()
            text = b""
            while b"curl" not in text or b"}'" not in text:
                text += await process.stdout.readline()
        assert b"FAKE Azure" in text
        words = shlex.split(text[text.index(b"curl") :].decode().replace("\\\n", " "))
        assert words[:2] == ["curl", "-N"]
        headers = dict(words[place + 1].split(": ", 1) for place, word in enumerate(words) if word == "-H")
        data = words[words.index("-d") + 1]
        async with aiohttp.ClientSession() as session, session.post(words[2], data=data, headers=headers) as answer:
            out = await answer.read()
        assert out.endswith(b"data: [DONE]\n\n")
        assert out.count(b"data: {") > 10
    finally:
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def test_demo_on_a_taken_port_prints_no_banner(azure: FakeAzure) -> None:
    """Only the error."""
    done = await asyncio.to_thread(run, "demo", "--listen", f"127.0.0.1:{azure.port}")
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot listen" in done.stderr


async def test_running_out_of_descriptors_passes(azure: FakeAzure, unused_tcp_port: int) -> None:
    """More clients than descriptors: after some disconnect, the next request succeeds."""
    command = f"ulimit -n 60; exec {sys.executable} -m gateway serve --listen 127.0.0.1:{unused_tcp_port}"
    process = await asyncio.create_subprocess_shell(
        command, env={**CLEAN, "AZURE_OPENAI_ENDPOINT": azure.endpoint}, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        assert b"listening" in await process.stderr.readline()
        clients = await asyncio.gather(
            *(asyncio.open_connection("127.0.0.1", unused_tcp_port) for _ in range(120)), return_exceptions=True
        )
        await asyncio.sleep(0.3)
        for client in clients:
            if isinstance(client, tuple):
                client[1].close()
        url = f"http://127.0.0.1:{unused_tcp_port}/v1/chat/completions"
        status = 0
        async with asyncio.timeout(30), aiohttp.ClientSession() as session:
            while status != 200:
                # The first may still be turned away, while the gateway learns that descriptors are free again.
                try:
                    async with session.post(url, json=CHAT, headers={"api-key": KEY}) as answer:
                        status = answer.status
                except aiohttp.ClientError:
                    await asyncio.sleep(0.1)
        assert process.returncode is None
    finally:
        process.terminate()
        await process.wait()
