"""The configuration: YAML files in, a checked `Loaded` out, or a ConfigError with every mistake."""

from gateway.config.files import GatewayFile, TeamFile
from gateway.config.load import Loaded, load

__all__ = ("GatewayFile", "Loaded", "TeamFile", "load")
