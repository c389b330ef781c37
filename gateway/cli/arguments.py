"""Arguments that several commands take, and the path of the configuration."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, TypeAlias

from gateway.errors import StartError

__all__ = (
    "CONFIG_HELP",
    "CONFIG_OR_FOLDER_HELP",
    "DEFAULT",
    "GO_PROXY_FILE",
    "NothingConfiguredError",
    "config_path",
    "listen_address",
    "registry_of",
)


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_DEFAULT_CONFIG = "default: $GATEWAY_CONFIG, else the shipped one if $AZURE_OPENAI_ENDPOINT is set"
CONFIG_HELP = f"path of gateway.yaml; {_DEFAULT_CONFIG}"
CONFIG_OR_FOLDER_HELP = f"path of gateway.yaml, or of its folder; {_DEFAULT_CONFIG}"
# In a checkout this is a link to config/gateway.yaml.
DEFAULT = (Path(__file__).parents[1] / "gateway.yaml").resolve()
# The configuration's path in the Go proxy's image, to which its users' compose files mount theirs.
GO_PROXY_FILE = Path("/app/config.yaml")


class NothingConfiguredError(Exception):
    """No file is given and no endpoint is set."""


def config_path(given: Path | None) -> Path:
    """Return the configuration's path: the given one, $GATEWAY_CONFIG, the shipped one, or the Go proxy's."""
    if given is None and (named := os.environ.get("GATEWAY_CONFIG")):
        given = Path(named)
    if given is not None:
        return given / "gateway.yaml" if given.is_dir() else given
    if os.environ.get("AZURE_OPENAI_ENDPOINT"):
        return DEFAULT
    if GO_PROXY_FILE.is_file():
        return GO_PROXY_FILE
    raise NothingConfiguredError


def registry_of(config: Path | None) -> Any:
    """Return the registry of all stages, including those in the `plugins_path` of a configuration."""
    from gateway.config.load import plugin_folders  # noqa: PLC0415
    from gateway.registry import Registry  # noqa: PLC0415

    return Registry(plugin_folders(config_path(config)) if config is not None else ())


def listen_address(text: str) -> Any:
    """Parse an address. Raises StartError."""
    from gateway.settings import Listen  # noqa: PLC0415

    try:
        return Listen.parse(text)
    except ValueError as exc:
        raise StartError(f"--listen: {exc}") from None
