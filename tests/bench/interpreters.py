"""The Python interpreters under which the gateway is measured."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.workplace import Workplace

ROOT = Path(__file__).parents[2]

# Debian builds an optimised target of CPython's Makefile; the configure arguments do not show it.
_PROBE = """\
import importlib.metadata, importlib.util, json, platform, sysconfig
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
arguments = sysconfig.get_config_var("CONFIG_ARGS") or ""
print(json.dumps({
    "implementation": platform.python_implementation(),
    "version": platform.python_version(),
    "optimised": "--enable-optimizations" in arguments or "/usr/share/python-wheels" in arguments,
    "ready": all(importlib.util.find_spec(name) for name in ("gateway", "aiohttp", "msgspec", "yaml", "structlog")),
    "packages": {name: version(name) for name in ("aiohttp", "uvloop", "aiofastnet")},
}))
"""


@dataclass(frozen=True)
class Interpreter:
    """An interpreter with the gateway installed."""

    python: Path
    version: str
    optimised: bool
    packages: dict[str, str | None]

    @property
    def name(self) -> str:
        """The name in tables."""
        return self.version if self.optimised else f"{self.version} (not optimised)"

    def describe(self) -> str:
        """Return a description in one line."""
        build = "optimised build" if self.optimised else "not an optimised build, which costs 10-20 %"
        packages = ", ".join(f"{name} {version or '-'}" for name, version in self.packages.items())
        return f"{self.version}, {build}; {packages}"


def prepare(workplace: Workplace, python: Path) -> Interpreter:
    """Return an interpreter with the gateway: the given one, or an environment made for it in the run's folder."""
    facts = _probe(python)
    if not facts["ready"]:
        python = _environment(workplace, python)
        facts = _probe(python)
    return Interpreter(python, f"{facts['implementation']} {facts['version']}", facts["optimised"], facts["packages"])


def _probe(python: Path) -> dict[str, Any]:
    # -P: modules of the working directory do not count as installed.
    found = subprocess.run([python, "-P", "-c", _PROBE], check=True, capture_output=True, text=True)
    facts: dict[str, Any] = json.loads(found.stdout)
    return facts


def _environment(workplace: Workplace, python: Path) -> Path:
    folder = workplace.folder / f"environment-{len(list(workplace.folder.glob('environment-*')))}"
    subprocess.run([python, "-m", "venv", folder], check=True)
    pip: list[str | Path] = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "--require-hashes", "-r", ROOT / "requirements" / "run.txt"], check=True)
    project: list[str | Path] = [
        "--no-deps",
        "--no-build-isolation",
        "--config-settings",
        "editable_mode=compat",
        "-e",
        ROOT,
    ]
    subprocess.run([*pip, *project], check=True)
    return folder / "bin" / "python"
