"""The registry finds a stage's class: built-in, by path, by entry point, or literal; nothing shadows anything."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.config import load
from gateway.config.show import show
from gateway.registry import Registry, UnknownStage
from gateway.testing import FakeAzure
from tests.conftest import KEY, StartGateway, write_files

STAGE = '''"""{doc}"""
from dataclasses import dataclass
from typing import Annotated

from gateway import Meta, Next, Request, Response, Stage


@dataclass
class {name}(Stage):
    """{doc}"""

    text: Annotated[str, Meta(description="what to say")] = "hello"

    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = await call_next(request)
        response.headers.set("x-{header}", self.text)
        return response
'''


def install(folder: Path, name: str, stage: str, class_name: str) -> Path:
    """Install a tiny distribution with an entry point into a folder, as pip would."""
    source = folder / "source"
    source.mkdir()
    (source / f"{name}.py").write_text(STAGE.format(doc="Say something.", name=class_name, header=stage))
    (source / "setup.cfg").write_text(
        f"[metadata]\nname = {name.replace('_', '-')}\nversion = 1\n[options]\npy_modules = {name}\n"
        f"[options.entry_points]\ngateway.stages =\n    {stage} = {name}:{class_name}\n"
    )
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
    )
    site = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--disable-pip-version-check", "--target", str(site), str(source)], check=True)
    return site


@pytest.mark.slow
async def test_stages_of_a_package_and_of_a_folder(
    tmp_path: Path, start_gateway: StartGateway, azure: FakeAzure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed package with an entry point, and a file in a folder of `plugins_path`, are listed by name."""
    monkeypatch.syspath_prepend(install(tmp_path, "stranger_package", "greeting", "Greeting"))
    yaml = """
plugins_path: mine
resources: {azure: {endpoint: "${ENDPOINT}"}}
pipeline: [greeting, one_file: bye, stranger_package:Greeting as again, auth_passthrough, model_map, api_version]
"""
    one_file = STAGE.format(doc="Say more.", name="OneFile", header="one-file")
    gateway = await start_gateway(azure.endpoint, yaml, {"mine/one_file.py": one_file})
    async with gateway.post(key=KEY) as answer:
        assert answer.status == 200
        assert answer.headers["x-greeting"] == "hello"
        assert answer.headers["x-one-file"] == "bye"
    assert {"greeting", "rate_limit"} <= set(Registry().names())
    # Two stages with one name are an error that names both.
    (tmp_path / "mine" / "greeting.py").write_text(one_file)
    with pytest.raises(UnknownStage, match=r"greeting\.py and the entry point stranger_package:Greeting"):
        Registry([tmp_path / "mine"]).find("greeting")


def test_a_package_that_is_installed_later_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points are read again after a change in a folder of `sys.path`, and removed names disappear."""
    monkeypatch.syspath_prepend(tmp_path)
    assert "late" not in Registry().names()
    metadata = tmp_path / "late_package-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: late-package\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[gateway.stages]\nlate = late_package:Late\n")
    assert "late" in Registry().names()
    shutil.rmtree(metadata)
    assert "late" not in Registry().names()


def test_built_in_stages_load_despite_another_plugins_folder(tmp_path: Path) -> None:
    """A `plugins/` in the working directory, even one that is imported first, does not replace the built-in one."""
    files = {
        "plugins/__init__.py": "",
        "plugins/rate_limit.py": "raise RuntimeError('the wrong one')",
        "gateway.yaml": "resources: {a: https://x.openai.azure.com}\n"
        "pipeline: [auth_passthrough, rate_limit: {in_flight: 1}, model_map, api_version]\n",
    }
    write_files(tmp_path, files)
    code = "import plugins, gateway.cli, sys; sys.exit(gateway.cli.main(['check', '.']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "rate_limit: in_flight=1" in done.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rate_limits", "did you mean 'rate_limit'"),
        ("Rate-Limit", "is not a valid name of a stage"),
        ("nothing", "there is no stage 'nothing'"),
        ("gateway.stage:compile_pipeline", "not a subclass"),
        ("gateway.stage:Nothing", "has no 'Nothing'"),
        ("no.such:Thing", "No module named"),
    ],
)
def test_an_unknown_name_is_an_error(name: str, words: str) -> None:
    """With the most similar name."""
    with pytest.raises(UnknownStage, match=words):
        Registry().find(name)


def test_a_stage_with_settings_must_be_a_dataclass(tmp_path: Path) -> None:
    """The usual mistake in a first plugin gets a message with the fix."""
    (tmp_path / "slip.py").write_text("from gateway import Stage\nclass Slip(Stage):\n    limit: int = 3\n")
    with pytest.raises(UnknownStage, match="put @dataclass above"):
        Registry([tmp_path]).find("slip")


def test_literal_names_find_modules_below_plugins_path(tmp_path: Path) -> None:
    """`house.stages:Watermark` is a module in a folder of `plugins_path`."""
    files = {
        "lib/house/__init__.py": "",
        "lib/house/stages.py": STAGE.format(doc="Mark.", name="Watermark", header="mark"),
        "gateway.yaml": "plugins_path: lib\nresources: {a: https://x.openai.azure.com}\n"
        "pipeline: [auth_passthrough, house.stages:Watermark: {text: hi}, model_map, api_version]\n",
    }
    assert "  Watermark: text=hi\n" in show(load(write_files(tmp_path, files), {}))
