"""The documentation is correct: its configurations load, its stages run, its tables are complete."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from gateway import Response
from gateway.azure.operations import OPERATIONS
from gateway.azure.resources import Deployment, Resource, ResourceTimeouts
from gateway.balancing.circuit_breaker import DeploymentHealth
from gateway.balancing.health import Health
from gateway.cli.command_line import command_line
from gateway.config import GatewayFile, TeamFile, load
from gateway.config.files import CredentialFile, IdentityFile, PooledFile, ResourceFile, StoreFile, TlsFile
from gateway.config.show import show
from gateway.errors import Fault
from gateway.fields import settings_of
from gateway.registry import Registry
from gateway.settings import HealthSettings, Limits, Timeouts
from gateway.testing import FakeAzure, post, running, talk
from tests.conftest import CHAT, StartGateway, write_files

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TEAMS = (ROOT / "docs" / "teams.md").read_text()
STAGES_GUIDE = (ROOT / "docs" / "writing-a-stage.md").read_text()
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_readme_s_configuration_loads(tmp_path: Path) -> None:
    """`gateway.yaml` and the team's file."""
    main, team, _ = blocks(README, "yaml")
    text = show(load(write_files(tmp_path, {"gateway.yaml": main, "teams/research.yaml": team}), {}))
    assert "team research: /research/v1" in text
    assert "rate_limit: requests_per_minute=60" in text


async def test_the_readme_s_stage_runs(start_gateway: StartGateway, azure: FakeAzure) -> None:
    """The stage of the README, in the folder and the pipeline of the README."""
    stage = blocks(README, "python")[1]
    yaml = "resources: {azure: {endpoint: '${ENDPOINT}'}}\n" + blocks(README, "yaml")[2]
    gateway = await start_gateway(azure.endpoint, yaml, {"my_stages/powered_by.py": stage})
    async with gateway.post() as answer:
        assert (answer.status, answer.headers["x-powered-by"]) == (200, "our team")


def test_the_readme_names_the_two_commands() -> None:
    """The two commands are in it, and the client example compiles."""
    assert "make run" in README
    assert "make test" in README
    compile(blocks(README, "python")[0], "README.md", "exec")


async def test_the_guide_s_stages_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example loads from `plugins_path`, and its test passes."""
    for code in blocks(STAGES_GUIDE, "python"):
        named = re.match(r"# my_stages/(\w+)\.py\n", code)
        if named:
            write_files(tmp_path, {f"my_stages/{named.group(1)}.py": code})
    registry = Registry([tmp_path / "my_stages"])
    for name in ("powered_by", "token_ceiling", "shout", "second_try", "no_tools"):
        assert registry.find(name)
    monkeypatch.syspath_prepend(tmp_path)
    scope: dict[str, object] = {}
    code = next(code for code in blocks(STAGES_GUIDE, "python") if "def test_it_lowers" in code)
    exec(code, scope)  # noqa: S102 -- our own documentation
    await scope["test_it_lowers_what_is_above"]()  # type: ignore[operator]
    async with running(registry.find("shout")()) as run:
        run.respond_with(
            Response(200, b'data: {"choices":[{"delta":{"content":"hi"}}]}\n\n', {"content-type": "text/event-stream"})
        )
        assert b'"HI"' in (await run.post()).body
    resources = {name: Resource(name, f"https://{name}.invalid") for name in ("east", "west")}
    answers = iter((Response(429), Response(200, b"ok")))
    sent = await post(
        registry.find("second_try")("west"),  # type: ignore[call-arg]
        json=CHAT, resources=resources, resource="east", response=lambda request: next(answers),
    )  # fmt: skip
    assert sent.body == b"ok"
    assert sent.reached is not None
    assert sent.reached.target.resource == resources["west"]
    refused = await post(
        registry.find("token_ceiling")(limit=1, over="refuse"),  # type: ignore[call-arg]
        json={**CHAT, "max_tokens": 2},
    )
    assert refused.status == 400
    talked = await talk(
        [registry.find("no_tools")()],
        up=[{"type": "response.create", "tools": [{}]}, {"tools": []}],
        down=[{"tools": 1}],
    )
    assert talked.to_azure == [{"tools": []}]
    assert [event.get("type") for event in talked.to_client] == ["error", None]
    sys.modules.pop("my_stages.token_ceiling", None)


def test_the_guide_s_script_runs(tmp_path: Path) -> None:
    """With the shipped configuration, in front of a fake Azure with all of Azure's oddities."""
    code = next(code for code in blocks(STAGES_GUIDE, "python") if "serving(" in code)
    shutil.copy(ROOT / "config" / "gateway.yaml", tmp_path)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "data: [DONE]\n\n\n" in done.stdout
    assert done.stdout.endswith("/openai/deployments/gpt-4o/chat/completions\n")
    assert '"id":""' not in done.stdout


