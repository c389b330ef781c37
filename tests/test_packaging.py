"""The package as users install it: a wheel, outside the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("gateway", "plugins", "config", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.mark.slow
def test_installed_package_has_what_it_needs(tmp_path: Path) -> None:
    """The wheel has the shipped configuration, the built-in stages and the command, and works in any directory."""
    source = tmp_path / "source"
    source.mkdir()
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, source / name)
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--disable-pip-version-check", "--target", str(site), str(source)], check=True)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import gateway, gateway.cli; "
        f"assert gateway.__file__.startswith({str(site)!r}); sys.exit(gateway.cli.main(['check']))"
    )
    env = {"AZURE_OPENAI_ENDPOINT": "https://x.openai.azure.com", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "sse_newline" in done.stdout
    assert (site / "bin" / "gateway").exists()
    assert (site / "gateway" / "py.typed").exists()
    assert (site / "gateway" / "limits" / "redis.lua").exists()


def test_the_default_install_stays_small() -> None:
    """At most six direct dependencies; faster libraries are an extra."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    needed = [line for line in config["options"]["install_requires"].splitlines() if line and line[0] != "#"]
    assert 0 < len(needed) <= 6
    speed = config["options.extras_require"]["speed"]
    for name in ("uvloop", "aiofastnet"):
        assert name in speed
        assert not any(line.startswith(name) for line in needed)
        assert f"\n{name}==" in (ROOT / "requirements" / "run.txt").read_text(), "the image and `make run` have it"


@pytest.mark.parametrize(("extra", "library"), [("socks", "python-socks"), ("redis", "redis")])
def test_the_image_has_what_an_extra_needs(extra: str, library: str) -> None:
    """SOCKS proxies, which the Go proxy has, and Redis are extras of the package; the image includes them."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert library in config["options.extras_require"][extra]
    assert library not in config["options"]["install_requires"]
    assert f"\n{library}==" in (ROOT / "requirements" / "run.txt").read_text()


def test_the_image_can_judge_tokens() -> None:
    """The libraries of `identity:` for signatures are an extra of the package, and in the image's lock file."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    for name in ("pyjwt", "cryptography"):
        assert name in config["options.extras_require"]["identity"]
        assert name not in config["options"]["install_requires"]
        assert f"\n{name}==" in (ROOT / "requirements" / "run.txt").read_text()