def test_every_setting_of_the_files_is_documented() -> None:
    """With its default."""
    for cls in (GatewayFile, TeamFile, StoreFile, Timeouts, Limits):
        for name, (_, field) in settings_of(cls).items():
            assert f"`{name}`" in CONFIGURATION, name
            if cls is Timeouts:
                assert f"| `{name}` | {field.default:g} |" in CONFIGURATION
    for field in dataclasses.fields(Limits):
        assert f"| `{field.name}` | {field.default} |" in CONFIGURATION
    resources = (ROOT / "docs" / "resources.md").read_text()
    for name in (*settings_of(ResourceFile), *settings_of(TlsFile), *settings_of(ResourceTimeouts)):
        assert f"`{name}`" in CONFIGURATION, name
    for name in (*settings_of(PooledFile), *settings_of(CredentialFile)):
        assert f"`{name}`" in resources, name
    for name, (_, field) in settings_of(HealthSettings).items():
        default = "none" if field.default is None else f"{field.default:g}"
        assert f"| `{name}` | {default} |" in resources


def test_links_between_documents_lead_somewhere() -> None:
    """No dead relative link."""
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name}: {target}"


# Pages that name the project's own files; the others name files of their readers.
INSIDE = ("CONTRIBUTING.md", "docs/architecture.md", "docs/performance.md", "tests/bench/README.md")


@pytest.mark.parametrize("page", INSIDE)
def test_files_that_the_pages_name_exist(page: str) -> None:
    """By path, or by the name of a file in `gateway/` or next to the page."""
    text = (ROOT / page).read_text().partition("## Code map")[0]  # the map has a test of its own
    named = set(re.findall(r"`([\w./-]+(?:\.(?:py|c|h|txt|lua|cfg)|/))`", text))
    assert named
    for name in named:
        found = [*(ROOT / "gateway").rglob(f"{name}"), *(ROOT / page).parent.glob(name), *ROOT.glob(name)]
        assert found, f"{page} names {name}"


def test_classes_that_the_architecture_names_exist() -> None:
    """In `gateway`, or in aiohttp."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    source = "".join(path.read_text() for path in (ROOT / "gateway").rglob("*.py"))
    theirs = {"AbstractResolver", "BaseProtocol", "ClientRequest", "ClientResponse", "ClientSession", "TCPConnector"}
    named = set(re.findall(r"`([A-Z][a-z]+(?:[A-Z][a-z]+)*)(?:\.(\w+))?`", text))
    assert len(named) > 5
    for cls, method in named:
        assert f"class {cls}" in source or cls in theirs, cls
        assert not method or f"def {method}(" in source, f"{cls}.{method}"


def test_the_go_proxy_s_document_names_the_flags_and_the_import() -> None:
    """Each flag with a Go name, and the command exactly as typed."""
    text = (ROOT / "docs" / "coming-from-the-go-proxy.md").read_text()
    for words in ("`-c FILE`", "`--configFile FILE`", "`-l ADDRESS`", "`-s`, `--cors`", "/app/config.yaml"):
        assert words in text
    (line,) = (line for block in blocks(text, "console") for line in block.splitlines() if "gateway import" in line)
    options = command_line().parse_args(line.removeprefix("$ gateway ").partition(" >")[0].split())
    assert (options.path, options.env_file) == (Path("config.yaml"), Path("keys.env"))


def test_every_operation_is_documented() -> None:
    """By its name or its kind, in the table of docs/operations.md, with the first api-version if that is known."""
    rows = [line for line in (ROOT / "docs" / "operations.md").read_text().splitlines() if line.startswith("| `")]
    for operation in (each for each in OPERATIONS if each.on_azure and each.method != "WS"):
        kinds = operation.name.split(".")
        names = {operation.name, *(".".join([*kinds[:size], "*"]) for size in range(1, len(kinds)))}
        lines = [line for line in rows if any(f"`{name}`" in line for name in names)]
        assert lines, operation.name
        classic, v1 = lines[0].split("|")[2:4]
        if not operation.local:
            assert bool(classic.strip()) == (operation.classic is not None) or operation.name in ONLY_IN_PART
            assert v1.strip() or not operation.v1, operation.name
        if operation.since is not None and operation.name not in ("chat.completions", "completions", "embeddings"):
            assert operation.since in classic, operation.name


# Operations on only one of Azure's APIs, in a family that is on both.
ONLY_IN_PART = {"responses.compact"}


def test_the_documented_identities_load(tmp_path: Path) -> None:
    """The identities of both pages load, each with a team that its claims lead to."""
    (main, team) = (block for block in blocks(CONFIGURATION, "yaml") if "identity" in block or "claims" in block)
    entra = next(block for block in blocks((ROOT / "docs" / "operating.md").read_text(), "yaml") if "identity" in block)
    rest = (
        "resources: {azure: {endpoint: 'https://x.openai.azure.com', api_key: k}}\nteams: teams/*.yaml\n"
        "pipeline: [auth_keys, model_map, api_version]\n"
    )
    for identity in (main, entra):
        text = show(load(write_files(tmp_path, {"gateway.yaml": identity + rest, "teams/research.yaml": team}), {}))
        assert "team research: tokens with roles research" in text
        assert "identity https://login.microsoftonline.com/TENANT/v2.0 for " in text


def test_every_setting_of_an_issuer_is_documented() -> None:
    """With its default."""
    section = CONFIGURATION.partition("## Tokens of clients")[2].partition("\n## ")[0]
    for name, (_, field) in settings_of(IdentityFile).items():
        assert f"| `{name}` |" in section
        if isinstance(field.default, float):
            assert f"| `{name}` | {field.default:g} |" in section


def test_the_teams_of_the_guide_load(tmp_path: Path) -> None:
    """The two files of the guide are a valid configuration, and the team has its own limits."""
    gateway, team = blocks(TEAMS, "yaml")[:2]
    config = write_files(tmp_path, {"gateway.yaml": gateway, "teams/research.yaml": team})
    text = show(load(config, {"EAST_KEY": "key"}))
    assert "team research: 1 key" in text
    assert "tokens_per_minute: 50000" in text
    assert "requests_per_minute=300" in text


def test_every_reason_that_a_deployment_can_have_is_documented() -> None:
    """By its name in the log, the counts and the admin listener; every state, too."""
    text = (ROOT / "docs" / "resources.md").read_text()
    for name in (*get_args(Fault), "rate_limited", "abuse_penalty", "refused", "no_deployment", "status_500"):
        assert f"`{name}`" in text, name
    for name in ("available", "cooling_down", "open", "half_open"):
        assert f"`{name}`" in text, name
    shown = DeploymentHealth(Deployment(Resource("east", "https://east.invalid"), "x"), "key", Health()).report(0.0)
    for name in shown.keys() - {"resource", "region"}:
        assert f'"{name}"' in text, name
